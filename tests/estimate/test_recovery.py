"""What a recovery is said to need, against what torch allocates and counts while one step is trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.medium import VOCABULARY, medium_model, random_batches
from helpers.memory import Allocations
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from pgprune_cli.estimate.recovery import (
    RecoverySizes,
    activation_bytes,
    recovery_disk,
    recovery_flops,
    recovery_memory,
)
from pgprune_cli.forward.short_attention import ShortAttention
from pgprune_cli.model.loading import eager_if_capped
from pgprune_cli.model.prunable import PrunableModel
from pgprune_cli.recipe.reader import find, load
from pgprune_cli.recipe.schema import RecoverSettings, Trained
from pgprune_cli.recover.loss import divergences
from pgprune_cli.recover.student import trainable
from pgprune_cli.recover.teacher import LiveTeacher

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by peft
    pytest.mark.usefixtures("kernel_for_groups"),
]

BATCH, LENGTH = 4, 64


def sizes_of(train: Trained, dtype: torch.dtype, on_cpu: bool = False) -> RecoverySizes:
    """Return the sizes of a recovery of one step."""
    settings = RecoverSettings(train=train, lora_rank=4, batch=BATCH, seqlen=LENGTH, heldout=2, tokens=BATCH * LENGTH)
    student, teacher = PrunableModel.of(medium_model()), PrunableModel.of(medium_model(dtype))
    return RecoverySizes(student, teacher, settings, 1, dtype, on_cpu)


def test_recipe_of_7b_trains_adapters_on_a_card_of_24_gb() -> None:
    """Even a student of the dense model's size, beside predictions of it on disk."""
    with torch.device("meta"):
        model = PrunableModel.of(AutoModelForCausalLM.from_config(LlamaConfig(), dtype=torch.bfloat16))
    assert sum(parameter.numel() for parameter in model.module.parameters()) > 6.7e9
    settings = load(find("llama2-7b-50")).recover
    memory = recovery_memory(RecoverySizes(model, model, settings, 1, torch.bfloat16))
    assert (settings.train, settings.teacher) == ("lora", "cached")
    assert max(memory.device, memory.caching) < 23e9  # 24 GB, less what an allocator wastes


def training_of(sizes: RecoverySizes) -> tuple[nn.Module, Callable[[], None]]:
    """Return the student, with adapters if they are trained, and what trains it for one step without the optimizer."""
    student = trainable(sizes.student, sizes.settings.train, sizes.settings.lora_rank)
    (windows,) = random_batches(sizes.settings.batch, sizes.settings.seqlen, batches=1)
    teacher = LiveTeacher(sizes.teacher.module, 0, 1.0)

    def step() -> None:
        targets = teacher.targets(windows, torch.arange(len(windows)))
        with torch.autocast("cpu", torch.bfloat16, enabled=sizes.dtype == torch.bfloat16):
            divergences(student(input_ids=windows, use_cache=False).logits, targets).mean().backward()

    return student, step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", ["all", "layers", "lora", "norms-and-outputs"])
def test_memory_is_what_a_step_allocates(train: Trained, dtype: torch.dtype) -> None:
    if train == "lora":
        pytest.importorskip("peft", reason="pgprune[recovery] is not installed")
    sizes = sizes_of(train, dtype)
    needed = recovery_memory(sizes)
    student, step = training_of(sizes)
    with Allocations() as seen:
        step()
    copies = needed.weights - sum(parameter.nbytes for parameter in student.parameters())
    assert needed.activations + needed.logits + needed.gradients + copies == pytest.approx(seen.peak, rel=0.2)
    assert sizes.trained == sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    assert needed.optimizer == 2 * needed.gradients == 8 * sizes.trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_short_windows_on_a_cpu_keeps_its_weights(dtype: torch.dtype) -> None:
    more = activation_bytes(sizes_of("layers", dtype, on_cpu=True)) - activation_bytes(sizes_of("layers", dtype))
    _, step = training_of(sizes_of("layers", dtype))
    peaks = []
    for mode in (ShortAttention(), nullcontext()):
        with mode, Allocations() as seen:
            step()
        peaks.append(seen.peak)
    assert 0.4 * more < peaks[0] - peaks[1] < 1.5 * more  # the kernel that keeps none needs other copies


