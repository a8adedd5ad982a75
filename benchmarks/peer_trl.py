"""Run steps of TRL's GKD trainer on request, in a separate environment (see benchmarks/requirements.txt).

    <python of that environment> benchmarks/peer_trl.py <folder>

`<folder>` holds `teacher/` and `student/` (model folders with a tokenizer) and `batch.safetensors`: `input_ids`,
`attention_mask` and `labels`, all [B, T]; labels are token ids at their own positions, -100 where unsupervised.

It prints `ready` and then replies to each line of its input until end of file:
    step     makes one optimizer step; replies with its seconds
    peak     makes one optimizer step; replies with the bytes by which resident memory grew at its peak

Loop, loss on full logits, clipping and optimizer are the library's. Nothing is generated (lmbda=0); the divergence is
the forward KL (beta=0) at temperature 1; the teacher is in memory and reads every batch. Three settings differ from
the library's defaults, to match the other variants: no gradient checkpointing, teacher weights in bfloat16 where the
machine is fast in it, and denormals flushed to zero.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it: trl would report usage

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


class StepProtocol(TrainerCallback):
    """Pause the library's loop between steps until the next request, and measure the requested step."""

    def __init__(self, output: TextIO) -> None:
        self._output = output

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Report that requests are accepted."""
        self._reply_and_wait("ready")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Reply with the requested measurement of the step that just ended."""
        seconds = time.perf_counter() - self._start
        self._reply_and_wait(seconds if self._command == "step" else _status("VmHWM") - self._before)

    def _reply_and_wait(self, reply: object) -> None:
        print(reply, file=self._output, flush=True)
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        self._command = line.strip()
        if self._command not in ("step", "peak"):
            sys.exit(f"unknown request {self._command!r}; expected step or peak")
        self._before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self._start = time.perf_counter()  # moving the batch is part of the step


def main(folder: Path) -> None:
    """Train until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stderr, from C too; stdout carries only replies
    torch.set_flush_denormal(True)
    batch = load_file(folder / "batch.safetensors")
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = _trainer(folder, batch, StepProtocol(replies), output_dir)
        for weight in (*trainer.model.parameters(), *trainer.teacher_model.parameters()):
            weight.sum()  # memory-mapped: read now, so that the first step does not count it
        trainer.train()


def _trainer(folder: Path, batch: dict[str, Tensor], protocol: TrainerCallback, output_dir: str) -> GKDTrainer:
    is_bfloat16_fast = torch.cpu._is_avx512_bf16_supported()
    config = GKDConfig(
        output_dir=output_dir,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        seq_kd=False,
        teacher_model_init_kwargs={"dtype": "bfloat16" if is_bfloat16_fast else "float32"},
        bf16=is_bfloat16_fast,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        learning_rate=4e-4,
        max_grad_norm=1.0,
        max_steps=10**6,
        per_device_train_batch_size=1,  # rows of the dataset below
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return GKDTrainer(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=config,
        data_collator=lambda _: dict(batch),
        train_dataset=Dataset.from_dict({"step": range(1000)}),  # one row per step; the batch is always the same
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        callbacks=[protocol],
    )


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
