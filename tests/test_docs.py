"""Every command block in the documentation is run or says why not, and every command line is one the program accepts.

The blocks of a page run from top to bottom in one directory. A block about a model that is not available here has
`<!-- run small -->` above it: its commands, except `pip install`, then run on the demo model with the settings in
`SMALL`. Names can be replaced for the run: `<!-- run small: demo for RECIPE, 2 for 8 -->`. A block that cannot run at
all says `<!-- not run: why -->`.
"""

from __future__ import annotations

import ast
import contextlib
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
from typing import NamedTuple

import pytest
from helpers.commands import PROGRAM, parsed
from helpers.messages import SNAPSHOT
from helpers.multiple_choice import items_of, task_file

from pgprune_cli.cli import program as cli
from pgprune_cli.demo.grammar import generate
from pgprune_cli.recipe.reader import load

ROOT = Path(__file__).parents[1]
DOCS = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "log.md"]  # the log keeps old commands
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
NARROW_PAGES = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
REMARK = r"<!-- (?:not run: (?P<why>[^\n]+)|(?P<small>run small)(?::\s(?P<replacements>[^>]+))?) -->\n"
FENCE = re.compile(rf"(?:{REMARK})?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`(pgprune [^`]+)`(?!`)")
RUN_LANGUAGES = ("bash", "python", "yaml")
SHOWN_LANGUAGES = ("text", "json")
SHELL = re.compile(r"[|&;$*<>]")
"""Characters that need a shell, except in ` > FILE` at the end of a command."""
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
    "recover.corpus=demo",
    "recover.tokens=128",
    "recover.seqlen=32",
    "recover.batch=2",
    "recover.accumulate=1",
    "recover.heldout=2",
    "evaluation.corpora=[tales=text.txt]",
    "evaluation.seqlen=[32]",
)
"""Settings appended to every command of a small block that takes a recipe, after the command's own."""
RECIPE_COMMANDS = {
    name for name, command in PROGRAM.commands.items() if any("--set" in param.opts for param in command.params)
}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
IMMEDIATE_OPTIONS = (["--help"], ["--version"], ["--install-completion"])
"""Options that print and exit while the command line is parsed."""


@dataclass(frozen=True)
class Block:
    """One fenced block. `replacements` holds pairs (text in the page, text to run instead)."""

    language: str
    text: str
    why_not: str | None
    small: bool
    replacements: tuple[tuple[str, str], ...]

    @property
    def runs(self) -> bool:
        return self.language in RUN_LANGUAGES and not self.why_not


class Command(NamedTuple):
    """The words of one command, and the file its stdout is redirected to."""

    words: list[str]
    stdout: str | None = None


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    result = []
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        pairs = [" ".join(pair.split()).partition(" for ") for pair in re.split(r",\s", match["replacements"] or "")]
        replacements = tuple((shown, run) for run, _, shown in pairs if shown)
        result.append(Block(match["language"], match["text"], match["why"], bool(match["small"]), replacements))
    return result


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


