"""Preflight estimates of memory and disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from distill.training.preflight import PreflightInput, preflight
from distill.training.preflight.inputs import collated
from distill.training.preflight.resources import _measured_step, _states_per_weight


class MemoryHungrySGD(torch.optim.SGD):
    """An optimizer whose state has 2^48 elements per parameter, without allocating them."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["kept"] = torch.zeros(1).expand(2**48)


def test_missing_memory_or_disk_stops_the_run(valid_input: PreflightInput) -> None:
    assert {"memory", "disk"} <= {
        f.check for f in preflight(replace(valid_input, make_optimizer=MemoryHungrySGD)) if f.stops
    }


def test_optimizer_states_are_counted(valid_input: PreflightInput) -> None:
    assert _states_per_weight(valid_input) == pytest.approx(2, abs=1e-4)  # AdamW: two moments, and a count
    assert _states_per_weight(replace(valid_input, make_optimizer=torch.optim.SGD)) == 0


def test_activations_grow_with_the_lessons(valid_input: PreflightInput) -> None:
    weights = sum(p.numel() * p.element_size() for p in valid_input.module.parameters())
    bytes_of_one, bytes_of_four = (
        _measured_step(valid_input, collated(valid_input, [valid_input.lessons[0]] * number, 1))[0] - weights
        for number in (1, 4)
    )
    assert bytes_of_four == pytest.approx(4 * bytes_of_one, rel=0.15)
    assert (
        bytes_of_four > 4 * sum(len(s.prompt.ids) for s in valid_input.lessons[0].sequences) * 32 * 4 * 2
    )  # hidden states, 2 layers
