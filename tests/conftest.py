"""Fixtures that all tests share: tiny models, the demo's recipe and finished runs."""

from __future__ import annotations

import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("helpers")  # before anything imports it

from helpers.fp8 import lacks_fp8
from helpers.models import ARCHITECTURES, EXPERT_ARCHITECTURES, save_tokenizer, tiny_model
from helpers.one_search import RECIPE as ONE_SEARCH
from helpers.one_search import result_of
from helpers.recipes import COMMAND, SMALL, WIDTH_SEARCH

from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.run.layout import EVALUATION_FILE
from pgprune_cli.storage.records import write_record


def _skipped_without_fp8(item: pytest.Item):
    """Skip a test that fails because this PyTorch cannot multiply fp8 matrices on the CPU."""
    try:
        return (yield)
    except Exception as error:
        if not lacks_fp8(error):
            raise
        pytest.skip(f"PyTorch {torch.__version__} cannot multiply fp8 matrices on the CPU")


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_skipped_without_fp8)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(_skipped_without_fp8)


@pytest.fixture(scope="session", autouse=True)
def default_sighup_handler():
    """Restore SIGHUP's default handler: under nohup and in some CIs it is ignored, and child processes inherit that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def one_thread():
    """One thread for torch: models this small are slower with several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    """Each of the architectures of the tiny models in turn."""
    return request.param


@pytest.fixture(params=(*ARCHITECTURES, *EXPERT_ARCHITECTURES))
def any_architecture(request) -> str:
    """Each of the architectures of the tiny models in turn, mixtures of experts included."""
    return request.param


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk, in one file."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model("llama-gqa").save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved tiny model that the test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def shared() -> Path:
    """The folder of real texts beside the project. A test that uses it is skipped if the folder is absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "data" / "wikitext2.test.txt").exists():
        pytest.skip(f"no real texts: {folder / 'data'} is absent")
    return folder


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache of tokenised text that all tests share."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory):
    """The bench of tests/faults: pgprune on a tiny model, in processes that get killed and on disks that fail."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("there is no /proc, which names the file behind a handle")
    from helpers.faults_bench import RECIPE, Bench

    base = tmp_path_factory.mktemp("base")
    tiny_model("llama-gqa").save_pretrained(base / "model")
    save_tokenizer(base / "model")
    (base / "text.txt").write_text("ab" * 400 + "The king was glad. " * 40)
    (base / "recipe.yaml").write_text(RECIPE.format(base=base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPRUNE_CACHE", str(base / "cache"))
        bench = Bench(base, tmp_path_factory.mktemp("jobs"))
    yield bench
    bench.close()


@pytest.fixture(autouse=True)
def _shared_token_cache(token_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenise each text once for all tests, and keep out of the user's own cache."""
    monkeypatch.setenv("PGPRUNE_CACHE", token_cache)


@pytest.fixture
def small():
    """A function that returns the demo's recipe, made small, with further overrides as for `--set`."""

    def recipe(*overrides: str) -> Recipe:
        return load(find("demo"), [*SMALL, *overrides])

    return recipe


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, token_cache: str) -> dict[str, Path]:
    """Finished and evaluated runs of the demo, a few steps long, by search policy."""
    from pgprune_cli.jobs.search import search

    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    for policy, overrides in (("units", ()), ("widths", WIDTH_SEARCH)):
        run = runs[policy] = folder / policy
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", COMMAND)
            patch.setenv("PGPRUNE_CACHE", token_cache)
            search(load(find("demo"), [*SMALL, *overrides]), run)
        ppl = {"units": 4.5, "widths": 3.25}[policy]
        row = {"corpus": "demo", "seqlen": 128, "bos": False, "ppl": ppl, "tokens": 99}
        write_record(run / EVALUATION_FILE, {"model": policy, "parameters": 7, "perplexity": [row]})
    return runs


@pytest.fixture
def searching(finished: dict[str, Path], tmp_path: Path) -> Path:
    """A run of the unit search that is still running: it has no decision yet, and its last row is half written."""
    run = tmp_path / "searching"
    shutil.copytree(finished["units"], run)
    for name in ("decision.safetensors", "decision.json", "repair.safetensors", "evaluation.json"):
        (run / name).unlink(missing_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "losses": [1.')
    return run


# --- count the inputs that the fuzz tests tried, in this process or in those of pytest -n

TRIED = pytest.StashKey[Counter[str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    node.config.stash.setdefault(TRIED, Counter()).update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not (inputs := sys.modules.get("helpers.inputs")):
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = dict(inputs.tried)
    else:
        session.config.stash[TRIED] = inputs.tried


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if tried := config.stash.get(TRIED, None):
        kinds = sorted(kind for kind in tried if not kind.endswith(", refused"))
        terminalreporter.section("inputs tried")
        for kind in kinds:
            terminalreporter.write_line(f"{kind}: {tried[kind]:,}, of which refused: {tried[f'{kind}, refused']:,}")
        terminalreporter.write_line(f"all readings: {sum(tried[kind] for kind in kinds):,}")


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, token_cache: str) -> tuple:
    """What one process finds in the search of helpers/one_search.py."""
    from pgprune_cli.jobs.search import search

    run = tmp_path_factory.mktemp("alone")
    search(load(find("demo"), ONE_SEARCH), run)
    return result_of(run)
