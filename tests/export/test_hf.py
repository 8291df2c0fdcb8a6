"""Exports to transformers directories, loaded again and compared with the masked dense model."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers.exports import DECISIONS, decide, export, replay
from helpers.masks import draw, masked, random_repair, repaired_by_hand
from helpers.messages import refused
from helpers.models import VOCABULARY, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from pgprune_cli.errors import RunError
from pgprune_cli.export import hf, hf_config
from pgprune_cli.export.plan import Options, check_new
from pgprune_cli.export.shapes import ShapeRequirements
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.model.loading import eager_if_capped
from pgprune_cli.model.masks import RepairedBlock
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.source import resolve
from pgprune_cli.repair.least_squares import repair
from pgprune_cli.run.decision import Decision
from pgprune_cli.serving import modeling_pruned
from pgprune_cli.storage import safetensors_file

LAYERS = 4
TOLERANCE = {"atol": 5e-4, "rtol": 1e-4}
pytestmark = pytest.mark.usefixtures("one_thread")


def load(directory: Path):
    """Load a model and fail if a weight is missing, unexpected or of the wrong shape."""
    eager = eager_if_capped(AutoConfig.from_pretrained(directory))
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True, **eager)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture
def saved(architecture, tmp_path):
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


@pytest.fixture
def llama(tmp_path):
    model = tiny_model("llama-gqa")
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


@pytest.mark.parametrize("name", DECISIONS)
@torch.inference_mode()
def test_export_has_the_logits_of_the_masked_dense_model(saved, tmp_path, name):
    model, base = saved
    model_mask = draw(model, DECISIONS[name])
    written = export(base, tmp_path / "out", model_mask)
    pruned = load(tmp_path / "out")
    tokens = torch.randint(3, VOCABULARY, (2, 40))
    with masked(model, model_mask):
        torch.testing.assert_close(pruned(tokens).logits, model(tokens).logits, **TOLERANCE)
    assert not written.stock
    kept_layers = sum(bool(layer.attention.any() or layer.ffn.any()) for layer in model_mask)
    assert len(written.shapes.layers) == len(pruned.model.layers) == kept_layers
    assert written.parameters_after == sum(parameter.numel() for parameter in pruned.parameters())
    assert written.parameters_before == sum(parameter.numel() for parameter in model.parameters())

    pruned.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_pruned.py").exists()
    assert torch.equal(load(tmp_path / "again")(tokens).logits, pruned(tokens).logits)
    pruned.set_attn_implementation("eager")  # SDPA returns no attention weights
    weights = pruned(tokens, output_attentions=True).attentions
    dense = written.shapes.dense
    masks = [layer.attention for index, layer in enumerate(model_mask) if not dense.is_recurrent(index)]
    heads = [int(mask.sum()) for mask in masks if mask.any()]
    assert [w.shape[1] for w in weights if w is not None] == heads
    with masked(model, model_mask):
        torch.testing.assert_close(pruned(tokens).logits, model(tokens).logits, **TOLERANCE)


@pytest.mark.parametrize(
    "name",
    ["fewer query heads in every layer", "no heads in the first layer", "two layers removed, among them the first"],
)
@torch.inference_mode()
def test_generation_with_a_cache_and_left_padding_equals_recomputation(saved, tmp_path, name):
    model, base = saved
    model_mask = draw(model, DECISIONS[name])
    export(base, tmp_path / "out", model_mask)
    pruned = load(tmp_path / "out")
    prompts = [torch.randint(3, VOCABULARY, (length,)) for length in (4, 9)]
    expected = []
    with masked(model, model_mask):
        for tokens in prompts:
            for _ in range(16):  # beyond the sliding window of the Mistral
                logits = model(tokens[None], use_cache=False).logits[0, -1]
                tokens = torch.cat([tokens, logits.argmax()[None]])
            expected.append(tokens)
    padded = torch.stack([torch.cat([torch.zeros(9 - len(p), dtype=torch.long), p]) for p in prompts])
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = pruned.generate(padded, attention_mask=(padded != 0).long(), **options)
    static = pruned.generate(prompts[1][None], cache_implementation="static", disable_compile=True, **options)
    for row, tokens in zip((*batch, *static), (*expected, expected[1]), strict=True):
        assert row[-len(tokens) :].tolist() == tokens.tolist()


@torch.inference_mode()
def test_layers_keep_their_kind_of_attention_when_full_and_sliding_are_mixed(tmp_path):
    model = tiny_model("qwen3")
    for layer in model.model.layers[2:]:
        layer.self_attn.sliding_window = 6
    types = ["full_attention"] * 2 + ["sliding_attention"] * 2
    model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "layer_types": types}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    model = load(tmp_path / "base")
    for counts in (
        [(0, 5), (2, 9), (0, 0), (3, 3)],
        [(0, 5), (0, 9), (0, 4), (3, 3)],
        [(0, 0), (2, 9), (0, 7), (1, 1)],
    ):
        model_mask = draw(model, counts)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        export(tmp_path / "base", tmp_path / "out", model_mask)
        pruned = load(tmp_path / "out")
        tokens = torch.randint(3, VOCABULARY, (1, 5))
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        generated = pruned.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        with masked(model, model_mask):
            for length in range(5, 17):
                tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
                assert generated[0, length] == tokens[0, length]


def test_a_directory_loads_without_pgprune(tmp_path):
    for architecture in ("llama-biased", "mistral", "qwen2", "qwen3"):
        model = tiny_model(architecture)
        model.save_pretrained(tmp_path / "base" / architecture)
        model_mask = draw(model, DECISIONS["no heads in the first layer"])
        export(tmp_path / "base" / architecture, tmp_path / architecture, model_mask)
        with masked(model, model_mask), torch.inference_mode():
            save_file({"logits": model(torch.arange(3, 23)[None]).logits}, tmp_path / f"{architecture}.safetensors")
    script = """
