"""Prune again: a model that pgprune made is a base like any other, and its history goes along."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.exports import decide, export, load_export, replay
from helpers.masks import draw, random_tokens
from helpers.messages import refused
from helpers.models import save_tokenizer, tiny_model
from helpers.recipes import WIDTH_SEARCH
from helpers.recoveries import RECORD, recover

from pgprune_cli.core.grid import Grid, first_elements
from pgprune_cli.export import gguf
from pgprune_cli.export.plan import Options
from pgprune_cli.forward.masked import Evaluator
from pgprune_cli.jobs.export import export as export_run
from pgprune_cli.jobs.search import search
from pgprune_cli.jobs.verify import verify
from pgprune_cli.model.loading import load_prunable
from pgprune_cli.model.masks import LayerMask
from pgprune_cli.model.source import resolve
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.repair.least_squares import repair
from pgprune_cli.run.decision import ancestry
from pgprune_cli.run.layout import DECISION_RECORD

FIRST = [(4, 24), ((3, 1), 7), (0, 24), (2, 0)]
"""The sizes of the first decision: unequal, with a layer without heads and one without channels."""


@pytest.fixture
def pruned(architecture: str, tmp_path: Path) -> Path:
    """A tiny model with unequal layers, exported."""
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "pruned", draw(model, FIRST))
    return tmp_path / "pruned"


def half(grid: Grid) -> torch.Tensor:
    """Return a mask that keeps the first half of the members of every group, of a block that may be absent."""
    return first_elements(grid, grid.groups, max(1, grid.members // 2))


def test_second_decision_gives_the_masked_model(pruned: Path, tmp_path: Path) -> None:
    model, tokens = load_prunable(resolve(str(pruned)), "float32", "cpu"), random_tokens()
    grids = model.shape.grids
    second = tuple(
        LayerMask(half(attention), half(ffn)) for attention, ffn in zip(grids["attention"], grids["ffn"], strict=True)
    )
    repaired = repair(model, second, [tokens], "least-squares", 1e-3)
    decision = replace(decide(pruned, second), repaired=repaired.blocks)
    replay(decision, tmp_path / "again")
    loaded = load_export(tmp_path / "again")
    with torch.no_grad(), Evaluator(model).shrunk(second, repaired.blocks) as masked:
        expected = masked(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    assert parameters < sum(parameter.numel() for parameter in model.module.parameters())


def test_first_sizes_can_be_equalised_into_a_stock_model(tmp_path: Path) -> None:
    """The second decision keeps the same sizes everywhere: the stock class of the dense model holds the result."""
    dense = tiny_model("llama-gqa")
    dense.save_pretrained(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "pruned", draw(dense, [(4, 24), (3, 7), (4, 9), (2, 8)]))
    model = load_prunable(resolve(str(tmp_path / "pruned")), "float32", "cpu")
    mask = draw(model.module, [(2, 7)] * 4)
    plan = export(tmp_path / "pruned", tmp_path / "again", mask)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert plan.stock and config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert not {"per_layer_config", "auto_map", "output_biases"} & config.keys()
    tokens = random_tokens()
    loaded = load_export(tmp_path / "again")
    with torch.no_grad(), Evaluator(model).shrunk(mask) as masked:
        torch.testing.assert_close(loaded(tokens).logits, masked(tokens).logits, atol=1e-5, rtol=1e-4)


def test_second_export_can_be_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    dense = tiny_model("llama-gqa")
    dense.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "pruned", draw(dense, [(4, 24), (3, 7), (4, 9), (2, 8)]))
    model = load_prunable(resolve(str(tmp_path / "pruned")), "float32", "cpu")
    decision = decide(tmp_path / "pruned", draw(model.module, [(2, 7), (1, 7), (2, 9), (2, 8)]))
    plan = gguf.plan(resolve(decision.model), decision, Options())
    assert plan.model_type == "deci" and not plan.stock


@pytest.mark.parametrize("overrides", [WIDTH_SEARCH, ()], ids=["widths", "units"])
def test_search_on_a_pruned_model_chains_its_ancestry(
    tmp_path: Path, small: Callable[..., Recipe], overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = small("budget.sparsity=0.4", *overrides)
    first = search(recipe, Path("first"))
    export_run(Path("first"), Path("unrecovered"))
    recover(Path("unrecovered"), Path("first-model"))
    second = search(replace(recipe, model="first-model"), Path("second"))
    export_run(Path("second"), Path("second-model"))
    assert first.ancestors == []
    (earlier,) = second.ancestors
    assert earlier["model"] == recipe.model and earlier["fingerprint"] == first.fingerprint
    assert earlier["sparsity"] == first.sparsity
    assert earlier["recovery"]["tokens"] == RECORD.tokens
    assert [step["model"] for step in ancestry(Path("second-model"))] == [recipe.model, str(tmp_path / "first-model")]
    assert verify(Path("second-model")).faults == [] and verify(Path("second")).faults == []
    card = Path("second-model/README.md").read_text()
    assert first.fingerprint in card and f"{second.sparsity:.1%} of the rest" in card
    assert "The result was trained on 1,000 tokens." in card


def test_ancestry_refuses_a_damaged_record(tmp_path: Path, saved: Path) -> None:
    export(saved, tmp_path / "pruned", draw(tiny_model("llama-gqa"), [(4, 24), (3, 7), (4, 9), (2, 8)]))
    record = tmp_path / "pruned" / DECISION_RECORD
    record.write_text(record.read_text().replace('"steps": 10', '"steps": 11'))
    with refused(DECISION_RECORD, "checksum"):
        ancestry(tmp_path / "pruned")


def test_dense_model_has_no_ancestry(saved: Path) -> None:
    assert ancestry(saved) == []
