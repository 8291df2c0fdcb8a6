"""Accuracies of the harness against a plain loop over the choices, for a run, its export and its base model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.messages import refused
from helpers.models import save_tokenizer, tiny_model
from helpers.multiple_choice import by_hand, items_of, task_file

from pgprune_cli.errors import RunError, UserError
from pgprune_cli.jobs.evaluate import remember
from pgprune_cli.jobs.evaluation_request import task_names
from pgprune_cli.jobs.export import export
from pgprune_cli.jobs.targets import open_target
from pgprune_cli.jobs.tasks import load_tasks, measure_tasks
from pgprune_cli.model.loading import load_tokenizer
from pgprune_cli.run.evaluation import measurements
from pgprune_cli.run.layout import EVALUATION_FILE
from pgprune_cli.storage.records import read_record


@pytest.fixture
def harness() -> None:
    pytest.importorskip("lm_eval", reason="needs the extra: pip install 'pgprune[eval]'")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    data = tmp_path / "tales.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items_of(12)))
    return task_file(tmp_path, data)


def values(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


@pytest.fixture
def run(finished: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a finished run without an evaluation."""
    shutil.copytree(finished["units"], tmp_path / "run")
    (tmp_path / "run" / EVALUATION_FILE).unlink()
    return tmp_path / "run"


def test_accuracies_equal_those_of_a_plain_loop_for_a_run_and_its_export(
    harness, run: Path, task: Path, tmp_path: Path
) -> None:
    export(run, tmp_path / "exported")
    tasks = load_tasks([str(task)])
    rows_by_name = {}
    for name in (str(run), str(tmp_path / "exported"), "demo"):
        target = open_target(name, device="cpu")
        before = {key: value.clone() for key, value in target.module.state_dict().items()}
        rows = measure_tasks(target, tasks)
        expected = by_hand(target.module, load_tokenizer(target.source), items_of(12))
        assert values(rows) == pytest.approx(expected)
        for row in rows:
            assert (row["task"], row["items"], row["shots"]) == ("tales", 12, 0)
            assert 0 < row["stderr"] < 0.2
        assert all(torch.equal(value, before[key]) for key, value in target.module.state_dict().items())
        rows_by_name[name] = rows
    assert rows_by_name[str(run)] == rows_by_name[str(tmp_path / "exported")]


def test_max_items_takes_the_first_items(harness, task: Path) -> None:
    target = open_target("demo", device="cpu")
    rows = measure_tasks(target, load_tasks([str(task)]), max_items=5)
    assert values(rows) == pytest.approx(by_hand(target.module, load_tokenizer(target.source), items_of(5)))
    assert {row["items"] for row in rows} == {5}


