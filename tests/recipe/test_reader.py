"""Recipes are read strictly, faults are refused with file, line and key, and the shipped recipes are valid."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from helpers.messages import refused, says
from hypothesis import given, settings
from hypothesis import strategies as st

from pgprune_cli.errors import UserError
from pgprune_cli.recipe import schema as recipe
from pgprune_cli.recipe.contradictions import contradictions
from pgprune_cli.recipe.reader import UnknownKeys, dump, find, load, name_of, parse, summary
from pgprune_cli.recipe.schema import Recipe

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = "model: demo\ncalibration: {corpus: demo}\nbudget: {sparsity: 0.5}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test in an empty folder."""
    monkeypatch.chdir(tmp_path)


def faults(text: str | bytes, *overrides: str) -> list[str]:
    """Return the lines of the error with which the recipe x.yaml with this text is refused."""
    Path("x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        load(Path("x.yaml"), overrides)
    return str(caught.value).splitlines()


def read(text: str, *overrides: str) -> Recipe:
    Path("x.yaml").write_text(text, encoding="utf-8")
    return load(Path("x.yaml"), overrides)


# --- what is read


def test_recipe_has_the_defaults_of_the_schema() -> None:
    got = read(MINIMAL)
    assert (got.dtype, got.device, got.seed) == ("bfloat16", "auto", 0)
    assert got.calibration == recipe.CalibrationSettings(
        corpus="demo", windows=120_000, seqlen=128, batch=8, heldout=32
    )
    assert got.units.families == ("attention", "ffn")
    assert got.budget == recipe.BudgetSettings(
        sparsity=0.5, measure="parameters", scope="global", context=2048, min_keep=0.0, ffn_multiple=1
    )
    assert got.scores == recipe.ScoreSettings(metric="obs", windows=128, seqlen=1024)
    assert got.start == recipe.StartSettings(mapping="sigmap", temperature=1.0)
    assert got.search == recipe.SearchSettings(
        policy="widths",
        objective="loss",
        forward_passes=320,
        masks_per_step=16,
        estimator="rloo",
        learning_rate=0.0,
        schedule="cosine",
        checkpoint_every=100,
        evaluate_every=0,
    )
    assert got.repair == recipe.RepairSettings(
        method="sublayer", epochs=3, last_layers=1, windows=384, sampled_windows=0, damping=1e-3
    )
    assert got.evaluation == recipe.EvaluationSettings(corpora=("wikitext2",), seqlen=(128, 2048))


@pytest.mark.parametrize(("former", "last_layers"), [("outputs", 0), ("predictions", 1)])
def test_a_key_of_an_earlier_version_is_read_as_the_key_of_today(former: str, last_layers: int) -> None:
    assert read(MINIMAL + f"repair: {{last_layer: {former}}}").repair.last_layers == last_layers
    with refused("repair.last_layers: ", "given twice"):
        read(MINIMAL + f"repair: {{last_layers: 2, last_layer: {former}}}")
    with refused("repair.last_layers: ", "expected an integer", "both"):
        read(MINIMAL + "repair: {last_layer: both}")


@pytest.mark.parametrize("text", ["2e-3", "2E-3", "0.002", "2.0e-3", ".002", "+2e-3"])
def test_float_is_read_in_every_spelling(text: str) -> None:
    assert read(MINIMAL + f"search: {{learning_rate: {text}}}").search.learning_rate == 0.002


def test_integer_is_read_as_a_float_when_the_key_is_a_float() -> None:
    rate = read(MINIMAL + "search: {learning_rate: 1}").search.learning_rate
    assert rate == 1.0
    assert type(rate) is float


def test_relative_paths_are_not_changed() -> None:
    got = read("model: ./m\ncalibration: {corpus: ../c.txt}\nbudget: {sparsity: 0}\n")
    assert (got.model, got.calibration.corpus) == ("./m", "../c.txt")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:10", "cuda:0,cuda:1"])
def test_device_is_read(device: str) -> None:
    assert read(MINIMAL + f"device: {device}").device == device


@pytest.mark.parametrize(
    "families", [("ffn",), ("layer",), ("attention-block", "ffn-block"), ("attention", "ffn-block")]
)
def test_families_are_read_when_they_share_no_parameters(families: tuple[str, ...]) -> None:
    assert read(MINIMAL, f"units.families=[{', '.join(families)}]", UNITS).units.families == families


def test_byte_order_mark_and_windows_line_ends_are_accepted() -> None:
    Path("x.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load(Path("x.yaml")).model == "demo"


# --- what is refused


UNITS = "search.policy=units"


@pytest.mark.parametrize(
    ("families", "suggestion"),
    [("attention, ffn", "attention"), ("ffn-block, attention-block", "attention-block"), ("ffn", "attention")],
)
def test_a_kv_cache_budget_is_refused_for_ffn_families(families: str, suggestion: str) -> None:
    ffn = next(name for name in families.split(", ") if name.startswith("ffn"))
    with refused("x.yaml: budget.measure", ffn, f"[{suggestion}]"):
        read(MINIMAL + f"units: {{families: [{families}]}}", "budget.measure=kv-cache", UNITS)


@pytest.mark.parametrize("families", ["[attention]", "[attention-block]", "[layer]"])
def test_attention_and_whole_layers_have_a_kv_cache(families: str) -> None:
    got = read(MINIMAL, "budget.measure=kv-cache", f"units.families={families}", "budget.context=4096", UNITS)
    assert (got.budget.measure, got.budget.context) == ("kv-cache", 4096)


@pytest.mark.parametrize("families", ["attention, ffn-block", "layer"])
def test_min_keep_is_refused_for_whole_blocks(families: str) -> None:
    with refused("x.yaml: budget.min_keep", families.split(", ")[-1]):
        read(MINIMAL, f"units.families=[{families}]", "budget.min_keep=0.1", UNITS)


def test_fewer_forward_passes_than_one_step_are_refused() -> None:
    with refused("search.forward_passes: 8", "search.masks_per_step 16"):
        load(find("demo"), ["search.forward_passes=8"])
    for passes in (0, 16):
        assert load(find("demo"), [f"search.forward_passes={passes}"]).search.forward_passes == passes


def test_min_keep_is_refused_when_it_exceeds_what_the_sparsity_allows() -> None:
    with refused("x.yaml: budget.min_keep", "0.4", "budget.sparsity 0.7"):
        read(MINIMAL, "budget.sparsity=0.7", "budget.min_keep=0.4")
    assert read(MINIMAL, "budget.sparsity=0.7", "budget.min_keep=0.3").budget.min_keep == 0.3


@pytest.mark.parametrize("families", ["attention-block", "attention, ffn-block", "layer"])
def test_whole_blocks_are_refused_by_a_width_search(families: str) -> None:
    with refused("x.yaml: units.families", families.split(", ")[-1], "search.policy"):
        read(MINIMAL, f"units.families=[{families}]")
    assert read(MINIMAL, f"units.families=[{families}]", UNITS).search.policy == "units"


@pytest.mark.parametrize("families", ["attention, ffn-block", "layer"])
def test_whole_blocks_are_refused_by_a_budget_per_layer(families: str) -> None:
    overrides = [f"units.families=[{families}]", "budget.scope=per-layer", UNITS]
    with refused("x.yaml: budget.scope", families.split(", ")[-1]):
        read(MINIMAL, *overrides)
    assert read(MINIMAL, *overrides, "budget.sparsity=0").budget.scope == "per-layer"


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_rounded_weights_are_refused_by_a_metric_with_gradients(weight_format: str) -> None:
    with refused("x.yaml: scores.metric", "taylor", weight_format):
        read(MINIMAL, "scores.metric=taylor", f"weight_format={weight_format}")
    assert read(MINIMAL, f"weight_format={weight_format}").weight_format == weight_format


def test_fp8_weights_are_refused_by_a_latency_budget() -> None:
    with refused("x.yaml: budget.measure", "fp8"):
        read(MINIMAL, "budget.measure=latency", "weight_format=fp8")
    assert read(MINIMAL, "budget.measure=latency", "weight_format=int8").budget.measure == "latency"


def test_the_metrics_with_gradients_are_those_that_need_them() -> None:
    from pgprune_cli.scores.metrics import NEEDS

    assert {name for name, need in NEEDS.items() if need == "gradients"} == set(recipe.GRADIENT_METRICS)


def test_layers_kept_whole_are_refused_when_the_budget_contradicts_them() -> None:
    with refused("x.yaml: budget.keep_first", "0.7", "budget.sparsity 0.4"):
        read(MINIMAL, "budget.sparsity=0.4", "budget.keep_first=0.4", "budget.keep_last=0.3")
    with refused("x.yaml: budget.keep_last", "per-layer"):
        read(MINIMAL, "budget.scope=per-layer", "budget.keep_last=0.1")
    assert read(MINIMAL, "budget.sparsity=0.3", "budget.keep_first=0.4", "budget.keep_last=0.3").budget.keep_last == 0.3


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["teacher=cached"], "top_k"),
        (["teacher=cached", "top_k=8", "hidden=0.5"], "hidden"),
        (["turns=assistant"], "turns"),
        (["tokens=1000", "batch=4", "seqlen=256"], "tokens"),
    ],
)
def test_settings_of_a_recovery_are_refused_when_they_contradict_each_other(overrides: list[str], key: str) -> None:
    with refused(f"x.yaml: recover.{key}"):
        read(MINIMAL, *(f"recover.{override}" for override in overrides))


