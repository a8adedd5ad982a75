"""Take steps of TRL's GKD trainer on command, in an environment of its own (see requirements.txt beside this file).

    <python of that environment> benchmarks/peer_trl.py <folder>

`<folder>` holds `teacher/` and `student/` (model folders with a tokenizer) and `batch.safetensors`: `input_ids`,
`attention_mask` and `labels`, all [B, T]; the labels are those of the tokens themselves, -100 where nothing is learned.

It prints `ready`, and then answers lines on its input until they end:
    step     takes one optimizer step, and answers with the seconds it took
    peak     takes one too, and answers with the bytes by which resident memory grew at its peak

All is the library's: its loop, its loss on full logits, its clipping, its optimizer. Nothing is generated (lmbda=0);
the divergence is the forward KL (beta=0) at temperature 1; the teacher, in memory, reads every batch. Three settings
are not the library's defaults, to make the step like those that it stands beside: activations are kept, the teacher's
weights are bfloat16 where the machine is fast in it, and numbers below 1e-38 count as zero.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it: trl would report its use

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


class Protocol(TrainerCallback):
    """Holds the library's loop between two steps until it is asked for the next one, and measures that one."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Say that the first step can be asked for."""
        self._answer("ready")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answer with what was asked of the step that has just ended."""
        seconds = time.perf_counter() - self._start
        self._answer(seconds if self._asked == "step" else _status("VmHWM") - self._before)

    def _answer(self, answer: object) -> None:
        print(answer, file=self._answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        self._asked = line.strip()
        if self._asked not in ("step", "peak"):
            sys.exit(f"{self._asked!r} is neither step nor peak")
        self._before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        self._start = time.perf_counter()  # before the batch is handed over: that is a part of the step


def main(folder: Path) -> None:
    """Let the library train until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints, from C too, goes elsewhere than the answers
    torch.set_flush_denormal(True)
    batch = load_file(folder / "batch.safetensors")
    with tempfile.TemporaryDirectory() as output:
        trainer = _trainer(folder, batch, Protocol(answers), output)
        for weight in (*trainer.model.parameters(), *trainer.teacher_model.parameters()):
            weight.sum()  # mapped from the file: read now, lest the first step's growth include it
        trainer.train()


def _trainer(folder: Path, batch: dict[str, Tensor], protocol: TrainerCallback, output: str) -> GKDTrainer:
    fast = torch.cpu._is_avx512_bf16_supported()
    config = GKDConfig(
        output_dir=output,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        seq_kd=False,
        teacher_model_init_kwargs={"dtype": "bfloat16" if fast else "float32"},
        bf16=fast,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        learning_rate=4e-4,
        max_grad_norm=1.0,
        max_steps=10**6,
        per_device_train_batch_size=1,  # rows of the data set below
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
        train_dataset=Dataset.from_dict({"step": range(1000)}),  # one row a step: the batch is the same in all
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
