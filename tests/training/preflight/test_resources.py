"""Preflight: it passes what is sound, finds each bug that is planted here, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from distill.training.preflight import Plan, preflight
from distill.training.preflight.inputs import collated
from distill.training.preflight.resources import _measured_step, _states_per_weight


class Hoarder(torch.optim.SGD):
    """Keeps a petabyte for a parameter, by its own account."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["kept"] = torch.zeros(1).expand(2**48)


def test_missing_memory_or_disk_stops_the_run(sound: Plan) -> None:
    assert {"memory", "disk"} <= {f.check for f in preflight(replace(sound, make_optimizer=Hoarder)) if f.stops}


def test_optimizer_states_are_counted(sound: Plan) -> None:
    assert _states_per_weight(sound) == pytest.approx(2, abs=1e-4)  # AdamW: two moments, and a count
    assert _states_per_weight(replace(sound, make_optimizer=torch.optim.SGD)) == 0


def test_activations_grow_with_the_lessons(sound: Plan) -> None:
    weights = sum(p.numel() * p.element_size() for p in sound.module.parameters())
    one, four = (
        _measured_step(sound, collated(sound, [sound.lessons[0]] * number, 1))[0] - weights for number in (1, 4)
    )
    assert four == pytest.approx(4 * one, rel=0.15)
    assert four > 4 * sum(len(s.prompt.ids) for s in sound.lessons[0].sequences) * 32 * 4 * 2  # hidden states, 2 layers