@pytest.mark.parametrize("written", ["1", '"true"', "maybe"])
def test_switch_refuses_all_but_booleans(written: str) -> None:
    with refused("recover.gradient_checkpointing: ", "true or false"):
        read(MINIMAL + f"recover: {{gradient_checkpointing: {written}}}\n")
    assert read(MINIMAL + "recover: {gradient_checkpointing: yes}\n").recover.gradient_checkpointing is True


def test_the_text_of_a_recovery_may_be_empty_and_no_other() -> None:
    assert read(MINIMAL + 'recover: {corpus: ""}\n').recover.corpus == ""
    with refused("calibration.corpus", "expected text"):
        read(MINIMAL, 'calibration.corpus=""')


def test_cached_teacher_and_conversations_are_accepted() -> None:
    overrides = ["teacher=cached", "top_k=8", "turns=assistant", "corpus=chats.jsonl", "train=lora", "lora_rank=4"]
    got = read(MINIMAL, *(f"recover.{override}" for override in overrides)).recover
    assert (got.teacher, got.top_k, got.turns, got.corpus) == ("cached", 8, "assistant", "chats.jsonl")


def test_contradictions_have_one_line_each() -> None:
    assert len(faults(MINIMAL, "budget.measure=kv-cache", "budget.min_keep=0.6")) == 2


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("forward_passes: 3", ["forward_passes: ", "unknown key", "search.forward_passes"]),
        ("forwrads: 3", ["forwrads: ", "unknown key", "search.forward_passes"]),
        ("search: {forwrads: 3}", ["search.forwrads: ", "unknown key", "search.forward_passes"]),
        ("searhc: {forward_passes: 3}", ["searhc: ", "unknown key", "search"]),
        ("extend: _base", ["extend: ", "unknown key", "extends"]),
        (
            "search: {seqlen: 3}",
            [
                "search.seqlen: ",
                "unknown key",
                "scores.seqlen, recover.seqlen or evaluation.seqlen",
            ],
        ),
        (
            "evaluation: {corpus: demo}",
            ["evaluation.corpus: ", "unknown key", "evaluation.corpora, calibration.corpus or recover.corpus"],
        ),
        ("calibration: {corpora: [demo]}", ["calibration: ", "twice", "line 2"]),
        ("scores: {seqlne: 3}", ["scores.seqlne: ", "unknown key", "scores.seqlen"]),
        ("start: {zzz: 3}", ["start.zzz: ", "unknown key", "mapping or temperature"]),
        ("search: {forward_passes: many}", ["search.forward_passes: ", "integer", "text 'many'"]),
        ("search: {forward_passes: '3'}", ["search.forward_passes: ", "integer", "text '3'"]),
        ("search: {forward_passes: true}", ["search.forward_passes: ", "integer", "the boolean true"]),
        ("search: {forward_passes: 1.5}", ["search.forward_passes: ", "integer", "got 1.5"]),
        ("search: {forward_passes: 1e3}", ["search.forward_passes: ", "integer", "got 1e3"]),
        ("search: {forward_passes: [3]}", ["search.forward_passes: ", "integer", "a list"]),
        ("search: {forward_passes: {a: 3}}", ["search.forward_passes: ", "integer", "a mapping"]),
        ("search: {forward_passes: }", ["search.forward_passes: ", "integer", "nothing"]),
        ("search: {forward_passes: -1}", ["search.forward_passes: ", ">= 0", "got -1"]),
        ("search: {masks_per_step: 1}", ["search.masks_per_step: ", ">= 2", "got 1"]),
        ("search: {masks_per_step: 2147483648}", ["search.masks_per_step: ", "< 2147483648", "got 2147483648"]),
        ("search: {learning_rate: -1}", ["search.learning_rate: ", ">= 0", "got -1.0"]),
        ("search: {learning_rate: yes}", ["search.learning_rate: ", "number", "the boolean yes"]),
        ("search: {learning_rate: nan}", ["search.learning_rate: ", "number", "text 'nan'"]),
        ("search: {learning_rate: .nan}", ["search.learning_rate: ", "number", "text '.nan'"]),
        ("search: {learning_rate: .inf}", ["search.learning_rate: ", "number", "text '.inf'"]),
        ("search: {learning_rate: 1e999}", ["search.learning_rate: ", "number", "text '1e999'"]),
        ("search: {estimator: rlo}", ["search.estimator: ", "paper or rloo", "text 'rlo'", "rloo"]),
        ("search: {schedule: 3}", ["search.schedule: ", "cosine or constant", "got 3"]),
        ("seed: -1", ["seed: ", "0 <= value < 4294967296", "got -1"]),
        ("dtype: float61", ["dtype", "float16 or bfloat16", "'float61'", "float16?"]),
        ("device: gpu", ["device: ", "auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1", "text 'gpu'"]),
        (
            "device: cuda:0,cuda:0",
            ["device: ", "auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1", "text 'cuda:0,cuda:0'"],
        ),
        ("search: 3", ["search: ", "keys with values", "got 3"]),
        ("search:", ["search: ", "keys with values", "nothing"]),
        ("units: {families: []}", ["units.families: ", "at least one item", "an empty list"]),
        ("units: {families: [ffn, ffn]}", ["units.families: ", "twice"]),
        ("units: {families: ffn}", ["units.families: ", "list such as [a, b]", "text 'ffn'"]),
        (
            "units: {families: [fnn]}",
            ["units.families: ", "attention, ffn, attention-block, ffn-block or layer", "text 'fnn'", "ffn"],
        ),
        ("units: {families: [attention-block, ffn, attention]}", ["units.families: ", "attention-block and attention"]),
        ("units: {families: [ffn-block, ffn]}", ["units.families: ", "ffn-block and ffn"]),
        ("units: {families: [layer, attention]}", ["units.families: ", "layer and attention"]),
        ("evaluation: {corpora: [7]}", ["evaluation.corpora: ", "text", "got 7", "quotes"]),
        ("evaluation: {corpora: ['']}", ["evaluation.corpora: ", "text", "text ''"]),
        (
            "evaluation: {corpora: [demo, 'wikitext2=']}",
            ["evaluation.corpora: ", "corpus name or NAME=FILE", "text 'wikitext2='"],
        ),
        ("evaluation: {corpora: ['=a.txt']}", ["evaluation.corpora: ", "corpus name or NAME=FILE", "text '=a.txt'"]),
        ("evaluation: {seqlen: [128, 1]}", ["evaluation.seqlen: ", ">= 2", "got 1"]),
        ("model: other", ["model: ", "twice", "line 1"]),
        ("? [a]\n: 3", ["a recipe: ", "key", "a list"]),
        ("extends: 3", ["extends: ", "text", "got 3", "quotes"]),
        ("seed: !!int '3'", ["cannot be read as YAML", "anchors, aliases and tags"]),
        ("seed: &a 3", ["cannot be read as YAML", "anchors, aliases and tags"]),
        ("seed: *a", ["cannot be read as YAML", "anchors, aliases and tags"]),
        ("!!python/name:os.system x: 3", ["cannot be read as YAML", "anchors, aliases and tags"]),
        ("seed: a: 3", ['put a value with ": " in quotes']),
        ("seed: [3", ["cannot be read as YAML", "','"]),
        ("\tseed: 3", ["indent with spaces, not tabs"]),
        ("seed:\t3", ["indent with spaces, not tabs"]),
        ("seed:3", ['write "seed: 3", with a space']),
        ("seed:3\ndevice: cpu", ['write "seed: 3", with a space']),
        ("search: forward_passes:3", ["search: ", '"forward_passes: 3", with a space']),
        ("evaluation: {seqlen: 128}", ["evaluation.seqlen: ", "list such as [128, 2048]", "got 128"]),
        ("seed: \x07", ["cannot be read as YAML", "U+0007"]),
    ],
)
def test_recipe_is_refused_with_one_line_for_one_fault(line: str, facts: list[str]) -> None:
    (message,) = faults(MINIMAL + line)
    says(message, f"x.yaml:4: {facts[0]}", *facts[1:])


