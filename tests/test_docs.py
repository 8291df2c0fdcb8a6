"""The documentation cannot lie: every block of commands is run or says why not, every command line would be accepted.

A fenced block is run, top to bottom, all of a page in one directory. Where its model is not at hand,
`<!-- run small -->` stands above it: its very commands, except `pip install`, are run on the model that comes with the
package, cut short (`SMALL`). Names that mean nothing here give way to others, such as those of what lies in `here`:
`<!-- run small: demo for RECIPE, 2 for 8 -->`. What cannot be run at all says `<!-- not run: why -->`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.commands import PROGRAM, parsed
from helpers.multiple_choice import items_of, task_file

from pgprune_cli.cli import program as cli
from pgprune_cli.demo.grammar import generate
from pgprune_cli.recipe.reader import load

ROOT = Path(__file__).parents[1]
DOCS = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md"]  # its commands are of their day
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
REMARK = r"<!-- (?:not run: (?P<why>[^\n]+)|(?P<small>run small)(?::\s(?P<instead>[^>]+))?) -->\n"
FENCE = re.compile(rf"(?:{REMARK})?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`(pgprune [^`]+)`(?!`)")
RUN = ("bash", "python", "yaml")
SHELL = re.compile(r"[|&;$*<>]")
"""What only a shell understands."""
SHOWN = ("text", "json")
SMALL = (
    "model=demo",
    "device=cpu",
    "dtype=float32",
    "calibration.corpus=text.txt",
    "calibration.windows=16",
    "calibration.seqlen=32",
    "calibration.batch=2",
    "calibration.heldout=2",
    "scores.windows=4",
    "scores.seqlen=32",
    "search.forward_passes=4",
    "search.masks_per_step=2",
    "search.evaluate_every=2",
    "repair.windows=8",
    "evaluation.corpora=[tales=text.txt]",
    "evaluation.seqlen=[32]",
)
"""What is set, after all that the command sets itself, in every recipe of a block that is run small."""
TAKE_SETTINGS = {
    verb for verb, command in PROGRAM.commands.items() if any("--set" in each.opts for each in command.params)
}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    why_not: str | None
    small: bool
    instead: tuple[tuple[str, str], ...]
    """What stands in the page, and what to run in its place."""


def blocks(page: Path) -> list[Block]:
    found = []
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        pairs = [" ".join(pair.split()).partition(" for ") for pair in re.split(r",\s", match["instead"] or "")]
        instead = tuple((there, here) for here, _, there in pairs if there)
        found.append(Block(match["language"], match["text"], match["why"], bool(match["small"]), instead))
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


RUNNABLE = [page for page in PAGES if any(block.language in RUN and not block.why_not for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(blocks(page)), "a fence that this test cannot read"
    for block in blocks(page):
        assert block.language in (*RUN, *SHOWN), block.text
        assert block.language in RUN or not re.search(r"^\$? ?pgprune ", block.text, re.M), block.text
        assert not block.small or block.language != "bash" or [*commands(block)], block.text
    assert not re.search(r"^    \$? ?pgprune ", FENCE.sub("", text), re.M), "commands go into a fenced block"


NARROW = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]


@pytest.mark.parametrize("page", NARROW, ids=name)
def test_lines_are_of_120_characters_at_most(page: Path) -> None:
    """But for tables, whose rows cannot be broken."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def words_of(line: str) -> list[str]:
    return [re.sub(r"^N$", "2", word) for word in shlex.split(line, comments=True)[1:]]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_line_is_one_that_the_program_takes(page: Path) -> None:
    for block in blocks(page):
        for line in block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else ():
            if line.strip().startswith("pgprune "):
                parsed(words_of(line.strip()))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_that_is_mentioned_has_those_options(page: Path) -> None:
    """In running text, where an argument may be left out, and the rest where there is an ellipsis."""
    for match in INLINE.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        words = words_of(" ".join(match[1].split()).partition(" …")[0])
        if words in (["--help"], ["--version"], ["--install-completion"]):
            continue  # which act at once
        try:
            parsed(words)
        except Exception as error:
            if type(error).__name__ != "MissingParameter":
                raise


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_extra_that_is_to_be_installed_is_one(page: Path) -> None:
    """Which is all that is tried of `pip install`."""
    for extras in re.findall(r"pip install (?:-e )?'?(?:pgprune|\.)\[([^\]]+)\]", page.read_text(encoding="utf-8")):
        assert set(extras.split(",")) <= set(EXTRAS)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pgprune_is_installed_from_the_clone_that_the_page_is_read_in(page: Path) -> None:
    """What the program says instead, `pip install 'pgprune[…]'`, is explained in the quick start."""
    others = re.findall(r"pip install [^`\n]*\bpgprune\b", page.read_text(encoding="utf-8"))
    assert others == (["pip install 'pgprune"] if page.name == "index.md" else [])


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("pgprune search", "MissingParameter"),
        ("pgprune search demo --steps 3", "NoSuchOption"),
        ("pgprune prune demo", "UsageError"),
        ("pgprune recipes list", "UsageError"),
        ("pgprune eval demo --max-windows none", "BadParameter"),
    ],
)
def test_a_command_line_that_it_does_not_take_would_be_found(line: str, fault: str) -> None:
    with pytest.raises(Exception) as refused:
        parsed(words_of(line))
    assert type(refused.value).__name__ == fault


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which `pgprune`, `python` and `torchrun` are this one's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program, words in {"pgprune": "-m pgprune_cli ", "python": "", "torchrun": "-m torch.distributed.run "}.items():
        (folder / program).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}"$@"\n')
        (folder / program).chmod(0o755)
    paths = {"PATH": f"{folder}:{os.environ['PATH']}"}
    paths["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | paths | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}


@pytest.fixture
def here(tmp_path: Path, finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a page, with what may be given in place of its names: runs, a text, a task."""
    here = tmp_path / "here"
    for name, run in finished.items():
        shutil.copytree(run, here / "runs" / name)
    (here / "text.txt").write_text(generate(seed=9, characters=10_000))
    (here / "tales.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items_of(4)))
    task_file(here, Path("tales.jsonl"))
    for folder in ("configs", "scripts"):
        (here / folder).symlink_to(ROOT / folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub" / "datasets")
    monkeypatch.chdir(here)
    return here


def replaced(block: Block) -> str:
    text = block.text
    for there, here in block.instead:
        text, times = re.subn(rf"(?<![\w./-]){re.escape(there)}(?![\w./-])", here, text)
        assert times, f"nothing of that name to be replaced: {there}"
    return text


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command, with `SMALL` behind those that take a recipe's settings if it is to be run small."""
    for line in replaced(block).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        assert not SHELL.search(" ".join(words)), f"needs a shell: {line}"
        if block.small and TAKE_SETTINGS.intersection(words):
            words += [word for setting in SMALL for word in ("--set", setting)]
        if words and words[0] != "pip":
            yield words


def test_a_block_that_is_run_small_gives_its_commands() -> None:
    text = """\
pip install 'pgprune[gguf]'   # which is not tried
torchrun --nproc-per-node 8 -m pgprune_cli search RECIPE    # RECIPE: one's own
pgprune eval runs/RECIPE --max-windows 8 \\
    --ppl RECIPE
"""
    search, measure = commands(Block("bash", text, None, True, (("8", "2"), ("RECIPE", "demo"))))
    assert search[:7] == ["torchrun", "--nproc-per-node", "2", "-m", "pgprune_cli", "search", "demo"]
    assert search[7:9] == ["--set", "model=demo"]
    assert measure == ["pgprune", "eval", "runs/RECIPE", "--max-windows", "2", "--ppl", "demo"]
    for text, instead in (("pgprune runs | sort", ()), ("pgprune runs", (("run", "demo"),))):
        with pytest.raises(AssertionError):
            [*commands(Block("bash", text, None, True, instead))]


def run(command: list[str | Path], programs: dict[str, str]) -> None:
    done = subprocess.run(command, env=programs, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stderr}"


@pytest.mark.timeout(900)  # a process for every command
@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_what_a_page_shows_is_what_happens(
    page: Path, here: Path, programs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, block in enumerate(block for block in blocks(page) if block.language in RUN and not block.why_not):
        if block.language == "yaml":
            named = re.match(r"# ([\w-]+\.yaml)", block.text)  # a file for the commands that follow
            file = here / (named[1] if named else f"block-{number}.yaml")
            file.write_text(replaced(block))
            if not named:
                load(file)
        elif block.language == "python":
            run([sys.executable, "-c", replaced(block)], programs)
        elif shell := not block.small and SHELL.search(block.text):
            run(["bash", "-euc", block.text], programs)
        for words in commands(block) if block.language == "bash" and not shell else ():
            if words[0] != "pgprune":
                run([shutil.which(words[0], path=programs["PATH"]), *words[1:]], programs)
                continue
            monkeypatch.setattr(sys, "argv", words)  # seconds of imports for each, in processes of their own
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert not ended.value.code, words


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra: pip install 'pgprune[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([*build, "--site-dir", tmp_path], env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "how.html").exists()
