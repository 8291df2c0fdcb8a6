"""Hostile models, recipes and indexes: none of their code runs, and no file outside the model is read."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from helpers.masks import keep_first
from helpers.messages import refused
from helpers.models import save_tokenizer, tiny_model
from safetensors.torch import load_file, save_file

from pgprune_cli.errors import UserError
from pgprune_cli.jobs.export import export
from pgprune_cli.model.loading import check_prunable, load_model, load_tokenizer, read_config
from pgprune_cli.model.source import INDEX, resolve
from pgprune_cli.recipe.reader import find, load, name_of
from pgprune_cli.run.decision import Decision

CODE = "from pathlib import Path\nPath({!r}).touch()\nclass C: pass\n"


class CreatesFile:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model("llama-gqa").save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def mark(tmp_path: Path):
    """A file that hostile code would create. The test fails if it exists at the end."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "code of the model ran"


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def read(model: Path) -> None:
    """Run every reader of a model."""
    source = resolve(str(model))
    load_tokenizer(source)
    load_model(source, "auto", "cpu")
    source.fingerprint()


# --- pickles


def test_an_unchanged_model_is_read(model: Path) -> None:
    source = resolve(str(model))
    check_prunable(source)
    assert load_model(source, "auto", "cpu") and load_tokenizer(source)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_is_refused_as_a_model(suffix: str, mark: Path, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(CreatesFile(mark)))
    with refused(str(file), "pickled weights", "pgprune convert"):
        read(file)


def test_a_pickle_in_an_index_is_refused(model: Path, mark: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    (model / "weights.bin").write_bytes(pickle.dumps(CreatesFile(mark)))
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "weights.bin")}))
    with refused(f"{model / INDEX}: 'weights.bin'", "pgprune convert"):
        read(model)


def test_a_pickle_named_safetensors_is_refused(model: Path, mark: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(CreatesFile(mark)))
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or not safetensors"):  # quotes the library
        read(model)


# --- files outside of the directory


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "..\\outside.safetensors", "..", "a/b"]
)
def test_a_weight_file_outside_the_directory_is_refused(name: str, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    with refused(f"{model / INDEX}: {name!r}", "plain file name"):
        read(model)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE", "additional_chat_templates"]
)
def test_a_link_out_of_the_directory_is_refused(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").touch()
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../secret")
    with refused(f"{model}: {model / name} is a symbolic link", str(tmp_path / "secret")):
        read(model)


def test_a_link_out_of_the_directory_from_a_subfolder_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "x.jinja").symlink_to("/etc/hostname")
    with refused("x.jinja is a symbolic link", "/etc/hostname"):
        read(model)


def test_circular_links_are_accepted(model: Path) -> None:
    (model / "LICENSE").symlink_to("NOTICE")
    (model / "NOTICE").symlink_to("LICENSE")
    resolve(str(model))


def test_links_within_and_to_the_directory_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(model)
    load_model(resolve(str(tmp_path / "link")), "auto", "cpu")


def test_links_of_the_hub_cache_are_followed(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    load_model(resolve(str(snapshot)), "auto", "cpu")
    (tmp_path / "secret").touch()
    (snapshot / "LICENSE").symlink_to("../../../secret")
    with refused("LICENSE is a symbolic link", str(tmp_path / "secret")):
        read(snapshot)


def test_two_sets_of_weights_are_refused(model: Path) -> None:
    """transformers would read model.safetensors, while the index lists the other file."""
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "other.safetensors", metadata={"format": "pt"})
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "other.safetensors")}))
    with refused(f"{model}: holds both model.safetensors and", INDEX):
        read(model)


def test_weights_named_in_a_config_are_refused(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "x.safetensors")
    (model / "model.safetensors").touch()
    change(model / "config.json", transformers_weights="x.safetensors")
    with refused(f"{model / 'config.json'}: transformers_weights", "Remove"):
        read(model)


# --- code


@pytest.fixture
def no_question(monkeypatch: pytest.MonkeyPatch):
    """Fails if transformers asks at the terminal whether to run code."""

    def ask(*_):
        raise AssertionError("asked whether to run code")

    monkeypatch.setattr("builtins.input", ask)


def test_code_of_an_unknown_model_type_does_not_run(model: Path, mark: Path, no_question) -> None:
    (model / "evil.py").write_text(CODE.format(str(mark)))
    names = {name: "evil.C" for name in ("AutoConfig", "AutoModelForCausalLM")}
    change(model / "config.json", model_type="evil", auto_map=names)
    with refused(str(model), "config", "auto_map"):
        read_config(resolve(str(model)))
    with refused(str(model), "auto_map"):
        load_model(resolve(str(model)), "auto", "cpu")


