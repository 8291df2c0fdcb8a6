"""The command line as users see it: stdout, stderr and exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from click.testing import CliRunner
from helpers.commands import commands_of, parsed
from helpers.messages import says
from helpers.multiple_choice import items_of, task_file
from helpers.recipes import SMALL
from helpers.schemas import SCHEMAS
from helpers.waiting import lines_in, wait_until
from safetensors.torch import load_file, save_file

from pgprune_cli.cli import program as cli
from pgprune_cli.errors import RunError
from pgprune_cli.model.source import DEMO_MODEL
from pgprune_cli.recipe.reader import find, load, name_of, shipped
from pgprune_cli.run.layout import DECISION_MASKS, DECISION_RECORD

SET = [word for override in SMALL for word in ("--set", override)]


RESOLVES_LOOPS = pytest.mark.skipif(sys.version_info >= (3, 13), reason="Path.resolve takes links in a circle")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- help


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pgprune_cli.cli.program import main\n"
        "sys.argv = ['pgprune', '--help']\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'yaml', 'safetensors', 'lm_eval'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ")


@pytest.mark.parametrize("verb", ["", *commands_of()])
def test_every_help_page_ends_with_examples_that_parse(verb, pgprune) -> None:
    code, out, err = pgprune(*verb.split(), "--help")
    assert (code, err) == (0, "")
    examples = [line.strip() for line in out.partition("Example")[2].splitlines()[1:]]
    assert examples, out
    for example in examples:
        assert example.startswith(f"pgprune {verb}")
        parsed(shlex.split(example.partition(" > ")[0])[1:])


def test_every_command_is_described_in_a_line_of_80_columns() -> None:
    """The parser would shorten a longer sentence and end it with dots."""
    program = typer.main.get_command(cli.app)
    shown = CliRunner().invoke(program, ["--help"], prog_name="pgprune", terminal_width=80, max_content_width=80).output
    lines = shown.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == [verb for verb in commands_of() if " " not in verb]
    assert [line for line in lines if not line.endswith(".") or line.endswith("...") or len(line) > 80] == []


def test_no_arguments_prints_the_help(pgprune) -> None:
    code, out, err = pgprune()
    assert code == 2
    assert "Commands:" in out + err


@pytest.mark.parametrize("verb", ["", "search ", "recipes show "])
def test_h_is_short_for_help(verb, pgprune) -> None:
    assert pgprune(*f"{verb}-h".split()) == pgprune(*f"{verb}--help".split())


def test_version_is_printed(pgprune) -> None:
    assert pgprune("--version") == (0, f"pgprune {cli.__version__}\n", "")


# --- the whole job


def test_every_command_of_the_pipeline_prints_one_json_object(pgprune) -> None:
    code, out, err = pgprune("init-scores", "demo", *SET, "--json", "--metric", "magnitude")
    assert code == 0, err
    assert json.loads(out) == {
        "run": "runs/demo",
        "scores": "runs/demo/scores.safetensors",
        "metric": "magnitude",
    }
    code, out, err = pgprune("search", "demo", *SET, "--json")
    assert code == 0, err
    searched = json.loads(out)
    assert (searched["run"], searched["decision"]) == ("runs/demo", f"runs/demo/{DECISION_MASKS}")
    assert (searched["steps"], searched["forward_passes"]) == (6, 12)
    assert searched["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert "step 6/6" in err
    code, out, err = pgprune("export", "runs/demo", "--out", "models/small", "--json")
    assert code == 0, err
    written = json.loads(out)
    assert written["parameters_after"] < written["parameters_before"]
    Path("text.txt").write_text("The king was glad. " * 50)
    code, out, err = pgprune("eval", "models/small", "--ppl", "tales=text.txt", "--seqlen", "32", "--json", "--speed")
    assert code == 0, err
    result = json.loads(out)
    (row,) = result["perplexity"]
    assert (row["corpus"], row["seqlen"]) == ("tales", 32)
    assert row["ppl"] > 1
    assert row["tokens"] > 0
    assert result["parameters"] == written["parameters_after"]
    (base,) = result["baselines"]
    assert base["model"] == "demo"
    assert {*base["speed"]} == {
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "weight_bytes",
        "peak_memory_bytes",
    }


def test_eval_prints_accuracies_beside_perplexity_as_json_and_as_a_table(pgprune, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra: pip install 'pgprune[eval]'")
    (tmp_path / "tales.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items_of(4)))
    task = task_file(tmp_path, tmp_path / "tales.jsonl")
    (tmp_path / "text.txt").write_text("The king was glad. " * 20)
    words = ["eval", "demo", "--tasks", str(task), "--max-items", "3", "--ppl", "text=text.txt", "--seqlen", "32"]
    code, out, err = pgprune(*words, "--json")
    assert code == 0, err
    measured = json.loads(out)
    assert [row["corpus"] for row in measured["perplexity"]] == ["text"]
    assert [(row["metric"], row["items"]) for row in measured["tasks"]] == [("acc", 3), ("acc_norm", 3)]
    code, out, err = pgprune(*words)
    assert code == 0, err
    assert f"{measured['perplexity'][0]['ppl']:,.2f}" in out
    for row in measured["tasks"]:
        assert f"{row['value']:.4f} ± {row['stderr']:.4f}" in out


def test_without_json_commands_print_a_line_or_a_table(pgprune) -> None:
    code, out, err = pgprune("search", "demo", *SET)
    assert code == 0
    assert re.search(r"^seconds: opening \d+, scores \d+, width table \d+, steps \d+, repair \d+$", err, re.MULTILINE)
    assert out.startswith(f"runs/demo/{DECISION_MASKS}: sparsity 0.50")
    assert out.count("\n") == 1
    code, out, _ = pgprune(
        "eval", "runs/demo", "--ppl", "demo", "--seqlen", "128", "--max-windows", "2", "--baseline", "demo"
    )
    assert code == 0
    assert "demo PPL" in out
    assert "runs/demo" in out


@pytest.mark.parametrize("command", [["init-scores", "demo"], ["search", "demo"]])
def test_quiet_prints_nothing_on_stderr(command, pgprune) -> None:
    code, out, err = pgprune(*command, *SET, "--quiet")
    assert (code, err) == (0, "")
    assert out


def test_search_dry_run_prints_the_estimate_and_writes_nothing(pgprune) -> None:
    code, out, _ = pgprune("search", "demo", *SET, "--dry-run")
    assert code == 0
    for row in (
        "weights",
        "covariances and solver of one layer",
        "forward passes of the search",
        "seconds: steps (most for ",
        "seconds of the search",
        "TFLOP: steps",
    ):
        assert row in out
    assert "estimates from the shapes of the model and the recipe" in out
    code, out, _ = pgprune("search", "demo", *SET, "--dry-run", "--json", "--quiet")
    estimate = json.loads(out)
    assert (code, estimate["forward_passes"]["search"]) == (0, 12)
    assert estimate["seconds"] > 0
    code, out, _ = pgprune("search", "demo", *SET, "--dry-run", "--on", "rtx-4090", "--gpus", "2")
    assert code == 0
    for row in ("processes × GPUs that each of them uses", "2 × 1 rtx-4090", "yes", "nothing was measured"):
        assert row in out
    assert list(Path().iterdir()) == []


def test_options_of_the_estimate_are_refused_without_it(pgprune) -> None:
    for words, option in ((["--on", "rtx-4090"], "--dry-run"), (["--dry-run", "--gpus", "2"], "--on")):
        code, _, err = pgprune("search", "demo", *SET, *words)
        assert code == 2
        says(err, words[-2] if "--gpus" in words else "--on", option)


def test_recipes_lists_the_shipped_recipes(pgprune) -> None:
    code, out, err = pgprune("recipes")
    assert (code, err) == (0, "")
    assert "demo " in out and "llama2-7b-20, -30, -50 " in out and "paper/llama2-7b-20, -30, -50 " in out
    assert json.loads(pgprune("recipes", "--json")[1])["recipes"].keys() == {name_of(path) for path in shipped()}


def test_recipes_show_prints_every_key_and_copy_never_overwrites(pgprune) -> None:
    code, out, err = pgprune("recipes", "show", "demo", "--set", "budget.sparsity=0.25")
    assert (code, err) == (0, "")
    Path("shown.yaml").write_text(out)
    assert load(Path("shown.yaml")) == load(find("demo"), ["budget.sparsity=0.25"])
    assert json.loads(pgprune("recipes", "show", "demo", "--json")[1])["budget"]["sparsity"] == 0.5
    assert pgprune("recipes", "copy", "paper/llama2-7b-50")[0] == 0
    before = Path("llama2-7b-50.yaml").read_bytes()
    assert load(Path("llama2-7b-50.yaml")) == load(find("paper/llama2-7b-50"))
    code, out, err = pgprune("recipes", "copy", "llama2-7b-50", "--json")
    assert (code, out) == (2, "")
    says(err, "pgprune: llama2-7b-50.yaml: exists already")
    assert Path("llama2-7b-50.yaml").read_bytes() == before
    assert pgprune("recipes", "copy", "demo", "mine.yaml", "--json")[:2] == (0, '{"recipe": "mine.yaml"}\n')


def test_runs_lists_the_runs_in_the_folder_of_the_environment_variable(pgprune, monkeypatch) -> None:
    monkeypatch.setenv("PGPRUNE_RUNS", "elsewhere")
    assert pgprune("init-scores", "demo", *SET, "--metric", "magnitude", "--out", "elsewhere/scored")[0] == 0
    assert pgprune("search", "demo", *SET, "--set", "scores.metric=magnitude")[0] == 0
    code, out, err = pgprune("eval", "elsewhere/demo", "--ppl", "demo", "--seqlen", "128")
    assert code == 0, err
    (evaluated,) = json.loads(Path("elsewhere/demo/evaluation.json").read_text())["perplexity"]
    code, out, err = pgprune("runs", "--json")
    assert code == 0, err
    finished, scored = json.loads(out)["runs"]
    assert (finished["run"], finished["state"], finished["target"]) == ("elsewhere/demo", "finished", 0.5)
    assert (finished["step"], finished["steps"], finished["perplexity"]) == (6, 6, [evaluated])
    assert (scored["run"], scored["state"], scored["sparsity"]) == ("elsewhere/scored", "scored", None)
    table = pgprune("runs")[1]
    assert f"demo (128) {evaluated['ppl']:,.2f}" in table
    code, out, err = pgprune("export", "elsewhere/scored")
    assert (code, out) == (2, "")
    says(err, "pgprune: elsewhere/scored: ", "pgprune search RECIPE --out elsewhere/scored")


def test_runs_says_that_a_folder_has_none(pgprune) -> None:
    Path("models/mine").mkdir(parents=True)
    assert pgprune("runs", "models") == (0, "", "pgprune: models: no runs here.\n")
    assert pgprune("runs", "models", "--json") == (0, '{"runs": []}\n', "")


def test_export_dry_run_prints_one_line_per_tensor_in_a_pipe(pgprune) -> None:
    assert pgprune("search", "demo", *SET, "--quiet")[0] == 0
    planned = json.loads(pgprune("export", "runs/demo", "--dry-run", "--json")[1])
    out = pgprune("export", "runs/demo", "--dry-run")[1]
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == [row["name"] for row in planned["tensors"]]
    assert not Path("models").exists()


def test_recover_prints_what_it_would_take_and_what_it_did(pgprune, finished) -> None:
    assert pgprune("export", str(finished["widths"]), "--out", "models/small", "--quiet")[0] == 0
    settings = ("recover.tokens=128", "recover.seqlen=32", "recover.batch=2", "recover.heldout=2", "device=cpu")
    words = ["recover", "models/small", "--out", "models/better", "--quiet"]
    words += [word for setting in settings for word in ("--set", setting)]
    code, out, err = pgprune(*words, "--dry-run", "--json")
    assert code == 0, err
    assert (json.loads(out)["steps"], json.loads(out)["tokens"]) == (2, 128)
    assert "tokens trained on" in pgprune(*words, "--dry-run")[1]
    code, out, err = pgprune(*words, "--dry-run", "--format", "gguf")
    assert (code, out) == (2, "") and "Give a name that ends in .gguf" in err
    assert not Path("models/better").exists() and not Path("runs/better").exists()
    code, out, err = pgprune(*words, "--json")
    assert code == 0, err
    assert (json.loads(out)["run"], json.loads(out)["steps"]) == ("runs/better", 2)
    (row,) = json.loads(pgprune("runs", "--json")[1])["runs"]
    assert (row["kind"], row["state"]) == ("recovery", "finished")
    assert row["divergence"] == json.loads(out)["loss_after"]
    assert pgprune("verify", "runs/better", "--json")[0] == 0


def test_output_is_escaped_when_stdout_is_ascii(finished) -> None:
    """The locale of a container is often C. The names of files may be of any language."""
    shutil.copytree(finished["units"], Path("läufe/日本"))
    program = [sys.executable, "-m", "pgprune_cli", "export", "läufe/日本", "--out", "模型", "--dry-run"]
    done = subprocess.run(
        program, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "\\u6a21\\u578b" in done.stdout


def test_compare_prints_its_table(pgprune) -> None:
    words = ["compare", "demo", *SET, "--set", "evaluation.seqlen=[32]", "--max-windows", "2", "--only", "metric"]
    code, out, err = pgprune(*words, "--json")
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)["rows"]] == ["dense", "metric"]
    assert "metric" in pgprune(*words)[1]


def test_every_command_has_a_documented_json_schema() -> None:
    program = typer.main.get_command(cli.app)
    for verb in commands_of():
        command = program
        for word in verb.split():
            command = command.commands[word]
        assert "--json" in [name for option in command.params for name in option.opts], verb
        assert verb in SCHEMAS["output.json"]["$defs"]


# --- what is wrong


def test_bad_recipe_prints_one_line_per_fault(pgprune) -> None:
    Path("mine.yaml").write_text("extends: demo\nsearch:\n  forward: 3\nbudget:\n  sparsity: 2\n")
    code, out, err = pgprune("search", "mine.yaml")
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    says(first, "pgprune: mine.yaml:3: search.forward: ", "search.forward_passes")
    says(second, "pgprune: mine.yaml:5: budget.sparsity: ", "2.0")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["search", "lama2-7b-50"], ["lama2-7b-50: ", "did you mean llama2-7b-50"]),
        (
            ["search", "demo", "--set", "search.forward_passes"],
            ["--set search.forward_passes: ", "KEY=VALUE"],
        ),
        (["search", "demo", "--set", "model=nowhere"], ["nowhere: "]),
        (
            ["init-scores", "demo", "--metric", "wanda"],
            ["--metric wanda: ", "wanda-sp, flap, flap-adaptive, obs, taylor, magnitude, random or uniform"],
        ),
        (["export", "nowhere", "--out", "x"], ["nowhere: ", "pgprune runs"]),
        (["export", "nowhere", "--push", "small"], ["--push small: ", "OWNER/NAME"]),
        (["recipes", "copy", "demo", "demo.txt"], ["demo.txt: ", ".yaml"]),
        (["runs", "nowhere"], ["nowhere: "]),
        (["report", "nowhere"], ["nowhere: no such run directory", "pgprune runs"]),
        (["init-scores", "demo", "--out", "text.csv"], ["text.csv: not a directory", "--out"]),
        (["compare", "demo", "--out", "text.csv"], ["text.csv: not a directory", "--out"]),
        (["compare", "demo", "--out", "text.csv/new"], ["text.csv/new: ", "/text.csv is not a directory", "--out"]),
        (["doctor", "--set", "seed=1"], ["--set seed=1: ", "pgprune doctor RECIPE --set seed=1"]),
        (["eval", "runs/nowhere"], ["runs/nowhere: ", "pgprune runs"]),
        (["eval", "nowhere"], ["nowhere: "]),
        (["eval", "demo", "--ppl", "c4="], ["--ppl c4=: ", "NAME=FILE"]),
        (["eval", "demo", "--ppl", "mine=no.txt"], ["no.txt: ", "wikitext2"]),
        (
            ["eval", "demo", "--ppl", "wikitxt2"],
            ["wikitxt2: ", "did you mean wikitext2?"],
        ),
        (["eval", "demo", "--dtype", "int8"], ["--dtype int8: ", "auto, float32, float16 or bfloat16"]),
        (["eval", "demo", "--device", "tpu"], ["device: ", "'tpu'"]),
        (["eval", "demo", "--device", "meta"], ["device: ", "'meta'"]),
        (["search", "demo", "--sparsity", "30"], ["--sparsity 30: ", "0 <= value < 1"]),
        (["search", "demo", "--calibration", ""], ["--calibration: "]),
        (["search", "demo", "--calibration", "no.txt", "--dry-run"], ["no.txt: ", "wikitext2"]),
        (["search", "demo", "--calibration", "text.csv"], ["text.csv: ", ".parquet"]),
        (["recipes", "new", "demo", "--sparsity", "30"], ["--sparsity 30: ", "0 <= value < 1"]),
        (["recipes", "new", "demo", "--calibration", "no.txt"], ["no.txt: ", "wikitext2"]),
        (["eval", "demo", "--ppl", "mine=text.csv"], ["text.csv: ", ".parquet"]),
        (["eval", "demo", "--max-items", "5"], ["--max-items: ", "--tasks"]),
        (["compare", "demo", "--seeds", "-1"], ["--seeds -1: ", "0 <= value < 4294967296"]),
        (["compare", "demo", "--seeds", "0,99999999999"], ["--seeds 0,99999999999: ", "0 <= value < 4294967296"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, facts, pgprune) -> None:
    Path("text.csv").touch()
    quiet = [] if arguments[0] in ("recipes", "runs", "doctor") else ["--quiet"]
    code, out, err = pgprune(*arguments, *quiet)
    assert (code, out) == (2, "")
    says(err, *facts)
    assert err.startswith("pgprune: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["search", "demo", "--stepz", "3"], "no such option: --stepz, did you mean --set? See `pgprune search"),
        (["search", "demo", "--sett", "x=1"], "no such option: --sett, did you mean --set? See `pgprune search"),
        (["export", "runs/x", "--fromat", "gguf"], "no such option: --fromat, did you mean --format? See"),
        (["docter"], "no such command 'docter', did you mean 'doctor'? See `pgprune --help`"),
        (["search", "demo", "--sparsity", "30%"], "--sparsity 30%: expected a number such as 0.3. See `pgprune search"),
        (["eval", "demo", "--seqlen", "128,2048"], "--seqlen 128,2048: expected an integer. Repeat the option for"),
        (["eval", "demo", "--max-windows", "few"], "--max-windows few: expected an integer. See `pgprune eval"),
        (["search", "demo", "--set"], "--set: needs a value, KEY=VALUE. See `pgprune search --help`"),
        (["recipes", "show", "demo", "--set"], "--set: needs a value, KEY=VALUE. See `pgprune recipes show --help`"),
        (["search"], "missing argument 'RECIPE|MODEL'. See `pgprune search --help`"),
        (["recipes", "show"], "missing argument 'RECIPE'. See `pgprune recipes show --help`"),
        (["searc", "demo"], "no such command 'searc'"),
        (["eval", "demo", "--max-windows", "0"], "invalid value for '--max-windows'"),
        (["export", "runs/x", "--format", "onnx"], "invalid value for '--format'"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(arguments, fact, pgprune) -> None:
    code, out, err = pgprune(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"pgprune: {fact}")
    assert " See `pgprune" in err
    assert err.count("\n") == 1


def test_search_of_a_model_refuses_the_run_of_another_one_with_the_same_name(pgprune) -> None:
    for owner, factor in (("a", 1), ("b", -3)):
        shutil.copytree(DEMO_MODEL, Path(owner, "model"))
        tensors = load_file(Path(owner, "model/model.safetensors"))
        tensors["model.layers.1.mlp.down_proj.weight"] *= factor
        save_file(tensors, Path(owner, "model/model.safetensors"), metadata={"format": "pt"})
    words = ["--sparsity", "0.5", "--calibration", "demo", *SET, "--quiet"]
    assert pgprune("search", "a/model", *words)[0] == 0
    assert pgprune("search", "a/model", *words)[0] == 0
    run = Path("runs/model-50")
    for other in ("b/model", "owner/model"):  # the second one is on the hub
        code, out, err = pgprune("search", other, *words)
        assert (code, out) == (2, "")
        says(err, f"{run}: ", "a/model → ", other, "--out")
    (run / DECISION_RECORD).unlink()
    code, out, err = pgprune("search", "b/model", *words)
    assert (code, out) == (2, "")
    says(err, f"{run}/scores.safetensors: ", "b/model", "--out")
    (run / "scores.safetensors").unlink()
    code, out, err = pgprune("search", "b/model", *words)
    assert (code, out) == (2, "")
    says(err, f"{run}: ", "a/model → ", "b/model", "--out")
    moved = ["--set", f"model={Path('a/model').absolute()}"]
    assert pgprune("search", "b/model", *words, *moved)[0] == 0


@pytest.mark.parametrize("place", ["model", "--baseline"])
def test_eval_refuses_the_speed_of_a_run_before_loading_anything(place, finished, pgprune, monkeypatch) -> None:
    monkeypatch.setattr("pgprune_cli.jobs.targets.load_model", lambda *_: pytest.fail("it was loaded"))
    run = str(finished["units"])
    words = ["eval", run, "--speed"] if place == "model" else ["eval", "demo", "--speed", "--baseline", run]
    code, out, err = pgprune(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"pgprune: {run}: speed ")
    assert err.endswith(f"Export it first: pgprune export {run}\n")


def test_eval_speed_reads_the_decision_once(pgprune, monkeypatch) -> None:
    from pgprune_cli.run import decision

    assert pgprune("search", "demo", *SET, "--quiet")[0] == 0
    assert pgprune("export", "runs/demo", "--quiet")[0] == 0
    read, reads = decision.read_record, []
    monkeypatch.setattr(decision, "read_record", lambda path: reads.append(path) or read(path))
    code, out, err = pgprune("eval", "models/demo", "--speed", "--json", "--quiet")
    assert (code, err) == (0, "")
    assert [base["model"] for base in json.loads(out)["baselines"]] == ["demo"]
    assert reads == [Path("models/demo/decision.json")]


def test_export_never_overwrites(pgprune) -> None:
    assert pgprune("search", "demo", *SET, "--quiet")[0] == 0
    Path("there").mkdir()
    Path("there/file").touch()
    code, _, err = pgprune("export", "runs/demo", "--out", "there", "--quiet")
    assert code == 2
    says(err, "there: already exists")
    assert [path.name for path in Path("there").iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RunError("step 3: no finite loss"), "pgprune: step 3: no finite loss\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."),
            "pgprune: out of memory (CUDA out of memory. Tried to allocate 9.00 GiB.). Stop other programs on the "
            "device, use more devices, or set weight_format to int8. `pgprune search --dry-run` prints what a search "
            "needs.\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            "pgprune: runs/x: No space left on device. Make room, then run the same command again.\n",
        ),
    ],
)
def test_failed_run_is_exit_code_1(error, expected, pgprune, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pgprune_cli.jobs.search.search", fail)
    assert pgprune("search", "demo") == (1, "", expected)


def test_bug_shows_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr("pgprune_cli.jobs.search.search", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["pgprune", "search", "demo"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ("search mine.yml", ["mine.yml: ", ".yaml"]),
        ("search mine.YAML --sparsity 0.3", ["mine.YAML: ", ".yaml"]),
        ("recipes show mine.yml", ["mine.yml: ", ".yaml"]),
        ("report run --out folder", ["folder: ", "folder/report.html"]),
        ("eval demo --ppl ~nosuchuser/x", ["~nosuchuser/x: "]),
        ("search ~nosuchuser/x --sparsity 0.3", ["~nosuchuser/x: "]),
        ("search demo --set model=~nosuchuser/x", ["~nosuchuser/x: "]),
        ("search demo --quiet --set calibration.corpus=~nosuchuser/x", ["~nosuchuser/x: "]),
        ("recipes new ~nosuchuser/x", ["~nosuchuser/x: "]),
        ("convert ~nosuchuser/x out", ["~nosuchuser/x: "]),
        ("verify ~nosuchuser/x", ["~nosuchuser/x: "]),
        ("recover ~nosuchuser/x --out ~nosuchuser/y", ["~nosuchuser/x: "]),
        pytest.param("recover x --out loop/y", ["loop/y: "], marks=RESOLVES_LOOPS),
        ("search demo --quiet --out loop/y", ["loop/y: "]),
        pytest.param("report loop/y", ["loop/y: "], marks=RESOLVES_LOOPS),
        ("verify LONG", ["LONG", "too long"]),
        ("eval LONG", ["LONG", "too long"]),
        ("search LONG --sparsity 0.3", ["LONG", "too long"]),
        ("search demo --quiet --out LONG", ["LONG", "too long"]),
        ("eval demo --ppl LONG", ["LONG", "too long"]),
        ("export LONG", ["LONG", "too long"]),
    ],
)
def test_paths_that_cannot_be_used_are_one_line_and_exit_code_2(words, facts, pgprune) -> None:
    Path("loop").symlink_to("loop")
    Path("folder").mkdir()
    for name in ("mine.yml", "mine.YAML"):
        Path(name).write_text("extends: demo\n")
    code, out, err = pgprune(*words.replace("LONG", "x" * 300).split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    says(err.replace("x" * 300, "LONG"), *facts)


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ("search demo --out runs", ["runs: ", "--out runs/NAME"]),
        ("search demo --out models/mine", ["models/mine: ", "exported model", "--out"]),
        ("search demo --out dense", ["dense: ", "--out"]),
        ("init-scores demo --out models/mine", ["models/mine: ", "--out"]),
        ("recover models/mine --out x --recipe demo --run-dir runs", ["runs: ", "--run-dir"]),
        ("recover models/mine --out x.gguf --recipe demo", ["--out x.gguf: ", "--format hf", "--format gguf"]),
        ("recover models/mine --out x --format gguf --recipe demo", ["--out x: ", "--format gguf", ".gguf"]),
        ("search runs/mine", ["runs/mine: ", "pgprune search runs/mine/recipe.yaml --out runs/mine"]),
        ("compare runs/mine", ["runs/mine: ", "pgprune search runs/mine/recipe.yaml --out runs/mine"]),
        ("recipes show runs/mine", ["runs/mine: ", "runs/mine/recipe.yaml"]),
        ("recipes copy runs/mine", ["runs/mine: ", "runs/mine/recipe.yaml"]),
        ("search runs/recovery", ["runs/recovery: ", "recovery"]),
        ("init-scores models/mine", ["models/mine: ", "pgprune recipes new models/mine > mine.yaml"]),
        ("doctor dense", ["dense: ", "pgprune recipes new dense > mine.yaml"]),
        ("search models/mine", ["models/mine: ", "pgprune search models/mine --sparsity 0.3"]),
        ("search text", ["text: ", "recipe", "model"]),
        ("search empty", ["empty: ", "model"]),
        ("search EMPTY", ["recipe is empty"]),
        ("search EMPTY --sparsity 0.3", ["recipe is empty"]),
        ("eval EMPTY", ["model is empty"]),
        ("recover demo --out x", ["demo: ", "pgprune export", "decision.json"]),
        ("search /nowhere/my-llama --sparsity 0.3", ["/nowhere/my-llama: ", ".gguf", "spelling"]),
        ("search my.gguf --sparsity 0.3", ["my.gguf: ", "spelling"]),
        ("search lama2-7b-50 --sparsity 0.3", ["lama2-7b-50: ", "did you mean llama2-7b-50"]),
        ("search smollm2-135m-30", ["models/smollm2-135m: ", "scripts/fetch_smollm2.sh", "--set model=HuggingFaceTB/"]),
        ("recipes show d.yaml", ["d.yaml: ", "a directory"]),
        ("recipes show fifo.yaml", ["fifo.yaml: ", "not a recipe file"]),
        ("recipes show loop.yaml", ["loop.yaml: ", "not a recipe file"]),
    ],
)
def test_what_is_in_the_wrong_place_is_refused_with_what_to_do(words, facts, pgprune) -> None:
    for path in ("models/mine/config.json", "models/mine/decision.json", "dense/config.json", "text"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("{}")
    for path in ("runs/mine/recipe.yaml", "runs/recovery/recipe.yaml", "runs/recovery/training.json"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("model: demo\n")
    Path("d.yaml").mkdir()
    Path("empty").mkdir()
    os.mkfifo("fifo.yaml")
    Path("loop.yaml").symlink_to("loop.yaml")
    files = sorted(Path().rglob("*"))
    code, out, err = pgprune(*["" if word == "EMPTY" else word for word in words.split()])
    assert (code, out, err.count("\n")) == (2, "", 1), err
    says(err, *facts)
    assert sorted(Path().rglob("*")) == files


def test_paths_may_start_at_home(pgprune, finished, monkeypatch, tmp_path: Path) -> None:
    """The shell leaves `~` as it is in `--out=~/x`, in quotes and in what a script assigns."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    shutil.copytree(finished["units"], home / "runs/units")
    assert pgprune("recipes", "copy", "demo", "~/mine.yaml")[0] == 0
    assert (home / "mine.yaml").is_file()
    assert pgprune("recipes", "show", "~/mine.yaml")[0] == 0
    assert str(home / "runs/units") in pgprune("runs", "~/runs")[1]
    monkeypatch.setenv("PGPRUNE_RUNS", "~/runs")
    assert str(home / "runs/units") in pgprune("runs")[1]
    assert pgprune("export", "~/runs/units", "--dry-run")[0] == 0
    for words, fact in (
        (["search", "demo", "--out=~/runs"], f"{home}/runs: holds other runs"),
        (["eval", "~/runs/units", "--speed"], "~/runs/units: speed is measured on an exported model"),
        (["report", "~/nothing"], f"{home}/nothing"),
    ):
        code, out, err = pgprune(*words)
        assert (code, out) == (2, ""), err
        assert fact in err
    assert list(tmp_path.iterdir()) == [home]


