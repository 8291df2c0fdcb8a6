"""The width table of a width search: solved once, divided among the processes, and kept in the run directory.

It is kept there until the search is finished, so that a resumed search does not solve it again. The searches of a
comparison share one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from torch import Tensor

from pgprune_cli.model.prunable import Partitions
from pgprune_cli.recipe.schema import FITTED
from pgprune_cli.repair.width_files import has_layer, load_layer, refuse_full_disk, save_layers
from pgprune_cli.repair.width_table import WidthTable, solve_layers, table_bytes
from pgprune_cli.search.context import SearchContext

LAYOUT = "element order"
"""How the projections lie in the files. A table with another layout is solved again."""


def solve_table(
    context: SearchContext, ranks_of_units: Mapping[tuple[int, str], Tensor], partitions: Partitions, fingerprint: str
) -> WidthTable:
    """Solve the width table of a search, or what is missing of it on disk, and load it.

    ranks_of_units, partitions: as in `solve_layers`. Each process solves its share of the layers and reads all of them,
    so the number of processes changes nothing. Raises RunError if the disk is too small or another process died,
    OSError if it fails.
    """
    recipe, model, ranks = context.recipe, context.model, context.ranks
    folder = context.shared_widths or context.run
    batches = context.repair_batches
    solve = recipe.repair.method in FITTED
    multiples = {"ffn": recipe.budget.ffn_multiple}
    settings = (LAYOUT, fingerprint, recipe.dtype, recipe.weight_format, solve, recipe.repair.damping, multiples["ffn"])
    keys = sorted(ranks_of_units)
    units = [tensor for key in keys for tensor in (ranks_of_units[key], partitions[key])]
    identity = _digest(repr((*settings, keys)), [*batches, *units])
    own_layers = ranks.share(model.shape.layers)
    missing = [index for index in own_layers if not has_layer(folder, index, identity)]
    done = len(own_layers) - len(missing)
    with context.progress.layers("solving every layer's widths", len(own_layers), done) as layers:
        if ranks.max(len(missing)):  # then every process takes part in the passes
            refuse_full_disk(folder, model.shape.layers, table_bytes(model, partitions, multiples) if solve else 0)
            damping = recipe.repair.damping
            solved = solve_layers(
                model,
                ranks_of_units,
                partitions,
                batches,
                damping,
                solve=solve,
                multiples=multiples,
                only=missing,
                roots=context.error_roots,
                ranks=ranks,
                progress=layers,
            )
            save_layers(folder, solved, identity, layers.layer_done)
        ranks.barrier()  # by now every process has written its layers
        return WidthTable.of(model, {index: load_layer(folder, index) for index in range(model.shape.layers)})


def _digest(settings: str, tensors: Sequence[Tensor]) -> str:
    """Return a digest of everything the table depends on."""
    digest = hashlib.sha256(settings.encode())
    for tensor in tensors:
        digest.update(str(list(tensor.shape)).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
