"""Which codec suits a teacher: figures that follow from closed forms, and a recommendation that follows from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.annotate import main
from distill.annotation.codec_probe import Fidelity, candidates, compare, recommended
from distill.cache.codecs.dense import Dense
from distill.records import SoftTargets
from tests.conftest import compose, grid, tiny_overrides


def wholes(size: int = 400, number: int = 30) -> list[SoftTargets]:
    log_p_NV = (2.5 * torch.randn(number, size)).log_softmax(-1)
    return [Dense().cut(part, torch.zeros(len(part), dtype=torch.float64)) for part in log_p_NV.split(7)]


def test_figures_are_those_of_the_formulas() -> None:
    given = wholes()
    p_NV = np.exp(np.concatenate([grid(whole)[1] for whole in given]).astype(np.float64))
    found = compare(given, candidates(1.0))
    label = (1 - np.square(p_NV).sum(1)).mean()
    dense = found["cache=dense"]
    assert (dense.bytes_per_position, dense.kl, dense.noise) == pytest.approx((4 * 400, 0, 0), abs=1e-6)
    top = found["cache=topk cache.codec.k=16"]
    ranked_NV = -np.sort(-p_NV, 1)
    assert top.captured == pytest.approx(ranked_NV[:, :16].sum(1).mean(), abs=2e-3)
    rest_NV = ranked_NV[:, 16:]
    assert top.bias == pytest.approx(np.square(rest_NV - rest_NV.mean(1, keepdims=True)).sum(1).mean() / label, rel=0.1)
    assert (top.noise, top.bytes_per_position) == (0, 48)
    assert found["cache=rs_kd cache.codec.n=64"].noise == pytest.approx(1 / 64, rel=0.15)
    sampled = found["cache=sampled cache.codec.n=64"]
    tail_NV = np.where(p_NV < 1 / 64, p_NV, 0)
    assert sampled.noise == pytest.approx((tail_NV * (1 / 64 - tail_NV)).sum(1).mean() / label, rel=0.15)
    assert sampled.bias < top.bias / 10


def test_the_smallest_faithful_codec_is_recommended() -> None:
    found = {
        "biased": Fidelity(10.0, 1.0, 0.0, 0.0, 1e-3),
        "noisy": Fidelity(10.0, 1.0, 0.0, 0.1, 0.0),
        "large": Fidelity(90.0, 1.0, 0.0, 0.0, 0.0),
        "right": Fidelity(30.0, 1.0, 0.0, 0.005, 1e-5),
    }
    assert recommended(found) == "right"
    assert recommended({"noisy": found["noisy"], "large": found["large"]}) == "large"


def test_a_probe_measures_the_users_own_teacher_and_stores_nothing(
    tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [o for o in tiny_overrides(tmp_path, teacher_folder, teacher_folder) if o.startswith(("task", "teacher"))]
    main(compose(*given, f"root={tmp_path}", "probe=true", name="annotate"))
    told = capsys.readouterr().out
    assert len([line for line in told.splitlines() if line.startswith("cache=")]) == 7
    assert told.count("<- recommended") == 1
    assert not (tmp_path / "cache").exists()