@pytest.mark.parametrize("sparsity", ["1", "1.5", "-0.1"])
def test_sparsity_is_refused_when_it_is_not_a_fraction_below_one(sparsity: str) -> None:
    text = f"model: demo\ncalibration: {{corpus: demo}}\nbudget:\n  sparsity: {sparsity}\n"
    with refused("x.yaml:4: budget.sparsity: ", "0 <= value < 1", f"got {float(sparsity)}"):
        read(text)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (b"", ["x.yaml: ", "an empty file"]),
        (b"# only a comment\n", ["x.yaml: ", "an empty file"]),
        (b"- a\n", ["x.yaml: ", "a list"]),
        (b"model:demo\n", ["x.yaml: ", '"model: demo", with a space']),
        (b"model:demo\ndtype: auto\n", ["x.yaml:1: ", '"model: demo", with a space']),
        (b"just words\n", ["x.yaml: ", "'just words'"]),
        (b"model: demo\nseed: \xff\n", ["x.yaml:2: ", "UTF-8"]),
        (b"a: 1\n---\nb: 2\n", ["x.yaml:2: ", "another document"]),
        (b"a: [" * 3000, ["x.yaml:1: ", "nested too deeply"]),
    ],
    ids=[
        "empty",
        "comment",
        "list",
        "no space",
        "no space before line 2",
        "text",
        "not UTF-8",
        "two documents",
        "deep",
    ],
)
def test_file_is_refused_when_it_is_not_a_recipe(text: bytes, facts: list[str]) -> None:
    (message,) = faults(text)
    says(message, *facts)


