"""Soft targets between models of one family: ends pair by role, what the other lacks is the rest of a distribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from distill.cache import uniforms
from distill.cache.codecs.dense import Dense
from distill.cache.codecs.topk import TopK
from distill.errors import CacheError, ConfigError
from distill.lessons.collate import entries
from distill.losses.head import Head, Term, head_loss
from distill.prompts.tokenizers import load_tokenizer
from distill.prompts.vocabularies import Pairing, pair_vocabularies
from distill.records import Annotation, SoftTargets, Target
from tests.conftest import codec, divergences

# A teacher of six tokens: its end, 5, is the student's 1; its token 1 and its token 4 have no counterpart.
PAIRING = Pairing(np.array([0, -1, 2, 3, -1, 1], np.int32))
KEPT, LOST = [0, 2, 3, 5], [1, 4]


def distributions(number: int, size: int, seed: int) -> torch.Tensor:
    return (2 * torch.randn(number, size, generator=torch.Generator().manual_seed(seed))).double().log_softmax(-1)


def kl(soft: SoftTargets, student_NV: torch.Tensor) -> float:
    targets = entries(np.ones(len(soft), bool), soft.for_training())
    term = Term(divergences("soft")["ForwardKL"], targets, torch.ones(len(soft), dtype=torch.bool), 1.0, 1.0)
    return float(head_loss(student_NV, Head(torch.eye(student_NV.shape[1]).double()), [term])[1])


def test_kl_with_paired_ends_is_the_closed_form() -> None:
    teacher_NV, student_NV = distributions(5, 6, 1), distributions(5, 5, 2)  # the student's token 4 is its own
    soft = PAIRING.soft(Dense().cut(teacher_NV, torch.zeros(5)))
    t_NV, q_NV = teacher_NV.exp(), student_NV.exp()
    t_kept, q_kept = t_NV[:, KEPT], q_NV[:, PAIRING.id_V[KEPT]]
    rest_t, rest_q = t_NV[:, LOST].sum(1), 1 - q_kept.sum(1)
    expected = (t_kept * (t_kept / q_kept).log()).sum() + (rest_t * (rest_t / rest_q).log()).sum()
    assert kl(soft, student_NV) == pytest.approx(float(expected), abs=1e-5)


def test_what_is_left_out_goes_to_the_tail_and_nothing_is_renormalised() -> None:
    teacher_NV = distributions(5, 6, 1)
    for whole in (Dense().cut(teacher_NV, torch.zeros(5)), TopK(k=3, temperature=1.0).cut(teacher_NV, torch.zeros(5))):
        soft = PAIRING.soft(whole)
        for (ids, logprobs), (all_ids, all_logprobs) in zip(soft.rows(), whole.rows(), strict=True):
            kept = [(PAIRING.id_V[i], p) for i, p in zip(all_ids, all_logprobs, strict=True) if i in KEPT]
            assert list(zip(ids, logprobs, strict=True)) == kept
        mass_N = [np.exp(logprobs).sum() for _, logprobs in soft.rows()] + soft.tail_N
        assert np.allclose(mass_N, 1, atol=1e-6)


@pytest.mark.parametrize("name", ["sampled", "rs_kd"])
def test_sampled_targets_stay_unbiased(name: str) -> None:
    """The mean of the targets over many draws is the teacher's distribution, without the tokens that are left out."""
    teacher_V = distributions(1, 6, 3)[0].float()
    number = 4000
    uniform_N = torch.from_numpy(uniforms("draws", number, 0))
    whole = codec(name, n=3, **({"k_min": 1} if name == "sampled" else {})).cut(teacher_V.expand(number, -1), uniform_N)
    soft = PAIRING.soft(whole).for_training()
    mean_V = np.bincount(soft.ids_E, np.exp(soft.logprobs_E), 5) / number
    expected_V = np.zeros(5)
    expected_V[PAIRING.id_V[KEPT]] = teacher_V.exp()[KEPT]
    assert np.allclose(mean_V, expected_V, atol=0.03)
    assert soft.num_drawn_N is not None
    assert np.allclose(np.exp(whole.for_training().logprobs_E).sum() / number, 1, atol=0.03)


def test_ids_beyond_the_teachers_vocabulary_are_damage() -> None:
    soft = Dense().cut(distributions(1, 7, 1), torch.zeros(1))
    with pytest.raises(CacheError, match="token id 6, the teacher has 6 tokens"):
        PAIRING.soft(soft)


