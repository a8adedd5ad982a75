"""Laws 2, 3, 5, 8: which position learns what, whatever stands beside it, and how many of them there are."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CountingTeacher, examples, lessons, read
from omegaconf import DictConfig

from distill.cache.codecs.topk import TopK
from distill.cache.store import Store
from distill.errors import CacheError, ConfigError
from distill.lessons.collate import collate
from distill.lessons.curriculum import prepare, teach
from distill.lessons.join import Join, Lesson, Records, TrainingSequence
from distill.lessons.loader import Arrangement, DistillData, StepSampler
from distill.prompts.cues import Prompts
from distill.records import SPANS, Annotation, CheckedRationale, Example, Prompt, SoftTargets, Target


def soft(number: int, k: int = 3) -> SoftTargets:
    ids_E, every_N = np.tile(np.arange(k, dtype=np.int32), number), np.full(number, 0.5, np.float32)
    return SoftTargets(ids_E, np.full(number * k, -2, np.float32), every_N, np.full(number, k))


@pytest.mark.parametrize("number", [2, 4])
def test_a_target_without_exactly_one_distribution_per_token_is_refused(number: int) -> None:
    assert Target((5, 6, 7), soft(3))
    assert Target((5, 6, 7), None)
    with pytest.raises(CacheError, match=f"3 target tokens came with {number} distributions"):
        Target((5, 6, 7), soft(number))


def test_each_supervised_position_is_one_before_its_token(prompts: Prompts) -> None:
    given = lessons(prompts, 7)
    batch = collate(given, {}, 9, read)
    sequences = [sequence for lesson in given for sequence in lesson.sequences]
    wanted = [
        (row, place - 1, sequence.prompt.ids[place], SPANS.index(span), span in sequence.labelled)
        for row, sequence in enumerate(sequences)
        for span, (start, stop) in sequence.prompt.spans.items()
        for place in range(start, stop)
    ]
    found = zip(
        *(x.tolist() for x in (batch.sequence_N, batch.before_N, batch.label_N, batch.span_N, batch.is_labelled_N)),
        strict=True,
    )
    assert list(found) == wanted
    assert torch.equal(batch.input_ids_BT[batch.sequence_N, batch.before_N + 1], batch.label_N)


def test_soft_rows_stand_at_the_tokens_that_they_are_for(prompts: Prompts) -> None:
    given = lessons(prompts, 7)
    batch = collate(given, {}, 9, read)
    softs = [
        (s.prompt, span, read([soft.place]))
        for lesson in given
        for s in lesson.sequences
        for span, soft in s.soft.items()
    ]
    assert batch.soft is not None
    joined_soft = SoftTargets.join([targets for _, _, targets in softs])
    assert batch.soft.tail_N is not None
    assert batch.soft.tail_N[batch.is_soft_N].tolist() == joined_soft.tail_N.tolist()
    assert batch.soft.ids_E.tolist() == joined_soft.ids_E.tolist()
    assert batch.soft.logprobs_E.tolist() == joined_soft.logprobs_E.tolist()
    tokens = [i for prompt, span, targets in softs for i in prompt.ids[prompt.spans[span][0] :][: len(targets)]]
    assert batch.label_N[batch.is_soft_N].tolist() == tokens
    by_entry = np.repeat(tokens, joined_soft.num_N)
    assert batch.label_N[batch.soft.position_E.long()].tolist() == by_entry.tolist()
    assert np.diff(batch.soft.ends_N, prepend=0)[batch.is_soft_N].tolist() == joined_soft.num_N.tolist()
    assert (np.diff(batch.soft.ends_N, prepend=0) > 0).tolist() == batch.is_soft_N.tolist()


def test_the_end_of_the_sequence_is_supervised_also_where_it_is_the_padding(prompts: Prompts) -> None:
    given = lessons(prompts, 7)
    batch = collate(given, {}, prompts.end, read)
    number = sum(len(lesson.sequences) for lesson in given)
    assert (batch.label_N == prompts.end).sum() == number
    lengths = [len(sequence.prompt.ids) for lesson in given for sequence in lesson.sequences]
    assert batch.mask_BT.sum(1).tolist() == lengths
    assert batch.mask_BT[batch.sequence_N, batch.before_N + 1].all()
    is_end_N = batch.label_N == prompts.end
    assert (batch.before_N[is_end_N] + 2).tolist() == lengths


def sampler(given: list[Lesson], **settings: Any) -> StepSampler:
    """Steps of four examples, where nothing else is said."""
    plain = {"batch_size": 4, "batch_unit": "examples", "num_microbatches": 1, "num_steps": 1, "seed": 0}
    return StepSampler(given, **plain | settings)


@pytest.mark.parametrize(("num_microbatches", "world_size"), [(1, 1), (4, 1), (8, 1), (2, 2), (1, 4), (3, 2)])
def test_a_step_is_the_same_examples_however_it_is_cut(
    prompts: Prompts, num_microbatches: int, world_size: int
) -> None:
    given = lessons(prompts, 11)

    def dealt(number: int, size: int, **start: int) -> list[list[Any]]:
        ranks = [
            list(
                sampler(
                    given,
                    batch_size=8,
                    num_microbatches=number,
                    num_steps=4,
                    seed=3,
                    rank=r,
                    world_size=size,
                    **start,
                )
            )
            for r in range(size)
        ]
        return [
            [m for rank in ranks for m in rank[s * number : (s + 1) * number]] for s in range(len(ranks[0]) // number)
        ]

    whole, cut = dealt(1, 1), dealt(num_microbatches, world_size)
    assert len(cut) == 4
    for (one,), parts in zip(whole, cut, strict=True):
        assert sorted(one.indices) == sorted(index for part in parts for index in part.indices)
        assert all(part.counts == one.counts for part in parts)
        assert one.counts == sum((given[index].counts() for index in one.indices), Counter())
    assert dealt(num_microbatches, world_size, start_step=2) == cut[2:]
    seen = Counter(index for (one,) in whole for index in one.indices)
    assert set(seen) == set(range(11))
    assert max(seen.values()) - min(seen.values()) <= 1


def test_another_seed_is_another_order(prompts: Prompts) -> None:
    given = lessons(prompts, 11)
    orders = [next(sampler(given, batch_size=3, seed=seed).steps()) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_lessons_of_like_length_share_a_step(prompts: Prompts) -> None:
    given = lessons(prompts, 48)
    lengths = [lesson.num_tokens for lesson in given]
    steps = [[lengths[index] for index in step] for step in itertools.islice(sampler(given).steps(), 12)]
    assert sorted(length for step in steps for length in step) == sorted(lengths)
    by_length = sorted(sorted(step) for step in steps)
    assert all(former[-1] <= latter[0] for former, latter in itertools.pairwise(by_length))
    assert [max(step) for step in steps] != sorted(max(step) for step in steps)


def test_a_step_with_fewer_examples_than_parts_is_refused(prompts: Prompts) -> None:
    with pytest.raises(ConfigError, match="batch_size=3 leaves some of 2 processes x 2 microbatches without"):
        sampler(lessons(prompts, 5), batch_size=3, num_microbatches=2, world_size=2)


def graded(prompts: Prompts, number: int) -> list[Lesson]:
    """Lessons whose teacher is ever less sure, in an order of their own; every fifth has another answer."""
    given = lessons(prompts, number)
    return [
        replace(x, answer="no" if i % 5 else "yes", confidence=((7 * i) % number) / number) for i, x in enumerate(given)
    ]


@pytest.mark.parametrize("order", ["short_first", "confident_first"])
def test_the_first_epoch_goes_from_easy_to_hard_and_the_second_is_shuffled(order: Any, prompts: Prompts) -> None:
    given = graded(prompts, 200)
    steps = list(itertools.islice(sampler(given, batch_size=2, arrangement=Arrangement(order=order)).steps(), 200))
    first, second = steps[:100], steps[100:]
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(200))
    hardness = [x.num_tokens if order == "short_first" else -x.confidence for x in given]
    sorted_ = sorted(hardness)

    def displaced(epoch: list[list[int]]) -> int:
        """How far, at most, a lesson is from where it would be if all were sorted."""
        seen = [hardness[index] for step in epoch for index in step]
        bounds = [(bisect.bisect_left(sorted_, x), bisect.bisect_right(sorted_, x) - 1) for x in seen]
        return max(max(first - at, at - last, 0) for at, (first, last) in enumerate(bounds))

    assert displaced(first) <= 2 * 20 + 2 < 100 < displaced(second)  # lengths are sorted in windows of twenty steps
    resumed = list(sampler(given, batch_size=2, arrangement=Arrangement(order=order), num_steps=150, start_step=60))
    assert [list(part.indices) for part in resumed] == steps[60:150]


GROUPS = {"answer": lambda lesson: lesson.answer, "confidence": lambda lesson: int(5 * lesson.confidence)}


@pytest.mark.parametrize(("balance", "group"), GROUPS.items(), ids=GROUPS)
def test_balanced_every_group_is_equally_frequent_and_every_lesson_is_there(
    balance: Any, group: Callable[[Lesson], Any], prompts: Prompts
) -> None:
    given = [lesson for i, lesson in enumerate(graded(prompts, 40)) if i % 3 or lesson.confidence > 0.5]
    epoch = Arrangement(balance=balance).epoch(given)
    seen = Counter(group(given[index]) for index in epoch)
    assert len(seen) > 1
    assert len(set(seen.values())) == 1
    assert set(epoch) == set(range(len(given)))
    assert len(set(Counter(group(lesson) for lesson in given).values())) > 1  # they were not from the start
    steps = sampler(given, batch_size=1, arrangement=Arrangement(balance=balance)).steps()
    assert Counter(index for (index,) in itertools.islice(steps, len(epoch))) == Counter(epoch)


def test_an_order_by_a_confidence_that_nobody_has_is_refused(prompts: Prompts) -> None:
    with pytest.raises(ConfigError, match="7 of 7 lessons have no confidence"):
        Arrangement(order="confident_first").check(lessons(prompts, 7))
    Arrangement(order="short_first", balance="answer").check(lessons(prompts, 7))


def test_only_the_step_between_two_epochs_mixes_lengths(prompts: Prompts) -> None:
    given = lessons(prompts, 50)
    steps = list(itertools.islice(sampler(given).steps(), 50))  # four epochs of twelve and a half steps
    assert all(len(step) == 4 for step in steps)
    assert set(Counter(index for step in steps for index in step).values()) == {4}
    spreads = [max(x) - min(x) for x in ([given[index].num_tokens for index in step] for step in steps)]
    assert sum(spread > 40 for spread in spreads) <= 4


@pytest.mark.parametrize("batch_size", [100, 400, 1600])
def test_a_step_of_tokens_is_as_full_as_like_lengths_allow(batch_size: int, prompts: Prompts) -> None:
    given = lessons(prompts, 48)
    steps = list(itertools.islice(sampler(given, batch_size=batch_size, batch_unit="tokens").steps(), 60))
    whole = Counter(index for step in steps for index in step)
    assert max(whole.values()) - min(whole.values()) <= 1
    sizes = [len(step) * max(given[index].num_tokens for index in step) for step in steps]
    assert all(size <= batch_size or len(step) == 1 for size, step in zip(sizes, steps, strict=True))
    assert len({len(step) for step in steps}) > 1
    dealt = list(sampler(given, batch_size=batch_size, batch_unit="tokens", num_steps=60))
    resumed = sampler(given, batch_size=batch_size, batch_unit="tokens", num_steps=60, start_step=17)
    assert [list(part.indices) for part in dealt] == steps
    assert list(resumed) == dealt[17:]


def test_every_microbatch_of_a_step_of_tokens_has_an_example(prompts: Prompts) -> None:
    given = lessons(prompts, 48)
    settings = {"batch_size": 100, "batch_unit": "tokens", "num_microbatches": 2, "world_size": 2, "num_steps": 40}
    parts = [part for rank in (0, 1) for part in sampler(given, rank=rank, **settings)]
    assert len(parts) == 160
    assert all(part.indices for part in parts)


def test_validation_sees_every_lesson_once_with_little_padding(prompts: Prompts) -> None:
    given = lessons(prompts, 75)
    data = DistillData(
        train=given,
        validation=given,
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
    assert len(batches) == 2
    assert sorted(i for batch in batches for i in batch.example_ids) == sorted(lesson.example_id for lesson in given)
    widths = [batch.mask_BT.shape[1] for batch in batches]
    assert widths[0] < widths[1] == max(len(s.prompt.ids) for lesson in given for s in lesson.sequences)


def test_one_sequence_has_the_tokens_targets_and_counts_of_two(prompts: Prompts) -> None:
    for lesson in lessons(prompts, 7):
        one = lesson.branched()
        assert one.counts() == lesson.counts()
        (whole,) = one.sequences
        if len(lesson.sequences) == 1:
            assert one is lesson
            continue
        assert one.num_tokens < sum(len(sequence.prompt.ids) for sequence in lesson.sequences)
        first, *_ = whole.prompt.branches
        ends = (*whole.prompt.branches[1:], len(whole.prompt.ids))
        for sequence, start, end in zip(lesson.sequences, whole.prompt.branches, ends, strict=True):
            assert whole.prompt.ids[:first] + whole.prompt.ids[start:end] == sequence.prompt.ids
            ((span, place),) = sequence.prompt.spans.items()
            assert whole.prompt.spans[span] == tuple(start + p - first for p in place)
            assert start < whole.prompt.spans[span][0]  # the token before a target is in its branch
            assert (span in whole.labelled) == (span in sequence.labelled)
            assert whole.soft.get(span) == sequence.soft.get(span)


@pytest.mark.parametrize("last", [7, 8])
def test_a_target_that_begins_like_another_is_not_shared(last: int) -> None:
    answer, rationale = Prompt((5, 6, 7), {"answer": (2, 3)}), Prompt((5, 6, last), {"rationale": (2, 3)})
    lesson = Lesson("", tuple(TrainingSequence(prompt, frozenset(), {}) for prompt in (answer, rationale)))
    (one,) = lesson.branched().sequences
    assert one.prompt == Prompt((5, 6, 7, 6, last), {"answer": (2, 3), "rationale": (4, 5)}, branches=(1, 3))


def test_sequences_without_a_common_beginning_stay_apart() -> None:
    answer, rationale = Prompt((5, 6), {"answer": (1, 2)}), Prompt((5, 6, 8), {"rationale": (2, 3)})
    lesson = Lesson("", tuple(TrainingSequence(prompt, frozenset(), {}) for prompt in (answer, rationale)))
    assert lesson.branched() is lesson


def test_positions_go_on_from_the_shared_prompt_in_each_branch(prompts: Prompts) -> None:
    given = [lesson.branched() for lesson in lessons(prompts, 9)]
    batch = collate(given, {}, 9, read)
    assert batch.branch_BT is not None
    for row, lesson in enumerate(given):
        prompt = lesson.sequences[0].prompt
        starts, length = prompt.branches or (len(prompt.ids),), len(prompt.ids)
        wanted = [*range(starts[0])]
        for start, end in itertools.pairwise((*starts, length)):
            wanted += range(starts[0], starts[0] + end - start)
        assert batch.position_BT[row, :length].tolist() == wanted
        assert (batch.position_BT[row, length:] == 0).all()  # no place beyond those that a model has learned
        assert int(batch.branch_BT[row].max()) == len(prompt.branches)
    assert collate(lessons(prompts, 9), {}, 9, read).branch_BT is None


def test_counts_are_per_span_and_source(prompts: Prompts) -> None:
    lesson = lessons(prompts, 3)[2]
    answer, rationale = (sequence.prompt.spans for sequence in lesson.sequences)
    num_answer, num_rationale = (stop - start for start, stop in (answer["answer"], rationale["rationale"]))
    assert lesson.counts() == {
        ("answer", "labels"): num_answer,
        ("answer", "soft"): num_answer,
        ("rationale", "labels"): num_rationale,
        ("rationale", "soft"): num_rationale - 1,  # no distribution was asked for the end that follows it
    }
    assert lessons(prompts, 1)[0].counts()["answer", "labels"] == 0


EVERY_PLACE = frozenset((span, source) for span in SPANS for source in ("labels", "teacher", "soft"))


def joined(
    prompts: Prompts, folder: Path, given: list[Example], annotations: dict[str, Annotation], **more: Any
) -> Join:
    """Join examples with annotations by example id, through a real cache."""
    store = Store(folder, {"for": "test"}, TopK(k=3, temperature=1.0))
    requests = {(e.id, "answer"): prompts.request(e, "answer") for e in given if e.id in annotations}
    with store.writing() as writer:
        writer.add([replace(annotations[i], key=request.key) for (i, _), request in requests.items()])
    settings = {"soft_teacher": None, "rationales": {}, "answer": "direct", "needed": EVERY_PLACE} | more
    return Join(prompts=prompts, teacher=Records(store, requests), **settings)


def annotation(prompts: Prompts, answer: str) -> Annotation:
    ids = prompts.answer_ids(answer)
    return Annotation("", {"answer": Target(ids, soft(len(ids)))}, answer)


def test_gold_answers_are_labels_and_a_teachers_are_not(prompts: Prompts, tmp_path: Path) -> None:
    gold, asked = examples(2)
    asked = Example(asked.question)
    join = joined(prompts, tmp_path, [gold, asked], {e.id: annotation(prompts, e.answer or "8") for e in (gold, asked)})
    by_gold, by_teacher = (lesson.sequences[0] for lesson in join.lessons([replace(gold, rationale=None), asked]))
    assert (by_gold.labelled, by_teacher.labelled) == ({"answer"}, set())
    assert by_teacher.prompt == prompts.answer_prompt(asked, "8")
    assert by_gold.soft["answer"].num_positions == len(prompts.answer_ids(gold.answer))


def test_targets_for_other_token_ids_are_refused(prompts: Prompts, tmp_path: Path) -> None:
    example = examples(1)[0]
    wrong = replace(annotation(prompts, "999"), answer=example.answer)
    with pytest.raises(CacheError, match="do not write this target alike"):
        joined(prompts, tmp_path, [example], {example.id: wrong}).lessons([example])


def test_targets_that_name_a_token_beyond_the_vocabulary_are_refused(prompts: Prompts, tmp_path: Path) -> None:
    example = examples(1)[0]
    made = annotation(prompts, example.answer)
    targets = made.targets["answer"].soft
    for highest in (prompts.vocabulary_size - 1, prompts.vocabulary_size):
        ids_E = targets.ids_E.copy()
        ids_E[-1] = highest
        target = Target(made.targets["answer"].token_ids, replace(targets, ids_E=ids_E))
        join = joined(
            prompts, tmp_path / str(highest), [example], {example.id: replace(made, targets={"answer": target})}
        )
        if highest < prompts.vocabulary_size:
            assert join.lessons([example])
        else:
            with pytest.raises(CacheError, match="of another vocabulary"):
                join.lessons([example])


def test_only_checked_rationales_reach_the_lessons(prompts: Prompts, tmp_path: Path) -> None:
    kept, rejected, explained = (Example(e.question, e.answer) for e in examples(3))
    explained = replace(explained, rationale="Gold.")
    every = {e.id: annotation(prompts, e.answer) for e in (kept, rejected, explained)}
    ids = prompts.rationale_ids("By the teacher.")
    reasoned = Annotation("", {"rationale": Target(ids, soft(len(ids)))}, kept.answer, "By the teacher.")
    checked = {kept.id: [CheckedRationale(kept.id, reasoned, "gold", None)]}
    join = joined(prompts, tmp_path, [kept, rejected, explained], every, rationales=checked)
    found = {lesson.example_id: lesson.sequences for lesson in join.lessons([kept, rejected, explained])}
    spans = {name: [set(s.prompt.spans) for s in sequences] for name, sequences in found.items()}
    assert spans[kept.id] == spans[explained.id] == [{"answer"}, {"rationale"}]
    assert spans[rejected.id] == [{"answer"}]
    assert found[kept.id][1].prompt == prompts.rationale_prompt(kept, "By the teacher.", None)
    assert found[kept.id][1].soft["rationale"].num_positions == len(ids)
    assert found[explained.id][1].soft == {}


def test_each_further_rationale_is_a_lesson_of_its_own(prompts: Prompts, tmp_path: Path) -> None:
    (example,) = (Example(e.question, e.answer) for e in examples(1))
    texts = ("By the teacher.", "In other words.", "Once more.")
    said = [Annotation("", {}, example.answer, text, is_sampled=bool(place)) for place, text in enumerate(texts)]
    checked = {example.id: [CheckedRationale(example.id, one, "gold", None, 0.75) for one in said]}
    join = joined(prompts, tmp_path, [example], {example.id: annotation(prompts, example.answer)}, rationales=checked)
    found = join.lessons([example])
    assert [[set(s.prompt.spans) for s in lesson.sequences] for lesson in found] == [
        [{"answer"}, {"rationale"}],
        [{"rationale"}],
        [{"rationale"}],
    ]
    wanted = [prompts.rationale_prompt(example, text, None) for text in texts]
    assert [lesson.sequences[-1].prompt for lesson in found] == wanted
    assert {(lesson.example_id, lesson.answer, lesson.confidence) for lesson in found} == {
        (example.id, example.answer, 0.75)
    }


def test_a_reasoned_answer_follows_its_rationale(prompts: Prompts, tmp_path: Path) -> None:
    example = examples(2)[1]
    join = joined(prompts, tmp_path, [example], {example.id: annotation(prompts, example.answer)}, answer="reasoned")
    (lesson,) = join.lessons([example, Example("And this, which nobody explained?", "3")])
    (sequence,) = lesson.sequences
    assert sequence.prompt == prompts.rationale_prompt(example, example.rationale, example.answer)
    assert sequence.labelled == {"answer", "rationale"}


def test_what_no_loss_reads_makes_no_lesson_and_what_is_too_long_is_listed(prompts: Prompts, tmp_path: Path) -> None:
    short, long = Example("Why?"), Example("why " * 300, "3")
    every = {short.id: annotation(prompts, "8")}
    join = joined(prompts, tmp_path, [short], every, needed=frozenset({("answer", "labels")}))
    assert join.lessons([short, long]) == []
    assert set(join.skipped) == {long.id}
    assert "over max_length=256" in join.skipped[long.id]


def test_a_student_learns_from_train_and_is_watched_on_validation_alone(configured: Callable[..., DictConfig]) -> None:
    job = prepare(configured("loss=[answer,kl,rationale]"), Path("unused"))
    curriculum, splits = teach(job), job.source.splits
    taught, watched = ({lesson.example_id for lesson in part} for part in (curriculum.train, curriculum.validation))
    assert taught
    assert taught <= {example.id for example in splits.train}
    assert watched == {example.id for example in splits.validation}


def test_test_questions_reach_the_teacher_without_their_answers(configured: Callable[..., DictConfig]) -> None:
    job = prepare(configured("loss=[answer,kl,rationale,rationale_kl]"), Path("unused"))
    teacher = CountingTeacher(job.source.teacher)
    teach(replace(job, source=replace(job.source, teacher=teacher)))
    splits = job.source.splits
    is_test = {example.id for example in splits.test}
    asked = [request for request in teacher.asked if request.example.id in is_test]
    assert {request.example.id for request in asked} == is_test
    assert {(request.example.answer, request.example.rationale) for request in asked} == {(None, None)}
    assert {e.answer for e in splits.train if e.answer} <= {request.example.answer for request in teacher.asked}