def test_file_is_refused_when_it_cannot_be_read() -> None:
    Path("folder.yaml").mkdir()
    for name, *facts in [
        ("none.yaml", "none.yaml: ", "no such file"),
        ("folder.yaml", "folder.yaml: ", "Is a directory"),
        ("n" * 5000, "cannot be read"),
        ("a\0b", "a\\x00b: cannot be read"),
    ]:
        with refused(*facts):
            load(Path(name))


def test_recipe_is_refused_with_all_faults_in_order() -> None:
    text = (
        "forward_passes: 3\nsearch:\n  forwrads: 3\n  masks_per_step: 1\n  masks_per_step: 2\n"
        "budget: {sparsity: 1.5}\nunits: {families: 3}\n"
    )
    places = [
        "x.yaml:1: forward_passes: ",
        "x.yaml:3: search.forwrads: ",
        "x.yaml:4: search.masks_per_step: ",
        "x.yaml:5: search.masks_per_step: ",
        "x.yaml:6: budget.sparsity: ",
        "x.yaml:7: units.families: ",
        "--set search.forwrads=4: ",
        "--set seed=x: ",
        "x.yaml: model: ",
        "x.yaml: calibration.corpus: ",
    ]
    for message, place in zip(faults(text, "search.forwrads=4", "seed=x"), places, strict=True):
        assert message.startswith(place)
        says(message, place)