def test_an_annotation_loses_a_target_of_which_a_token_has_no_counterpart_and_no_other() -> None:
    soft = Dense().cut(distributions(2, 6, 1), torch.zeros(2))
    targets = {"rationale": Target((3, 4), soft), "answer": Target((2, 5), soft)}
    found = PAIRING.annotation(Annotation("key", targets, "yes", "So."))
    assert (found.key, found.answer, found.rationale) == ("key", "yes", "So.")
    assert found.targets.keys() == {"answer"}
    assert found.targets["answer"].token_ids == (2, 1)
    mapped = found.targets["answer"].soft
    assert mapped is not None
    assert mapped.ids_E.tolist() == [0, 2, 3, 1] * 2
    without = PAIRING.annotation(Annotation("key", {"answer": Target((3, 5), None)}, "yes"))
    assert without.targets == {"answer": Target((3, 1), None)}


def test_tokens_of_a_student_that_its_teacher_has() -> None:
    assert PAIRING.num_unpaired == 2
    assert PAIRING.has((0, 1, 2, 3))
    assert not PAIRING.has((0, 4))
    assert Pairing().has((0, 4))


def test_an_id_without_a_token_has_no_counterpart(teacher_folder: Path, student_folder: Path) -> None:
    teacher, student = load_tokenizer(teacher_folder), load_tokenizer(student_folder)
    for tokenizer in (teacher, student):
        whole = tokenizer.get_vocab()
        tokenizer.get_vocab = lambda whole=whole: whole | {"far": 330}
    pairing = paired(teacher, student)
    assert pairing.id_V is not None
    assert pairing.id_V.tolist() == [*range(320), *[-1] * 10, 330]


def paired(teacher: Any, student: Any) -> Pairing:
    return pair_vocabularies(teacher, student, ends=(teacher.eos_token_id, student.eos_token_id))


def test_equal_tokenizers_share_all_ids(teacher_folder: Path, student_folder: Path) -> None:
    pairing = paired(load_tokenizer(teacher_folder), load_tokenizer(student_folder))
    assert pairing == Pairing()
    assert (pairing.num_unpaired, pairing.ids((3, 1))) == (0, (3, 1))


def with_end(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})


def with_tokens(*tokens: str) -> Callable[[Any], object]:
    return lambda tokenizer: tokenizer.add_tokens(list(tokens))


@pytest.mark.parametrize(
    ("teacher_has", "student_has", "expected"),
    [
        (with_end, with_tokens(), {320: 1, 1: -1}),  # chat teacher, base student
        (with_tokens(), with_end, {1: 320}),
        (with_end, with_tokens("<|im_end|>"), {320: 1, 1: -1}),
        (with_tokens(), with_tokens("zebra"), {}),
        (with_tokens("zebra"), with_tokens(), {320: -1}),
        (with_tokens("one", "two"), with_tokens("two"), {320: -1, 321: 320}),
    ],
)
def test_added_tokens_pair_by_name_and_ends_by_role(
    teacher_has: Callable[[Any], object],
    student_has: Callable[[Any], object],
    expected: dict[int, int],
    teacher_folder: Path,
    student_folder: Path,
) -> None:
    teacher, student = load_tokenizer(teacher_folder), load_tokenizer(student_folder)
    teacher_has(teacher)
    student_has(student)
    pairing = paired(teacher, student)
    assert pairing.id_V is not None
    size = max(teacher.get_vocab().values()) + 1
    assert pairing.id_V.tolist() == [expected.get(index, index) for index in range(size)]
    assert pairing.ids((5, teacher.eos_token_id)) == (5, student.eos_token_id)


@pytest.mark.parametrize(("change", "found"), [("permuted", "2 of 320"), ("renamed", "1 of 320")])
def test_different_vocabularies_are_refused_with_a_remedy(
    change: str, found: str, teacher_folder: Path, student_folder: Path
) -> None:
    student = load_tokenizer(student_folder)
    state = student.backend_tokenizer.to_str()
    swapped = {
        "permuted": (('"A":', '"AB?":'), ('"B":', '"A":'), ('"AB?":', '"B":')),
        "renamed": (('"~":', '"~~":'),),
    }
    for old, new in swapped[change]:
        assert old in state
        state = state.replace(old, new)
    student = type(student)(tokenizer_object=Tokenizer.from_str(state), bos_token="<s>", eos_token="</s>")
    with pytest.raises(ConfigError, match=r"loss=\[answer,rationale\]") as raised:
        paired(load_tokenizer(teacher_folder), student)
    assert found in str(raised.value)
