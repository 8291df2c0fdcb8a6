"""The recipe schema: frozen dataclasses, one per section.

A key's type, range and choices are its annotation, and the comment above it is its description in docs/recipe.md.
Checks inside `Annotated` map a value to an error text, "" if the value is valid. `reader.py` fills the classes from
YAML.
"""

import math
import re
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Literal

from pgprune_cli.core.families import BLOCKS_OF
from pgprune_cli.recipe.strict_yaml import may_be_empty, shown_text

COUNT_LIMIT = 2**31
"""Counts stay below this limit because products of counts must fit into 64 bits."""


@dataclass(frozen=True)
class Range:
    """Check that low <= value < high, or low < value < high if `above` is set."""

    low: float
    high: float = math.inf
    above: bool = False

    def __call__(self, value: float) -> str:
        if (value > self.low or (value == self.low and not self.above)) and value < self.high:
            return ""
        if value >= COUNT_LIMIT == self.high:
            return f"expected value < {COUNT_LIMIT}, got {value}"
        if math.isinf(self.high) or self.high == COUNT_LIMIT:
            return f"expected value {'>' if self.above else '>='} {self.low}, got {value}"
        return f"expected {self.low} {'<' if self.above else '<='} value < {self.high}, got {value}"


def _device(value: str) -> str:
    """Check a device name, or a list of different CUDA devices."""
    cuda = r"cuda:(0|[1-9][0-9]*)"
    names = value.split(",")
    if re.fullmatch(rf"auto|cpu|cuda|{cuda}(,{cuda})*", value) and len(set(names)) == len(names):
        return ""
    return f"expected auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1, got {shown_text(value)}"


def _disjoint(families: tuple[str, ...]) -> str:
    """Check that no two families share parameters, because their masks could contradict each other."""
    for first, second in combinations(families, 2):
        if set(BLOCKS_OF[first]) & set(BLOCKS_OF[second]):
            return f"{first} and {second} contain the same parameters, keep only one of them"
    return ""


def name_and_text(corpus: str) -> tuple[str, str]:
    """Split an evaluation corpus, `wikitext2` or NAME=FILE, into its reported name and the source of its text.

    A name has no slash, so `./a=b.txt` is a file.
    """
    name, equals, text = corpus.partition("=")
    return (name, text) if equals and "/" not in name else (corpus, corpus)


def _corpus(value: str) -> str:
    return "" if all(name_and_text(value)) else f"expected a corpus name or NAME=FILE, got {shown_text(value)}"


