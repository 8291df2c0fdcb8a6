"""Pushing to the hub, against a hub that is not there and one that is made up."""

from __future__ import annotations

import pytest

from pgprune_cli.errors import RunError, UserError
from pgprune_cli.export import hub


class FakeApi:
    """Remembers what was asked of it."""

    calls: list = []  # noqa: RUF012

    def create_repo(self, name, exist_ok):
        from huggingface_hub import RepoUrl

        self.calls.append(("create", name, exist_ok))
        return RepoUrl(f"https://huggingface.co/someone/{name}")

    def upload_folder(self, repo_id, folder_path, commit_message):
        assert commit_message
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    def upload_file(self, repo_id, path_or_fileobj, path_in_repo, commit_message):
        assert commit_message
        self.calls.append(("upload", repo_id, [path_or_fileobj, path_in_repo]))


def test_a_file_goes_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    file = tmp_path / "small.gguf"
    file.touch()
    hub.push(file, "small")
    assert FakeApi.calls == [("create", "small", True), ("upload", "someone/small", [file, "small.gguf"])]


def test_the_directory_goes_to_the_repository_that_the_hub_made(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert hub.push(tmp_path, "small") == "https://huggingface.co/someone/small"
    assert FakeApi.calls == [
        ("create", "small", True),
        ("upload", "someone/small", ["config.json", "model.safetensors"]),
    ]


def test_without_a_network_the_directory_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").touch()
    with pytest.raises(
        RunError, match=r"^--push me/small: did not arrive on the hub \(.+\); the model is in"
    ) as failed:
        hub.push(tmp_path, "me/small")
    assert "\n" not in str(failed.value)
    assert f"`hf upload me/small {tmp_path}`" in str(failed.value)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["a/b/c", "-x/y", "me/a name", "me/"])
def test_what_is_no_name_on_the_hub_is_refused(name):
    with pytest.raises(UserError, match="not a name on the hub"):
        hub.check_name(name)
    hub.check_name("me/small-7b")


@pytest.mark.parametrize("name", ["small", ""])
def test_a_name_without_its_owner_is_told_what_is_expected(name):
    with pytest.raises(UserError, match=f"^--push {name}: expected OWNER/NAME, such as my-name/{name}"):
        hub.check_name(name)
