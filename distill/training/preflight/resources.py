"""The resources that a run needs, measured on its longest lessons, and those available."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from distill.app.machine import free_memory
from distill.losses.head import head_loss
from distill.records import Batch
from distill.training.preflight.inputs import Finding, Plan, Sample, collated, longest


def resources(plan: Plan, _: Sample | None = None) -> Iterator[Finding]:
    """Yield the findings on memory, disk and time."""
    free_bytes = free_memory(plan.device)
    lessons = longest(plan)
    batch = collated(plan, lessons, plan.prompts.end).to(plan.device)
    states = _state_bytes(plan)
    try:
        step, seconds = _measured_step(plan, batch)
    except torch.OutOfMemoryError:
        step, seconds = math.inf, math.nan
    yield _memory(free_bytes, step + states, len(lessons), batch.input_ids_BT.shape[1])
    free_disk = shutil.disk_usage(plan.run_dir).free
    needed_disk = kept_bytes(plan)
    yield Finding(
        "disk",
        needed_disk <= free_disk,
        f"{told_bytes(needed_disk)} for a student and a checkpoint",
        f"<= {told_bytes(free_disk)}",
        f"Free space on the disk of {plan.run_dir}, or set root to a folder on another disk",
        True,
    )
    per_lesson = sum(lesson.num_tokens for lesson in plan.lessons) / len(plan.lessons)
    num_tokens = plan.batch_size * plan.num_steps * (per_lesson if plan.batch_unit == "examples" else 1)
    duration = told_seconds(seconds / batch.input_ids_BT.numel() * num_tokens / plan.num_devices)
    yield Finding("time", True, f"about {duration} of forward and backward for {plan.num_steps} steps", "", "", False)


def kept_bytes(plan: Plan) -> int:
    """Return the bytes of a saved student and a checkpoint."""
    return 2 * sum(map(_size, plan.module.model.parameters())) + _state_bytes(plan)


def _state_bytes(plan: Plan) -> int:
    """Return the bytes of the optimizer state."""
    trained = sum(_size(weight) for weight in plan.module.model.parameters() if weight.requires_grad)
    return round(trained * _states_per_weight(plan))


def _memory(free_bytes: int | None, needed_bytes: float, num_lessons: int, length: int) -> Finding:
    amount = "more than available" if needed_bytes == math.inf else told_bytes(needed_bytes)
    fits = None if free_bytes is None else needed_bytes <= free_bytes
    return Finding(
        "memory",
        False if needed_bytes == math.inf else fits,
        f"{amount} for {num_lessons} lessons of {length} tokens",
        "<= unknown" if free_bytes is None else f"<= {told_bytes(free_bytes)}",
        "Reduce microbatch_size (the result is the same) or prompt.max_length, or set "
        "student.gradient_checkpointing=true",
        True,
    )


def _measured_step(plan: Plan, batch: Batch) -> tuple[float, float]:
    """Return the bytes and seconds of one forward and backward pass."""
    trained = [weight for weight in plan.module.model.parameters() if weight.requires_grad]
    is_cuda, saved = plan.device.type == "cuda", dict[int, int]()
    before = torch.cuda.memory_allocated(plan.device) if is_cuda else 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(plan.device)

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    plan.module.train()
    start = time.perf_counter()
    with plan.precision(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = list(plan.module.terms(batch).values())
        total, _ = head_loss(plan.module.hidden(batch), plan.module.head(), terms)
    if trained and total.requires_grad:
        torch.autograd.grad(total, trained, allow_unused=True)
    if is_cuda:
        torch.cuda.synchronize(plan.device)
        return float(torch.cuda.max_memory_allocated(plan.device) - before), time.perf_counter() - start
    for weight in plan.module.model.parameters():  # already in memory
        saved.pop(weight.untyped_storage().data_ptr(), None)
    return float(sum(saved.values()) + sum(map(_size, trained))), time.perf_counter() - start


def _states_per_weight(plan: Plan) -> float:
    """Return the optimizer's state bytes per byte of a trained parameter, measured on a small parameter."""
    weight = nn.Parameter(torch.zeros(256, 256, device=plan.device))
    optimizer = plan.make_optimizer([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return sum(map(_size, kept)) / _size(weight)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def told_bytes(num_bytes: int | float) -> str:
    """Format bytes as MiB or GiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def told_seconds(seconds: float) -> str:
    """Format seconds as minutes or hours."""
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"