import sys
sys.modules["pgprune_cli"] = None  # makes any import of it fail
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
for name in ("llama-biased", "mistral", "qwen2", "qwen3"):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    with torch.inference_mode():
        logits = model(torch.arange(3, 23)[None]).logits
    torch.testing.assert_close(logits, load_file(f"{name}.safetensors")["logits"], atol=2e-4, rtol=1e-4)
    model.save_pretrained("again-" + name)
    again = AutoModel.from_pretrained("again-" + name, trust_remote_code=True)
    torch.testing.assert_close(again.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-c", script]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


def test_rope_parameters_that_transformers_4_would_ignore_are_refused(monkeypatch):
    monkeypatch.setattr(modeling_pruned, "transformers_major", lambda: 4)
    scaling = {"rope_type": "linear", "factor": 4.0}
    cases = [({"rope_type": "default", "rope_theta": 500.0}, 10000.0, None), (LINEAR, 10000.0, None)]
    cases += [(LINEAR, 10000.0, scaling | {"factor": 2.0}), (LINEAR, None, scaling)]
    for parameters, theta, older in cases:
        # A namespace, because the config of transformers 5 has rope_parameters under all names.
        config = SimpleNamespace(model_type="llama", rope_parameters=parameters, rope_theta=theta, rope_scaling=older)
        with pytest.raises(ValueError, match="transformers 5"):
            modeling_pruned.refuse_unknown_rope(config)
    config.rope_theta, config.rope_scaling = 10000.0, scaling
    modeling_pruned.refuse_unknown_rope(config)


@pytest.mark.parametrize("sizes", ["mixed sizes", "uniform"])
def test_rope_is_written_for_transformers_4_too_and_read_unchanged(tmp_path, sizes):
    model = tiny_model("llama-gqa")
    model.config.rope_parameters = dict(LINEAR)
    model.save_pretrained(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "out", draw(model, DECISIONS.get(sizes, [(2, 7)] * LAYERS)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == LINEAR
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, {"rope_type": "linear", "factor": 4.0})
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == LINEAR


def test_rope_that_transformers_4_cannot_express_stops_it(tmp_path):
    """A null instead of a number makes it stop with an error, where it would compute something else."""
    model = tiny_model("gemma3_text")
    parameters = {"full_attention": LINEAR, "sliding_attention": LINEAR | {"rope_theta": 99.0}}
    model.config.rope_parameters = parameters
    model.save_pretrained(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "out", draw(model, [(2, 7)] * LAYERS))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] is None and "rope_local_base_freq" not in config
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == parameters


def test_layers_of_different_sizes_are_refused_if_transformers_cannot_load_them(llama, tmp_path, monkeypatch):
    model, base = llama
    monkeypatch.setattr(modeling_pruned, "FAMILIES", {"qwen2": modeling_pruned.FAMILIES["qwen2"]})
    monkeypatch.setattr(hf_config, "transformers", SimpleNamespace(__version__="5.0.0"))
    with refused("model type llama", "transformers 5.0.0", "budget.scope: per-layer", "qwen2"):
        export(base, tmp_path / "out", draw(model, DECISIONS["mixed sizes"]))


@torch.inference_mode()
def test_layers_of_equal_sizes_become_a_stock_model(saved, tmp_path, architecture):
    model, base = saved
    model_mask = draw(model, [(2, 7), (0, 0), (2, 7), (2, 7)])
    written = export(base, tmp_path / "out", model_mask)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.stock
    assert config["model_type"] == written.config["model_type"] == model.config.model_type
    assert not {"auto_map", "per_layer_config"} & set(config)
    assert not list((tmp_path / "out").glob("*.py"))
    tokens = torch.randint(3, VOCABULARY, (2, 30))
    with masked(model, model_mask):
        torch.testing.assert_close(load(tmp_path / "out")(tokens).logits, model(tokens).logits, **TOLERANCE)


@pytest.mark.parametrize(
    ("architecture", "removed", "reordered"),
    [
        ("gpt_oss", [1], True),
        ("gpt_oss", [2, 3], False),
        ("gemma2", [0], True),
        ("gemma2", [0, 1], False),
        ("llama-gqa", [1], False),
    ],
)
def test_an_unusual_order_of_attention_is_noted(architecture, removed, reordered, tmp_path):
    """vLLM ignores the `layer_types` of gpt-oss."""
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "base")
    counts = [(0, 0) if layer in removed else (4, 24) for layer in range(LAYERS)]
    plan = export(tmp_path / "base", tmp_path / "out", draw(model, counts))
    assert plan.stock and len(plan.notes) == reordered
    assert ("layer_types" in (tmp_path / "out" / "README.md").read_text()) == reordered


