"""Put trained weights in place of those in an exported model's files, whatever the files call them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pgprune_cli.errors import UserError
from pgprune_cli.export.dense_model import DenseModel, Shard
from pgprune_cli.model.families.adapter import FilePiece


def with_trained(base: DenseModel, trained: Mapping[str, Tensor]) -> DenseModel:
    """Return the model with trained weights, each of which is cut to what a file holds only when it is read.

    trained: by their names in the causal model, which may hold several tensors of the files in one (experts).

    Raises UserError for a name or a shape that the model does not have.
    """
    weights = TrainedWeights(base, trained)
    weights.check()
    return dataclasses.replace(base, shards=tuple(weights.overlay(shard) for shard in base.shards))


class TrainedWeights:
    """Trained weights by their names in the causal model, read by the names in the files of `base`."""

    def __init__(self, base: DenseModel, trained: Mapping[str, Tensor]) -> None:
        self.base, self.trained = base, trained
        self.pieces = {name: base.shape.family.file_piece(name) for name in base.tensors}

    def check(self) -> None:
        """Raise UserError for a name or a shape that the base model does not have."""
        unknown = self.trained.keys() - {piece.tensor for piece in self.pieces.values()}
        family = self.base.shape.family
        if family.head_weight in unknown and self.base.config.tie_word_embeddings:
            unknown.remove(family.head_weight)
            self._check_tied(family.head_weight, family.embedding_weight)
        if unknown:
            raise UserError(f"{min(unknown)}: was trained, but the pruned model has no weight of this name.")
        for name, piece in self.pieces.items():
            if piece.tensor not in self.trained:
                continue
            expected, found = self.base.tensors[name].shape, self._shape(piece)
            if found != expected:
                raise UserError(
                    f"{piece.tensor}: was trained with the shape {found and tuple(found)}, which does not give "
                    f"the pruned model's {name} of {tuple(expected)}."
                )

    def overlay(self, shard: Shard) -> Shard:
        """Return a shard that gives the trained weights in place of its own."""

        @contextmanager
        def opened() -> Iterator[Callable[[str], Tensor]]:
            with shard.open() as stored:
                yield lambda name: self._read(name) if self.pieces[name].tensor in self.trained else stored(name)

        return dataclasses.replace(shard, open=opened)

    def _read(self, name: str) -> Tensor:
        """Return a trained tensor as the file `name` holds it, on the CPU. Raises UserError for NaN and infinity."""
        tensor = self._cut(self.trained[self.pieces[name].tensor], self.pieces[name]).detach().cpu()
        if not tensor.isfinite().all():
            raise UserError(
                f"{name}: holds NaN or infinity after the training. Train with a lower recover.learning_rate."
            )
        return tensor

    def _cut(self, tensor: Tensor, piece: FilePiece) -> Tensor:
        """Return what a tensor of the files holds of a tensor of the model: all of it, or one expert's part."""
        if piece.group is None or piece.part is None:
            return tensor
        unit = self.base.unit_tensors[piece.tensor]
        parts: Sequence[Tensor] = tensor[piece.group].split([part.rows for part in unit.parts], unit.axis - 1)
        return parts[piece.part]

    def _shape(self, piece: FilePiece) -> torch.Size | None:
        """Return the shape of what a file would hold of a trained tensor, None if it does not have the parts."""
        tensor = self.trained[piece.tensor]
        try:
            return self._cut(torch.empty(tensor.shape, device="meta"), piece).shape
        except (IndexError, RuntimeError):
            return tensor.shape

    def _check_tied(self, head: str, embedding: str) -> None:
        """Raise UserError unless the trained head is the trained embedding."""
        if embedding not in self.trained or not torch.equal(self.trained[head], self.trained[embedding]):
            raise UserError(f"{head}: differs from {embedding} after the training, but the model ties the two.")
