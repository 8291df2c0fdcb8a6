"""What a recovery needs: bytes of memory and disk, tokens and FLOPs, from the shapes of the two models.

The models may be on the meta device. As in the estimate of a search, the FLOPs are those of matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from pgprune_cli.estimate.flops import Flops
from pgprune_cli.estimate.sizes import flops_per_token
from pgprune_cli.forward.masked import LOGIT_ROWS, SOFTMAX_ROWS
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.schema import RecoverSettings
from pgprune_cli.recover.checkpoints import MOST, STATE_BYTES
from pgprune_cli.recover.schedule import Schedule
from pgprune_cli.recover.student import attends_plainly, trained_names
from pgprune_cli.recover.teacher_cache import CacheKey


@dataclass(frozen=True)
class RecoveryMemory:
    """Bytes on one device.

    weights: of the model that is trained, float32 where they are trained, with the copies of float32 matrices that the
    computation in bfloat16 makes; gradients: of what is trained, with the copies that processes exchange; optimizer: of
    what is trained; activations: kept for the backward pass; logits: of the model that is trained, with their gradient
    and the predictions of the dense model; teacher: weights of the dense model, while it runs beside the training;
    caching: what the dense model needs before the training.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    teacher: int
    caching: int

    @property
    def device(self) -> int:
        """What the device needs at the most demanding moment."""
        trained = self.weights + self.gradients + self.optimizer
        return max(trained + self.activations + self.logits + self.teacher, self.caching)


