"""What a run needs of the machine, measured on its longest lessons, beside what there is."""

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
from distill.training.preflight.plan import Finding, Plan, Sample, collated, longest


def needs(plan: Plan, _: Sample | None = None) -> Iterator[Finding]:
    """Memory, disk and time."""
    there = free_memory(plan.device)
    lessons = longest(plan)
    batch = collated(plan, lessons, plan.prompts.end).to(plan.device)
    states = _state_bytes(plan)
    try:
        step, seconds = _measured_step(plan, batch)
    except torch.OutOfMemoryError:
        step, seconds = math.inf, math.nan
    yield _memory(there, step + states, len(lessons), batch.input_ids_BT.shape[1])
    free = shutil.disk_usage(plan.run_dir).free
    wanted = kept_bytes(plan)
    yield Finding(
        "disk",
        wanted <= free,
        f"{told_bytes(wanted)} for a student and a checkpoint",
        f"<= {told_bytes(free)}",
        f"Make room on the disk of {plan.run_dir}, or set root to another",
        True,
    )
    per_lesson = sum(lesson.num_tokens for lesson in plan.lessons) / len(plan.lessons)
    num_tokens = plan.batch_size * plan.num_steps * (per_lesson if plan.batch_unit == "examples" else 1)
    told = told_seconds(seconds / batch.input_ids_BT.numel() * num_tokens / plan.num_devices)
    yield Finding("time", True, f"about {told} of forward and backward for {plan.num_steps} steps", "", "", False)


def kept_bytes(plan: Plan) -> int:
    """Of a student and a checkpoint."""
    return 2 * sum(map(_size, plan.module.model.parameters())) + _state_bytes(plan)


def _state_bytes(plan: Plan) -> int:
    """Of the optimizer."""
    trained = sum(_size(weight) for weight in plan.module.model.parameters() if weight.requires_grad)
    return round(trained * _states_per_weight(plan))


def _memory(there: int | None, wanted: float, number: int, length: int) -> Finding:
    told = "more than there is" if wanted == math.inf else told_bytes(wanted)
    return Finding(
        "memory",
        None if there is None and wanted < math.inf else there is not None and wanted <= there,
        f"{told} for {number} lessons of {length} tokens",
        "<= unknown" if there is None else f"<= {told_bytes(there)}",
        "Lower microbatch_size (the result is the same), set student.gradient_checkpointing=true, or prompt.max_length "
        "lower",
        True,
    )


def _measured_step(plan: Plan, batch: Batch) -> tuple[float, float]:
    """Bytes and seconds of one forward and backward pass."""
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
    for weight in plan.module.model.parameters():  # they are there already
        saved.pop(weight.untyped_storage().data_ptr(), None)
    return float(sum(saved.values()) + sum(map(_size, trained))), time.perf_counter() - start


def _states_per_weight(plan: Plan) -> float:
    """Bytes that the optimizer keeps per byte of a trained parameter, seen on a small one."""
    weight = nn.Parameter(torch.zeros(256, 256, device=plan.device))
    optimizer = plan.make_optimizer([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return sum(map(_size, kept)) / _size(weight)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def told_bytes(num_bytes: int | float) -> str:
    """In a unit that suits."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def told_seconds(seconds: float) -> str:
    """In minutes or hours."""
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"
