"""The resources that a run needs, measured on its longest lessons, and those available."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distill.app.machine import free_memory, gpu_memory_rise, is_gpu
from distill.losses.head import head_loss
from distill.records import Batch
from distill.training.checkpoints import NUM_KEPT
from distill.training.preflight.inputs import Finding, PreflightInput, Sample, collated, longest


def resources(inputs: PreflightInput, _: Sample | None = None) -> Iterator[Finding]:
    """Yield the findings on memory, disk and time."""
    free_bytes = free_memory(inputs.device)
    lessons = longest(inputs)
    batch = collated(inputs, lessons, inputs.prompts.end).to(inputs.device)
    held = _held_bytes(inputs)
    try:
        step, seconds = _measured_step(inputs, batch)
    except torch.OutOfMemoryError:
        step, seconds = math.inf, math.nan
    yield _memory(free_bytes, step + held, len(lessons), batch.input_ids_BT.shape[1])
    free_disk = shutil.disk_usage(inputs.run_dir).free
    needed_disk = kept_bytes(inputs)
    yield Finding(
        "disk",
        needed_disk <= free_disk,
        f"{format_bytes(needed_disk)} at most for {_kept_text(inputs)}",
        f"<= {format_bytes(free_disk)}",
        f"Free space on the disk of {inputs.run_dir}, or set root to a folder on another disk",
        True,
    )
    per_lesson = sum(lesson.num_tokens for lesson in inputs.lessons) / len(inputs.lessons)
    num_tokens = inputs.batch_size * inputs.num_steps * (per_lesson if inputs.batch_unit == "examples" else 1)
    duration = format_seconds(seconds / batch.input_ids_BT.numel() * num_tokens / inputs.num_devices)
    yield Finding("time", True, f"about {duration} of forward and backward for {inputs.num_steps} steps", "", "", False)


def kept_bytes(inputs: PreflightInput) -> int:
    """Return the bytes that a run's folder holds at most: the kept checkpoints and the one being written."""
    weights, trained = _weight_bytes(inputs)
    checkpoint = weights * (1 + inputs.is_averaged) + trained * inputs.keeps_best + _state_bytes(inputs)
    num_saved = _num_saved(inputs)
    return max(min(num_saved, NUM_KEPT + 1) * checkpoint, min(num_saved, NUM_KEPT) * checkpoint + weights)


def _kept_text(inputs: PreflightInput) -> str:
    number = min(_num_saved(inputs), NUM_KEPT + 1)
    return "a checkpoint and a student" if number == 1 else f"{number} checkpoints at once, then a student"


def _num_saved(inputs: PreflightInput) -> int:
    """Return how many checkpoints a run writes: every few steps, and at its end."""
    return 1 + (inputs.num_steps - 1) // inputs.checkpoint_every


def _weight_bytes(inputs: PreflightInput) -> tuple[int, int]:
    """Return the bytes of all weights, and of the trained ones."""
    weights = list(inputs.module.model.parameters())
    return sum(map(_size, weights)), sum(_size(weight) for weight in weights if weight.requires_grad)


def _state_bytes(inputs: PreflightInput) -> int:
    """Return the bytes of the optimizer state."""
    return round(_weight_bytes(inputs)[1] * _states_per_weight(inputs))


def _held_bytes(inputs: PreflightInput) -> int:
    """Return the bytes of what stays in the device's memory from step to step, beside the student."""
    weights, trained = _weight_bytes(inputs)
    best = trained if inputs.keeps_best and inputs.device.type == "cpu" else 0  # the host keeps the best weights
    return _state_bytes(inputs) + weights * inputs.is_averaged + best


def _memory(free_bytes: int | None, needed_bytes: float, num_lessons: int, length: int) -> Finding:
    amount = "more than available" if needed_bytes == math.inf else format_bytes(needed_bytes)
    fits = None if free_bytes is None else needed_bytes <= free_bytes
    return Finding(
        "memory",
        False if needed_bytes == math.inf else fits,
        f"{amount} for {num_lessons} lessons of {length} tokens",
        "<= unknown" if free_bytes is None else f"<= {format_bytes(free_bytes)}",
        "Reduce microbatch_size (the result is the same) or prompt.max_length, or set "
        "student.gradient_checkpointing=true",
        True,
    )


def _measured_step(inputs: PreflightInput, batch: Batch) -> tuple[float, float]:
    """Return the bytes and seconds of one forward and backward pass."""
    trained = [weight for weight in inputs.module.model.parameters() if weight.requires_grad]
    rise = gpu_memory_rise(inputs.device) if is_gpu(inputs.device) else None
    saved = dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs.module.train()
    start = time.perf_counter()
    with inputs.precision(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = list(inputs.module.terms(batch).values())
        total, _ = head_loss(inputs.module.hidden(batch), inputs.module.head(), terms)
    if trained and total.requires_grad:
        torch.autograd.grad(total, trained, allow_unused=True)
    if rise is not None:
        return float(rise()), time.perf_counter() - start
    for weight in inputs.module.model.parameters():  # already in memory
        saved.pop(weight.untyped_storage().data_ptr(), None)
    return float(sum(saved.values()) + sum(map(_size, trained))), time.perf_counter() - start


def _states_per_weight(inputs: PreflightInput) -> float:
    """Return the optimizer's state bytes per byte of a trained parameter, measured on a small parameter."""
    weight = nn.Parameter(torch.zeros(256, 256, device=inputs.device))
    optimizer = inputs.make_optimizer([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return sum(map(_size, kept)) / _size(weight)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def format_bytes(num_bytes: int | float) -> str:
    """Format bytes as MiB or GiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def format_seconds(seconds: float) -> str:
    """Format seconds as minutes or hours."""
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"