@pytest.mark.parametrize(("out", "format"), [("small", "hf"), ("small.gguf", "gguf")])
def test_recover_says_what_to_do_next_unless_no_command_reads_the_file(out, format, pgprune, monkeypatch) -> None:
    record = {"loss_before": 2.0, "loss_after": 1.0, "tokens": 9, "best_step": 1, "steps": 1}

    def recover(request, **_: object) -> dict[str, float]:
        request.out.mkdir() if format == "hf" else request.out.touch()
        return record

    monkeypatch.setattr("pgprune_cli.jobs.recover.recover", recover)
    code, _, err = pgprune("recover", "pruned", "--recipe", "demo", "--out", out, "--format", format)
    assert code == 0, err
    assert err == ("next: pgprune eval small --baseline pruned\n" if format == "hf" else "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout_is_named() -> None:
    command = f"{shlex.quote(sys.executable)} -m pgprune_cli recipes show demo >/dev/full"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "standard output: No space left on device" in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "2>&- >&-"])
@pytest.mark.parametrize(("words", "expected"), [("runs nowhere", 2), ("recipes --json", 0)])
def test_closed_streams_do_not_change_the_exit_code(words, expected, closed) -> None:
    command = f"{shlex.quote(sys.executable)} -m pgprune_cli {words} {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (expected, False), done.stderr