RUNNABLE = [page for page in PAGES if any(block.runs for block in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_blocks_have_a_known_language_and_hold_all_commands(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(blocks(page)), "a fence that this test cannot read"
    for block in blocks(page):
        assert block.language in (*RUN_LANGUAGES, *SHOWN_LANGUAGES), block.text
        assert block.language in RUN_LANGUAGES or not re.search(r"^\$? ?pgprune ", block.text, re.M), block.text
        assert not block.small or block.language != "bash" or [*commands(block)], block.text
    assert not re.search(r"^    \$? ?pgprune ", FENCE.sub("", text), re.M), "commands go into a fenced block"


@pytest.mark.parametrize("page", NARROW_PAGES, ids=page_name)
def test_lines_have_at_most_120_characters_outside_tables(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def words_of(line: str) -> list[str]:
    """Return the arguments of a command line, with a number for the placeholder N and without a redirection."""
    return [re.sub(r"^N$", "2", word) for word in shlex.split(line.partition(" > ")[0], comments=True)[1:]]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_command_lines_in_blocks_are_accepted_by_the_program(page: Path) -> None:
    for block in blocks(page):
        for line in block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else ():
            if line.strip().startswith("pgprune "):
                parsed(words_of(line.strip()))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_in_running_text_have_the_options_they_are_shown_with(page: Path) -> None:
    """An argument may be left out in running text, and the rest of a command after an ellipsis."""
    for match in INLINE.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        words = words_of(" ".join(match[1].split()).partition(" …")[0])
        if words in IMMEDIATE_OPTIONS:
            continue
        try:
            parsed(words)
        except Exception as error:
            if type(error).__name__ != "MissingParameter":
                raise


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_extras_to_install_exist(page: Path) -> None:
    for extras in re.findall(r"pip install (?:-e )?'?(?:pgprune|\.)\[([^\]]+)\]", page.read_text(encoding="utf-8")):
        assert set(extras.split(",")) <= set(EXTRAS)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_pages_install_pgprune_from_the_clone(page: Path) -> None:
    """Only the quick start names the package, where it explains the advice that error messages give."""
    by_name = re.findall(r"pip install [^`\n]*\bpgprune\b", page.read_text(encoding="utf-8"))
    assert by_name == (["pip install 'pgprune"] if page.name == "index.md" else [])


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
def test_command_line_is_refused_when_the_program_does_not_take_it(line: str, fault: str) -> None:
    with pytest.raises(Exception) as refused:
        parsed(words_of(line))
    assert type(refused.value).__name__ == fault


PATH = re.compile(r"[\w*-]+(?:/[\w*-]+)*/[\w*-]+\.(?:py|sh|sbatch)\b")


@pytest.mark.parametrize("page", NARROW_PAGES, ids=page_name)
def test_source_files_that_a_page_names_exist(page: Path) -> None:
    """A path is relative to the repository or to the package. `activation.py` and `example.py` are examples."""
    missing = [
        path
        for path in PATH.findall(page.read_text(encoding="utf-8"))
        if Path(path).name not in ("activation.py", "example.py")
        if not any([*base.glob(path)] for base in (ROOT, ROOT / "pgprune_cli"))
    ]
    assert missing == []


def strings_of_the_package() -> Iterator[str]:
    """Yield every string literal of the package, with `…` for what an f-string fills in."""
    for path in (ROOT / "pgprune_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_error_headings_are_messages_the_program_prints() -> None:
    """A heading of the troubleshooting page may leave out the parts of a message that vary, as `…`."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.+)`$", text, re.M)
    messages = [*strings_of_the_package()]
    assert headings
    for heading in headings:
        for fragment in filter(None, (part.strip(" :") for part in heading.split("…"))):
            assert any(fragment in message for message in messages), f"no message holds {fragment!r}"


def test_headings_about_refused_models_are_messages_in_the_snapshot() -> None:
    """A heading of this page may leave out the parts of a message that vary, as `…`."""
    page = (ROOT / "docs" / "will_it_work.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.+)`$", page[page.index("## What is refused") :], re.M)
    messages = "\n".join("\n".join(lines) for lines in json.loads(SNAPSHOT.read_text(encoding="utf-8")).values())
    assert headings
    for heading in headings:
        assert re.search(".*".join(map(re.escape, heading.split("…"))), messages), f"no such message: {heading}"


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which `pgprune`, `python` and `torchrun` run this interpreter and this checkout."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program, words in {"pgprune": "-m pgprune_cli ", "python": "", "torchrun": "-m torch.distributed.run "}.items():
        (folder / program).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words}"$@"\n')
        (folder / program).chmod(0o755)
    paths = {"PATH": f"{folder}:{os.environ['PATH']}"}
    paths["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | paths | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}


@pytest.fixture
def page_directory(tmp_path: Path, finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory a page's blocks run in, with finished runs, a model, a text and a task to put in place."""
    directory = tmp_path / "page"
    for name, run in finished.items():
        shutil.copytree(run, directory / "runs" / name)
    shutil.copytree(ROOT / "pgprune_cli" / "demo" / "model", directory / "my-llama")
    (directory / "text.txt").write_text(generate(seed=9, characters=10_000))
    (directory / "tales.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items_of(4)))
    task_file(directory, Path("tales.jsonl"))
    for folder in ("configs", "scripts"):
        (directory / folder).symlink_to(ROOT / folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub" / "datasets")
    monkeypatch.chdir(directory)
    return directory


def replaced(block: Block) -> str:
    """Return the block's text with its replacements made. Fail if one of them replaces nothing."""
    text = block.text
    for shown, run in block.replacements:
        text, times = re.subn(rf"(?<![\w./-]){re.escape(shown)}(?![\w./-])", run, text)
        assert times, f"nothing of that name to be replaced: {shown}"
    return text


def commands(block: Block) -> Iterator[Command]:
    """Yield the block's commands, except `pip`, with `SMALL` appended where a small block's command takes a recipe."""
    for line in replaced(block).replace("\\\n", " ").splitlines():
        line, _, stdout = line.partition(" > ")
        words = shlex.split(line, comments=True)
        assert not SHELL.search(" ".join(words)), f"needs a shell: {line}"
        if block.small and RECIPE_COMMANDS.intersection(words):
            words += [word for setting in SMALL for word in ("--set", setting)]
        if words and words[0] != "pip":
            yield Command(words, stdout.strip() or None)


def test_small_block_yields_its_commands_with_replacements() -> None:
    text = """\
pip install 'pgprune[gguf]'   # is skipped
torchrun --nproc-per-node 8 -m pgprune_cli search RECIPE    # a recipe of your own
pgprune eval runs/RECIPE --max-windows 8 \\
    --ppl RECIPE
pgprune recipes show RECIPE > mine.yaml
"""
    search, measure, show = commands(Block("bash", text, None, True, (("8", "2"), ("RECIPE", "demo"))))
    assert search.words[:7] == ["torchrun", "--nproc-per-node", "2", "-m", "pgprune_cli", "search", "demo"]
    assert search.words[7:9] == ["--set", "model=demo"]
    assert measure == (["pgprune", "eval", "runs/RECIPE", "--max-windows", "2", "--ppl", "demo"], None)
    assert show == (["pgprune", "recipes", "show", "demo"], "mine.yaml")


@pytest.mark.parametrize(("text", "replacements"), [("pgprune runs | sort", ()), ("pgprune runs", (("run", "demo"),))])
def test_small_block_is_refused_when_it_needs_a_shell_or_replaces_nothing(
    text: str, replacements: tuple[tuple[str, str], ...]
) -> None:
    with pytest.raises(AssertionError):
        [*commands(Block("bash", text, None, True, replacements))]


def run_process(command: list[str | Path], programs: dict[str, str]) -> None:
    done = subprocess.run(command, env=programs, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stderr}"


def run_command(command: Command, programs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one command and fail if it fails; `pgprune` in this process, which saves seconds of imports."""
    words = command.words
    if words[0] != "pgprune":
        run_process([shutil.which(words[0], path=programs["PATH"]), *words[1:]], programs)
        return
    monkeypatch.setattr(sys, "argv", words)
    with contextlib.ExitStack() as stack:
        if command.stdout:
            file = stack.enter_context(Path(command.stdout).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(file))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code, words


@pytest.mark.timeout(900)  # one process for every command that is not pgprune
@pytest.mark.parametrize("page", RUNNABLE, ids=page_name)
def test_blocks_of_a_page_run(
    page: Path, page_directory: Path, programs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, block in enumerate(block for block in blocks(page) if block.runs):
        if block.language == "yaml":
            named = re.match(r"# ([\w-]+\.yaml)", block.text)  # a file that later commands read
            file = page_directory / (named[1] if named else f"block-{number}.yaml")
            file.write_text(replaced(block))
            if not named:
                load(file)
        elif block.language == "python":
            run_process([sys.executable, "-c", replaced(block)], programs)
        elif not block.small and SHELL.search(block.text):
            run_process(["bash", "-euc", block.text], programs)
        else:
            for command in commands(block):
                run_command(command, programs, monkeypatch)


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra: pip install 'pgprune[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*build, "--site-dir", tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "how.html").exists()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_snippets_load_the_tokenizer_of_an_export_without_a_question_at_the_terminal(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        if "trust_remote_code=True" in block:  # else it is about a dense model
            lines = [line for line in block.splitlines() if "AutoTokenizer.from_pretrained(" in line]
            assert all("trust_remote_code=True" in line for line in lines)
