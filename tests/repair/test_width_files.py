"""Widths on disk: what was solved, bit for bit, mapped; solved again where a file is gone, damaged or another's."""

from __future__ import annotations

import copy
import errno
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.blocks import BLOCKS, LAYERS, batches
from helpers.contexts import context_of
from helpers.models import tiny_model
from helpers.processes import run_together
from helpers.units import chain_units, random_scores, ranks_of
from torch import Tensor, nn

from pgprune_cli.distributed import Ranks
from pgprune_cli.errors import RunError, UserError
from pgprune_cli.forward.curvature import error_roots
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.repair import width_files
from pgprune_cli.repair.width_files import has_layer, load_layer, refuse_full_disk, remove_widths, save_layer
from pgprune_cli.repair.width_table import BlockWidths, WidthTable, solve_layers
from pgprune_cli.run.layout import WIDTHS_FOLDER
from pgprune_cli.search import context as contexts
from pgprune_cli.search import table as job


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request) -> nn.Module:
    return tiny_model("llama-biased").to(request.param)


def solve(model: nn.Module, damping: float = 1e-2, **options) -> Iterator[tuple[int, dict[str, BlockWidths]]]:
    """Solve layers of the model at every width of random chains."""
    prunable = PrunableModel.of(model)
    _, units = chain_units(prunable.shape)
    return solve_layers(prunable, ranks_of(prunable.shape, units), units, batches(), damping, solve=True, **options)


@pytest.fixture
def saved(model: nn.Module, tmp_path: Path) -> Path:
    for index, blocks in solve(model, only=[1]):
        save_layer(tmp_path, index, blocks, "mine")
    return tmp_path


def test_layers_are_written_while_the_next_is_solved_and_at_most_one_waits(tmp_path, monkeypatch) -> None:
    written: list[int] = []
    began = [threading.Event() for _ in range(4)]

    def save(run: Path, index: int, blocks: object, identity: str) -> None:
        assert index == 3 or began[index + 1].wait(timeout=20), "the next layer is only solved when this is written"
        written.append(index)

    def layers() -> Iterator[tuple[int, dict[str, BlockWidths]]]:
        for index in range(4):
            began[index].set()
            assert len(written) >= index - 1
            yield index, {}

    monkeypatch.setattr(width_files, "save_layer", save)
    width_files.save_layers(tmp_path, layers(), "mine", lambda: None)
    assert written == [0, 1, 2, 3]


def test_disk_that_fills_up_stops_the_layers_after_the_next(tmp_path: Path, monkeypatch) -> None:
    solved: list[int] = []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def layers() -> Iterator[tuple[int, dict[str, BlockWidths]]]:
        for index in range(4):
            solved.append(index)
            yield index, {}

    monkeypatch.setattr(width_files, "save_layer", full)
    with pytest.raises(OSError, match="No space left"):
        width_files.save_layers(tmp_path, layers(), "mine", lambda: None)
    assert solved == [0, 1]


def the_file(run: Path) -> Path:
    (path,) = (run / WIDTHS_FOLDER).iterdir()
    return path


def test_what_is_read_is_what_was_solved_bit_for_bit_and_mapped(model: nn.Module, saved: Path) -> None:
    ((_, solved),) = solve(model, only=[1])
    actual = load_layer(saved, 1)
    assert list(actual) == list(solved) == ["attention", "ffn"]
    for name, block in solved.items():
        assert torch.equal(actual[name].errors, block.errors)
        assert torch.equal(actual[name].order, block.order)
        assert list(actual[name].weights) == list(block.weights) != []
        for kept, weight in block.weights.items():
            assert actual[name].weights[kept].dtype == weight.dtype == next(model.parameters()).dtype
            assert torch.equal(actual[name].weights[kept], weight)
    if sys.platform == "linux":
        assert str(the_file(saved)) in Path("/proc/self/maps").read_text()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


