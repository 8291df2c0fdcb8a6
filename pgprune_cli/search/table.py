"""The table of widths that a search over layers is made of: solved once, each process a share of the layers, and kept
beside the run until its search is finished."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from pgprune_cli.console.progress import Progress
from pgprune_cli.distributed import Ranks
from pgprune_cli.estimate.memory import table_bytes
from pgprune_cli.estimate.sizes import Sizes
from pgprune_cli.model.prunable import Shape
from pgprune_cli.recipe.schema import Recipe
from pgprune_cli.repair.width_files import has_layer, load_layer, refuse_full_disk, save_layer
from pgprune_cli.repair.width_table import WidthTable, solved_layers


def searched_table(
    recipe: Recipe,
    run: Path,
    model: nn.Module,
    scores: Mapping[tuple[int, str], Tensor],
    batches: Sequence[Tensor],
    fingerprint: str,
    ranks: Ranks,
    progress: Progress,
) -> WidthTable:
    """The table that the recipe's search needs, in `run` after this call.

    `scores` per (layer, block), `batches` of tokens `(B, T)`, `fingerprint` of the model. Every process solves each
    world-th layer, and all read all: a layer is solved by one alone, so that their number changes nothing. Raises
    RunError where the disk is too small or another process is gone, OSError where it fails.
    """
    solve, multiple = recipe.repair.method.startswith("least-squares"), recipe.budget.ffn_multiple
    damping, layers = recipe.repair.damping, len(Shape.of(model).channels)
    settings = repr((fingerprint, recipe.dtype, recipe.weight_format, solve, damping, multiple, sorted(scores)))
    identity = _digest(settings, [*batches, *(scores[key] for key in sorted(scores))])
    share = ranks.share(layers)
    own = [index for index in share if not has_layer(run, index, identity)]
    text, done = "measuring every layer's widths", len(share) - len(own)
    with progress.layers(text, len(share), done) as bar:
        if own:
            refuse_full_disk(run, layers, table_bytes(Sizes(model, recipe)) if solve else 0)
            solved = solved_layers(model, scores, batches, damping, solve, multiple, own, bar.batches_done)
            for index, blocks in solved:
                save_layer(run, index, blocks, identity)
                bar.layer_done()
        ranks.greatest(0)  # by now all have written theirs
        return WidthTable.of(model, {index: load_layer(run, index) for index in range(layers)})


def _digest(settings: str, tensors: Sequence[Tensor]) -> str:
    """Of all that the table depends on."""
    found = hashlib.sha256(settings.encode())
    for tensor in tensors:
        found.update(str(list(tensor.shape)).encode() + tensor.numpy().tobytes())
    return found.hexdigest()
