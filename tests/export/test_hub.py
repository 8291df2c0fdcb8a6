"""Uploads to the hub: to one that cannot be reached, and to a fake one."""

from __future__ import annotations

import pytest
from helpers.messages import refused

from pgprune_cli.errors import RunError, UserError
from pgprune_cli.export import hub


class FakeApi:
    """Records the calls."""

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


def test_push_uploads_a_file_under_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    file = tmp_path / "small.gguf"
    file.touch()
    hub.push(file, "small")
    assert FakeApi.calls == [("create", "small", True), ("upload", "someone/small", [file, "small.gguf"])]


def test_push_uploads_a_directory_to_the_created_repository(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert hub.push(tmp_path, "small") == "https://huggingface.co/someone/small"
    assert FakeApi.calls == [
        ("create", "small", True),
        ("upload", "someone/small", ["config.json", "model.safetensors"]),
    ]


def test_push_without_a_network_leaves_the_directory_and_says_how_to_retry(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").touch()
    with pytest.raises(RunError, match=r"^--push me/small: upload failed \(.+\)") as failed:  # quotes the library
        hub.push(tmp_path, "me/small")
    assert "\n" not in str(failed.value)
    assert f"hf upload me/small {tmp_path}" in str(failed.value)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["a/b/c", "-x/y", "me/a name", "me/"])
def test_an_invalid_hub_name_is_refused(name):
    with pytest.raises(UserError, match=f"^--push {name}: not a valid name on the hub"):  # quotes the library
        hub.check_name(name)
    hub.check_name("me/small-7b")


@pytest.mark.parametrize("name", ["small", ""])
def test_a_hub_name_without_owner_is_refused(name):
    with refused(f"--push {name}", "OWNER/NAME", f"my-name/{name}"):
        hub.check_name(name)
