"""Find recipes that cannot work with any model, although every key is valid on its own.

What depends on the model's sizes is checked by `search/budget.py` once the model is known.
"""

from collections.abc import Iterator

from pgprune_cli.core.families import BLOCKS_OF, WHOLE_FAMILIES
from pgprune_cli.errors import UserError
from pgprune_cli.recipe.schema import GRADIENT_METRICS, Recipe
from pgprune_cli.recipe.strict_yaml import one_line


def refuse_contradictions(recipe: Recipe, where: str) -> None:
    """Raise UserError if keys of the recipe contradict each other, with one line per contradiction.

    Every line starts with `where`, usually the recipe's file.
    """
    if problems := contradictions(recipe):
        raise UserError("\n".join(one_line(f"{where}: {problem}") for problem in problems))


def contradictions(recipe: Recipe) -> list[str]:
    """Return an error text for every contradiction between keys, empty for a sound recipe."""
    return [
        *_of_families(recipe),
        *_of_min_keep(recipe),
        *_of_whole_layers(recipe),
        *_of_weight_format(recipe),
        *_of_search(recipe),
        *_of_recovery(recipe),
    ]


def _of_families(recipe: Recipe) -> Iterator[str]:
    families, budget = recipe.units.families, recipe.budget
    whole = [family for family in families if family in WHOLE_FAMILIES]
    if whole and recipe.search.policy == "widths":
        yield (
            f"units.families: {whole[0]} is kept or removed as a whole, so search.policy widths has no widths to "
            "search. Set search.policy to units."
        )
    if whole and budget.scope == "per-layer" and budget.sparsity > 0:
        yield (
            f"budget.scope: {whole[0]} is one unit per layer, so per-layer would remove it from every layer. "
            "Set budget.scope to global or per-family."
        )
    without_cache = [family for family in families if "attention" not in BLOCKS_OF[family]]
    if budget.measure == "kv-cache" and without_cache:
        others = [family for family in families if family not in without_cache] or ["attention"]
        yield (
            f"budget.measure: the family {without_cache[0]} has no KV cache, so a kv-cache budget cannot limit it. "
            f"Set units.families to [{', '.join(others)}]."
        )
    if budget.measure == "active-parameters" and "ffn" in families and recipe.search.policy == "units":
        yield (
            "budget.measure: a unit search removes whole experts, which changes no active-parameters. "
            "Set budget.measure to parameters or search.policy to widths."
        )


def _of_min_keep(recipe: Recipe) -> Iterator[str]:
    budget = recipe.budget
    whole = [family for family in recipe.units.families if family in WHOLE_FAMILIES]
    if not budget.min_keep:
        return
    if whole:
        yield (
            f"budget.min_keep: {whole[0]} is one unit per layer, so any minimum would keep all of it. "
            "Set budget.min_keep to 0."
        )
    elif budget.min_keep + budget.sparsity > 1 + 1e-9:  # 0.7 + 0.3 is a little more than 1 in floats
        yield (
            f"budget.min_keep: keeping {budget.min_keep} of every layer exceeds what budget.sparsity "
            f"{budget.sparsity} allows. Lower one of them."
        )


def _of_whole_layers(recipe: Recipe) -> Iterator[str]:
    budget = recipe.budget
    whole = budget.keep_first + budget.keep_last
    key = "budget.keep_first" if budget.keep_first else "budget.keep_last"
    if whole and budget.scope == "per-layer" and budget.sparsity > 0:
        yield f"{key}: budget.scope per-layer removes something from every layer. Set budget.scope to global."
    elif whole + budget.sparsity > 1 + 1e-9:
        yield (
            f"{key}: keeping {whole:g} of the layers whole exceeds what budget.sparsity {budget.sparsity} allows. "
            "Lower one of them."
        )


def _of_weight_format(recipe: Recipe) -> Iterator[str]:
    weight_format, metric = recipe.weight_format, recipe.scores.metric
    if weight_format != "full" and metric in GRADIENT_METRICS:
        yield (
            f"scores.metric: {metric} needs gradients, which {weight_format} weights do not have. "
            "Set weight_format to full, or choose a metric without gradients, such as obs."
        )
    if weight_format == "fp8" and recipe.budget.measure == "latency":
        yield (
            "budget.measure: with weight_format fp8, latency would be measured on fp8 products, but exports do not "
            "use fp8. Set weight_format to full or int8."
        )


def _of_search(recipe: Recipe) -> Iterator[str]:
    passes, masks = recipe.search.forward_passes, recipe.search.masks_per_step
    if 0 < passes < masks:
        yield (
            f"search.forward_passes: {passes} is less than one step of search.masks_per_step {masks}. "
            f"Give {masks} or more, or 0 for no search."
        )


def _of_recovery(recipe: Recipe) -> Iterator[str]:
    recover = recipe.recover
    step = recover.seqlen * recover.batch * recover.accumulate
    if recover.teacher == "cached" and not recover.top_k:
        yield (
            "recover.top_k: 0 compares all tokens, and teacher cached would write a probability of each to disk. "
            "Set recover.top_k to 64, for example, or recover.teacher to live."
        )
    if recover.teacher == "cached" and recover.hidden:
        yield (
            "recover.hidden: teacher cached has no residual stream of the dense model to compare with. "
            "Set recover.hidden to 0 or recover.teacher to live."
        )
    if recover.turns == "assistant" and not recover.corpus:
        yield (
            "recover.turns: the text of the calibration has no conversations. Set recover.corpus to a file or a data "
            "set with a column `messages`, or recover.turns to all."
        )
    if recover.tokens < step:
        yield (
            f"recover.tokens: {recover.tokens} tokens are less than one step, which reads {step} "
            "(seqlen × batch × accumulate). Raise recover.tokens or lower recover.batch."
        )
