"""A decision comes back as it was, or is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.messages import says
from safetensors.torch import save

from pgprune_cli.errors import UserError
from pgprune_cli.model.masks import LayerMask
from pgprune_cli.run.decision import Decision
from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD, RECIPE_FILE
from pgprune_cli.storage.records import checksum, read_record, write_record


def a_decision() -> Decision:
    """Of 3 layers: one whole, one thinned, one without attention."""
    ffn = torch.arange(10) % 3 == 0
    keep = (
        LayerMask(torch.ones(4, dtype=torch.bool), torch.ones(10, dtype=torch.bool)),
        LayerMask(torch.tensor([True, False, False, True]), ffn),
        LayerMask(torch.zeros(4, dtype=torch.bool), ~ffn),
    )
    recipe = "model: owner/name\nseed: 0\n"
    budget: dict[str, str | float] = {"measure": "flops", "kept": 2 / 3}
    return Decision(keep, "owner/name", "f" * 64, 1 / 3, recipe, 300, 600, 90, 0.1 + 0.2, budget=budget, dense_loss=0.1)


def assert_same(one: Decision, other: Decision) -> None:
    assert replace(one, model_mask=()) == replace(other, model_mask=())
    assert len(one.model_mask) == len(other.model_mask)
    for mine, its in zip(one.model_mask, other.model_mask, strict=True):
        assert mine.attention.dtype == mine.ffn.dtype == torch.bool
        assert mine.attention.equal(its.attention) and mine.ffn.equal(its.ffn)


def refused(run: Path) -> str:
    with pytest.raises(UserError) as caught:
        Decision.load(run)
    return str(caught.value)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    a_decision().save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("loss", [None, 2.5])
def test_round_trip(tmp_path, loss):
    decision = replace(a_decision(), heldout_loss=loss)
    decision.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [DECISION_RECORD, DECISION_MASKS]
    assert_same(Decision.load(tmp_path), decision)


def test_the_record_can_be_read_by_people(run):
    from pgprune_cli import __version__

    record = json.loads((run / DECISION_RECORD).read_text())
    assert record["kept"] == [{"attention": 4, "ffn": 10}, {"attention": 2, "ffn": 4}, {"attention": 0, "ffn": 6}]
    assert record["pgprune"] == __version__
    assert record["masks_sha256"] == checksum(run / DECISION_MASKS)
    assert record["sparsity"] == 1 / 3 and record["recipe"].startswith("model: owner/name\n")


def test_the_same_decision_gives_the_same_bytes(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    a_decision().save(other)
    assert (other / DECISION_MASKS).read_bytes() == (run / DECISION_MASKS).read_bytes()
    assert (other / DECISION_RECORD).read_bytes() == (run / DECISION_RECORD).read_bytes()


@pytest.mark.parametrize("missing", [DECISION_MASKS, DECISION_RECORD])
def test_a_missing_file_is_refused(run, missing):
    (run / missing).unlink()
    says(refused(run), f"{run}: ", "pgprune runs")
    (run / RECIPE_FILE).touch()
    says(refused(run), f"{run}: ", "not finished", f"pgprune search {run}/recipe.yaml --out {run}")


def test_no_run_at_all_is_refused(tmp_path):
    assert refused(tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'}: no such run directory")


def test_every_damage_to_the_masks_is_refused(run):
    whole = (run / DECISION_MASKS).read_bytes()
    words = (
        f"{run / DECISION_MASKS}: damaged, or not the masks that decision.json describes; remove both and search again"
    )
    for damaged in (whole[:-1], b"", whole + b"\0", *(_flipped(whole, place) for place in range(0, len(whole), 7))):
        (run / DECISION_MASKS).write_bytes(damaged)
        assert refused(run) == words


def _flipped(content: bytes, place: int) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 1
    return bytes(damaged)


def test_masks_of_another_decision_are_refused(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    replace(a_decision(), model_mask=tuple(reversed(a_decision().model_mask))).save(other)
    (run / DECISION_MASKS).write_bytes((other / DECISION_MASKS).read_bytes())
    assert "not the masks that decision.json describes" in refused(run)


@pytest.mark.parametrize(
    "key",
    [
        "model",
        "fingerprint",
        "sparsity",
        "recipe",
        "steps",
        "forward_passes",
        "heldout_loss",
        "budget",
        "dense_loss",
        "repair_sha256",
    ],
)
def test_a_missing_key_is_refused(run, key):
    record = read_record(run / DECISION_RECORD)
    del record[key]
    write_record(run / DECISION_RECORD, record)
    assert refused(run) == f"{run / DECISION_RECORD}: '{key}' is missing; the file is not a whole decision"


def test_a_layer_without_masks_is_refused(run):
    masks = save({"layers.0.attention": torch.ones(4, dtype=torch.bool)})
    (run / DECISION_MASKS).write_bytes(masks)
    record = read_record(run / DECISION_RECORD) | {"masks_sha256": checksum(run / DECISION_MASKS)}
    write_record(run / DECISION_RECORD, record)
    assert refused(run) == f"{run / DECISION_RECORD}: 'layers.0.ffn' is missing; the file is not a whole decision"


@pytest.mark.parametrize(("content", "words"), [("{", "cannot be read"), ("[]", "holds a list, not an object")])
def test_a_damaged_record_is_refused(run, content, words):
    (run / DECISION_RECORD).write_text(content)
    assert refused(run).startswith(f"{run / DECISION_RECORD}: {words}")


def test_a_search_killed_between_the_two_files_leaves_no_decision(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pgprune_cli.run.decision.write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            a_decision().save(tmp_path)
    assert "not a run directory" in refused(tmp_path)
    a_decision().save(tmp_path)
    assert_same(Decision.load(tmp_path), a_decision())


def test_a_changed_digit_of_the_record_is_refused(run):
    text = (run / DECISION_RECORD).read_text()
    (run / DECISION_RECORD).write_text(text.replace("0.333", "0.433", 1))
    assert text != (run / DECISION_RECORD).read_text()
    says(refused(run), f"{run / DECISION_RECORD}: ", "checksum")


def test_a_decision_without_a_checksum_is_refused(run):
    record = read_record(run / DECISION_RECORD)
    (run / DECISION_RECORD).write_text(json.dumps(record))
    says(refused(run), f"{run / DECISION_RECORD}: ", "checksum")


def test_a_decision_of_a_newer_pgprune_is_refused(run):
    write_record(run / DECISION_RECORD, read_record(run / DECISION_RECORD) | {"version": 2})
    assert refused(run) == f"{run / DECISION_RECORD}: of a newer pgprune (version 2, this one reads 1); upgrade pgprune"
