"""Names with brackets and colons, which rich would take for markup and emoji, are printed as they are by every verb."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from helpers.recipes import SMALL

from pgprune_cli.cli.tables import grid
from pgprune_cli.console.progress import StderrProgress
from pgprune_cli.model.source import DEMO_MODEL

MODEL, RUN, CORPUS, TEXT = "e[/v2]/m[bold]:key:", "runs/r[/i][v2]:key:", "c[red]", "t[/v2]/t[b]:key:.txt"


@pytest.fixture
def _hostile_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model, a text and a recipe with hostile names in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO_MODEL, MODEL)
    Path(TEXT).parent.mkdir(parents=True)
    Path(TEXT).write_text("The king was glad. " * 400)
    Path("r[v2].yaml").write_text(
        f"extends: demo\nmodel: {MODEL!r}\ncalibration: {{corpus: {TEXT!r}}}\n"
        f"evaluation: {{corpora: ['{CORPUS}={TEXT}'], seqlen: [32]}}\n"
    )


def plain(text: str) -> str:
    """Remove what a terminal does not show: colours, and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.mark.usefixtures("_hostile_names")
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_every_verb_prints_brackets_and_colons_as_they_are(terminal, pgprune, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    sets = [word for override in SMALL for word in ("--set", override)]

    def prints(*arguments: str, names: tuple[str, ...], code: int = 0) -> None:
        actual, out, err = pgprune(*arguments)
        assert actual == code, plain(out + err)
        for name in names:
            assert name in plain(out + err), f"{name!r} is not in the output of {arguments}:\n{plain(out + err)}"

    recipe = "r[v2].yaml"
    prints("init-scores", recipe, "--out", RUN, *sets, names=(MODEL, RUN))
    prints("search", recipe, "--out", RUN, "--dry-run", *sets, names=(MODEL,))
    prints("search", recipe, "--out", RUN, *sets, names=(MODEL, RUN))
    prints("eval", RUN, names=(RUN, CORPUS))
    prints("eval", MODEL, "--ppl", f"{CORPUS}={TEXT}", "--seqlen", "32", names=(MODEL, CORPUS))
    prints("runs", names=(RUN, MODEL, CORPUS))
    prints("report", RUN, names=(RUN,))
    prints("export", RUN, "--out", "out/x[/v2]:key:", names=("out/x[/v2]:key:",))
    prints("export", RUN, "--dry-run", "--out", "x[b]", names=("x[b]", "model.layers.0.mlp.down_proj.weight"))
    prints("verify", RUN, names=(RUN,))
    prints("verify", "out/x[/v2]:key:", names=("out/x[/v2]:key:",))
    prints("recipes", "show", recipe, names=(MODEL,))
    prints("doctor", recipe, *sets, names=(MODEL, TEXT))
    prints("doctor", recipe, "--set", "model=/no[/where]", code=1, names=("/no[/where]",))
    prints("eval", "/no[/where]", code=2, names=("/no[/where]",))
    prints("compare", recipe, "--out", "c[/v2]", "--only", "metric", *sets, names=("c[/v2]", CORPUS))


def test_progress_and_tables_print_text_as_it_is(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    text = "loading e[/v2]/m[bold]:key:"
    for forced in (False, True):
        monkeypatch.delenv("CI", raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "200")
        if forced:
            monkeypatch.setenv("FORCE_COLOR", "1")
        progress = StderrProgress()
        with progress.working(f"1 {text}"):
            progress.say(f"2 {text}")
        with progress.layers(f"3 {text}", 1), progress.writing(f"4 {text}", 1):
            pass
        grid([f"5 {text}", f"6 {text}"], [[f"7 {text}", f"8 {text}"]])
        out, err = map(plain, capsys.readouterr())
        assert [number for number in "1234" if f"{number} {text}" not in err] == []
        assert [number for number in "5678" if f"{number} {text}" not in out] == []


def test_a_cell_of_a_table_is_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    grid(["name", "number"], [["a\n\x1b[31mb", "1"]], texts=1)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["name", "number"],
        [r"a\n\x1b[31mb", "1"],
    ]