@pytest.mark.parametrize(("architecture", "stock", "model_type"), [
    ("llama-gqa", True, "mistral"), ("llama-biased", False, "pruned_llama"), ("qwen2", True, "qwen2"),
])  # fmt: skip
@torch.inference_mode()
def test_number_of_heads_need_not_divide_the_hidden_size(tmp_path, architecture, stock, model_type):
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "base")
    model_mask = draw(model, [(3, 7)] * LAYERS)  # 6 heads, hidden size 32
    written = export(tmp_path / "base", tmp_path / "out", model_mask)
    assert (written.stock, written.config["model_type"]) == (stock, model_type)
    tokens = torch.randint(3, VOCABULARY, (2, 30))
    with masked(model, model_mask):
        torch.testing.assert_close(load(tmp_path / "out")(tokens).logits, model(tokens).logits, **TOLERANCE)


def test_a_sharded_model_gives_the_same_tensors_in_shards_of_any_size(saved, tmp_path):
    model, base = saved
    model.save_pretrained(tmp_path / "sharded", max_shard_size="6KB")
    model_mask = draw(model, DECISIONS["two layers removed, among them the first"])
    export(base, tmp_path / "one", model_mask)
    decision = decide(tmp_path / "sharded", model_mask)
    written_bytes: list[int] = []
    planned = hf.plan(resolve(decision.model), decision, Options(shard_size=4000))
    planned.write(tmp_path / "many", written_bytes.append)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors") if path.name.startswith("model"))
    assert len(files) > 2
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert planned.bytes == sum((tmp_path / "many" / name).stat().st_size for name in files)
    expected = load_file(tmp_path / "one" / "model.safetensors")
    tensors = {}
    for name in files:
        tensors |= (shard := load_file(tmp_path / "many" / name))
        assert shard and all(index["weight_map"][key] == name for key in shard)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 4000 or len(shard) == 1
    assert set(index["weight_map"]) == set(tensors) == set(expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values()) == sum(written_bytes)
    assert written_bytes == [tensor.nbytes for tensor in map(tensors.get, [edit.name for edit in planned.edits])]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    load(tmp_path / "many")