def test_fault_in_a_list_has_its_own_line() -> None:
    too_short, not_a_number = faults(MINIMAL + "evaluation:\n  seqlen:\n  - 128\n  - 1\n  - x\n")
    says(too_short, "x.yaml:7: evaluation.seqlen: ", ">= 2", "got 1")
    says(not_a_number, "x.yaml:8: evaluation.seqlen: ", "integer", "'x'")


def test_fault_escapes_control_characters_and_cuts_long_values() -> None:
    with refused("x.yaml:4: a\\nb\\x1b[31m: ", "unknown key"):
        read(MINIMAL + '"a\\nb\\e[31m": 1\n')
    with refused("x.yaml:4: seed: ", f"'{'x' * 60}'..."):
        read(MINIMAL + f"seed: {'x' * 500}\n")


# --- extends


def test_base_is_merged_key_by_key() -> None:
    Path("_base.yaml").write_text(
        "model: demo\nsearch: {forward_passes: 5, masks_per_step: 4}\ncalibration: {corpus: demo}\n"
    )
    got = read("search: {forward_passes: 7}\nextends: _base\nbudget: {sparsity: 0.5}\n")
    assert (got.model, got.search.forward_passes, got.search.masks_per_step) == ("demo", 7, 4)
    assert read("extends: ./_base.yaml\nbudget: {sparsity: 0.5}\n").search.forward_passes == 5


def test_base_is_searched_beside_the_file_and_then_among_the_shipped_recipes() -> None:
    Path("sub").mkdir()
    Path("sub/demo.yaml").write_text("extends: ../other\nsearch: {forward_passes: 25}\n")
    Path("other.yaml").write_text(MINIMAL)
    assert read("extends: sub/demo").search.forward_passes == 25
    assert read("extends: llama3-8b-50\nbudget: {sparsity: 0.1}").model == "meta-llama/Meta-Llama-3-8B"


def test_fault_in_a_base_names_the_file_and_line_of_the_base() -> None:
    Path("_a.yaml").write_text("extends: _b\n\nsearch:\n  forwrads: 5\n")
    Path("_b.yaml").write_text("seed: x\n")
    places = [
        "_b.yaml:1: seed: ",
        "_a.yaml:4: search.forwrads: ",
        "x.yaml:2: seed: ",
        "x.yaml: calibration.corpus: ",
        "x.yaml: budget.sparsity: ",
    ]
    for message, place in zip(faults("extends: _a\nseed: y\nmodel: demo\n"), places, strict=True):
        assert message.startswith(place)
        says(message, place)