Natural = Annotated[int, Range(0, COUNT_LIMIT)]
Count = Annotated[int, Range(1, COUNT_LIMIT)]
Length = Annotated[int, Range(2, COUNT_LIMIT)]
"""Tokens. A window of one token predicts nothing."""
Positive = Annotated[float, Range(0, above=True)]
Fraction = Annotated[float, Range(0, 1)]
SEEDS = Range(0, 2**32)
Family = Literal["attention", "ffn", "attention-block", "ffn-block", "layer"]
Measure = Literal["parameters", "active-parameters", "flops", "kv-cache", "latency"]
MetricName = Literal["wanda-sp", "flap", "flap-adaptive", "obs", "taylor", "magnitude", "random", "uniform"]
Bos = Literal["auto", True, False]
Objective = Literal["loss", "kl", "kl-hidden"]
RepairMethod = Literal["none", "bias", "least-squares", "least-squares-bias", "sublayer"]
Trained = Literal["all", "layers", "lora", "norms-and-outputs"]
EVALUATIONS = 8
"""About how often a search evaluates its decision, besides the start, if the recipe leaves it open."""
FITTED: tuple[RepairMethod, ...] = ("least-squares", "least-squares-bias", "sublayer")
"""The repairs that refit the output projections in closed form, at every width of the width table."""
GRADIENT_METRICS = ("taylor",)
"""The metrics that need a backward pass."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """The text on which the search measures losses."""

    # A corpus name, a text file, or a data set on the hub. Another column than `text` follows a colon: FILE:COLUMN.
    corpus: str
    # Maximum number of windows that the search draws its batches from.
    windows: Count = 120_000
    # Tokens per window.
    seqlen: Length = 128
    # Windows per step.
    batch: Count = 8
    # Windows, spread over the text, that are set aside to evaluate the current decision. No batch is sampled from them.
    heldout: Count = 32
    # Whether every window begins with the BOS token, in place of one token of the text. `auto` does so for families
    # that were trained with it (Gemma).
    bos: Bos = "auto"


@dataclass(frozen=True, kw_only=True)
class UnitsSettings:
    """Which units are kept or removed as a whole."""

    # `attention` (KV heads and query heads) and `ffn` (FFN channels, experts) are searched by width or by unit. A unit
    # search removes KV heads with all their query heads.
    # `attention-block`, `ffn-block` and `layer` remove whole blocks or decoder layers and need `search.policy: units`.
    families: Annotated[tuple[Family, ...], _disjoint] = ("attention", "ffn")


@dataclass(frozen=True, kw_only=True)
class BudgetSettings:
    """How much is removed."""

    # The fraction of the `measure` to remove. 0.3 removes 30 % of the prunable parameters, FLOPs, KV cache or latency.
    sparsity: Fraction
    # What `sparsity` is a fraction of. `active-parameters` are the parameters that one token uses: in a mixture of
    # experts, those of as many experts as the router picks for it. Latency is measured on the device before the search.
    measure: Measure = "parameters"
    # Where the sparsity holds: over all units together, in each family, or in each layer of each family.
    scope: Literal["per-family", "global", "per-layer"] = "global"
    # Sequence length, in tokens, at which FLOPs, KV-cache bytes and latency are counted.
    context: Annotated[int, Range(1, 2**20 + 1)] = 2048
    # The fraction of its units that every layer keeps at least, in each family.
    min_keep: Fraction = 0.0
    # The fraction of the decoder layers, from the first one on, in which nothing is removed, rounded to whole layers.
    keep_first: Fraction = 0.0
    # The same for the last layers.
    keep_last: Fraction = 0.0
    # Kept FFN widths are multiples of this number, or the full width of the layer.
    ffn_multiple: Count = 1


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """The scores of the units, from which the search starts."""

    # The function that computes the scores.
    metric: MetricName = "obs"
    # Calibration windows that the metric reads.
    windows: Count = 128
    # Tokens per window.
    seqlen: Length = 1024


@dataclass(frozen=True, kw_only=True)
class StartSettings:
    """How scores become the starting keep probabilities (theta) of the unit search."""

    # `sigmap` (the paper's) takes the z-score within each layer and applies a sigmoid.
    # `linear` scales each layer's scores from 0 (lowest) to 1 (highest).
    # `rank` takes the fraction of the layer's units that score no higher: every layer starts with the same fraction.
    # `global-rank` ranks the units of all layers together, for metrics that are comparable across them.
    # All are then shifted so that the expected mask meets the budget.
    mapping: Literal["sigmap", "linear", "rank", "global-rank"] = "sigmap"
    # Divides the scaled scores. Below 1, the starting probabilities are closer to 0 and 1.
    temperature: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The search. Every step samples `masks_per_step` masks and runs one forward pass of one batch for each of them."""

    # What is searched: the width of each block (`widths`), or every unit on its own (`units`, as in the paper).
    policy: Literal["widths", "units"] = "widths"
    # What the search minimises on the calibration text: the next-token loss (`loss`), the divergence KL(dense ‖ pruned)
    # of the predictions from those of the dense model (`kl`), or that plus the relative squared error of the residual
    # stream behind the first, the middle and the last layer (`kl-hidden`).
    objective: Objective = "loss"
    # Total number of forward passes.
    forward_passes: Natural = 320
    # Masks per step. Their losses are compared with each other, so at least two are needed.
    masks_per_step: Length = 16
    # Baseline of the policy gradient, for `policy: units`: leave-one-out over the step's masks (`rloo`) or the
    # paper's moving average (`paper`).
    estimator: Literal["paper", "rloo"] = "rloo"
    # Learning rate, for `policy: units`. 0 chooses it from the number of steps.
    learning_rate: Annotated[float, Range(0)] = 0.0
    # Learning rate schedule, for `policy: units`. `cosine` decays it to 0 at the last step.
    schedule: Literal["cosine", "constant"] = "cosine"
    # Steps between checkpoints.
    checkpoint_every: Count = 100
    # Steps between evaluations of the current decision on the held-out windows. The best decision seen is written.
    # 0 chooses it so that there are about 8 evaluations.
    evaluate_every: Natural = 0

    @property
    def steps(self) -> int:
        """Number of policy updates. Forward passes that do not fill a whole step are not used."""
        return self.forward_passes // self.masks_per_step

    def evaluates(self, step: int) -> bool:
        """Return whether the decision after `step` steps is evaluated. That of the start (0) and the last one are."""
        every = self.evaluate_every or max(1, -(-self.steps // EVALUATIONS))
        return self.steps > 0 and (step % every == 0 or step == self.steps)


@dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """The repair of the kept weights. It needs forward passes through the model only."""

    # What is refitted: nothing (`none`); the output's bias (`bias`); the output projections (attention o, FFN down) in
    # closed form (`least-squares`), with a bias (`least-squares-bias`); or from there on every kept weight of one block
    # at a time, with AdamW (`sublayer`).
    method: RepairMethod = "sublayer"
    # How many times `sublayer` reads the text of each block.
    epochs: Count = 3
    # How many of the last layers `sublayer` fits together in the end, to what the dense model predicts.
    last_layers: Natural = 1
    # Windows of `calibration.seqlen` tokens that the width table and the repair are fitted to.
    windows: Count = 384
    # Windows that the dense model writes itself and that the repair is fitted to in addition.
    sampled_windows: Natural = 0
    # Regularisation of the width table and the repair, relative to the mean second moment. Higher values stay closer to
    # the original weights.
    damping: Positive = 1e-3

    @property
    def fits_blocks(self) -> bool:
        """Whether whole blocks are fitted, behind the closed form."""
        return self.method == "sublayer"

    @property
    def fitted_last_layers(self) -> int:
        """How many layers are fitted to what the dense model predicts: none unless blocks are fitted."""
        return self.last_layers if self.fits_blocks else 0


@dataclass(frozen=True, kw_only=True)
class RecoverSettings:
    """The recovery: `pgprune recover` trains an exported model to predict what its dense model predicts."""

    # The text to train on, as `calibration.corpus`. Empty means the text of the calibration.
    corpus: Annotated[str, may_be_empty] = ""
    # Tokens that are trained on in all. A shorter text is read several times, each time cut into other windows (with
    # `teacher: live`).
    tokens: Count = 800_000
    # Tokens per window.
    seqlen: Length = 128
    # Windows per forward pass, on each device.
    batch: Count = 8
    # Forward passes per optimizer step, on each device.
    accumulate: Count = 1
    # Windows, spread over the text, that are never trained on. The checkpoint that is best on them is written.
    heldout: Count = 64
    # Which tokens are trained on: all of them, or only the assistant's turns of conversations (a `messages` column).
    turns: Literal["all", "assistant"] = "all"
    # What is trained: all weights (`all`); those of the decoder layers and the final norm, not the embeddings and the
    # unembedding (`layers`); low-rank adapters that are merged into the weights at the end (`lora`); or the norms and
    # the output projections (attention o, FFN down) only.
    train: Trained = "layers"
    # Rank of the adapters, for `train: lora`.
    lora_rank: Count = 16
    # Where the predictions of the dense model come from: `live` runs it beside the model that is trained, `cached`
    # writes its predictions to disk before the training and needs no memory for it.
    teacher: Literal["live", "cached"] = "live"
    # How many of the dense model's most likely tokens are compared one by one. All others count as one more token. 0
    # compares all tokens, which `teacher: cached` cannot.
    top_k: Natural = 0
    # Divides the logits of both models before they are compared. Above 1, unlikely tokens count more.
    temperature: Positive = 1.0
    # Weight of the relative squared error of the residual stream behind every layer. It needs `teacher: live`.
    hidden: Annotated[float, Range(0)] = 0.0
    # Weight of the next-token loss on the text itself.
    lm: Annotated[float, Range(0)] = 0.0
    # Peak learning rate of AdamW. It rises over the first tenth of the steps and falls to 0 along a cosine.
    learning_rate: Positive = 2e-4
    # Whether activations are computed again in the backward pass, which saves memory and takes a third more time.
    gradient_checkpointing: bool = False
    # Steps between checkpoints, at which the model is evaluated on the held-out windows. 0 makes about 8.
    checkpoint_every: Natural = 0


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The perplexities that `pgprune eval` reports: one for each corpus and window length."""

    # Corpus names or NAME=FILE, as for `--ppl`. FILE:COLUMN names another column than `text`.
    corpora: tuple[Annotated[str, _corpus], ...] = ("wikitext2",)
    # Window lengths in tokens.
    seqlen: tuple[Length, ...] = (128, 2048)
    # Whether every window begins with the BOS token, as `calibration.bos`. For `--tasks`, whether prompts begin with
    # it; there `auto` leaves it to the tokenizer.
    bos: Bos = "auto"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe describes one search: the model, the budget and the settings of every phase."""

    # A hub name, a model directory, a GGUF file or its directory, or `demo`.
    model: str
    # Data type of the weights and of the computation. `auto` uses the model's own, `fastest` uses bfloat16 if the
    # device has instructions for it and float32 if not. A run keeps the one that it began with.
    dtype: Literal["auto", "fastest", "float32", "float16", "bfloat16"] = "bfloat16"
    # How the weights of the decoder layers are stored during the search. `full` stores them in `dtype`. `int8` and
    # `fp8` round them to one byte per weight, to save memory; `fp8` also multiplies in fp8. Exports have the original
    # weights wherever the repair did not fit new ones.
    weight_format: Literal["full", "int8", "fp8"] = "full"
    # `auto`, `cpu`, `cuda`, `cuda:N`, or a list such as `cuda:0,cuda:1`, which spreads the layers over several GPUs.
    device: Annotated[str, _device] = "auto"
    # Seed of all random choices. The same seed on the same machine gives the same search.
    seed: Annotated[int, SEEDS] = 0
    calibration: CalibrationSettings
    units: UnitsSettings = UnitsSettings()
    budget: BudgetSettings
    scores: ScoreSettings = ScoreSettings()
    start: StartSettings = StartSettings()
    search: SearchSettings = SearchSettings()
    repair: RepairSettings = RepairSettings()
    recover: RecoverSettings = RecoverSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
