"""The order in which the elements of a block lie in its weights, for the time of a search.

A width search keeps the elements of a block in one order, which its table fixes before the first step. With the rows
of queries, keys, values, gates and ups in that order, and the columns of the output projection, every width is a prefix
(`FirstElements`). The model computes the same function, up to the rounding of sums in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.model.quantized import QuantizedLinear
from pgprune_cli.model.unit_tensors import KeptElements, UnitTensor

ElementOrders = Mapping[tuple[int, str], Tensor]
"""By (layer, block name), the elements `(elements,)` int64 in the order in which they lie, group after group."""


@contextmanager
def elements_in_order(model: PrunableModel, orders: ElementOrders) -> Iterator[None]:
    """Put the elements of these blocks into an order inside the `with`. The weights are back on every way out.

    It takes the memory of one more tensor at a time, and of two for fused projections and stacked experts.
    """
    with ExitStack() as undo, torch.no_grad():
        for (index, name), order in orders.items():
            layer, block = model.layers[index], model.shape.blocks[index][name]
            module = layer.get_submodule(block.module)
            there, back = KeptElements.reordered(order), KeptElements.reordered(order.argsort())
            for tensor in model.family.unit_tensors(layer, block):
                owner = module.get_submodule(tensor.module)
                if tensor.key == "weight" and isinstance(owner, QuantizedLinear):
                    owner.reorder(tensor, there)
                    undo.callback(owner.reorder, tensor, back)
                else:
                    undo.enter_context(_reordered(owner.get_parameter(tensor.key), tensor, there, back))
        yield


@contextmanager
def _reordered(parameter: nn.Parameter, tensor: UnitTensor, there: KeptElements, back: KeptElements) -> Iterator[None]:
    dense = parameter.data
    rows = there.rows_of(dense, tensor)
    if dense.dim() == 2 and tensor.axis == 1 and dense.is_contiguous():
        # Columns are stored as rows, so that those of a width lie side by side.
        parameter.data = dense.view(dense.shape[::-1]).copy_(rows.T).T
    else:
        dense.copy_(rows)
    del rows
    try:
        yield
    finally:
        dense.copy_(back.rows_of(parameter.data, tensor))
        parameter.data = dense
