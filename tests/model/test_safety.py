"""Models, recipes and indexes made by someone hostile: nothing of them runs, and nothing outside of them is read."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
from helpers.models import save_tokenizer, tiny_model
from safetensors.torch import load_file, save_file

from pgprune_cli.errors import UserError
from pgprune_cli.jobs.export import export
from pgprune_cli.model.loading import check_prunable, load_model, load_tokenizer, read_config
from pgprune_cli.model.masks import LayerMask
from pgprune_cli.model.source import INDEX, resolve
from pgprune_cli.recipe.reader import find, load, name_of
from pgprune_cli.run.decision import Decision

CODE = "from pathlib import Path\nPath({!r}).touch()\nclass C: pass\n"


class Bomb:
    """Unpickling it makes a file."""

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
    """A file that hostile code would make; fails where it did."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "code of the model ran"


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(model: Path) -> str:
    """What any of the readers says first."""
    with pytest.raises(UserError) as caught:
        source = resolve(str(model))
        source.fingerprint()
        load_tokenizer(source)
        load_model(source, "auto", "cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- pickles


def test_an_untouched_model_is_read(model: Path) -> None:
    source = resolve(str(model))
    check_prunable(source)
    assert load_model(source, "auto", "cpu") and load_tokenizer(source)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_is_no_model(suffix: str, mark: Path, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(Bomb(mark)))
    assert "pickled weights (*.bin), which can run code, are not read" in refused(file)


def test_a_pickle_that_an_index_names(model: Path, mark: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    (model / "weights.bin").write_bytes(pickle.dumps(Bomb(mark)))
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "weights.bin")}))
    assert refused(model).startswith(f"{model / INDEX}: 'weights.bin' is not a safetensors file; pickled weights")


def test_a_pickle_called_safetensors(model: Path, mark: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    refused(model)


# --- files outside of the directory


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "..\\outside.safetensors", "..", "a/b"]
)
def test_names_in_an_index_stay_in_the_directory(name: str, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    assert refused(model) == f"{model / INDEX}: {name!r} is not a plain file name"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE", "additional_chat_templates"]
)
def test_links_out_of_the_directory_are_not_followed(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").touch()
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../secret")
    assert refused(model) == (
        f"{model}: {model / name} is a symbolic link out of the model's directory, to {tmp_path / 'secret'}; "
        "put a copy in its place"
    )


def test_a_link_in_a_folder_that_is_copied(model: Path, tmp_path: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "x.jinja").symlink_to("/etc/hostname")
    assert "x.jinja is a symbolic link out of" in refused(model)


def test_links_in_a_circle(model: Path) -> None:
    (model / "LICENSE").symlink_to("NOTICE")
    (model / "NOTICE").symlink_to("LICENSE")
    resolve(str(model))


def test_links_inside_and_to_the_whole_directory_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(model)
    load_model(resolve(str(tmp_path / "link")), "auto", "cpu")


def test_the_cache_of_the_hub_is_made_of_links(model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    load_model(resolve(str(snapshot)), "auto", "cpu")
    (tmp_path / "secret").touch()
    (snapshot / "LICENSE").symlink_to("../../../secret")
    assert "LICENSE is a symbolic link out of" in refused(snapshot)


def test_two_sets_of_weights(model: Path) -> None:
    """transformers reads the one, and the index says the other."""
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "other.safetensors", metadata={"format": "pt"})
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "other.safetensors")}))
    assert "holds both model.safetensors and other weights" in refused(model)


def test_weights_that_a_config_names(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "x.safetensors")
    (model / "model.safetensors").touch()
    change(model / "config.json", transformers_weights="x.safetensors")
    assert refused(model) == f"{model / 'config.json'}: names its weights (transformers_weights); remove that key"


def test_a_model_that_an_adapter_names(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "../other", "peft_type": "LORA"}')
    assert "holds an adapter (adapter_config.json)" in refused(model)


# --- code


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    """transformers would ask at a terminal whether to run code, and wait."""

    def asked(*_):
        raise AssertionError("asked whether to run code")

    monkeypatch.setattr("builtins.input", asked)


def test_code_of_an_unknown_model_does_not_run(model: Path, mark: Path, asked) -> None:
    (model / "evil.py").write_text(CODE.format(str(mark)))
    names = {name: "evil.C" for name in ("AutoConfig", "AutoModelForCausalLM")}
    change(model / "config.json", model_type="evil", auto_map=names)
    with pytest.raises(
        UserError, match=r"its config cannot be used: it needs code of its own \(auto_map\), and none is run"
    ):
        read_config(resolve(str(model)))
    with pytest.raises(UserError, match="code of its own"):
        load_model(resolve(str(model)), "auto", "cpu")