def test_group_with_metrics_of_its_own_is_one_row_per_metric(harness, task: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    member = json.loads(task.read_text())
    group = {
        "group": "both",
        "task": [member | {"task": "one", "num_fewshot": 0}, member | {"task": "other", "num_fewshot": 0}],
        "aggregate_metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "both.yaml").write_text(json.dumps(group))
    target = open_target("demo", device="cpu")
    both: Any = TaskManager(include_path=str(tmp_path / "groups"), include_defaults=False).load(["both"])
    (row,) = measure_tasks(target, both)
    alone = values(measure_tasks(target, load_tasks([str(task)])))
    assert (row["task"], row["metric"], row["items"]) == ("both", "acc", 24)
    assert row["value"] == pytest.approx(alone["acc"])


def test_load_tasks_refuses_the_file_of_a_group(harness, tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("group: both\ntask: [one, other]\n")
    with refused("both.yaml", "a group", "by name"):
        load_tasks([str(tmp_path / "both.yaml")])


def test_results_of_several_calls_are_kept_in_the_run_and_written_into_the_model_card(
    harness, run: Path, task: Path, tmp_path: Path
) -> None:
    target = open_target(str(run), device="cpu")
    empty = target.description() | {"perplexity": []}
    perplexity = [{"corpus": "tales", "seqlen": 32, "bos": False, "ppl": 5.0, "tokens": 100}]
    remember(run, empty | {"perplexity": perplexity})
    rows = measure_tasks(target, load_tasks([str(task)]))
    remember(run, empty | {"tasks": rows})
    assert read_record(run / EVALUATION_FILE) == empty | {"perplexity": perplexity, "tasks": rows}
    export(run, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "| tales | 32 | 5.00 | 100 |" in card
    for row in rows:
        assert f"| tales | 0 | {row['metric']} | {row['value']:.4f} | {row['stderr']:.4f} | 12 | no |" in card
    remember(run, empty | {"tasks": rows, "dtype": "bfloat16"})  # another dtype: results are not mixed
    assert read_record(run / EVALUATION_FILE)["perplexity"] == []


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("bos", ["auto", True, False])
def test_prompts_begin_with_bos_as_the_setting_says(harness, adds, bos, task: Path, tmp_path: Path) -> None:
    tiny_model("llama-gqa").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", **({"add_bos_token": True} if adds else {}))
    target = open_target(str(tmp_path / "model"), device="cpu", bos=bos)
    prompts = []
    target.module.get_input_embeddings().register_forward_hook(lambda _, inputs, __: prompts.append(inputs[0]))
    rows = measure_tasks(target, load_tasks([str(task)]), max_items=3)
    expected = adds if bos == "auto" else bos
    assert [row["bos"] for row in rows] == [expected] * len(rows)
    assert prompts and all(((ids[:, 0] == 1) == expected).all() for ids in prompts)
    names = measurements(target.description() | {"perplexity": [], "tasks": rows})
    assert [name.endswith(", with BOS") for name in names if name.startswith("tales")] == [expected] * len(rows)


# --- what is wrong


@pytest.mark.parametrize("bad", ["", "piqa,", ",piqa"])
def test_task_names_refuses_a_list_with_a_gap(bad: str) -> None:
    with refused(f"--tasks {bad}: ", "hellaswag,piqa"):
        task_names(bad)
    assert task_names("piqa, boolq,piqa") == ["piqa", "boolq"]


def test_load_tasks_names_the_extra_when_the_harness_is_missing(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"^--tasks needs an extra\. .*pip install 'pgprune\[eval\]'"):
        load_tasks(["hellaswag"])


def test_load_tasks_refuses_an_unknown_task_and_suggests_another(harness) -> None:
    with refused("--tasks helaswag: ", "lm_eval ls tasks", "did you mean hellaswag?"):
        load_tasks(["helaswag"])


def test_load_tasks_refuses_a_wrong_task_file_in_one_line(harness, task: Path, tmp_path: Path) -> None:
    described = json.loads(task.read_text())
    described["dataset_kwargs"]["data_files"] = {"validation": str(tmp_path / "gone.jsonl")}
    for text in ("no: task", "a: [", json.dumps(described)):
        task.write_text(text)
        with pytest.raises(UserError) as error:
            load_tasks([str(task)])
        assert str(error.value).startswith(f"--tasks {task}: cannot be loaded: ")
        assert "\n" not in str(error.value)


def test_perplexity_does_not_import_the_harness(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The king was glad. " * 20)
    code = (
        "import sys; from pgprune_cli.cli.program import main\n"
        "sys.argv = ['pgprune', 'eval', 'demo', '--ppl', 'tales=text.txt', '--seqlen', '32', '--max-windows', '1']\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "assert 'lm_eval' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_the_harness_prints_is_not_on_stdout(harness, task: Path, monkeypatch, capsys) -> None:
    from lm_eval import evaluator

    evaluate = evaluator.evaluate

    def talkative(*arguments: Any, **options: Any) -> Any:
        print("bootstrapping for stddev: perplexity")
        return evaluate(*arguments, **options)

    monkeypatch.setattr(evaluator, "evaluate", talkative)
    measure_tasks(open_target("demo", device="cpu"), load_tasks([str(task)]), max_items=2)
    assert capsys.readouterr().out == ""


def test_a_metric_that_is_not_finite_is_none_and_one_that_overflows_an_error(harness, task: Path, monkeypatch) -> None:
    from lm_eval import evaluator

    evaluate, target = evaluator.evaluate, open_target("demo", device="cpu")

    def infinite(*arguments: Any, **options: Any) -> Any:
        measured = evaluate(*arguments, **options)
        measured["results"]["tales"] |= {"acc,none": float("inf"), "acc_stderr,none": float("nan")}
        return measured

    monkeypatch.setattr(evaluator, "evaluate", infinite)
    rows = measure_tasks(target, load_tasks([str(task)]), max_items=2)
    (row,) = (row for row in rows if row["metric"] == "acc")
    assert row["value"] is row["stderr"] is None
    assert measurements(target.description() | {"perplexity": [], "tasks": [row]})["tales acc"] == "not finite"

    def overflowing(*_: Any, **__: Any) -> Any:
        raise OverflowError("math range error")

    monkeypatch.setattr(evaluator, "evaluate", overflowing)
    with refused("demo", "math range error", error=RunError):
        measure_tasks(target, load_tasks([str(task)]), max_items=2)