def test_old_buffers_and_tied_duplicates_are_dropped_and_dtypes_kept(llama, tmp_path):
    model, base = llama
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    written = export(base, tmp_path / "out", draw(model, [(2, 24)] * LAYERS))
    assert written.parameters_before == tiny_model("llama-gqa").num_parameters()
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert not [name for name in file.keys() if "inv_freq" in name]  # noqa: SIM118
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.parametrize("counts", [[(2, 24)] * LAYERS, DECISIONS["mixed sizes"]], ids=["equal", "unequal"])
def test_a_config_does_not_tie_a_head_that_differs_from_the_embedding(llama, tmp_path, counts):
    """transformers 5 does not tie them either way, but other runtimes follow the config."""
    model, base = llama
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    export(base, tmp_path / "out", draw(model, counts))
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(load(tmp_path / "out").lm_head.weight, tensors["lm_head.weight"])


def test_the_weights_shrink_and_the_other_files_are_copied(llama, tmp_path):
    model, base = llama
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"):
        (base / name).write_text(name)
    model_mask = draw(model, [(2, 6), (1, 6), (0, 0), (2, 12)])
    measured = {
        "model": "x",
        "perplexity": [{"corpus": "wikitext2", "seqlen": 128, "bos": False, "ppl": 12.375001, "tokens": 1000}],
    }
    written = export(base, tmp_path / "out", model_mask, measured)
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"):
        assert (out / name).read_text() == name
    assert (out / "generation_config.json").exists()
    assert written.bytes == (out / "model.safetensors").stat().st_size
    saved_bytes = 4 * (written.parameters_before - written.parameters_after)
    assert abs((base / "model.safetensors").stat().st_size - written.bytes - saved_bytes) < 4096
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    assert [k.ffn.tolist() for k in Decision.load(out).model_mask] == [k.ffn.tolist() for k in model_mask]
    card = (out / "README.md").read_text()
    assert "| 2 (layer removed) | 0 of 4 | 0 of 8 | 0 of 24 |" in card
    assert "| wikitext2 | 128 | 12.38 | 1,000 |" in card
    assert "trust_remote_code=True" in card and "dtype: float32" in card
    assert str(tmp_path) not in card


def test_an_existing_target_is_refused(llama, tmp_path):
    model, base = llama
    model_mask = draw(model, DECISIONS["mixed sizes"])
    (tmp_path / "out").mkdir()
    export(base, tmp_path / "out", model_mask)
    with refused(f"{tmp_path / 'out'}: already exists"):
        export(base, tmp_path / "out", model_mask)
    (tmp_path / "file").touch()
    with refused(f"{tmp_path / 'file'}: already exists"):
        export(base, tmp_path / "file", model_mask)


def test_a_mount_point_is_refused_before_writing(llama, tmp_path, monkeypatch):
    """As in a container, where a volume is mounted at the name of the export. It cannot be renamed."""
    model, base = llama
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    for name in ("out", "link"):
        with refused(str(tmp_path / name), "mount point", str(tmp_path / name / "model")):
            check_new(tmp_path / name, directory=True)
    with refused("mount point"):
        export(base, tmp_path / "out", draw(model, DECISIONS["mixed sizes"]))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "link", "out"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space left"), OSError("no space left")])
def test_a_failed_write_leaves_nothing_behind(error, llama, tmp_path, monkeypatch):
    model, base = llama

    def full(path, entries, tensors):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors_file, "write", full)
    with pytest.raises(OSError, match="no space"):
        export(base, tmp_path / "out", draw(model, DECISIONS["mixed sizes"]))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_full_disk_is_noticed_before_writing(llama, tmp_path, monkeypatch):
    model, base = llama
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(RunError, match=r"/new/out: needs about \d+ MB of disk, but only 0 MB are free\."):
        export(base, tmp_path / "new" / "out", draw(model, DECISIONS["mixed sizes"]))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_another_model_than_the_searched_one_is_refused(llama, tmp_path):
    model, base = llama
    decision = decide(base, draw(model, DECISIONS["mixed sizes"]))
    tiny_model("llama-gqa", seed=1).save_pretrained(base)
    facts = "model.embed_tokens.weight, model.layers.0, model.layers.1 and 3 more"
    with refused(f"{base}: not the model that was searched", facts):
        hf.plan(resolve(str(base)), decision, Options())