@pytest.mark.parametrize("train", ["all", "layers", "lora", "norms-and-outputs"])
def test_flops_are_those_that_torch_counts(train: Trained) -> None:
    if train == "lora":
        pytest.importorskip("peft", reason="pgprune[recovery] is not installed")
    sizes = sizes_of(train, torch.float32)
    counted = {name: part.total() for name, part in recovery_flops(sizes).items()}
    _, step = training_of(sizes)
    with FlopCounterMode(display=False) as seen:
        step()
    assert sizes.evaluations == 2  # at the start and behind the only step
    dense = counted["dense model"] * BATCH // (BATCH + 2 * sizes.settings.heldout)
    assert counted["training"] + dense == pytest.approx(seen.get_total_flops(), rel=0.1)


def test_a_cached_teacher_needs_disk_and_no_memory_beside_the_training() -> None:
    settings = RecoverSettings(teacher="cached", top_k=8, tokens=10_000, heldout=4, seqlen=100, batch=2)
    model = PrunableModel.of(medium_model())
    sizes = RecoverySizes(model, model, settings, 1, torch.float32)
    needed = recovery_memory(sizes)
    assert needed.teacher == 0
    assert needed.caching > sum(parameter.nbytes for parameter in model.module.parameters())
    cache = recovery_disk(sizes, torch.bfloat16)["cache"]
    assert cache == pytest.approx((100 + 4) * 100 * 8 * 4, rel=0.02)  # float16, 16-bit ids


def test_the_written_model_has_the_dtype_that_it_is_stored_in() -> None:
    sizes = sizes_of("layers", torch.float32)
    parameters = sum(parameter.numel() for parameter in sizes.student.module.parameters())
    assert recovery_disk(sizes, torch.bfloat16)["model"] == 2 * parameters


def test_the_gradients_that_processes_exchange_are_copies() -> None:
    sizes = sizes_of("layers", torch.float32)
    alone, shared = (recovery_memory(replace(sizes, processes=count)) for count in (1, 2))
    assert shared.gradients == 2 * alone.gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_capping_keeps_the_scores_and_the_logits(dtype: torch.dtype) -> None:
    """What a step takes more with it than without, where the scores outweigh all else."""
    settings = RecoverSettings(train="layers", batch=2, seqlen=256, heldout=2, tokens=512)
    needed, seen = [], []
    for caps in ({"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, {}):
        student, teacher = (capped_model(dtype, caps) for dtype in (torch.float32, dtype))
        sizes = RecoverySizes(student, teacher, settings, 1, dtype)
        _, step = training_of(sizes)
        with Allocations() as allocated:
            step()
        memory = recovery_memory(sizes)
        needed.append(memory.activations + memory.logits)
        seen.append(allocated.peak)
    assert needed[0] - needed[1] == pytest.approx(seen[0] - seen[1], rel=0.3)


def capped_model(dtype: torch.dtype, caps: dict[str, float]) -> PrunableModel:
    """Return a random Gemma 2 with these soft-caps, and without the ones that are not there."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **{"attn_logit_softcapping": None, "final_logit_softcapping": None} | caps,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **eager_if_capped(config))
    return PrunableModel.of(model.eval().requires_grad_(False))


def test_gradient_checkpointing_saves_memory_and_takes_time() -> None:
    model = PrunableModel.of(medium_model())
    sizes = [
        RecoverySizes(model, model, RecoverSettings(gradient_checkpointing=checkpointing), 1, torch.float32)
        for checkpointing in (False, True)
    ]
    without, with_it = map(recovery_memory, sizes)
    assert with_it.activations < without.activations / 2
    without, with_it = (recovery_flops(each)["training"].total() for each in sizes)
    assert without < with_it < 4 / 3 * without
