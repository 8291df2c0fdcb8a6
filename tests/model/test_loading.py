"""From a name to a model's files: every kind of name, and every refusal."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from helpers.models import tiny_model
from safetensors.torch import load_file, save_file

from pgprune_cli.errors import UserError
from pgprune_cli.forward.layerwise import start_layerwise
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model import loading
from pgprune_cli.model.devices import device_map
from pgprune_cli.model.loading import check_prunable, empty_model, load_model, load_tokenizer
from pgprune_cli.model.source import DEMO_MODEL, INDEX, Source, resolve


def refused(name: object) -> str:
    with pytest.raises(UserError) as caught:
        resolve(str(name))
    return str(caught.value)


def make(folder: Path, *names: str) -> Path:
    """Empty files: `resolve` only looks at names."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def sharded(folder: Path) -> Path:
    """The model cut into two files with an index, the second file first in it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"two.safetensors": names[: len(names) // 2], "one.safetensors": names[len(names) // 2 :]}
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, inside in shards.items() for name in inside}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# --- names


def test_demo_comes_with_the_package():
    source = resolve("demo")
    assert source == Source("demo", DEMO_MODEL, None)
    assert source.weight_files() == [DEMO_MODEL / "model.safetensors"]


def test_a_directory(saved):
    assert resolve(str(saved)) == Source(str(saved), saved, None)


def test_a_directory_of_shards_in_the_order_of_the_index(damaged):
    source = resolve(str(sharded(damaged)))
    assert source.weight_files() == [damaged / "two.safetensors", damaged / "one.safetensors"]


def test_a_path_may_be_relative_or_start_at_home(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert resolve("model") == Source("model", Path("model"), None)
    monkeypatch.setenv("HOME", str(saved.parent))
    assert resolve("~/model") == Source("~/model", saved, None)


def test_a_gguf_file(tmp_path):
    file = make(tmp_path / "quantised", "x-Q8_0.gguf", "x-Q4_K.gguf") / "x-Q8_0.gguf"
    source = resolve(str(file))
    assert source == Source(str(file), file.parent, "x-Q8_0.gguf")
    assert source.weight_files() == [file]


def test_a_directory_with_one_gguf_file(tmp_path):
    folder = make(tmp_path / "quantised", "x.gguf", "README.md")
    assert resolve(str(folder)) == Source(str(folder), folder, "x.gguf")


def test_of_several_gguf_files_one_must_be_named(tmp_path):
    folder = make(tmp_path / "quantised", "b.gguf", "a.gguf")
    assert refused(folder) == f"{folder}: holds 2 GGUF files; name the one you mean: a.gguf, b.gguf"


def without_safetensors(folder):
    return (
        f"{folder}: has a config.json but neither model.safetensors nor {INDEX}; pickled weights (*.bin), which can "
        "run code, are not read: scripts/convert_to_safetensors.py converts them"
    )


def test_pickles_are_refused(tmp_path):
    folder = make(tmp_path / "old", "config.json", "pytorch_model.bin")
    assert refused(folder) == without_safetensors(folder)


def test_safetensors_beside_pickles_are_taken(damaged):
    (damaged / "pytorch_model.bin").touch()
    assert resolve(str(damaged)).weight_files() == [damaged / "model.safetensors"]


def test_other_directories_and_files_are_refused(tmp_path):
    folder = make(tmp_path / "empty")
    assert refused(folder) == f"{folder}: holds neither config.json with safetensors nor a .gguf file"
    folder = make(tmp_path / "half", "config.json")
    assert refused(folder) == without_safetensors(folder)
    file = make(tmp_path / "half", "model.safetensors") / "model.safetensors"
    assert refused(file) == f"{file}: a model is a directory, a .gguf file or a hub name, and this is another file"


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./owner/name", "models/x", "owner/na me", "demo2", "../x", ""])
def test_what_is_no_name_is_never_asked_for(name, tmp_path, monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError(f"the hub was asked for {name!r}")

    monkeypatch.chdir(make(tmp_path / "here"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", forbidden)
    if name:
        assert refused(name) == f"{name}: no such directory or .gguf file, and not a hub name (owner/name) either"
    else:  # the current directory
        assert refused(name) == ": holds neither config.json with safetensors nor a .gguf file"


# --- the hub


def test_a_hub_name_is_downloaded_without_pickles_and_code(saved, monkeypatch):
    asked = []

    def download(name: str, **options: list[str]) -> str:
        asked.append((name, options["allow_patterns"]))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("owner/some.model-1") == Source("owner/some.model-1", saved, None)
    [(name, patterns)] = asked
    assert name == "owner/some.model-1"
    from fnmatch import fnmatch

    for file in ("model.safetensors", INDEX, "config.json", "tokenizer.json", "chat_template.jinja", "tokenizer.model"):
        assert any(fnmatch(file, pattern) for pattern in patterns), file
    for file in ("pytorch_model.bin", "modeling_x.py", "model.gguf", "consolidated.00.pth"):
        assert not any(fnmatch(file, pattern) for pattern in patterns), file


def test_only_the_config_of_a_hub_model_is_downloaded_for_one_without_weights(saved, tmp_path, monkeypatch):
    shutil.copy(saved / "config.json", tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _, **given: asked.append(given) or str(tmp_path))
    model = empty_model("owner/name", "auto")
    assert asked == [{"allow_patterns": ["config.json"]}]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    whole = load_model(resolve(str(saved)), "auto", "cpu")
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in whole.named_parameters()
    ]
    assert empty_model(str(tmp_path), "bfloat16").dtype == torch.bfloat16


def test_without_the_hub_the_message_says_what_to_give_instead(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("Cannot find\nan appropriate   cached snapshot folder")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert refused("owner/name") == (
        "owner/name: cannot be had from the hub (Cannot find an appropriate cached snapshot folder); where the hub "
        "cannot be reached, give a local directory or a .gguf file as `model:`"
    )


# --- weights


def test_a_missing_shard_is_refused(damaged):
    source = resolve(str(sharded(damaged)))
    (damaged / "one.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        source.weight_files()
    assert str(caught.value) == f"{damaged}: {damaged / 'one.safetensors'} is missing; fetch the model's files again"
    with pytest.raises(UserError, match=r"one\.safetensors is missing"):
        load_model(source, "auto", "cpu")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_may_not_lead_elsewhere(damaged, name):
    (damaged / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError) as caught:
        resolve(str(damaged)).weight_files()
    assert str(caught.value) == f"{damaged / INDEX}: {name!r} is not a plain file name"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\xff"])
def test_a_damaged_index_is_refused(damaged, content):
    (damaged / INDEX).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        resolve(str(damaged)).weight_files()
    assert str(caught.value).startswith(f"{damaged / INDEX}: ")


def test_damaged_weights_are_refused(damaged):
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as caught:
        load_model(resolve(str(damaged)), "auto", "cpu")
    assert str(caught.value).startswith(f"{damaged / 'model.safetensors'}: damaged or not safetensors ")


def test_weights_that_are_missing_are_not_made_up(damaged):
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_model(resolve(str(damaged)), "auto", "cpu")
    assert str(caught.value) == (f"{damaged}: its files lack 2 weights, the first is model.layers.1.mlp.up_proj.weight")


def test_weights_of_another_shape_are_refused(damaged):
    tensors = load_file(damaged / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name][:5].clone()}, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_model(resolve(str(damaged)), "auto", "cpu")
    assert "1 weights do not fit its config: model.layers.1.mlp.up_proj.weight has the shape (5, 32)" in str(
        caught.value
    )


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "llama", "num_attention_heads": "x"}'])
def test_a_damaged_config_is_refused(damaged, config):
    (damaged / "config.json").write_text(config)
    with pytest.raises(UserError) as caught:
        load_model(resolve(str(damaged)), "auto", "cpu")
    assert str(caught.value).startswith(str(damaged))


def test_a_model_arrives_ready_for_forward_passes(damaged):
    model = load_model(resolve(str(sharded(damaged))), "auto", "cpu")
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    expected = dict(tiny_model("llama-gqa").named_parameters())
    loaded = dict(model.named_parameters())
    assert loaded.keys() == expected.keys()
    assert all(loaded[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize(("installed", "given"), [(True, {"": torch.device("cuda")}), (False, None)])
def test_weights_go_straight_to_a_gpu(installed: bool, given: object, saved, monkeypatch):
    """As far as that can be seen without one: what transformers is asked for."""
    from transformers import AutoModelForCausalLM

    asked = []

    def loads(*_: object, **arguments: object) -> tuple[object, dict[str, object]]:
        asked.append(arguments.get("device_map"))
        return MagicMock(), {"missing_keys": set(), "mismatched_keys": set()}

    monkeypatch.setattr("pgprune_cli.model.loading.devices_of", lambda device: [torch.device(device)])
    monkeypatch.setattr("pgprune_cli.model.loading.find_spec", lambda name: installed)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
    load_model(resolve(str(saved)), "float32", "cuda")
    load_model(resolve(str(saved)), "float32", "cpu")
    assert asked == [given, None]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_model_arrives_in_the_dtype_asked_for(saved, dtype):
    model = load_model(resolve(str(saved)), dtype, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_no_code_of_a_model_is_run(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "evil.py").write_text("raise SystemExit('the code of a model was run')\n")
    with pytest.raises(UserError, match="it needs code of its own"):
        load_model(resolve(str(damaged)), "auto", "cpu")


def test_the_tokenizer_of_the_demo(damaged):
    text = "Anna owned two red kites."
    tokenizer = load_tokenizer(resolve("demo"))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(UserError) as caught:  # a model without one
        load_tokenizer(resolve(str(damaged)))
    assert str(caught.value).startswith(f"{damaged}: its tokenizer cannot be loaded: ")
    assert "\n" not in str(caught.value)


# --- fingerprints


def test_a_fingerprint_stays_wherever_the_model_lies(saved, damaged):
    assert resolve(str(damaged)).fingerprint() == resolve(str(saved)).fingerprint()


def test_a_fingerprint_changes_with_any_weight_byte_of_a_small_model(damaged):
    source = resolve(str(damaged))
    seen = {source.fingerprint()}
    whole = (damaged / "model.safetensors").read_bytes()
    places = range(0, len(whole), len(whole) // 20)
    for place in (*places, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        (damaged / "model.safetensors").write_bytes(changed)
        seen.add(source.fingerprint())
    assert len(seen) == len(places) + 2


def test_a_fingerprint_changes_with_the_config_and_with_the_size(damaged):
    source = resolve(str(damaged))
    before = source.fingerprint()
    config = (damaged / "config.json").read_text()
    (damaged / "config.json").write_text(config.replace("10000.0", "20000.0"))
    changed = source.fingerprint()
    assert changed != before
    with (damaged / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert source.fingerprint() not in (before, changed)


def test_a_fingerprint_sees_every_part_of_a_file_too_large_to_read_whole(tmp_path):
    """8 MiB in 64 masks_per_step: a change that runs through the whole file, or its end, is seen."""
    folder = make(tmp_path / "large")
    (folder / "x.gguf").write_bytes(bytes(8 << 20))
    source = resolve(str(folder))
    seen = {source.fingerprint()}
    for start in range(0, 8 << 20, 1 << 20):  # an eighth of it retrained
        content = bytearray(8 << 20)
        content[start : start + (1 << 20)] = b"\1" * (1 << 20)
        (folder / "x.gguf").write_bytes(content)
        seen.add(source.fingerprint())
    assert len(seen) == 9


# --- several devices


@pytest.mark.parametrize(("free", "count"), [(1 << 40, 1), (3 << 20, 2)])
def test_auto_weighs_the_model_before_it_is_loaded(free, count, monkeypatch):
    """The demo model has 3.2 MB in bfloat16."""
    two, used = [torch.device("cpu"), torch.device("cpu", 0)], [torch.device("cpu")]
    monkeypatch.setattr(loading, "devices_of", lambda _: two)
    monkeypatch.setattr(
        loading, "device_map", lambda *given: used.append(given[-1][1]) or device_map(*given[:-1], used[:1])
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    load_model(resolve("demo"), "bfloat16", "auto")
    assert used == two[:count]


def test_a_spread_model_computes_what_it_did():
    """All of it on the CPU, but with accelerate's hooks, which the shrunk forward and the streams must live with."""
    accelerate = pytest.importorskip("accelerate", reason="needs the extra: pip install 'pgprune[multi-gpu]'")
    alone, hooked = (Evaluator(load_model(resolve("demo"), "float32", "cpu")) for _ in range(2))
    layers = len(alone.shape.channels)
    accelerate.dispatch_model(hooked.model, device_map(layers, True, [torch.device("cpu")]), force_hooks=True)
    assert all(hasattr(layer, "_hf_hook") for layer in hooked.layers)
    space = alone.shape.space(("attention", "ffn"))
    keep = alone.shape.keep(space, torch.arange(space.n) % 3 > 0)
    tokens = torch.arange(48).view(2, 24)
    assert torch.equal(hooked.losses([keep], tokens), alone.losses([keep], tokens))
    streams = [start_layerwise(evaluator.model, [tokens]) for evaluator in (alone, hooked)]
    for stream in streams:
        stream.advance(0)
    assert torch.equal(streams[0].hidden[0], streams[1].hidden[0])