# --- signals


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGINT, 130),
        # tests/faults/test_stops.py sends them to processes of their own, too.
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.soak),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.soak),
    ],
)
def test_interrupted_search_prints_the_command_that_resumes_it(signum, code) -> None:
    many = [*SET, "--set", "search.forward_passes=200000", "--set", "search.checkpoint_every=100000"]
    program = [sys.executable, "-m", "pgprune_cli", "search", "demo", "--out", "a run", *many]
    started = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    history = Path("a run/metrics.jsonl")
    wait_until(lambda: lines_in(history) > 0, started)
    started.send_signal(signum)
    out, err = started.communicate(timeout=120)
    assert started.returncode == code, err
    assert out == ""
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    (newest,) = Path("a run/checkpoints").iterdir()
    step = int(newest.name.removeprefix("step-"))
    assert last.startswith(
        f"pgprune: stopped: step {step} of 100000 is saved in a run. "
        "Resume with: pgprune search demo --out 'a run' --set "
    )
    resuming = shlex.split(last.partition("Resume with: ")[2])
    assert resuming == ["pgprune", *program[3:]]


INTERRUPTED_AT_STEP_3 = """
import os, signal
from pgprune_cli.cli import program
from pgprune_cli.search import loop
original = loop._take_step
def take_step(problem, state):
    row = original(problem, state)
    if state.step == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return row
loop._take_step = take_step
program.main()
"""