def test_code_of_a_known_model_type_does_not_run(model: Path, mark: Path, no_question) -> None:
    (model / "evil.py").write_text(CODE.format(str(mark)))
    names = {name: "evil.C" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    change(model / "config.json", auto_map=names)
    assert type(load_model(resolve(str(model)), "auto", "cpu")).__name__ == "LlamaForCausalLM"


def test_code_of_a_tokenizer_does_not_run(model: Path, mark: Path, no_question) -> None:
    (model / "evil.py").write_text(CODE.format(str(mark)))
    change(model / "tokenizer_config.json", tokenizer_class="C", auto_map={"AutoTokenizer": ["evil.C", "evil.C"]})
    try:
        load_tokenizer(resolve(str(model)))
    except UserError as error:
        assert "auto_map" in str(error)


def test_code_in_an_exported_directory_does_not_run(
    model: Path, mark: Path, no_question, tmp_path: Path, monkeypatch
) -> None:
    """An exported model is loaded with the installed classes, whatever modeling_pruned.py its directory holds."""
    monkeypatch.chdir(tmp_path)
    out = exported(model)
    (out / "modeling_pruned.py").write_text(CODE.format(str(mark)))
    assert type(load_model(resolve(str(out)), "auto", "cpu")).__name__ == "PrunedLlamaForCausalLM"


def test_code_is_not_copied_into_an_export(model: Path, tmp_path: Path, monkeypatch) -> None:
    """It would run on the machine of anyone who loads the export with `trust_remote_code`."""
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer_evil.py", "vocab.py", "evil.py"):
        (model / name).touch()
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenizer_evil.C", None]})
    change(model / "config.json", auto_map={"AutoConfig": "evil.C"})
    out = exported(model)
    assert [path.name for path in out.glob("*.py")] == ["modeling_pruned.py"]
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    assert "evil" not in (out / "config.json").read_text()


def exported(model: Path) -> Path:
    model_mask = keep_first(tiny_model("llama-gqa"), [(4 - layer, 9 + layer) for layer in range(4)])
    fingerprint = resolve(str(model)).fingerprint()
    Decision(model_mask, str(model), fingerprint, 0.5, "dtype: float32\n", 1, 2, 3, 2.5).save(Path("run"))
    export(Path("run"), Path("out"))
    return Path("out")


# --- configs of absurd sizes


@pytest.mark.parametrize("layers", [10**9, "many", None, [1]])
def test_an_absurd_number_of_layers_is_refused(layers, model: Path) -> None:
    change(model / "config.json", num_hidden_layers=layers)
    with refused(f"{model / 'config.json'}: num_hidden_layers is {layers!r}", "1000"):
        read(model)


@pytest.mark.parametrize(
    "sizes",
    [{"intermediate_size": 10**7}, {"vocab_size": 10**8}, {"hidden_size": 10**6}, {"head_dim": 2**24}],
    ids=lambda sizes: next(iter(sizes)),
)
def test_a_config_far_larger_than_the_stored_weights_is_refused(sizes, model: Path) -> None:
    """transformers would make up the missing weights: 15 GB in two minutes for the first of these."""
    change(model / "config.json", **sizes)
    with refused(str(model), "37,152"):
        read(model)


# --- recipes


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.system ['touch ran']",
        "model: !!python/name:os.system",
        "!!python/object/new:os.system ['touch ran']",
        "model: &a demo\ndtype: *a",
    ],
)
def test_a_recipe_runs_no_code(text: str, mark: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml:.*anchors, aliases and tags"):
        load(tmp_path / "x.yaml")


@pytest.mark.parametrize("name", ["...yaml", "..yaml"])
def test_a_recipe_whose_name_is_the_parent_folder_is_refused(name: str, tmp_path: Path) -> None:
    """Its run directory would be `runs/..`."""
    shutil.copy(find("demo"), tmp_path / name)
    with pytest.raises(UserError, match=re.escape(name)):
        name_of(tmp_path / name)


def test_no_recipe_key_names_a_file_to_write() -> None:
    """Only model, corpora and device hold free text, and all of them are only read."""
    from pgprune_cli.recipe.reader import _KINDS

    kinds = {key: str(kind) for key, kind in _KINDS.items() if not is_dataclass(kind)}
    free = {key for key, kind in kinds.items() if "str" in kind and "Literal" not in kind}
    assert free == {"model", "device", "calibration.corpus", "recover.corpus", "evaluation.corpora"}


def test_every_loader_of_transformers_is_told_not_to_trust_code() -> None:
    """No call leaves `trust_remote_code` open, so transformers never asks. Only `convert` unpickles, without code."""
    import ast

    import pgprune_cli

    package = Path(pgprune_cli.__file__).parent
    loaders = 0
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                loaders += 1
                keywords = {keyword.arg for keyword in node.keywords}
                # None: load_model passes it with the rest of its arguments, and is tested above
                assert "trust_remote_code" in keywords or None in keywords, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                restricted = path.name == "convert.py" and "weights_only=True" in map(ast.unparse, node.keywords)
                assert restricted, f"{path}:{node.lineno} unpickles"
    assert loaders
