"""The documentation cannot lie: every block of commands is run or says why not, every command line would be accepted.

A fenced block is run, top to bottom, all of a page in one directory, unless `<!-- not run: why -->` stands above it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import parsed

from pgprune_cli.recipe_reader import load

ROOT = Path(__file__).parents[1]
DOCS = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md"]  # its commands are of their day
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
FENCE = re.compile(r"(?:<!-- not run: (?P<why>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`(pgprune [^`]+)`(?!`)")
RUN = ("bash", "python", "yaml")
SHOWN = ("text", "json")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    why_not: str | None


def blocks(page: Path) -> list[Block]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["language"], match["text"], match["why"]) for match in found]


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
    assert not re.search(r"^    \$? ?pgprune ", FENCE.sub("", text), re.M), "commands go into a fenced block"


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


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("pgprune search", "MissingParameter"),
        ("pgprune search demo --steps 3", "NoSuchOption"),
        ("pgprune prune demo", "UsageError"),
        ("pgprune recipes list", "UsageError"),
        ("pgprune eval demo --limit none", "BadParameter"),
    ],
)
def test_a_command_line_that_it_does_not_take_would_be_found(line: str, fault: str) -> None:
    with pytest.raises(Exception) as refused:
        parsed(words_of(line))
    assert type(refused.value).__name__ == fault


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which `pgprune` and `python` are this one's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program, words in {"pgprune": "-m pgprune_cli ", "python": ""}.items():
        (folder / program).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}"$@"\n')
        (folder / program).chmod(0o755)
    paths = {"PATH": f"{folder}:{os.environ['PATH']}"}
    paths["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | paths | {"HF_HUB_OFFLINE": "1"}


@pytest.mark.timeout(900)  # a process for every command
@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_what_a_page_shows_is_what_happens(page: Path, tmp_path: Path, programs: dict[str, str]) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for number, block in enumerate(block for block in blocks(page) if block.language in RUN and not block.why_not):
        if block.language == "yaml":
            file = here / f"block-{number}.yaml"
            file.write_text(block.text)
            load(file)
            continue
        program = ["bash", "-euc"] if block.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run([*program, block.text], cwd=here, env=programs, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.text}\n{done.stderr}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra: pip install 'pgprune[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([*build, "--site-dir", tmp_path], env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "how.html").exists()
