"""From a model's files to its weights: loaded as stored, refused if damaged or incomplete."""

import json
import shutil
from unittest.mock import MagicMock

import pytest
import torch
from helpers.messages import refused, says
from helpers.models import save_shards, tiny_model
from helpers.units import group_units
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto import tokenization_auto

from pgprune_cli.errors import UserError
from pgprune_cli.forward.divergence import Divergence
from pgprune_cli.forward.layerwise import start_layerwise
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model import loading, weights
from pgprune_cli.model.devices import device_map
from pgprune_cli.model.loading import check_prunable, empty_model, load_model, load_prunable, load_tokenizer
from pgprune_cli.model.source import resolve

MISTRAL_FORMAT = hasattr(tokenization_auto, "_use_mistral_format")
"""Whether this version of transformers knows the argument of that name."""

# --- weights


def test_empty_model_downloads_only_the_config_of_a_hub_model(saved, tmp_path, monkeypatch):
    shutil.copy(saved / "config.json", tmp_path)
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda _, **options: calls.append(options) or str(tmp_path)
    )
    model = empty_model("owner/name", "auto").module
    assert [call["allow_patterns"] for call in calls] == [["config.json", "adapter_config.json"]]
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    loaded = load_model(resolve(str(saved)), "auto", "cpu")
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in loaded.named_parameters()
    ]
    assert empty_model(str(tmp_path), "bfloat16").dtype == torch.bfloat16


def test_damaged_weights_are_refused(damaged):
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as caught:
        load_model(resolve(str(damaged)), "auto", "cpu")
    assert str(caught.value).startswith(f"{damaged / 'model.safetensors'}: damaged or not safetensors ")


def test_missing_weights_are_refused(damaged):
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with refused(f"{damaged}: ", "2 weights are missing", "model.layers.1.mlp.up_proj.weight"):
        load_model(resolve(str(damaged)), "auto", "cpu")


def test_weights_of_another_shape_are_refused(damaged):
    tensors = load_file(damaged / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name][:5].clone()}, damaged / "model.safetensors", metadata={"format": "pt"})
    with refused(f"{damaged}: ", name, "(5, 32)", "(24, 32)"):
        load_model(resolve(str(damaged)), "auto", "cpu")


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "llama", "num_attention_heads": "x"}'])
def test_a_damaged_config_is_refused(damaged, config):
    (damaged / "config.json").write_text(config)
    with pytest.raises(UserError) as caught:
        load_model(resolve(str(damaged)), "auto", "cpu")
    assert str(caught.value).startswith(str(damaged))