@dataclass(frozen=True)
class RecoverySizes:
    """A recovery whose needs are counted.

    student, teacher: the two models, in the dtypes that they are loaded in; settings: of the recipe; processes: how
    many share the batches; dtype: of the matrix products; on_cpu: whether a CPU trains; teacher_apart: whether a live
    teacher is on other GPUs than the student.
    """

    student: PrunableModel
    teacher: PrunableModel
    settings: RecoverSettings
    processes: int
    dtype: torch.dtype
    on_cpu: bool = False
    teacher_apart: bool = False

    @property
    def schedule(self) -> Schedule:
        """How many steps are trained."""
        return Schedule.of(self.settings, self.processes)

    @property
    def evaluations(self) -> int:
        """How often the held-out text is read: at the start, at every checkpoint and at the end."""
        return sum(map(self.schedule.is_due, range(self.schedule.steps + 1)))

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step, over all processes."""
        return self.schedule.windows_per_step * self.settings.seqlen

    @property
    def heldout_tokens(self) -> int:
        """Tokens of the held-out text."""
        return self.settings.heldout * self.settings.seqlen

    @cached_property
    def adapters(self) -> int:
        """Parameters of the adapters, if they are trained: two matrices for every linear layer but the head."""
        head = self.student.head
        linears = [
            module
            for module in self.student.module.modules()
            if isinstance(module, nn.Linear) and module is not head and module.weight.numel()
        ]
        return self.settings.lora_rank * sum(linear.in_features + linear.out_features for linear in linears)

    @cached_property
    def trained(self) -> int:
        """Parameters that are trained."""
        if self.settings.train == "lora":
            return self.adapters
        named = dict(self.student.module.named_parameters())
        return sum(named[name].numel() for name in set(trained_names(self.student, self.settings.train)))


def recovery_memory(sizes: RecoverySizes) -> RecoveryMemory:
    """Return the bytes that a recovery needs on the device that trains."""
    settings, in_float32 = sizes.settings, 4 * sizes.trained
    live = settings.teacher == "live"
    teacher = _weight_bytes(sizes.teacher)
    return RecoveryMemory(
        weights=_student_bytes(sizes),
        gradients=in_float32 * (2 if sizes.processes > 1 else 1),  # those that are sent are copies
        optimizer=2 * in_float32,
        activations=activation_bytes(sizes),
        logits=logit_bytes(sizes),
        teacher=teacher if live and not sizes.teacher_apart else 0,
        caching=0 if live else teacher + _teacher_activation_bytes(sizes),
    )


def recovery_disk(sizes: RecoverySizes, stored: torch.dtype) -> dict[str, int]:
    """Return the bytes on disk of the cached predictions, of all checkpoints, and of the written model in `stored`."""
    settings = sizes.settings
    cache = 0
    if settings.teacher == "cached":
        windows = -(-settings.tokens // settings.seqlen) + settings.heldout
        vocabulary = len(sizes.teacher.head.weight)
        kept = min(settings.top_k, vocabulary)
        key = CacheKey("", "", windows, settings.seqlen, vocabulary, kept, settings.temperature)
        cache = key.bytes_of(key.shards)
    return {
        "cache": cache,
        "checkpoints": MOST * STATE_BYTES * sizes.trained,
        "model": stored.itemsize * sum(parameter.numel() for parameter in sizes.student.module.parameters()),
    }


def recovery_flops(sizes: RecoverySizes) -> dict[str, Flops]:
    """Return the FLOPs by phase of a recovery, in order.

    Predictions are cached for a text with as many tokens as are trained on.
    """
    settings = sizes.settings
    student, teacher = _token_flops(sizes.student, settings.seqlen), _token_flops(sizes.teacher, settings.seqlen)
    layers = student - _head_flops(sizes.student)
    to_weights = {
        "all": student,
        "layers": layers,
        "lora": 4 * sizes.trained,  # also to their inputs
        "norms-and-outputs": 2 * sizes.trained,
    }
    backward = student + to_weights[settings.train]
    forward = student + (2 * sizes.trained if settings.train == "lora" else 0)
    again = layers if settings.gradient_checkpointing else 0
    trained = sizes.schedule.steps * sizes.step_tokens
    evaluated = sizes.evaluations * sizes.heldout_tokens
    taught = trained + evaluated if settings.teacher == "live" else settings.tokens + sizes.heldout_tokens
    return {
        "training": Flops({sizes.dtype: trained * (forward + backward + again)}),
        "held-out text": Flops({sizes.dtype: evaluated * forward}),
        "dense model": Flops({next(sizes.teacher.module.parameters()).dtype: taught * teacher}),
    }


def activation_bytes(sizes: RecoverySizes) -> int:
    """Return the bytes of what a forward pass of one batch keeps for the backward pass.

    Per token and layer: in the residual stream, what the norms keep in float32 and what the projections read; the
    outputs of the inner projections, those of the FFN also behind the activation function; the inputs of the output
    projections; where attention is computed by the plain formula, as in short windows on a CPU or with soft-capping,
    also its weights, and the capped scores. With gradient checkpointing, only the residual stream between the layers,
    and one layer at a time.
    """
    model, itemsize = sizes.student, sizes.dtype.itemsize
    hidden = model.head.weight.shape[1]
    plain = attends_plainly(sizes.settings, on_cpu=sizes.on_cpu) or model.config._attn_implementation == "eager"
    capped = itemsize if getattr(model.config, "attn_logit_softcapping", None) else 0
    layers = []
    for layer in model.layers:
        blocks = model.family.blocks_of(layer)
        per_token = 0
        for block in blocks:
            used = model.family.groups_per_token(layer, block)
            if used is None:
                *inner, output = block.linears(layer)
                width = sum(linear.out_features for linear in inner) + output.in_features
            else:
                width = 3 * used * model.family.grid(layer, block).members
            times = 1 if block == model.family.attention else 4 / 3
            if plain and block == model.family.attention:  # its weights in float32, and in the dtype of the products
                scores = model.family.grid(layer, block).elements * sizes.settings.seqlen
                per_token += scores * ((4 if itemsize == 4 else 4 + itemsize) + capped)
            per_token += hidden * (8 + itemsize) + round(width * times) * itemsize
        layers.append(per_token)
    stream = len(layers) * 4 * hidden
    kept = stream + max(layers) if sizes.settings.gradient_checkpointing else sum(layers)
    streams = len(layers) * hidden * (4 + _itemsize(sizes.teacher)) if sizes.settings.hidden else 0
    return sizes.settings.batch * sizes.settings.seqlen * (kept + streams)


def logit_bytes(sizes: RecoverySizes) -> int:
    """Return the bytes of the logits of one batch, of their gradient and of what the dense model predicts.

    For the whole vocabulary these are its logits; for the likeliest tokens, log-probabilities in float32 and ids. A few
    rows exist in float32. Soft-capping keeps its own result and has a gradient of its own; a division has the latter.
    """
    settings, config = sizes.settings, sizes.student.config
    copies = 2
    if getattr(config, "final_logit_softcapping", None):
        copies = 4
    elif getattr(config, "logits_scaling", 1) != 1:
        copies = 3
    rows, vocabulary = settings.batch * settings.seqlen, len(sizes.student.head.weight)
    listed = 12 * settings.top_k if settings.top_k else _itemsize(sizes.teacher) * vocabulary
    text = 8 * vocabulary if settings.lm else 0
    logits = rows * vocabulary * sizes.dtype.itemsize
    return rows * (listed + text) + copies * logits + 4 * 4 * min(SOFTMAX_ROWS, rows) * vocabulary


def _teacher_activation_bytes(sizes: RecoverySizes) -> int:
    """Return the bytes of the dense model's logits, some rows at a time."""
    rows = min(LOGIT_ROWS, sizes.settings.batch * sizes.settings.seqlen)
    return rows * len(sizes.teacher.head.weight) * (_itemsize(sizes.teacher) + 4)


def _student_bytes(sizes: RecoverySizes) -> int:
    """Return the bytes of the student's weights, and of the float32 matrices once more in the dtype of products."""
    stored = _weight_bytes(sizes.student)
    if sizes.settings.train == "lora":
        return stored + 4 * sizes.trained
    in_float32 = sizes.trained if _itemsize(sizes.student) < 4 else stored // 4
    copies = sizes.dtype.itemsize * in_float32 if sizes.dtype.itemsize < 4 else 0
    return stored + (4 - _itemsize(sizes.student)) * sizes.trained + copies


def _weight_bytes(model: PrunableModel) -> int:
    return sum(parameter.nbytes for parameter in model.module.parameters())


def _itemsize(model: PrunableModel) -> int:
    parameter: Any = next(model.module.parameters())
    return int(parameter.dtype.itemsize)


def _head_flops(model: PrunableModel) -> int:
    return 2 * model.head.weight.numel()


def _token_flops(model: PrunableModel, context: int) -> int:
    """Return the FLOPs of a forward pass for one token, with the head."""
    return sum(flops_per_token(model, context)) + _head_flops(model)