def test_code_of_a_known_model_does_not_run(model: Path, mark: Path, asked) -> None:
    (model / "evil.py").write_text(CODE.format(str(mark)))
    names = {name: "evil.C" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    change(model / "config.json", auto_map=names)
    assert type(load_model(resolve(str(model)), "auto", "cpu")).__name__ == "LlamaForCausalLM"


def test_code_of_a_tokenizer_does_not_run(model: Path, mark: Path, asked) -> None:
    (model / "evil.py").write_text(CODE.format(str(mark)))
    change(model / "tokenizer_config.json", tokenizer_class="C", auto_map={"AutoTokenizer": ["evil.C", "evil.C"]})
    try:
        load_tokenizer(resolve(str(model)))
    except UserError as error:
        assert "code of its own" in str(error)


def test_code_beside_our_own_models_does_not_run(model: Path, mark: Path, asked, tmp_path: Path, monkeypatch) -> None:
    """An exported model is loaded by the installed classes, whatever file lies beside it."""
    monkeypatch.chdir(tmp_path)
    out = exported(model)
    (out / "modeling_pruned.py").write_text(CODE.format(str(mark)))
    assert type(load_model(resolve(str(out)), "auto", "cpu")).__name__ == "PrunedLlamaForCausalLM"


def test_code_does_not_travel_into_an_export(model: Path, tmp_path: Path, monkeypatch) -> None:
    """There it would run where the export is trusted, as its card says."""
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
    keep = tuple(LayerMask(torch.arange(4) < 4 - layer, torch.arange(24) < 9 + layer) for layer in range(4))
    fingerprint = resolve(str(model)).fingerprint()
    Decision(keep, str(model), fingerprint, 0.5, "dtype: float32\n", 1, 2, 3, 2.5).save(Path("run"))
    export(Path("run"), Path("out"))
    return Path("out")


# --- configs that would never end


@pytest.mark.parametrize("layers", [10**9, "many", None, [1]])
def test_a_model_of_a_billion_layers(layers, model: Path) -> None:
    change(model / "config.json", num_hidden_layers=layers)
    assert f"num_hidden_layers {layers!r}: at most 1000 are read" in refused(model)


@pytest.mark.parametrize(
    "sizes",
    [{"intermediate_size": 10**7}, {"vocab_size": 10**8}, {"hidden_size": 10**6}, {"head_dim": 2**24}],
    ids=lambda sizes: next(iter(sizes)),
)
def test_a_config_of_a_far_larger_model_than_there_are_weights_of(sizes, model: Path) -> None:
    """transformers would make up what is missing: of the first one, 15 GB in two minutes."""
    change(model / "config.json", **sizes)
    assert " weights, and its files hold 37,152" in refused(model)


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
    with pytest.raises(UserError, match="anchors, aliases and tags are not allowed"):
        load(tmp_path / "x.yaml")


@pytest.mark.parametrize("name", ["...yaml", "..yaml"])
def test_no_recipe_is_called_like_the_folder_above(name: str, tmp_path: Path) -> None:
    """Its run directory would be `runs/..`."""
    shutil.copy(find("demo"), tmp_path / name)
    with pytest.raises(UserError, match="a recipe's file needs a name"):
        name_of(tmp_path / name)


def test_a_recipe_names_nothing_that_is_written() -> None:
    """The only keys that hold free text are a model, corpora and a device; all of them are read."""
    from pgprune_cli.recipe.reader import _KINDS

    kinds = {key: str(kind) for key, kind in _KINDS.items() if not is_dataclass(kind)}
    free = {key for key, kind in kinds.items() if "str" in kind and "Literal" not in kind}
    assert free == {"model", "device", "calibration.corpus", "evaluation.corpora"}


def test_nothing_of_transformers_is_trusted() -> None:
    """No reader of the package leaves `trust_remote_code` to be asked for at a terminal."""
    import ast

    import pgprune_cli

    package = Path(pgprune_cli.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                # load_model's comes with the rest of its arguments, and is tested above
                assert "trust_remote_code" in given or None in given, f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "pickle.load", "pickle.loads"):
                raise AssertionError(f"{path}:{node.lineno} unpickles")