def test_the_hubs_files_are_looked_for_where_hf_home_says(tmp_path):
    repository = tmp_path / "hub" / "models--me--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).touch()
    code = "from pgprune_cli.model.source import resolve; print(resolve('me/tiny').directory)"
    home = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    home.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True, check=False)
    assert done.stdout == f"{snapshot}\n", done.stderr


# --- what cannot be pruned is seen before anything is loaded


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "holds quantised weights, which cannot be cut"),
        ({"model_type": "gpt2"}, "model type 'gpt2' is not supported; pgprune prunes llama, mistral, qwen2, qwen3"),
    ],
)
def test_what_cannot_be_pruned(change, said, damaged):
    path = damaged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        check_prunable(resolve(str(damaged)))


def test_what_can_be_pruned(saved):
    check_prunable(resolve(str(saved)))


def test_weights_that_do_not_fit_the_config_are_named(damaged, capfd):
    path = damaged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 23}))
    with pytest.raises(UserError) as caught:
        load_model(resolve(str(damaged)), "auto", "cpu")
    assert str(caught.value) == (
        f"{damaged}: 12 weights do not fit its config: model.layers.0.mlp.down_proj.weight has the shape (32, 24), and "
        "by the config it should be (32, 23)"
    )
    assert capfd.readouterr().err == "", "a line for the user, no table"
