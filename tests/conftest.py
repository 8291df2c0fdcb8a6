"""Tiny models of every supported layout, built here: no network, no downloads."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import Recipe

pytest.register_assert_rewrite("faults_bench")

ARCHITECTURES = ("llama-mha", "llama-gqa", "llama-biased", "mistral", "qwen2", "qwen3")

VOCABULARY = 96

SMALL = (
    "calibration.sequences=16",
    "calibration.seqlen=16",
    "calibration.batch=2",
    "calibration.heldout=4",
    "saliency.sequences=4",
    "saliency.seqlen=32",
    "search.policy=units",
    "search.forwards=12",
    "search.samples=2",
    "search.learning_rate=0.05",
    "policy.temperature=0.3",
    "reconstruct.method=none",
    "search.checkpoint_every=100",
    "search.evaluate_every=3",
)
"""Overrides that cut the demo's recipe down to a second: six steps of the units policy, no repair."""


def script_module(name: str) -> ModuleType:
    """`scripts/<name>.py`, which is no module of the package."""
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_config(architecture: str):
    """A transformers config of 4 layers: GQA with 4 KV groups of 2 query heads except `llama-mha`; 24 channels.

    `llama-gqa` and `qwen3` tie their embeddings; `llama-biased` has biases everywhere, `qwen2` on q, k and v.
    """
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    match architecture:
        case "llama-mha":
            return LlamaConfig(**sizes | {"num_attention_heads": 4})
        case "llama-gqa":
            return LlamaConfig(**sizes | {"tie_word_embeddings": True})
        case "llama-biased":
            return LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)
        case "mistral":
            return MistralConfig(**sizes, sliding_window=16)
        case "qwen2":
            return Qwen2Config(**sizes)
        case "qwen3":
            return Qwen3Config(**sizes | {"tie_word_embeddings": True})
    raise ValueError(architecture)


def tiny_model(architecture: str, seed: int = 0) -> nn.Module:
    """A random float32 model of `tiny_config`, in eval mode, with weights large enough that every unit matters."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1.0 if parameter.mean() > 0.5 else 0.0, std=0.2)
    return model.eval().requires_grad_(False)


TEXT = "Don't stop: 12345 foxes' dens, they'RE 3 métres   deep!\n\n\tThe  end… of 2024-11-25 (日本語) <s> again. "


def save_tokenizer(directory: Path, size: int = VOCABULARY, splitter=None, **options) -> None:
    """A BPE over bytes of `size` tokens, three of them special; one of few tokens lacks most bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<s>", "</s>"]  # the first one transformers gives every Qwen2
    few = [*special, *letters[: size - 4], "ab"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(few)}, [("a", "b")]))
    tokenizer.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if size > len(special + letters):
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=letters, show_progress=False
        )
        tokenizer.train_from_iterator([TEXT] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<|endoftext|>", **options
    )
    fast.save_pretrained(directory)


def finished_run(run: Path) -> None:
    """Writes a base model with its tokenizer into `base`, and into `run` a repaired decision on it."""
    from pgprune_cli.model.prunable import LayerKeep
    from pgprune_cli.model.source import resolve
    from pgprune_cli.repair.least_squares import repair
    from pgprune_cli.run.decision import Decision

    model = tiny_model("llama-gqa")
    model.save_pretrained("base")
    save_tokenizer(Path("base"))
    keep = tuple(LayerKeep(torch.arange(4) < 4 - layer, torch.arange(24) < 9 + layer) for layer in range(4))
    outputs = repair(model, keep, [torch.arange(64).view(4, 16)], "least-squares", 1e-3).outputs
    Decision(keep, "base", resolve("base").fingerprint(), 0.5, "dtype: float32\n", 1, 2, 3, 2.5, outputs).save(run)


@pytest.fixture(scope="session", autouse=True)
def hangups_are_heard():
    """Whatever runs the tests may ignore SIGHUP (nohup, some CIs), and the programs they start would do so, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk, in one file."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model("llama-gqa").save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def shared() -> Path:
    """The folder of real texts beside the project; a test that asks for it skips where it is absent."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "data" / "wikitext2.test.txt").exists():
        pytest.skip(f"no real texts: {folder / 'data'} is absent")
    return folder


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory):
    """Of tests/faults: pgprune on a tiny model, in processes that may be killed and on disks that fail."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc to tell which file a handle is of")
    from faults_bench import RECIPE, Bench

    base = tmp_path_factory.mktemp("base")
    tiny_model("llama-gqa").save_pretrained(base / "model")
    save_tokenizer(base / "model")
    (base / "text.txt").write_text("ab" * 400 + "The king was glad. " * 40)
    (base / "recipe.yaml").write_text(RECIPE.format(base=base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPRUNE_CACHE", str(base / "cache"))
        made = Bench(base, tmp_path_factory.mktemp("jobs"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _one_cache(token_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is tokenised once for all tests, and never into the user's own cache."""
    monkeypatch.setenv("PGPRUNE_CACHE", token_cache)


@pytest.fixture
def small():
    """The demo's recipe, small; overrides as of `--set`."""

    def recipe(*overrides: str) -> Recipe:
        return load(find("demo"), [*SMALL, *overrides])

    return recipe


LAYERS_POLICY = ("search.policy=layers", "reconstruct.method=least-squares", "reconstruct.sequences=8")
COMMAND = ["/usr/bin/pgprune", "search", "demo", "--out", "a run"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, token_cache: str) -> dict[str, Path]:
    """Run directories by the policy that searched, a few steps each, of the demo; measured, too."""
    from pgprune_cli.jobs.search import search

    folder = tmp_path_factory.mktemp("runs")
    runs = {}
    for policy, overrides in (("units", ()), ("layers", LAYERS_POLICY)):
        run = runs[policy] = folder / policy
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", COMMAND)
            patch.setenv("PGPRUNE_CACHE", token_cache)
            search(load(find("demo"), [*SMALL, *overrides]), run, quiet=True)
        ppl = {"units": 4.5, "layers": 3.25}[policy]
        (run / "evaluation.json").write_text(
            f'{{"model": "{policy}", "parameters": 7, "perplexity": '
            f'[{{"corpus": "demo", "seqlen": 128, "ppl": {ppl}, "tokens": 99}}]}}'
        )
    return runs


@pytest.fixture
def searching(finished: dict[str, Path], tmp_path: Path) -> Path:
    """The search over units while it goes on: no decision yet, and a row that is half written."""
    run = tmp_path / "searching"
    shutil.copytree(finished["units"], run)
    for name in ("decision.safetensors", "decision.json", "repair.safetensors", "evaluation.json"):
        (run / name).unlink(missing_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "losses": [1.')
    return run


# --- how many inputs the tests of fuzz/ tried, here or in the processes of pytest -n

TRIED = pytest.StashKey[Counter[str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    node.config.stash.setdefault(TRIED, Counter()).update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not (inputs := sys.modules.get("inputs")):
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