def test_missing_base_does_not_report_its_keys_as_missing() -> None:
    Path("_mine.yaml").write_text("seed: 3\n")
    no_base, unknown_key = faults("model: demo\nextends: _mien\nsede: 3\n")
    says(no_base, "x.yaml:2: extends: ", "'_mien'", "_mine?")
    says(unknown_key, "x.yaml:3: sede: ", "seed?")
    says(faults("extends: _mine\nseed: 3\nextends: _mine\n")[0], "x.yaml:3: extends: ", "line 1")
    assert "extends: no such file" in faults(f"extends: {'n' * 5000}\n")[0]


def test_bases_are_refused_when_they_extend_each_other_in_a_circle() -> None:
    Path("_a.yaml").write_text("extends: _b\n")
    Path("_b.yaml").write_text("seed: 3\nextends: _a\n")
    with refused("_b.yaml:2: extends", "_a.yaml extends _b.yaml extends _a.yaml"):
        read("extends: _a\n")
    with refused("x.yaml:1: extends", "x.yaml extends x.yaml"):
        read("extends: x\n")


# --- overrides


def test_override_replaces_the_value_of_the_file() -> None:
    got = read(
        "model: demo\nbudget: {sparsity: 0.5}\nsearch: {forward_passes: 3, masks_per_step: 4}\n",
        "calibration.corpus=a=b",  # a missing required key, and a value with = in it
        "search.forward_passes=7",
        "search.forward_passes=8",
        "search.learning_rate=2e-2",
        "units.families=[ffn]",
        "device=cuda:0,cuda:1",
        "start={mapping: linear}",
    )
    assert (got.calibration.corpus, got.search.forward_passes, got.search.masks_per_step) == ("a=b", 8, 4)
    assert (got.search.learning_rate, got.units.families) == (0.02, ("ffn",))
    assert (got.device, got.start.mapping) == ("cuda:0,cuda:1", "linear")


@pytest.mark.parametrize(
    ("override", "fact"),
    [
        ("search.forwrads=3", "search.forward_passes"),
        ("forward_passes=3", "search.forward_passes"),
        ("search.forward_passes=many", "'many'"),
        ("search.forward_passes=", "nothing"),
        ("search=3", "got 3"),
        ("search={forward_passes: 3, forwrads: 4}", "search.forward_passes"),
        ("units.families=[ffn, layer]", "ffn and layer"),
        ("forward_passes", "KEY=VALUE"),
        ("extends=_base", "only in a file"),
        ("model=a #2", "quotes"),
        ("model=!!str a", "tags"),
        ("units.families=[ffn", "YAML"),
    ],
)
def test_override_is_refused_when_it_is_faulty(override: str, fact: str) -> None:
    with refused(f"--set {override}: ", fact):
        read(MINIMAL, override)


