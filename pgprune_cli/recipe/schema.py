"""Recipes: what one search is, as frozen dataclasses.

They are the schema. A key's type, range and choices stand in its annotation and nowhere else: an `Annotated` type
carries checks, each from a value to what is wrong with it ("" if nothing is). `recipe_reader` fills them from YAML.
"""

import math
import re
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Literal

from pgprune_cli.recipe.strict_yaml import shown_text

MOST = 2**31
"""No count is as large: what is counted here is multiplied with each other in 64 bits."""


@dataclass(frozen=True)
class Range:
    """Check of a number: low <= value < high, or low < value < high when `above`."""

    low: float
    high: float = math.inf
    above: bool = False

    def __call__(self, value: float) -> str:
        if (value > self.low or (value == self.low and not self.above)) and value < self.high:
            return ""
        if value >= MOST == self.high:
            return f"expected value < {MOST}, got {value}"
        if math.isinf(self.high) or self.high == MOST:
            return f"expected value {'>' if self.above else '>='} {self.low}, got {value}"
        return f"expected {self.low} {'<' if self.above else '<='} value < {self.high}, got {value}"


def _device(value: str) -> str:
    cuda = r"cuda:(0|[1-9][0-9]*)"
    names = value.split(",")
    if re.fullmatch(rf"auto|cpu|cuda|{cuda}(,{cuda})*", value) and len(set(names)) == len(names):
        return ""
    return f"expected auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1, got {shown_text(value)}"


def _disjoint(families: tuple[str, ...]) -> str:
    """No parameter may be in two families: their masks would contradict each other."""
    for one, other in combinations(families, 2):
        if "layer" in (one, other) or one.removesuffix("-block") == other.removesuffix("-block"):
            return f"{one} and {other} hold the same parameters, keep one of them"
    return ""


def name_and_text(corpus: str) -> tuple[str, str]:
    """What a corpus of an evaluation is reported as, and where its text comes from: of `wikitext2` or NAME=FILE.

    No name has a slash, so that `./a=b.txt` is a file.
    """
    name, equals, text = corpus.partition("=")
    return (name, text) if equals and "/" not in name else (corpus, corpus)


def _corpus(value: str) -> str:
    return "" if all(name_and_text(value)) else f"expected a corpus name or NAME=FILE, got {shown_text(value)}"


Natural = Annotated[int, Range(0, MOST)]
Count = Annotated[int, Range(1, MOST)]
Length = Annotated[int, Range(2, MOST)]  # tokens; a window of one token predicts nothing
Positive = Annotated[float, Range(0, above=True)]
Fraction = Annotated[float, Range(0, 1)]
Family = Literal["attention", "ffn", "attention-block", "ffn-block", "layer"]
Measure = Literal["parameters", "flops", "kv-cache", "latency"]
MetricName = Literal["wanda-sp", "flap", "obs", "taylor", "magnitude", "random", "uniform"]
RepairMethod = Literal["none", "bias", "least-squares", "least-squares-bias"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text the search measures losses on."""

    corpus: str  # a corpus name, or a file
    windows: Count = 120_000  # at most this many windows are searched over
    seqlen: Length = 128  # tokens a window
    batch: Count = 8  # windows a step
    heldout: Count = 32  # windows set aside to judge the hard mask, never searched on


@dataclass(frozen=True, kw_only=True)
class Units:
    """What is kept or removed as a whole: KV heads, FFN channels, sub-layers or decoder layers."""

    families: Annotated[tuple[Family, ...], _disjoint] = ("attention", "ffn")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much goes: a fraction of what units cost, of all together, of each family or of each layer of a family."""

    sparsity: Fraction
    measure: Measure = "parameters"  # what sparsity is a fraction of; latency is measured on the device
    scope: Literal["per-family", "global", "per-layer"] = "global"
    context: Annotated[int, Range(1, 2**20 + 1)] = 2048  # tokens at which FLOPs, KV-cache bytes and latency are counted
    min_keep: Fraction = 0.0  # of the units of every layer and family
    ffn_multiple: Count = 1  # FFN widths are multiples of it, or a layer's whole width


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metric that seeds the policy, and the calibration text it reads."""

    metric: MetricName = "obs"
    windows: Count = 128
    seqlen: Length = 1024  # tokens a window


@dataclass(frozen=True, kw_only=True)
class Start:
    """How the scores becomes the starting theta."""

    mapping: Literal["sigmap", "linear"] = "sigmap"
    temperature: Positive = 1.0  # below 1 the start is surer of the scores' order


@dataclass(frozen=True, kw_only=True)
class Search:
    """The loop: `forward passes` forward passes of one batch, `samples` of them a step."""

    policy: Literal["widths", "units"] = "widths"  # what is sampled: the layers' widths, or every unit by itself
    forward_passes: Natural = 320
    masks_per_step: Length = 16  # masks a step; they are compared with each other, so one is not enough
    estimator: Literal["paper", "rloo"] = "rloo"  # this and the next two: of the units policy only
    learning_rate: Annotated[float, Range(0)] = 0.0  # 0: chosen by the number of steps
    schedule: Literal["cosine", "constant"] = "cosine"
    checkpoint_every: Count = 100  # steps
    evaluate_every: Count = 100  # steps

    @property
    def steps(self) -> int:
        """Updates of the policy; forward passes that make no whole step are not spent."""
        return self.forward_passes // self.masks_per_step


@dataclass(frozen=True, kw_only=True)
class Repair:
    """The closed-form repair of the kept weights of o and down, by forward passes only."""

    method: RepairMethod = "least-squares"
    windows: Count = 384  # windows of calibration.seqlen that it is fitted to
    damping: Positive = 1e-3  # of the mean second moment; more keeps closer to the weights as they are


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The perplexities reported, one for each corpus and window length (tokens)."""

    corpora: tuple[Annotated[str, _corpus], ...] = ("wikitext2",)  # names, or NAME=FILE, as of `--ppl`
    seqlen: tuple[Length, ...] = (128, 2048)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One search. A `device` of several (`cuda:0,cuda:1`) spreads the layers over them."""

    model: str  # a hub name, a directory, a GGUF file or its directory, or "demo"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "bfloat16"
    weight_format: Literal["full", "int8", "fp8"] = "full"  # what the layers' projections are kept in while it searches
    device: Annotated[str, _device] = "auto"
    seed: Annotated[int, Range(0, 2**32)] = 0
    calibration: Calibration
    units: Units = Units()
    budget: Budget
    scores: Scores = Scores()
    start: Start = Start()
    search: Search = Search()
    repair: Repair = Repair()
    evaluation: Evaluation = Evaluation()
