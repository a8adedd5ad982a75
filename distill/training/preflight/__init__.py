"""What can be found out about a run before it trains, on its own student, cache and first lessons.

Most checks are identities: what holds whatever the weights are. A student that is taught its own distributions has
nothing to learn; padding and neighbours change no loss; a label is the next token. Some look only, and some pass a few
lessons through the model, which costs about as much as a few steps. Nothing is changed.
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

from distill.training.preflight import looking, running
from distill.training.preflight.needs import needs
from distill.training.preflight.plan import Finding, Plan, samples_of

__all__ = ["Finding", "Plan", "needed", "preflight", "table"]


def preflight(plan: Plan) -> list[Finding]:
    """Check everything, looking first; what comes behind a failure that stops the run is left out."""
    with _without_trace(plan.module, plan.device):
        samples = samples_of(plan)
        findings = [finding for look in looking.CHECKS for finding in look(plan, samples)]
        sample = replace(samples[0], batch=samples[0].batch.to(plan.device))
        for checks in ((*running.IDENTITIES, needs), (running.gradients,)):
            if not any(finding.stops for finding in findings):
                findings += [finding for check in checks for finding in check(plan, sample)]
    return findings


def needed(plan: Plan) -> list[Finding]:
    """What training would need, and what there is, whatever else is wrong."""
    with _without_trace(plan.module, plan.device):
        return list(needs(plan))


def table(findings: Sequence[Finding]) -> str:
    """A line or more per check, at most 110 columns wide; a failure says below what to do."""
    lines = [f"{'':5} {'check':15} {'found':53} wanted"]
    for finding in findings:
        mark = {True: "ok", None: "-"}.get(finding.passed) or ("FAIL" if finding.is_fatal else "warn")
        found, wanted = textwrap.wrap(finding.found, 53), textwrap.wrap(finding.wanted, 34)
        firsts = itertools.chain([(mark, finding.check)], itertools.repeat(("", "")))
        pairs = itertools.zip_longest(found, wanted, fillvalue="")
        lines += [f"{m:5} {check:15} {f:53} {w}".rstrip() for (m, check), (f, w) in zip(firsts, pairs, strict=False)]
        if finding.passed is False:
            lines += textwrap.wrap(finding.remedy, 110, initial_indent=f"{'':6}-> ", subsequent_indent=" " * 9)
    return "\n".join(lines)


@contextmanager
def _without_trace(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Meanwhile the module is on `device`; then random numbers, modes and buffers are as they were."""
    modes = [(part, part.training) for part in module.modules()]
    home = next(module.parameters()).device
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    states = np.random.get_state(), random.getstate()
    forked = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(forked, device_type=device.type if forked else "cuda"):
            module.to(device)
            yield
    finally:
        module.to(home)
        for part, mode in modes:
            part.training = mode
        for name, buffer in module.named_buffers():  # others than before, if they moved
            buffer.copy_(kept[name])
        np.random.set_state(states[0])
        random.setstate(states[1])