def test_a_base_model_with_a_single_edited_matrix_is_refused(llama, tmp_path):
    model, base = llama
    decision = decide(base, draw(model, DECISIONS["mixed sizes"]))
    model.model.layers[1].mlp.down_proj.weight.data.mul_(-3)
    model.save_pretrained(base)
    with refused(f"{base}: not the model that was searched", "differs: model.layers.1."):
        hf.plan(resolve(str(base)), decision, Options())


def test_a_decision_of_other_sizes_or_without_units_is_refused(llama, tmp_path):
    model, base = llama
    with refused(str(base), "number of layers", "decision.json"):
        export(base, tmp_path / "out", draw(model, DECISIONS["mixed sizes"])[:3])
    with refused("decision.json: keeps no units"):
        export(base, tmp_path / "out", draw(model, [(0, 0)] * LAYERS))


def test_an_incomplete_or_quantised_model_is_refused(llama, tmp_path):
    model, base = llama
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model_mask = draw(model, DECISIONS["mixed sizes"])
    with refused(str(base), "model.layers.2.mlp.up_proj.weight is missing", "(24, 32)"):
        export(base, tmp_path / "out", model_mask)
    config = AutoConfig.from_pretrained(base).to_dict() | {"quantization_config": {"quant_method": "fp8"}}
    (base / "config.json").write_text(json.dumps(config))
    with refused(str(base), "quantised"):
        export(base, tmp_path / "out", model_mask)


def repaired(base: Path, model, method: str, reselect: bool = False, uniform: bool = False) -> tuple[Decision, Tensor]:
    """Return a repaired decision and the text that the repair saw. Some layers keep whole blocks, without a repair."""
    tokens = torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    counts = [((3, 1), 16)] * LAYERS if uniform else [((3, 2), 16), (4, 16), ((4, 1), 16), (4, 16)]
    with torch.inference_mode(False):  # whole blocks are trained
        model_mask, repaired = repair(
            PrunableModel.of(model), draw(model, counts), [tokens], method, 1e-3, epochs=3, reselect=reselect
        )
    fingerprint = resolve(str(base)).fingerprint()
    return Decision(model_mask, str(base), fingerprint, 0.3, "dtype: float32", 1, 2, 3, 2.5, repaired), tokens


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(
    ("method", "reselect"),
    [
        ("least-squares", False),
        ("least-squares", True),
        ("least-squares-bias", False),
        ("bias", False),
        ("sublayer", True),
    ],
)
@torch.inference_mode()
def test_an_export_has_the_repaired_weights(saved, tmp_path, method, reselect, uniform):
    """The exported model equals the dense one shrunk with its repair, and differs from it without."""
    model, base = saved
    decision, tokens = repaired(base, model, method, reselect, uniform)
    written = replay(decision, tmp_path / "small")
    exported = load(tmp_path / "small")
    evaluator = Evaluator(PrunableModel.of(model))
    with evaluator.shrunk(decision.model_mask, decision.repaired) as shrunk:
        expected = shrunk(tokens).logits
    with evaluator.shrunk(decision.model_mask) as unrepaired:
        without_repair = unrepaired(tokens).logits
    logits = exported(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - without_repair).abs().max() > 1e-2

    has_biases = getattr(model.config, "mlp_bias", False)
    fitted = "bias" in method and not has_biases
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    repaired_blocks = {name for _, name in decision.repaired}
    biases = [block.config_name for block in PrunableModel.of(model).family.blocks if block.name in repaired_blocks]
    assert config.get("output_biases") == (biases if fitted else None)
    assert written.parameters_after == sum(parameter.numel() for parameter in exported.parameters())
    if fitted:
        assert not written.stock
    exported.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(tokens).logits, logits)


