"""Where models run: the one owner of devices. It chooses the device, moves models to it and frees its memory.

A reader keeps tensors on the device of its model, so it is made and dropped inside the block in which the model is
placed.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from distill.app.console import say

Model = TypeVar("Model", bound=nn.Module)


def device() -> torch.device:
    """The accelerator of this process, or else the CPU. The processes of a machine take its accelerators in turn."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    return torch.device(accelerator.type, rank % torch.accelerator.device_count())


def native_dtype() -> torch.dtype:
    """bfloat16 if the machine computes in it at full speed, else float32."""
    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def place(model: Model) -> Model:
    """Move a model that stays on the device until it is dropped, such as a teacher."""
    return model.to(device())


@contextmanager
def on_device(model: nn.Module, target: torch.device | None = None) -> Iterator[None]:
    """Run the model on `target`, the process's own device by default, inside the block; then move it back.

    A model that does not fit runs where it is.
    """
    home = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    target = target or device()
    try:
        model.to(target)
    except torch.OutOfMemoryError:
        say(f"the model does not fit into the memory of {target}, so it runs on {home}")
        model.to(home)
    try:
        yield
    finally:
        model.to(home)
        if target != home:
            release()


def release() -> None:
    """Return the memory of dropped models to the device; reference cycles would keep it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