def test_a_loaded_model_is_ready_for_forward_passes(damaged):
    model = load_model(resolve(str(save_shards(damaged))), "auto", "cpu")
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    expected = dict(tiny_model("llama-gqa").named_parameters())
    loaded = dict(model.named_parameters())
    assert loaded.keys() == expected.keys()
    assert all(loaded[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize(("installed", "device_map"), [(True, {"": torch.device("cuda")}), (False, None)])
def test_weights_go_straight_to_a_gpu_if_accelerate_is_installed(
    installed: bool, device_map: object, saved, monkeypatch
):
    """Without a GPU, the test checks what transformers is asked for."""
    from transformers import AutoModelForCausalLM

    device_maps = []

    def loads(*_: object, **arguments: object) -> tuple[object, dict[str, object]]:
        device_maps.append(arguments.get("device_map"))
        return MagicMock(), {"missing_keys": set(), "mismatched_keys": set()}

    monkeypatch.setattr("pgprune_cli.model.loading.devices_of", lambda device: [torch.device(device)])
    monkeypatch.setattr("pgprune_cli.model.weights.find_spec", lambda name: installed)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
    load_model(resolve(str(saved)), "float32", "cuda")
    load_model(resolve(str(saved)), "float32", "cpu")
    assert device_maps == [device_map, None]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_model_is_loaded_in_the_requested_dtype(saved, dtype):
    model = load_model(resolve(str(saved)), dtype, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_attention_with_soft_capping_is_never_left_to_a_kernel_that_ignores_it(tmp_path):
    config = tiny_model("gemma2").config
    config.attn_logit_softcapping = 0.01  # so low that it shows
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = torch.arange(12)[None]
    expected = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path)
    loaded = load_model(resolve(str(tmp_path)), "float32", "cpu")
    assert loaded.config._attn_implementation == "eager"
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected)


def test_no_code_of_a_model_is_run(damaged):
    config = json.loads((damaged / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "evil.py").write_text("raise SystemExit('the code of a model was run')\n")
    with refused(f"{damaged}: ", "auto_map"):
        load_model(resolve(str(damaged)), "auto", "cpu")


def test_the_tokenizer_is_loaded_and_its_absence_refused(damaged):
    text = "Anna owned two red kites."
    tokenizer = load_tokenizer(resolve("demo"))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with refused(f"{damaged}: has no tokenizer"):
        load_tokenizer(resolve(str(damaged)))


def test_transformers_takes_its_own_classes_for_the_tokenizer_of_a_mistral(monkeypatch):
    """With mistral-common installed and tekken.json in the directory, it would take that package's."""
    load, seen = AutoTokenizer.from_pretrained, []

    def loading(*arguments, **options):
        seen.append(options)
        return load(*arguments, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loading)
    load_tokenizer(resolve("demo"))
    monkeypatch.delattr(tokenization_auto, "_use_mistral_format", raising=False)
    load_tokenizer(resolve("demo"))
    known, unknown = {"trust_remote_code": False, "mistral_format": False}, {"trust_remote_code": False}
    assert seen == ([known, unknown] if MISTRAL_FORMAT else [unknown, unknown])


def test_a_tokenizer_of_mistral_common_is_refused(monkeypatch):
    class MistralCommonBackend:
        pass

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: MistralCommonBackend())
    with refused("demo", "MistralCommonBackend", "pip uninstall mistral-common"):
        load_tokenizer(resolve("demo"))


def test_a_damaged_tokenizer_is_refused_in_one_line(damaged):
    (damaged / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        load_tokenizer(resolve(str(damaged)))
    assert "\n" not in str(caught.value)
    refusal, colon, _ = str(caught.value).partition("loaded: ")  # then it quotes the library
    says(refusal + colon, f"{damaged}: its tokenizer")


# --- several devices


@pytest.mark.parametrize(("free", "count"), [(1 << 40, 1), (3 << 20, 2)])
def test_auto_uses_as_many_devices_as_the_weights_need(free, count, monkeypatch):
    """The demo model has 3.2 MB in bfloat16."""
    devices, used = [torch.device("cpu"), torch.device("cpu", 0)], [torch.device("cpu")]
    monkeypatch.setattr(loading, "devices_of", lambda _: devices)
    monkeypatch.setattr(
        weights, "device_map", lambda *args: used.append(args[-1][1]) or device_map(*args[:-1], used[:1])
    )
    monkeypatch.setattr(loading, "free_bytes", lambda _: free)
    load_model(resolve("demo"), "bfloat16", "auto")
    assert used == devices[:count]


def test_auto_leaves_the_first_of_several_devices_to_another_model(monkeypatch):
    devices, used = [torch.device("cpu", index) for index in range(3)], []
    monkeypatch.setattr(loading, "devices_of", lambda _: devices)
    monkeypatch.setattr(loading, "free_bytes", lambda _: 1 << 40)
    monkeypatch.setattr(loading, "read_weights", lambda *args: used.append(args[-1]) or tiny_model("llama-gqa"))
    load_model(resolve("demo"), "bfloat16", "auto")
    load_model(resolve("demo"), "bfloat16", "auto", beside_another=True)
    load_model(resolve("demo"), "bfloat16", "cpu:0,cpu:1", beside_another=True)  # named ones are all used
    assert used == [devices[:1], devices[1:2], devices]


def test_a_spread_model_gives_the_same_losses_as_on_one_device():
    """Everything is on the CPU, but with accelerate's hooks, which shrunk and layer-wise passes must work with."""
    accelerate = pytest.importorskip("accelerate", reason="needs the extra: pip install 'pgprune[multi-gpu]'")
    single, hooked = (load_prunable(resolve("demo"), "float32", "cpu") for _ in range(2))
    places = device_map(hooked.family, hooked.shape.layers, True, [torch.device("cpu")])
    accelerate.dispatch_model(hooked.module, places, force_hooks=True)
    assert all(hasattr(layer, "_hf_hook") for layer in hooked.layers)
    space, units = group_units(single.shape)
    model_mask = single.shape.model_mask(space, torch.arange(space.n) % 3 > 0, units)
    tokens = torch.arange(48).view(2, 24)
    assert torch.equal(Evaluator(hooked).losses([model_mask], tokens), Evaluator(single).losses([model_mask], tokens))
    own = [Divergence(Evaluator(model), 1.0) for model in (single, hooked)]
    left, right = (each.values([model_mask], tokens, [{}], each.dense_states(tokens)) for each in own)
    assert torch.equal(left.objective, right.objective) and torch.equal(left.loss, right.loss)
    runs = [start_layerwise(model, [tokens]) for model in (single, hooked)]
    for run in runs:
        run.advance(0)
    assert torch.equal(runs[0].hidden_states[0], runs[1].hidden_states[0])


# --- models that cannot be pruned are refused before loading


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, ("quantised weights", "original model")),
        ({"quantization_config": {"quant_method": "mxfp4"}}, ("quantised weights", "Mxfp4Config(dequantize=True)")),
        ({"model_type": "gpt2"}, ("'gpt2' is not supported", "llama, mistral, qwen2, qwen3")),
    ],
    ids=["quantised", "mxfp4", "model-type"],
)
def test_a_model_that_cannot_be_pruned_is_refused(change, facts, damaged):
    path = damaged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with refused(*facts):
        check_prunable(resolve(str(damaged)))


def test_a_bidirectional_gemma_is_refused(tmp_path):
    """EmbeddingGemma: a search would evaluate it as a causal model."""
    tiny_model("gemma3_text").save_pretrained(tmp_path)
    check_prunable(resolve(str(tmp_path)))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_bidirectional_attention": True}))
    with refused(str(tmp_path), "both directions", "causal"):
        check_prunable(resolve(str(tmp_path)))


def test_a_supported_model_is_accepted(saved):
    check_prunable(resolve(str(saved)))


def test_weights_that_do_not_fit_the_config_are_refused_in_one_line(damaged, capfd):
    path = damaged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 23}))
    with refused(f"{damaged}: 12 weights", "model.layers.0.mlp.down_proj.weight", "(32, 24)", "(32, 23)"):
        load_model(resolve(str(damaged)), "auto", "cpu")
    assert capfd.readouterr().err == "", "transformers printed its own table"


def test_weights_of_other_shapes_are_refused_where_transformers_takes_them(saved, monkeypatch):
    """As transformers 5.18 does with those of GGUF files."""
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def taken_as_they_are(*args, **options):
        model, info = from_pretrained(*args, **options)
        model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(32, 7))
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", taken_as_they_are)
    with refused("1 weight", "model.layers.1.mlp.down_proj.weight", "(32, 7) instead of (32, 24)"):
        load_prunable(resolve(str(saved)), "float32", "cpu")