def test_repeated_command_resumes_and_finishes_the_search() -> None:
    """Run the same command twice: interrupt it the first time."""
    arguments = ["search", "demo", *SET, "--set", "search.forward_passes=20", "--json"]
    interrupted = [sys.executable, "-c", INTERRUPTED_AT_STEP_3, *arguments]
    first = subprocess.run(interrupted, capture_output=True, text=True, check=False)
    assert first.returncode == 130, first.stderr
    repeated = [sys.executable, "-m", "pgprune_cli", *arguments]
    second = subprocess.run(repeated, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert "from step 3 of 10" in second.stderr
    assert json.loads(second.stdout)["forward_passes"] == 20


@pytest.mark.parametrize(
    ("command", "job", "saved"),
    [
        (["init-scores", "demo"], "init_scores.init_scores", "nothing is saved yet"),
        (["search", "demo"], "search.search", "nothing is saved yet"),
        (["compare", "demo", "--only", "metric"], "compare.compare", "0 of 1 run is measured in runs/compare/demo"),
        (["export", "{run}", "--out", "small"], "export.export", "nothing is written to small"),
    ],
)
def test_stopped_command_prints_what_is_saved_and_how_to_resume(
    command, job, saved, finished, pgprune, monkeypatch
) -> None:
    words = [word.format(run=finished["units"]) for word in command]
    monkeypatch.setattr(f"pgprune_cli.jobs.{job}", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    code, out, err = pgprune(*words)
    assert (code, out) == (143, "")
    command = shlex.join(["pgprune", *words])
    how = "Start again" if saved == "nothing is saved yet" else "Resume"
    assert err == f"pgprune: terminated\npgprune: stopped: {saved}. {how} with: {command}\n"


@pytest.mark.parametrize(
    ("words", "opening"),
    [
        ("search demo", "recipe.reader.load"),
        ("search demo --sparsity 0.3 --dry-run", "recipe.reader.load"),
        ("init-scores demo", "recipe.reader.load"),
        ("compare demo", "jobs.compare.runs_of"),
        ("recover models/small --out small", "jobs.recovery_request.recipe_of"),
        ("export {run}", "jobs.export.options_of"),
    ],
)
def test_stopped_command_prints_how_to_start_again_while_it_opens(
    words, opening, finished, pgprune, monkeypatch
) -> None:
    words = words.format(run=finished["units"]).split()
    monkeypatch.setattr(f"pgprune_cli.{opening}", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    code, out, err = pgprune(*words)
    assert (code, out) == (130, "")
    first, last = err.splitlines()
    assert first == "pgprune: interrupted"
    assert last.startswith("pgprune: stopped: nothing ")
    assert last.endswith(f" Start again with: {shlex.join(['pgprune', *words])}")


@pytest.mark.parametrize("place", ["pgprune_cli.jobs.search.search", "pgprune_cli.recipe.reader.load"])
def test_stopped_command_has_its_exit_code_when_an_import_turns_the_stop_into_an_error(
    place, pgprune, monkeypatch
) -> None:
    """As transformers does, whose modules are imported at their first use."""

    def import_half(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except SystemExit:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from None

    monkeypatch.setattr(place, import_half)
    code, out, err = pgprune("search", "demo")
    assert (code, out) == (130, "")
    assert err.startswith("pgprune: interrupted\npgprune: stopped: nothing ")
    assert err.count("\n") == 2


# --- what there is to look at


def test_control_characters_in_messages_are_escaped(pgprune) -> None:
    code, _, err = pgprune("verify", "\x1b[2Jnothing")
    assert (code, err) == (2, "pgprune: \\x1b[2Jnothing: no such file or directory\n")


def test_verify_reports_intact_and_damaged_files(pgprune) -> None:
    from pgprune_cli.run.layout import DECISION_RECORD

    assert pgprune("verify", "nothing")[0] == 2
    assert pgprune("init-scores", "demo", "--out", "run", "--metric", "magnitude", "-q")[0] == 0
    assert pgprune("verify", "run") == (0, "run: intact (run directory): scores.safetensors\n", "")
    Path("run", DECISION_RECORD).write_text("{")
    code, out, err = pgprune("verify", "run")
    assert (code, len(out.splitlines()), err) == (1, 1, "")
    code, out, _ = pgprune("verify", "run", "--json")
    assert code == 1 and len(json.loads(out)["faults"]) == 1


def test_doctor_prints_ok_and_fails_for_a_missing_model(pgprune, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 10**12))
    code, out, err = pgprune("doctor", "demo")
    assert (code, err) == (0, "")
    assert all(line.startswith("OK ") for line in out.splitlines())
    code, out, _ = pgprune("doctor", "demo", "--set", "model=nowhere", "--json")
    assert code == 1
    assert [row["name"] for row in json.loads(out)["findings"] if row["status"] == "FAIL"] == ["model"]


def test_doctor_only_warns_of_a_missing_evaluation_text(pgprune) -> None:
    words = ["doctor", "demo", "--set", "evaluation.corpora=[tales=nothing.txt]"]
    code, out, err = pgprune(*words)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("WARN")] == [["WARN", "text"]]
    rows = json.loads(pgprune(*words, "--json")[1])["findings"]
    assert [(row["name"], row["status"]) for row in rows if row["fix"]] == [("text", "WARN")]


def test_corpora_of_a_recipe_are_checked_before_a_model_is_loaded(pgprune, monkeypatch) -> None:
    Path("text.txt").write_text("The king was glad. " * 50)
    tales = ["--set", "evaluation.corpora=[tales=text.txt]", "--set", "evaluation.seqlen=[32]"]
    assert pgprune("search", "demo", *SET, *tales, "--quiet")[0] == 0
    code, out, err = pgprune("eval", "runs/demo", "--json")
    assert code == 0, err
    assert [(row["corpus"], row["seqlen"]) for row in json.loads(out)["perplexity"]] == [("tales", 32)]
    Path("text.txt").unlink()
    monkeypatch.setattr("pgprune_cli.jobs.targets.load_model", lambda *_: pytest.fail("it was loaded"))
    for command in (["eval", "runs/demo"], ["compare", "demo", *SET, *tales]):
        code, out, err = pgprune(*command, "--quiet")
        assert (code, out) == (2, "")
        assert "text.txt: no such file" in err


# --- report


def test_report_prints_its_path_and_its_runs(pgprune, finished, tmp_path) -> None:
    pytest.importorskip("altair", reason="pgprune[report] is not installed")
    code, out, err = pgprune("report", *map(str, finished.values()), "--out", "both.html", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "report": "both.html",
        "runs": [{"run": str(run), "state": "finished"} for run in finished.values()],
    }
    assert (tmp_path / "both.html").read_text().startswith("<!doctype html>")
    code, out, err = pgprune("report", str(tmp_path))
    assert (code, out) == (2, "")
    assert err.startswith(f"pgprune: {tmp_path}: is not a run directory. ") and err.count("\n") == 1