@torch.inference_mode()
def test_a_bias_fitted_in_one_layer_is_zero_in_the_others(llama, tmp_path):
    model, base = llama
    tokens = torch.randint(VOCABULARY, (4, 16))
    model_mask = draw(model, [(4, 24), (0, 9), (4, 24), (4, 0)])
    repaired = repair(PrunableModel.of(model), model_mask, [tokens], "bias", 1e-3).blocks
    decision = dataclasses.replace(decide(base, model_mask), repaired=repaired)
    replay(decision, tmp_path / "small")
    pruned = load(tmp_path / "small")
    assert pruned.config.output_biases == ["mlp"]
    assert {name for name, value in pruned.named_parameters() if name.endswith("bias") and value.any()} == {
        "model.layers.1.mlp.down_proj.bias"
    }
    assert sum(name.endswith("bias") for name, _ in pruned.named_parameters()) == 3
    with Evaluator(PrunableModel.of(model)).shrunk(model_mask, repaired) as shrunk:
        torch.testing.assert_close(pruned(tokens).logits, shrunk(tokens).logits, **TOLERANCE)


PADDED = {
    "heads in every layer": ShapeRequirements("every"),
    "heads in the first layer": ShapeRequirements("first"),
    "multiples": ShapeRequirements(pad_kv_heads=2, pad_ffn=8),
    "everything": ShapeRequirements("every", "every", pad_kv_heads=3, pad_ffn=5),
}


@pytest.mark.parametrize("requirements", PADDED)
@pytest.mark.parametrize("method", ["none", "least-squares", "least-squares-bias", "every tensor"])
@torch.inference_mode()
def test_padding_does_not_change_the_logits(saved, tmp_path, requirements, method):
    model, base = saved
    model_mask = draw(model, [(0, 9), ((2, 1), 24), (3, 0), (1, 5)])
    tokens = torch.randint(3, VOCABULARY, (2, 20))
    if method == "every tensor":
        repaired = random_repair(model, model_mask, bias=True)
    elif method == "none":
        repaired = {}
    else:
        repaired = repair(PrunableModel.of(model), model_mask, [tokens], method, 1e-3).blocks
    decision = dataclasses.replace(decide(base, model_mask), repaired=repaired)
    planned = replay(decision, tmp_path / "out", requirements=PADDED[requirements])
    pruned = load(tmp_path / "out")
    kept, written = (planned.base.shape.kept(mask) for mask in (planned.shapes.kept, planned.shapes.written))
    assert planned.shapes.padded == (kept != written)
    for name, grids in PrunableModel.of(pruned).shape.grids.items():
        assert [(grid.elements and grid.groups, grid.elements and grid.members) for grid in grids] == [
            size[name] for size in written
        ]
    with Evaluator(PrunableModel.of(model)).shrunk(model_mask, repaired) as shrunk:
        torch.testing.assert_close(pruned(tokens).logits, shrunk(tokens).logits, **TOLERANCE)
    assert planned.parameters_after == sum(parameter.numel() for parameter in pruned.parameters())
    card = (tmp_path / "out" / "README.md").read_text()
    assert (f"If this padding counts as kept, {planned.sparsity:.1%} were removed." in card) == planned.shapes.padded


@torch.inference_mode()
def test_padding_can_make_a_stock_model(llama, tmp_path):
    model, base = llama
    model_mask = draw(model, [(2, 6), (1, 8), (2, 7), (0, 5)])
    planned = export(
        base, tmp_path / "out", model_mask, requirements=ShapeRequirements("every", pad_kv_heads=2, pad_ffn=8)
    )
    assert planned.stock
    tokens = torch.randint(3, VOCABULARY, (2, 30))
    with masked(model, model_mask):
        torch.testing.assert_close(load(tmp_path / "out")(tokens).logits, model(tokens).logits, **TOLERANCE)


