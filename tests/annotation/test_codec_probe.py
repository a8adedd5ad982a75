"""Codecs are compared by closed-form figures, and the smallest faithful codec is recommended."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.annotate import main
from distill.annotation.codec_probe import Fidelity, candidate_codecs, compare_codecs, recommend
from distill.cache.codecs.dense import Dense
from distill.records import SoftTargets
from tests.conftest import compose, grid, tiny_overrides


def distributions(size: int = 400, num_rows: int = 30) -> list[SoftTargets]:
    log_p_NV = (2.5 * torch.randn(num_rows, size)).log_softmax(-1)
    return [Dense().cut(part, torch.zeros(len(part), dtype=torch.float64)) for part in log_p_NV.split(7)]


def test_figures_agree_with_closed_forms() -> None:
    dense_targets = distributions()
    p_NV = np.exp(np.concatenate([grid(soft)[1] for soft in dense_targets]).astype(np.float64))
    fidelities = compare_codecs(dense_targets, candidate_codecs(1.0))
    label_noise = (1 - np.square(p_NV).sum(1)).mean()
    dense = fidelities["cache=dense"]
    assert (dense.bytes_per_position, dense.kl, dense.noise) == pytest.approx((4 * 400, 0, 0), abs=1e-6)
    top = fidelities["cache=topk cache.codec.k=16"]
    ranked_NV = -np.sort(-p_NV, 1)
    assert top.captured == pytest.approx(ranked_NV[:, :16].sum(1).mean(), abs=2e-3)
    tail_NV = ranked_NV[:, 16:]
    assert top.bias == pytest.approx(
        np.square(tail_NV - tail_NV.mean(1, keepdims=True)).sum(1).mean() / label_noise, rel=0.1
    )
    assert (top.noise, top.bytes_per_position) == (0, 48)
    assert fidelities["cache=rs_kd cache.codec.n=64"].noise == pytest.approx(1 / 64, rel=0.15)
    sampled = fidelities["cache=sampled cache.codec.n=64"]
    tail_NV = np.where(p_NV < 1 / 64, p_NV, 0)
    assert sampled.noise == pytest.approx((tail_NV * (1 / 64 - tail_NV)).sum(1).mean() / label_noise, rel=0.15)
    assert sampled.bias < top.bias / 10


def test_the_smallest_faithful_codec_is_recommend() -> None:
    fidelities = {
        "biased": Fidelity(10.0, 1.0, 0.0, 0.0, 1e-3),
        "noisy": Fidelity(10.0, 1.0, 0.0, 0.1, 0.0),
        "large": Fidelity(90.0, 1.0, 0.0, 0.0, 0.0),
        "right": Fidelity(30.0, 1.0, 0.0, 0.005, 1e-5),
    }
    assert recommend(fidelities) == "right"
    assert recommend({"noisy": fidelities["noisy"], "large": fidelities["large"]}) == "large"


def test_the_probe_command_compares_codecs_and_writes_nothing(
    tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        o for o in tiny_overrides(tmp_path, teacher_folder, teacher_folder) if o.startswith(("task", "teacher"))
    ]
    main(compose(*overrides, f"root={tmp_path}", "probe=true", name="annotate"))
    output = capsys.readouterr().out
    assert len([line for line in output.splitlines() if line.startswith("cache=")]) == 7
    assert output.count("<- recommended") == 1
    assert not (tmp_path / "cache").exists()
