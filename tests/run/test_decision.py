"""A saved decision is read back unchanged. A damaged one is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.messages import refused, says
from safetensors import safe_open
from safetensors.torch import save

from pgprune_cli.errors import UserError
from pgprune_cli.model.masks import LayerMask, RepairedBlock
from pgprune_cli.run.decision import LATER, Decision
from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD, RECIPE_FILE, REPAIR_FILE
from pgprune_cli.storage.records import checksum, read_record, write_record


def a_decision() -> Decision:
    """Return a decision for 3 layers: one unpruned, one pruned, one without attention."""
    ffn = torch.arange(10) % 3 == 0
    model_mask = (
        LayerMask(torch.ones(4, dtype=torch.bool), torch.ones(10, dtype=torch.bool)),
        LayerMask(torch.tensor([True, False, False, True]), ffn),
        LayerMask(torch.zeros(4, dtype=torch.bool), ~ffn),
    )
    recipe = "model: owner/name\nseed: 0\n"
    budget: dict[str, str | float] = {"measure": "flops", "kept": 2 / 3}
    counts, phases = (300, 600, 90), {"opening": 1.25, "steps": 1234.5}
    return Decision(
        *(model_mask, "owner/name", "f" * 64, 1 / 3, recipe, *counts, 0.1 + 0.2),
        budget=budget,
        dense_loss=0.1,
        phases=phases,
    )


def assert_equal(actual: Decision, expected: Decision) -> None:
    assert replace(actual, model_mask=()) == replace(expected, model_mask=())
    for layer, expected_layer in zip(actual.model_mask, expected.model_mask, strict=True):
        assert layer.attention.dtype == layer.ffn.dtype == torch.bool
        assert layer.attention.equal(expected_layer.attention) and layer.ffn.equal(expected_layer.ffn)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    a_decision().save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("loss", [None, 2.5])
def test_decision_is_read_back_equal(tmp_path, loss):
    decision = replace(a_decision(), heldout_loss=loss)
    decision.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [DECISION_RECORD, DECISION_MASKS]
    assert_equal(Decision.load(tmp_path), decision)


REPAIRED = {
    (1, "attention"): RepairedBlock(
        torch.randn(7, 4), None, {"q_proj.weight": torch.randn(4, 7), "k_proj.bias": torch.randn(4).bfloat16()}
    ),
    (1, "ffn"): RepairedBlock(torch.randn(7, 4).half(), torch.randn(7)),
    (2, "ffn"): RepairedBlock(torch.randn(2, 7, 3), None, {"experts.gate_up_proj": torch.randn(2, 6, 7)}),
}


def assert_same_repair(run: Path) -> None:
    repaired = Decision.load(run).repaired
    assert sorted(repaired) == sorted(REPAIRED)
    for key, own in REPAIRED.items():
        assert torch.equal(repaired[key].weight, own.weight) and repaired[key].weight.dtype == own.weight.dtype
        assert repaired[key].inner.keys() == own.inner.keys()
        assert all(torch.equal(repaired[key].inner[name], values) for name, values in own.inner.items())
        bias = repaired[key].bias
        assert bias is own.bias if own.bias is None or bias is None else torch.equal(bias, own.bias)


def test_refitted_weights_are_read_back_equal_in_every_tensor_of_a_block(tmp_path):
    decision = replace(a_decision(), repaired=REPAIRED)
    decision.save(tmp_path)
    with safe_open(tmp_path / REPAIR_FILE, framework="pt") as file:
        assert {"layers.1.attention.weight", "layers.1.attention.q_proj.weight", "layers.1.ffn.bias"} < set(file.keys())
    assert_same_repair(tmp_path)
    replace(decision, repaired=Decision.load(tmp_path).repaired).save(tmp_path / "again")
    assert (tmp_path / "again" / REPAIR_FILE).read_bytes() == (tmp_path / REPAIR_FILE).read_bytes()


def test_a_changed_weight_of_a_repair_is_refused(tmp_path):
    replace(a_decision(), repaired=REPAIRED).save(tmp_path)
    content = bytearray((tmp_path / REPAIR_FILE).read_bytes())
    with safe_open(tmp_path / REPAIR_FILE, framework="pt") as file:
        wanted = file.get_tensor("layers.1.attention.q_proj.weight").numpy().tobytes()
    content[content.index(wanted) + 3] ^= 1
    (tmp_path / REPAIR_FILE).write_bytes(content)
    with refused(f"{tmp_path / REPAIR_FILE}: ", DECISION_RECORD):
        Decision.load(tmp_path)


def test_a_decision_of_version_1_is_read(tmp_path):
    """Its repair holds output projections only."""
    outputs = {key: RepairedBlock(own.weight, own.bias) for key, own in REPAIRED.items()}
    replace(a_decision(), repaired=outputs).save(tmp_path)
    record = read_record(tmp_path / DECISION_RECORD) | {"version": 1}
    write_record(tmp_path / DECISION_RECORD, {key: value for key, value in record.items() if key not in LATER})
    read = Decision.load(tmp_path)
    assert_equal(replace(read, repaired={}), replace(a_decision(), heldout_objective=None, best_step=None, phases={}))
    assert all(torch.equal(read.repaired[key].weight, own.weight) for key, own in outputs.items())
    assert not any(own.inner for own in read.repaired.values())


def test_seconds_by_phase_are_shown_in_their_order(run):
    assert Decision.load(run).seconds_by_phase() == "opening 1, steps 1,234"


def test_a_decision_without_phases_is_read(run):
    record = read_record(run / DECISION_RECORD)
    del record["phases"]
    write_record(run / DECISION_RECORD, record)
    assert Decision.load(run).phases == {}


def test_decision_record_shows_the_kept_counts_and_the_origin(run):
    from pgprune_cli import __version__

    record = json.loads((run / DECISION_RECORD).read_text())
    assert record["kept"] == [{"attention": 4, "ffn": 10}, {"attention": 2, "ffn": 4}, {"attention": 0, "ffn": 6}]
    assert record["pgprune"] == __version__
    assert record["masks_sha256"] == checksum(run / DECISION_MASKS)
    assert record["sparsity"] == 1 / 3 and record["recipe"].startswith("model: owner/name\n")


def test_saving_a_decision_twice_writes_the_same_bytes(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    a_decision().save(other)
    assert (other / DECISION_MASKS).read_bytes() == (run / DECISION_MASKS).read_bytes()
    assert (other / DECISION_RECORD).read_bytes() == (run / DECISION_RECORD).read_bytes()


@pytest.mark.parametrize("missing", [DECISION_MASKS, DECISION_RECORD])
def test_decision_is_refused_when_a_file_is_missing(run, missing):
    (run / missing).unlink()
    with refused(f"{run}: ", "pgprune runs"):
        Decision.load(run)
    (run / RECIPE_FILE).touch()
    with refused(f"{run}: ", "not finished", f"pgprune search {run}/recipe.yaml --out {run}"):
        Decision.load(run)


def test_decision_is_refused_when_the_run_does_not_exist(tmp_path):
    with refused(f"{tmp_path / 'nowhere'}: no such run directory"):
        Decision.load(tmp_path / "nowhere")


def test_decision_is_refused_when_the_masks_are_damaged(run):
    whole = (run / DECISION_MASKS).read_bytes()
    messages = set()
    for damaged in (whole[:-1], b"", whole + b"\0", *(_flipped(whole, place) for place in range(0, len(whole), 7))):
        (run / DECISION_MASKS).write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            Decision.load(run)
        messages.add(str(caught.value))
    (message,) = messages
    says(message, f"{run / DECISION_MASKS}: ", DECISION_RECORD)


def _flipped(content: bytes, place: int) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 1
    return bytes(damaged)


def test_decision_is_refused_with_the_masks_of_another_decision(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    replace(a_decision(), model_mask=tuple(reversed(a_decision().model_mask))).save(other)
    (run / DECISION_MASKS).write_bytes((other / DECISION_MASKS).read_bytes())
    with refused(f"{run / DECISION_MASKS}: ", DECISION_RECORD):
        Decision.load(run)


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
def test_decision_is_refused_when_a_key_is_missing(run, key):
    record = read_record(run / DECISION_RECORD)
    del record[key]
    write_record(run / DECISION_RECORD, record)
    with refused(f"{run / DECISION_RECORD}: ", f"'{key}' is missing"):
        Decision.load(run)


def test_decision_is_refused_when_a_layer_has_no_mask(run):
    masks = save({"layers.0.attention": torch.ones(4, dtype=torch.bool)})
    (run / DECISION_MASKS).write_bytes(masks)
    record = read_record(run / DECISION_RECORD) | {"masks_sha256": checksum(run / DECISION_MASKS)}
    write_record(run / DECISION_RECORD, record)
    with refused(f"{run / DECISION_RECORD}: ", "'layers.0.ffn' is missing"):
        Decision.load(run)


@pytest.mark.parametrize(("content", "fact"), [("{", "cannot be read"), ("[]", "got a list")])
def test_decision_is_refused_when_the_record_is_damaged(run, content, fact):
    (run / DECISION_RECORD).write_text(content)
    with refused(f"{run / DECISION_RECORD}: ", fact):
        Decision.load(run)


def test_decision_is_absent_when_the_search_is_killed_between_its_two_files(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pgprune_cli.run.decision.write_record", killed)
        with pytest.raises(KeyboardInterrupt):
            a_decision().save(tmp_path)
    with refused(str(tmp_path), "not a run directory"):
        Decision.load(tmp_path)
    a_decision().save(tmp_path)
    assert_equal(Decision.load(tmp_path), a_decision())


def test_decision_is_refused_when_a_digit_of_the_record_changes(run):
    text = (run / DECISION_RECORD).read_text()
    (run / DECISION_RECORD).write_text(text.replace("0.333", "0.433", 1))
    assert text != (run / DECISION_RECORD).read_text()
    with refused(f"{run / DECISION_RECORD}: ", "checksum"):
        Decision.load(run)


def test_decision_is_refused_without_a_checksum(run):
    record = read_record(run / DECISION_RECORD)
    (run / DECISION_RECORD).write_text(json.dumps(record))
    with refused(f"{run / DECISION_RECORD}: ", "checksum"):
        Decision.load(run)


def test_decision_is_refused_when_a_newer_pgprune_wrote_it(run):
    write_record(run / DECISION_RECORD, read_record(run / DECISION_RECORD) | {"version": 4})
    with refused(f"{run / DECISION_RECORD}: ", "newer pgprune", "version 4", "reads 3"):
        Decision.load(run)
