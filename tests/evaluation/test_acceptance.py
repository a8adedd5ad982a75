"""How many tokens of a student its teacher would accept in speculative decoding: bounds around the exact value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.evaluation.likelihoods import Closeness, closeness_of
from distill.prompts.rendering import Prompts
from distill.records import SoftTargets, Target
from distill.students.causal_lm import open_student
from distill.students.saving import save_student
from tests.cache.codecs.conftest import ALL_CODECS, random_logprobs, uniform_draws
from tests.conftest import WHOLE_STUDENT, codec

NUM = 6


def closeness(log_q_NV: Tensor, soft: SoftTargets) -> Closeness | None:
    return closeness_of(log_q_NV, Target(tuple(range(len(soft))), soft))


@ALL_CODECS
@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])  # from a heavy tail to nearly none
def test_the_bounds_enclose_the_acceptance_of_whole_distributions(name: str, spread: float) -> None:
    log_p_NV, log_q_NV = random_logprobs(NUM, 300, spread), random_logprobs(NUM, 300, spread)
    along = closeness(log_q_NV, codec(name).cut(log_p_NV, uniform_draws(NUM)))
    if name == "rs_kd":  # has no exact entries
        assert along is None
        return
    assert along is not None
    exact = float(torch.minimum(log_p_NV, log_q_NV).exp().double().sum() / NUM)
    assert along.accepted_low - 1e-6 <= exact <= along.accepted_high + 1e-6
    assert 0 <= along.accepted_low <= along.accepted_high <= 1 + 1e-6
    if name == "dense":
        assert along.accepted_low == pytest.approx(exact, abs=1e-6)
        assert along.accepted_high == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize(
    ("student", "low", "high"),
    [
        ([0.25, 0.5, 0.125, 0.125], 0.5, 0.75),  # both tails 0.25
        ([0.6, 0.3, 0.1, 0.0], 0.75, 0.85),  # the tail of the student is the smaller one
        ([0.0, 0.1, 0.4, 0.5], 0.1, 0.35),  # that of the teacher is
    ],
)
def test_the_bounds_lie_apart_by_the_smaller_of_the_two_tails(student: list[float], low: float, high: float) -> None:
    """The teacher says 0.5, 0.25, and 0.25 for all others."""
    kept = np.log(np.array([0.5, 0.25], np.float32))
    soft = SoftTargets(np.array([0, 1]), kept, np.array([0.25], np.float32), np.array([2]))
    along = closeness(torch.tensor([student]).log(), soft)
    assert along is not None
    assert along[1:] == pytest.approx((low, high), abs=1e-6)


def test_a_model_is_accepted_by_itself_whole() -> None:
    log_p_NV = random_logprobs(NUM, 300)
    along = closeness(log_p_NV, codec("topk").cut(log_p_NV, uniform_draws(NUM)))
    assert along is not None
    assert along.accepted_high == pytest.approx(1, abs=1e-6)
    assert along.accepted_low < 1


@pytest.mark.slow
def test_a_saved_student_drafts_for_its_teacher_and_leaves_its_greedy_text_unchanged(
    teacher_folder: Path, prompts: Prompts, tmp_path: Path
) -> None:
    student = open_student(teacher_folder, **WHOLE_STUDENT | {"keep_layers": [0, 1]})
    save_student(student, prompts.tokenizer, tmp_path / "student", dtype=torch.float32, max_new_tokens=24)
    teacher, draft = (AutoModelForCausalLM.from_pretrained(path) for path in (teacher_folder, tmp_path / "student"))
    tokenizer, passes = AutoTokenizer.from_pretrained(tmp_path / "student"), []
    teacher.register_forward_hook(lambda *_: passes.append(1))
    for text in ("Tell me about it", "One, two", "7 + 5 ="):
        inputs = tokenizer(text, return_tensors="pt")
        length = {"do_sample": False, "min_new_tokens": 24, "max_new_tokens": 24}
        plain = teacher.generate(**inputs, **length)
        passes.clear()
        drafted = teacher.generate(**inputs, **length, assistant_model=draft)
        assert torch.equal(drafted, plain)
        assert 0 < len(passes) < 24  # some drafted tokens were accepted