# --- round trip


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for the values that the schema allows, so that new keys are covered too."""
    if dataclasses.is_dataclass(kind):
        return st.builds(kind, **{entry.name: values(entry.type) for entry in dataclasses.fields(kind)})
    if get_origin(kind) is Annotated:
        base, check = get_args(kind)
        if check is recipe._device:
            return st.sampled_from(["auto", "cpu", "cuda", "cuda:3", "cuda:0,cuda:1"])
        if base is float and isinstance(check, recipe.Range) and check.high <= 1:
            return st.floats(check.low, check.high, exclude_min=check.above, exclude_max=True)
        return values(base).filter(lambda value: not check(value))
    if get_origin(kind) is tuple:
        return st.lists(values(get_args(kind)[0]), min_size=1, max_size=4, unique=True).map(tuple)
    if kind is int:
        return st.integers(2, 2**31)
    if kind is bool:
        return st.booleans()
    if kind is float:
        return st.one_of(st.floats(0, 0.99), st.floats(allow_nan=False, allow_infinity=False, min_value=0))
    if kind is str:
        tricky = [
            "2e-3",
            "1e999",
            "010",
            "0x1f",
            "yes",
            "~",
            "1:30",
            "=",
            "<<",
            "2020-01-01",
            ".nan",
            "- a",
            "#",
            "\ufeff",
        ]
        return st.one_of(
            st.sampled_from(tricky), st.text(min_size=1), st.text("\n\t \x85\u2028'\"\\:#", min_size=1)
        ).filter(str.strip)
    return st.sampled_from(get_args(kind))


def without_contradictions(any_recipe: Recipe) -> Recipe:
    """Replace keys that contradict each other: each value is valid alone, but `load` may refuse them together."""
    if not contradictions(any_recipe):
        return any_recipe
    return dataclasses.replace(
        any_recipe,
        weight_format="full",
        units=recipe.UnitsSettings(families=("attention",)),
        budget=dataclasses.replace(any_recipe.budget, min_keep=0.0, keep_first=0.0, keep_last=0.0),
        search=dataclasses.replace(any_recipe.search, forward_passes=0),
        recover=recipe.RecoverSettings(),
    )


@settings(max_examples=200, deadline=None)
@given(values(Recipe).map(without_contradictions))
def test_dump_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, given_recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    path.write_bytes(dump(given_recipe).encode())
    again = load(path)
    assert again == given_recipe


def test_dump_has_the_form_of_a_recipe() -> None:
    text = dump(read(MINIMAL + "search: {learning_rate: 2e-5}\n"))
    assert text.startswith(
        "model: demo\ndtype: bfloat16\nweight_format: full\ndevice: auto\nseed: 0\ncalibration:\n  corpus: demo\n"
    )
    assert "  families: [attention, ffn]\n" in text
    assert "  learning_rate: 2.0e-05\n" in text


# --- noise


def assert_read_or_refused(data: bytes, *overrides: str) -> None:
    Path("fuzz.yaml").write_bytes(data)
    try:
        load(Path("fuzz.yaml"), overrides)
    except UserError as error:
        for line in str(error).split("\n"):
            assert re.match(r"fuzz\.yaml\b|--set ", line)
            assert line.isprintable()


WORDS = [
    *(
        "model",
        "search",
        "forward_passes",
        "seed",
        "budget",
        "sparsity",
        "units",
        "families",
        "ffn",
        "extends",
        "calibration",
    ),
    *("corpus", "demo", "2e-3", ".nan", "~", "<<", ": ", "- ", "\n", "\n  ", "[", "]", "{", "}", ",", "'", '"', "#"),
    *("&a", "*a", "!!int ", "!", "? ", "|", ">", "%YAML 1.1\n", "---\n", "...\n", "\\", "\t", "\0", "\x85", "\ufeff"),
    '"\\UFFFFFFFF"',
    '"\\uD800"',
    '"\\U00110000"',
    "%YAML " + "9" * 5000 + ".1\n",
    "9" * 5000,
    "-" + "1_" * 20,
]


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    assert_read_or_refused(data)


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=20))
def test_random_text_is_read_or_refused(text: str, override: str) -> None:
    assert_read_or_refused(text.encode(), override, f"model={override}", f"{override}=3")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(WORDS), max_size=25).map("".join),
    st.lists(st.sampled_from(WORDS), max_size=5).map("".join),
)
def test_random_yaml_is_read_or_refused(text: str, override: str) -> None:
    assert_read_or_refused(text.encode("utf-8", "surrogatepass"), f"search={override}", override)


# --- what ships


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=name_of)
def test_shipped_recipe_is_valid(path: Path) -> None:
    if path.name.startswith("_"):  # a base: complete with a sparsity, and for some with a model
        load(path, ["budget.sparsity=0.5", *(["model=demo"] if path.stem in ("_base", "_reference") else [])])
        return
    opening = path.read_text(encoding="utf-8").splitlines()
    assert opening[1].split() == ["#", "pgprune", "search", name_of(path)]
    assert summary(path) == opening[0].removeprefix("# ")
    assert find(name_of(path)) == find(f"{name_of(path)}.yaml") == path
    loaded = load(path)
    percent = re.search(r"-(\d+)$", path.stem)
    assert path.stem == "demo" or percent
    if percent:
        assert loaded.budget.sparsity == int(percent[1]) / 100
        assert f" {percent[1]} %" in summary(path)


def test_shipped_recipes_have_the_search_settings_of_the_base() -> None:
    assert load(find("llama-3.2-1b-30")).search == recipe.SearchSettings(checkpoint_every=5, objective="kl")


@pytest.mark.parametrize("percent", [20, 30, 50])
def test_paper_recipes_have_the_settings_of_the_paper(percent: int) -> None:
    got = load(find(f"paper/llama2-13b-{percent}"))
    assert (got.search.policy, got.search.estimator, got.search.steps, got.search.masks_per_step) == (
        "units",
        "paper",
        15_000,
        2,
    )
    assert (got.search.learning_rate, got.search.schedule, got.dtype) == (2e-3, "cosine", "bfloat16")
    assert load(find(f"paper/llama3-8b-{percent}")).search.learning_rate == 6e-3
    assert got.calibration == recipe.CalibrationSettings(corpus="c4", heldout=64, bos=False)
    assert got.evaluation.bos is False
    assert got.scores == recipe.ScoreSettings(metric="wanda-sp", windows=128, seqlen=1024)
    assert (got.start, got.budget.scope) == (recipe.StartSettings(), "per-family")
    assert got.repair.method == "none"


@pytest.mark.parametrize(
    ("written", "value"), [("auto", "auto"), ('"auto"', "auto"), ("true", True), ("yes", True), ("false", False)]
)
def test_bos_is_auto_or_a_boolean(written: str, value: object) -> None:
    got = read(MINIMAL + f"evaluation: {{bos: {written}}}\n")
    assert got.evaluation.bos == value and type(got.evaluation.bos) is type(value)
    assert parse(dump(got), "a model") == got
    assert load(find("demo"), [f"calibration.bos={written}"]).calibration.bos == value


@pytest.mark.parametrize("written", ["1", "0", '"true"', "1.0", "atuo", "[true]"])
def test_bos_refuses_numbers_and_other_texts(written: str) -> None:
    (fault,) = faults(MINIMAL + f"evaluation: {{bos: {written}}}\n")
    says(fault, "evaluation.bos: ", "auto, true or false")


def test_base_recipe_sets_every_key_except_model_and_sparsity() -> None:
    """The base shows its readers every key that can be set."""
    base = yaml.safe_load((CONFIGS / "_base.yaml").read_text(encoding="utf-8"))
    complete = yaml.safe_load(dump(read(MINIMAL)))
    del complete["model"], complete["budget"]["sparsity"]
    assert {key: list(value) if isinstance(value, dict) else 0 for key, value in base.items()} == {
        key: list(value) if isinstance(value, dict) else 0 for key, value in complete.items()
    }


def test_parse_reads_what_dump_wrote() -> None:
    original = read(MINIMAL + "search: {forward_passes: 32}\n")
    assert parse(dump(original), "a model") == original


def test_parse_refuses_a_base() -> None:
    with refused("a model:1: extends"):
        parse("extends: _base", "a model")


def test_parse_tells_unknown_keys_from_other_faults() -> None:
    with refused("a model:1: forward_passes", "search.forward_passes", error=UnknownKeys):
        parse("forward_passes: 3", "a model")
    for text in ("forward_passes: 3\nseed: x", "model: [", "seed: 3"):  # a wrong type, no YAML, a missing key
        with pytest.raises(UserError) as caught:
            parse(text, "a model")
        assert not isinstance(caught.value, UnknownKeys)


def test_find_suggests_a_recipe_file_in_the_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").touch()
    with refused("mein.yaml: ", "mine.yaml?"):
        find("mein.yaml")


def test_find_suggests_the_nearest_of_shipped_and_own_recipes_first() -> None:
    def meant(name: str) -> list[str]:
        with pytest.raises(UserError) as caught:
            find(name)
        return re.split(", | or ", str(caught.value).partition("did you mean ")[2].partition("?")[0])

    Path("demo-of-mine.yaml").touch()
    assert meant("demo-mine") == ["demo-of-mine.yaml", "demo"]
    assert meant("demos") == ["demo"]
    assert meant("smollm2-30")[0] == "smollm2-135m-30"
    assert meant("llama2-7b-20.yml")[0] == "llama2-7b-20"


def test_find_returns_files_and_shipped_recipes() -> None:
    Path("mine.yaml").write_text(MINIMAL)
    Path("demo").mkdir()  # a run directory of the same name is not a recipe
    assert find("mine.yaml") == Path("mine.yaml")
    assert find("demo") == CONFIGS / "demo.yaml"
    Path("demo.yaml").write_text(MINIMAL)
    assert find("demo.yaml") == Path("demo.yaml")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("smolm2-135m-50", "smollm2-135m-50, smollm2-135m-20 or smollm2-135m-30?"),
        ("configs/dem.yaml", "demo?"),
        ("zzzzqq", ""),
        ("_base", ""),
    ],
)
def test_find_refuses_an_unknown_recipe_with_the_nearest_names(name: str, suggestion: str) -> None:
    with refused(f"{name}: no such recipe", suggestion, "pgprune recipes"):
        find(name)


def test_summary_is_the_first_line_of_the_opening_comment() -> None:
    for text, expected in [("\n# One.\n# Two.\nseed: 3\n", "One."), ("seed: 3\n# Late.\n", ""), ("", "")]:
        Path("x.yaml").write_text(text)
        assert summary(Path("x.yaml")) == expected
    with refused("none.yaml: ", "no such file"):
        summary(Path("none.yaml"))


def test_reading_a_recipe_loads_nothing_heavy() -> None:
    code = "import sys, pgprune_cli.recipe.schema; "
    code += "sys.exit(bool({'torch', 'numpy', 'transformers', 'typer'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIGS.parent)