@torch.inference_mode()
def test_padding_has_the_rows_of_the_base_model_around_refitted_ones(llama, tmp_path):
    """So fine-tuning can make use of it."""
    model, base = llama
    model_mask = draw(model, [((2, 1), 5)] * LAYERS)
    repaired = random_repair(model, model_mask, bias=False)
    decision = dataclasses.replace(decide(base, model_mask), repaired=repaired)
    planned = replay(decision, tmp_path / "out", requirements=ShapeRequirements(pad_kv_heads=4, pad_ffn=8))
    by_hand = repaired_by_hand(model, model_mask, repaired).state_dict()
    tensors, written = load_file(tmp_path / "out" / "model.safetensors"), planned.shapes.written
    for index in range(LAYERS):
        for name, mask, width in (
            ("mlp.up_proj", written[index].ffn, 1),
            ("self_attn.q_proj", written[index].attention, 8),
        ):
            full = f"model.layers.{index}.{name}.weight"
            assert torch.equal(tensors[full], by_hand[full][mask.repeat_interleave(width)])


def test_a_repair_of_a_tensor_that_the_model_lacks_is_refused(llama, tmp_path):
    model, base = llama
    model_mask = draw(model, [((2, 1), 5)] * LAYERS)
    repaired = {(1, "attention"): RepairedBlock(torch.zeros(32, 16), None, {"q_proj.bias": torch.zeros(16)})}
    with refused("repair.safetensors: ", "model.layers.1.self_attn.q_proj.bias", "Search again"):
        replay(dataclasses.replace(decide(base, model_mask), repaired=repaired), tmp_path / "out")


@pytest.mark.parametrize(("value", "fact"), [(torch.nan, "NaN"), (1e6, "1e+06")])
def test_refitted_weights_that_no_file_can_hold_are_refused(llama, tmp_path, value, fact):
    model, base = llama
    model_mask = draw(model, [((2, 1), 5)] * LAYERS)
    own = RepairedBlock(torch.zeros(32, 5), None, {"up_proj.weight": torch.full((5, 32), value)})
    decision = dataclasses.replace(decide(base, model_mask), repaired={(1, "ffn"): own})
    with refused("model.layers.1.mlp.up_proj.weight: ", fact):
        replay(decision, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_written_in_the_requested_dtype(llama, tmp_path, dtype):
    model, base = llama
    decision, _ = repaired(base, model, "least-squares")
    replay(decision, tmp_path / "same")
    planned = replay(decision, tmp_path / "out", dtype=dtype)
    expected, tensors = (load_file(tmp_path / name / "model.safetensors") for name in ("same", "out"))
    assert tensors.keys() == expected.keys()
    dtype = getattr(torch, dtype)
    assert all(torch.equal(tensors[name], expected[name].to(dtype)) for name in expected)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert load(tmp_path / "out").dtype == dtype
    assert planned.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_weights_that_the_dtype_cannot_hold_are_refused(llama, tmp_path):
    model, base = llama
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e6
    model.save_pretrained(base)
    model_mask = draw(model, [(4, 24)] * LAYERS)
    with refused("model.layers.1.mlp.up_proj.weight: ", "1e+06", "float16", "6.55e+04", "--dtype"):
        export(base, tmp_path / "out", model_mask, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    export(base, tmp_path / "out", model_mask, dtype="bfloat16")


def test_the_index_lists_only_the_weights_and_not_the_decision(llama, tmp_path):
    """Servers read every *.safetensors file of a directory unless an index says which ones hold weights."""
    model, base = llama
    decision, _ = repaired(base, model, "least-squares")
    replay(decision, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == ["decision.safetensors", "model.safetensors"]
    assert Decision.load(tmp_path / "out").model == str(base)


SAMPLED = {"max_length": 4096, "temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2}
"""As Llama 2 has it: transformers 5 loads this, but refuses to save a model with it."""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_generation_config_that_cannot_be_saved_is_exported_so_that_it_can(llama, tmp_path, caplog, monkeypatch):
    model, base = llama
    (base / "generation_config.json").write_text(json.dumps(SAMPLED))
    monkeypatch.setattr(transformers.utils.logging.get_logger(), "propagate", True)
    export(base, tmp_path / "out", draw(model, DECISIONS["mixed sizes"]))
    assert not caplog.records
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == SAMPLED | {"do_sample": True}
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    again = GenerationConfig.from_pretrained(tmp_path / "again")
    assert (again.temperature, again.top_p, again.max_length) == (0.9, 0.6, 4096)
