"""Preflight: checks of a run before it trains, on its own student, cache and first lessons.

Most checks are identities that hold for any weights: a student trained on its own distributions has zero KL, padding
and neighbours change no loss, a label is the next token. Data checks only read; model checks pass a few lessons
through the model, which costs about as much as a few steps. Preflight leaves no state changed.
"""

from __future__ import annotations

import itertools
import random
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from distill.lessons.join import TrainingSequence
from distill.models.placement import on_device
from distill.prompts.classes import ClassPrompts
from distill.prompts.preview import CLOSE, OPEN, marked
from distill.prompts.rendering import Prompts
from distill.training.preflight import data_checks, model_checks
from distill.training.preflight.inputs import Finding, PreflightInput, plain, samples_of
from distill.training.preflight.resources import resources

__all__ = ["Finding", "PreflightInput", "example", "preflight", "resource_findings", "table"]


def preflight(inputs: PreflightInput) -> list[Finding]:
    """Run all checks, data checks first; after a failure that stops the run, skip the later stages."""
    with _state_restored(inputs.module, inputs.device):
        samples = samples_of(inputs)
        are_classes = isinstance(inputs.prompts, ClassPrompts)
        checks = data_checks.OF_CLASSES if are_classes else data_checks.OF_TOKENS
        findings = [finding for check in checks for finding in check(inputs, samples)]
        sample = replace(samples[0], batch=samples[0].batch.to(inputs.device))
        for stage in ((*model_checks.IDENTITIES, resources), (model_checks.gradients,)):
            if not any(finding.stops for finding in findings):
                findings += [finding for check in stage for finding in check(inputs, sample)]
    return findings


def resource_findings(inputs: PreflightInput) -> list[Finding]:
    """Return the resources that training needs and those available, without the other checks."""
    with _state_restored(inputs.module, inputs.device):
        return list(resources(inputs))


def example(inputs: PreflightInput) -> str:
    """Return the first lesson as the student sees it, with what it learns in ⟦ ⟧."""
    sequences = [part for whole in inputs.lessons[0].sequences for part in plain(whole)]
    texts = [textwrap.indent(_shown(inputs.prompts, sequence), "  ") for sequence in sequences]
    learned = "class" if isinstance(inputs.prompts, ClassPrompts) else "tokens"
    return f"the first lesson as the student sees it, with the {learned} to learn in ⟦ ⟧:\n" + "\n  --\n".join(texts)


def _shown(prompts: Prompts | ClassPrompts, sequence: TrainingSequence) -> str:
    if isinstance(prompts, ClassPrompts):
        return f"{prompts.text(sequence.ids[:-1])} {OPEN}{prompts.label(sequence.ids[-1:])}{CLOSE}"
    return marked(prompts, sequence.ids, [(target.start, target.stop) for target in sequence.targets])


def table(findings: Sequence[Finding]) -> str:
    """Format one or more lines per check, at most 110 columns wide; a remedy follows each failure."""
    lines = [f"{'':5} {'check':15} {'found':53} expected"]
    for finding in findings:
        mark = {True: "ok", None: "-"}.get(finding.passed) or ("FAIL" if finding.is_fatal else "warn")
        found, expected = textwrap.wrap(finding.found, 53), textwrap.wrap(finding.expected, 34)
        firsts = itertools.chain([(mark, finding.check)], itertools.repeat(("", "")))
        pairs = itertools.zip_longest(found, expected, fillvalue="")
        lines += [f"{m:5} {check:15} {f:53} {w}".rstrip() for (m, check), (f, w) in zip(firsts, pairs, strict=False)]
        if finding.passed is False:
            lines += textwrap.wrap(finding.remedy, 110, initial_indent=f"{'':6}-> ", subsequent_indent=" " * 9)
    return "\n".join(lines)


@contextmanager
def _state_restored(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the module on `device` in the block; then restore its device, modes, buffers and all random states."""
    modes = [(part, part.training) for part in module.modules()]
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    states = np.random.get_state(), random.getstate()
    forked = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(forked, device_type=device.type), on_device(module, device):
            yield
    finally:
        for part, mode in modes:
            part.training = mode
        for name, buffer in module.named_buffers():  # moving may have replaced them
            buffer.copy_(kept[name])
        np.random.set_state(states[0])
        random.setstate(states[1])