def relabelled(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"attention.1"', b'"attention.2"', 1))


HARMS = (truncated, flipped, relabelled, lambda path: path.write_bytes(b""), Path.unlink)


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_not_whole_is_not_there(saved: Path, harm) -> None:
    assert has_layer(saved, 1, "mine")
    harm(the_file(saved))
    assert not has_layer(saved, 1, "mine")


def test_neither_is_another_searchs(saved: Path) -> None:
    assert not has_layer(saved, 1, "another")
    assert not has_layer(saved, 0, "mine")
    with pytest.raises(UserError, match="layer-00000"):
        load_layer(saved, 0)


def test_a_disk_that_is_too_small_is_refused_beforehand(saved: Path, monkeypatch) -> None:
    """Of 4 layers' files one is there."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 30 * 10**9))
    refuse_full_disk(saved, 4, 40 * 10**9)
    with pytest.raises(RunError, match=r"33\.0 GB.*30\.0 GB"):
        refuse_full_disk(saved, 4, 44 * 10**9)


def test_what_is_finished_leaves_nothing(saved: Path) -> None:
    (saved / WIDTHS_FOLDER / ".layer-00002.safetensors.1.tmp").write_bytes(b"of one that was killed")
    remove_widths(saved)
    remove_widths(saved)
    assert list(saved.iterdir()) == []


# --- the table of a search

RECIPE = load(find("demo"), [])


def table(
    model: nn.Module,
    run: Path,
    recipe: Recipe = RECIPE,
    ranks: Ranks = Ranks(),  # noqa: B008
    text: list[Tensor] | None = None,
    fingerprint: str = "fingerprint",
    seed: int = 0,
) -> WidthTable:
    """Solve the table of a search of the tiny model, on the batches of this file."""
    run.mkdir(exist_ok=True)
    context = replace(context_of(recipe, PrunableModel.of(model), run), ranks=ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contexts, "repair_batches", lambda *_: text or batches())
        shape = context.model.shape
        _, units = chain_units(shape, scores=random_scores(shape, seed))
        return job.solve_table(context, ranks_of(shape, units), units, fingerprint)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The layers that were solved, call after call."""
    calls = []

    def recorded(*arguments, **options):
        calls.append(list(options["only"]))
        return solve_layers(*arguments, **options)

    monkeypatch.setattr(job, "solve_layers", recorded)
    return calls


def assert_same(left: WidthTable, right: WidthTable) -> None:
    for key in BLOCKS:
        assert torch.equal(left.errors[key], right.errors[key])
        assert torch.equal(left.orders[key], right.orders[key])
        assert list(left.repaired[key]) == list(right.repaired[key])
        for kept, output in left.repaired[key].items():
            assert torch.equal(output.weight, right.repaired[key][kept].weight)
            assert output.bias is right.repaired[key][kept].bias


def test_a_table_is_solved_once(model: nn.Module, tmp_path: Path, solved) -> None:
    first = table(model, tmp_path)
    assert_same(table(model, tmp_path), first)
    assert_same(WidthTable.of(PrunableModel.of(model), dict(solve(model, RECIPE.repair.damping))), first)
    assert solved == [list(range(LAYERS))]


def test_what_is_damaged_is_solved_again_and_nothing_else(model: nn.Module, tmp_path: Path, solved) -> None:
    first = table(model, tmp_path)
    before = {key: {kept: out.weight.clone() for kept, out in outs.items()} for key, outs in first.repaired.items()}
    flipped(tmp_path / WIDTHS_FOLDER / "layer-00002.safetensors")
    (tmp_path / WIDTHS_FOLDER / "layer-00000.safetensors").unlink()
    again = table(model, tmp_path)
    assert solved == [list(range(LAYERS)), [0, 2]]
    for key, repaired in again.repaired.items():
        assert all(torch.equal(output.weight, before[key][kept]) for kept, output in repaired.items())


@pytest.mark.parametrize("changed", ["recipe", "text", "model", "chain"])
def test_of_another_search_everything_is_solved(changed: str, model: nn.Module, tmp_path: Path, solved) -> None:
    table(model, tmp_path)
    recipe, text, fingerprint, seed = RECIPE, batches(), "fingerprint", 0
    if changed == "recipe":
        recipe = replace(RECIPE, repair=replace(RECIPE.repair, damping=0.5))
    elif changed == "text":
        text[0][0, 0] += 1
    elif changed == "model":
        fingerprint = "another"
    else:
        seed = 1
    table(model, tmp_path, recipe, text=text, fingerprint=fingerprint, seed=seed)
    assert solved == [list(range(LAYERS))] * 2


@pytest.mark.parametrize("world", [2, 3, 7])
def test_shares_of_processes_make_the_same_table(
    world: int, model: nn.Module, tmp_path: Path, solved, monkeypatch
) -> None:
    monkeypatch.setattr(contexts, "repair_batches", lambda *_: batches())  # not a patch by each thread
    # Of a cached property, Python 3.11 lets one thread at a time compute the value.
    roots = property(lambda context: error_roots(context.model, context.repair_batches, ranks=context.ranks))
    monkeypatch.setattr(contexts.SearchContext, "error_roots", roots)
    alone = table(model, tmp_path / "alone")
    run_together(world, lambda ranks: table(copy.deepcopy(model), tmp_path / "together", ranks=ranks))
    assert_same(table(model, tmp_path / "together"), alone)
    assert sorted(index for call in solved[1:] for index in call) == list(range(LAYERS))


def test_nothing_is_solved_on_a_disk_that_is_too_small(model: nn.Module, tmp_path: Path, solved, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 1000))
    with pytest.raises(RunError, match="--out"):
        table(model, tmp_path)
    assert (solved, list(tmp_path.iterdir())) == ([], [])
