"""Laws 2, 3 and 5: the collated batch supervises the right positions, with aligned soft targets and counts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.errors import CacheError
from distill.lessons.collate import collate
from distill.lessons.join import Lesson, TrainingSequence
from distill.lessons.loader import Arrangement, DistillData
from distill.prompts.rendering import Prompts
from distill.records import SPANS, Prompt, SoftTargets, Target
from tests.cases import Case
from tests.conftest import by_span, case_lessons, lessons, read
from tests.lessons.conftest import soft


@pytest.mark.parametrize("number", [2, 4])
def test_a_target_without_exactly_one_distribution_per_token_is_refused(number: int) -> None:
    assert Target((5, 6, 7), soft(3))
    assert Target((5, 6, 7), None)
    with pytest.raises(CacheError, match=f"3 target tokens came with {number} distributions"):
        Target((5, 6, 7), soft(number))


def test_each_supervised_position_is_one_before_its_token(case: Case) -> None:
    all_lessons = case_lessons(case, 7)
    batch = collate(all_lessons, {}, 9, read)
    sequences = [sequence for lesson in all_lessons for sequence in lesson.sequences]
    expected = [
        (row, index - 1, sequence.ids[index], SPANS.index(target.span), target.is_labelled)
        for row, sequence in enumerate(sequences)
        for target in sequence.targets
        for index in range(target.start, target.stop)
    ]
    positions = zip(
        *(x.tolist() for x in (batch.sequence_N, batch.before_N, batch.label_N, batch.span_N, batch.is_labelled_N)),
        strict=True,
    )
    assert list(positions) == expected
    assert torch.equal(batch.input_ids_BT[batch.sequence_N, batch.before_N + 1], batch.label_N)


def test_the_learned_tokens_are_the_text_of_the_example_and_the_end(case: Case) -> None:
    for lesson, example in zip(case_lessons(case, 7), case.examples(7), strict=True):
        for sequence in lesson.sequences:
            (target,) = sequence.targets
            assert sequence.ids[target.stop - 1] == case.prompts.end
            assert target.stop == len(sequence.ids)
            text = example.answer if target.span == "answer" else example.rationale
            learned = case.prompts.decode(sequence.ids[target.start : target.stop - 1])
            assert learned.strip() == str(text).strip()


def test_a_target_with_distributions_for_other_tokens_than_the_chosen_ones_is_refused() -> None:
    assert Target((5, 6, 7), soft(2), (0, 2))
    with pytest.raises(CacheError, match="2 chosen tokens came with 3 distributions"):
        Target((5, 6, 7), soft(3), (0, 2))
    for chosen in [(), (2, 0), (1, 1), (0, 3), (-1, 0)]:
        with pytest.raises(CacheError, match="expected at least one token, in ascending order"):
            Target((5, 6, 7), soft(len(chosen)), chosen)


@pytest.mark.parametrize("are_chosen", [False, True])
def test_soft_targets_are_aligned_with_their_tokens(are_chosen: bool, case: Case) -> None:
    all_lessons = case_lessons(case, 7, are_chosen=are_chosen)
    batch = collate(all_lessons, {}, 9, read)
    placed = [(s.ids, target) for lesson in all_lessons for s in lesson.sequences for target in s.targets]
    softs = [read([target.soft.place]) for _, target in placed]
    assert batch.soft is not None
    joined_soft = SoftTargets.join(softs)
    assert batch.soft.tail_N is not None
    assert batch.soft.tail_N[batch.is_soft_N].tolist() == joined_soft.tail_N.tolist()
    assert batch.soft.ids_E.tolist() == joined_soft.ids_E.tolist()
    assert batch.soft.logprobs_E.tolist() == joined_soft.logprobs_E.tolist()
    assert all(target.soft.num_positions == len(soft) for (_, target), soft in zip(placed, softs, strict=True))
    tokens = [
        ids[target.start :][offset]
        for (ids, target), soft in zip(placed, softs, strict=True)
        for offset in target.soft.chosen or range(len(soft))
    ]
    assert batch.label_N[batch.is_soft_N].tolist() == tokens
    tokens_by_entry = np.repeat(tokens, joined_soft.num_N)
    assert batch.label_N[batch.soft.position_E.long()].tolist() == tokens_by_entry.tolist()
    assert np.diff(batch.soft.ends_N, prepend=0)[batch.is_soft_N].tolist() == joined_soft.num_N.tolist()
    assert (np.diff(batch.soft.ends_N, prepend=0) > 0).tolist() == batch.is_soft_N.tolist()


def test_the_end_token_is_supervised_even_if_it_is_the_padding_token(case: Case) -> None:
    all_lessons = case_lessons(case, 7)
    batch = collate(all_lessons, {}, case.prompts.end, read)
    num_sequences = sum(len(lesson.sequences) for lesson in all_lessons)
    assert (batch.label_N == case.prompts.end).sum() == num_sequences
    lengths = [len(sequence.ids) for lesson in all_lessons for sequence in lesson.sequences]
    assert batch.mask_BT.sum(1).tolist() == lengths
    assert batch.mask_BT[batch.sequence_N, batch.before_N + 1].all()
    is_end_N = batch.label_N == case.prompts.end
    assert (batch.before_N[is_end_N] + 2).tolist() == lengths


def test_validation_sees_every_lesson_once_with_little_padding(prompts: Prompts) -> None:
    all_lessons = lessons(prompts, 75)
    data = DistillData(
        train=all_lessons,
        validation=all_lessons,
        read=read,
        batch_size=8,
        microbatch_size=8,
        batch_unit="examples",
        arrangement=Arrangement(),
        num_steps=1,
        seed=0,
        padding_id=1,
        num_workers=0,
    )
    batches = list(data.val_dataloader())
    assert [len(batch.example_ids) for batch in batches] == [*[8] * 9, 3]
    assert sorted(i for batch in batches for i in batch.example_ids) == sorted(
        i for lesson in all_lessons for i in lesson.example_ids
    )
    widths = [batch.mask_BT.shape[1] for batch in batches]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1] == max(len(s.ids) for lesson in all_lessons for s in lesson.sequences)


def test_one_sequence_has_the_tokens_targets_and_counts_of_two(case: Case) -> None:
    for lesson in case_lessons(case, 7):
        branched = lesson.branched()
        assert branched.counts() == lesson.counts()
        (shared,) = branched.sequences
        if len(lesson.sequences) == 1:
            assert branched is lesson
            continue
        assert branched.num_tokens < sum(len(sequence.ids) for sequence in lesson.sequences)
        branch_start, *_ = shared.branches
        ends = (*shared.branches[1:], len(shared.ids))
        for sequence, start, end in zip(lesson.sequences, shared.branches, ends, strict=True):
            assert shared.ids[:branch_start] + shared.ids[start:end] == sequence.ids
            (target,) = sequence.targets
            assert by_span(shared)[target.span] == target.moved(start - branch_start)
            assert start < by_span(shared)[target.span].start  # the token before a target belongs to its branch


@pytest.mark.parametrize("last", [7, 8])
def test_a_target_with_a_common_beginning_is_not_shared(last: int) -> None:
    answer, rationale = Prompt((5, 6, 7), {"answer": (2, 3)}), Prompt((5, 6, last), {"rationale": (2, 3)})
    lesson = Lesson(tuple(TrainingSequence.of(prompt, "", (), {}) for prompt in (answer, rationale)))
    (sequence,) = lesson.branched().sequences
    prompt = Prompt((5, 6, 7, 6, last), {"answer": (2, 3), "rationale": (4, 5)})
    assert sequence == replace(TrainingSequence.of(prompt, "", (), {}), branches=(1, 3))


def test_sequences_without_a_common_prefix_stay_separate() -> None:
    answer, rationale = Prompt((5, 6), {"answer": (1, 2)}), Prompt((5, 6, 8), {"rationale": (2, 3)})
    lesson = Lesson(tuple(TrainingSequence.of(prompt, "", (), {}) for prompt in (answer, rationale)))
    assert lesson.branched() is lesson


def test_positions_continue_from_the_shared_prompt_in_each_branch(case: Case) -> None:
    branched_lessons = [lesson.branched() for lesson in case_lessons(case, 9)]
    batch = collate(branched_lessons, {}, 9, read)
    assert batch.branch_BT is not None
    for row, lesson in enumerate(branched_lessons):
        (sequence,) = lesson.sequences
        starts, length = sequence.branches or (len(sequence.ids),), len(sequence.ids)
        expected = [*range(starts[0])]
        for start, end in itertools.pairwise((*starts, length)):
            expected += range(starts[0], starts[0] + end - start)
        assert batch.position_BT[row, :length].tolist() == expected
        assert (batch.position_BT[row, length:] == 0).all()  # no position beyond the model's maximum
        assert int(batch.branch_BT[row].max()) == len(sequence.branches)
    assert collate(case_lessons(case, 9), {}, 9, read).branch_BT is None


def test_counts_are_per_span_and_source(prompts: Prompts) -> None:
    lesson = lessons(prompts, 3)[2]
    answer, rationale = (target for sequence in lesson.sequences for target in sequence.targets)
    num_answer, num_rationale = (target.stop - target.start for target in (answer, rationale))
    assert lesson.counts() == {
        ("answer", "labels"): num_answer,
        ("answer", "soft"): num_answer,
        ("rationale", "labels"): num_rationale,
        ("rationale", "soft"): num_rationale - 1,  # the end token after it has no distribution
    }
    assert lessons(prompts, 1)[0].counts()["answer", "labels"] == 0
