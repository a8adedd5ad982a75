"""Laws 2 and 8: lessons are joined from examples and the annotations that the cache holds for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig

from distill.annotation.reader import AnnotationReader
from distill.cache.codecs.topk import TopK
from distill.cache.store import Store
from distill.errors import CacheError
from distill.lessons.curriculum import build_curriculum, prepare
from distill.lessons.join import Join, Joined, Lesson, SoftPlace, TrainingSequence, first_span
from distill.prompts.rendering import Prompts
from distill.prompts.vocabularies import Pairing
from distill.records import SPANS, Annotation, Example, FilteredRationale, Prompt, RowCounts, Span, Target
from tests.conftest import CountingTeacher, arithmetic, by_span, examples
from tests.lessons.conftest import soft

ALL_TARGETS = frozenset((span, source) for span in SPANS for source in ("labels", "teacher", "soft"))


def make_join(
    prompts: Prompts, folder: Path, given_examples: list[Example], annotations: dict[str, Annotation], **overrides: Any
) -> Join:
    """Join examples with annotations, by example id, through a real cache."""
    store = Store(folder, {"for": "test"}, TopK(k=3, temperature=1.0))
    requests = {(e.id, "answer"): prompts.request(e, "answer") for e in given_examples if e.id in annotations}
    with store.writing() as writer:
        writer.add([replace(annotations[example_id], key=request.key) for (example_id, _), request in requests.items()])
    settings = {
        "soft_teacher": None,
        "rationales": {},
        "further_answers": {},
        "answer": "direct",
        "needed": ALL_TARGETS,
    }
    settings |= {"pairing": Pairing(), "too_long": {}} | overrides
    return Join(prompts=prompts, teacher=AnnotationReader(store, requests, arithmetic(), prompts), **settings)


def is_of(sequence: TrainingSequence, prompt: Prompt) -> bool:
    """Whether a sequence has the tokens and spans of a prompt."""
    spans = {target.span: (target.start, target.stop) for target in sequence.targets}
    return (sequence.ids, spans) == (prompt.ids, prompt.spans)


def annotation(prompts: Prompts, answer: str) -> Annotation:
    ids = prompts.answer_ids(answer)
    return Annotation("", {"answer": Target(ids, soft(len(ids)))}, answer)


def test_gold_answers_are_labels_and_teacher_answers_are_not(prompts: Prompts, tmp_path: Path) -> None:
    gold, unlabelled = examples(2)
    unlabelled = Example(unlabelled.question)
    join = make_join(
        prompts, tmp_path, [gold, unlabelled], {e.id: annotation(prompts, e.answer or "8") for e in (gold, unlabelled)}
    )
    by_gold, by_teacher = (
        lesson.sequences[0] for lesson in join.join([replace(gold, rationale=None), unlabelled]).lessons
    )
    assert [sequence.targets[0].is_labelled for sequence in (by_gold, by_teacher)] == [True, False]
    assert is_of(by_teacher, prompts.answer_prompt(unlabelled, "8"))
    assert by_gold.targets[0].soft.num_positions == len(prompts.answer_ids(gold.answer))


def test_targets_for_other_token_ids_are_refused(prompts: Prompts, tmp_path: Path) -> None:
    example = examples(1)[0]
    mismatched = replace(annotation(prompts, "999"), answer=example.answer)
    with pytest.raises(CacheError, match="tokenize this target differently"):
        make_join(prompts, tmp_path, [example], {example.id: mismatched}).join([example])


def test_targets_with_ids_beyond_the_vocabulary_are_refused(prompts: Prompts, tmp_path: Path) -> None:
    example = examples(1)[0]
    valid = annotation(prompts, example.answer)
    targets = valid.targets["answer"].soft
    for max_id in (prompts.vocabulary_size - 1, prompts.vocabulary_size):
        ids_E = targets.ids_E.copy()
        ids_E[-1] = max_id
        target = Target(valid.targets["answer"].token_ids, replace(targets, ids_E=ids_E))
        join = make_join(
            prompts, tmp_path / str(max_id), [example], {example.id: replace(valid, targets={"answer": target})}
        )
        if max_id < prompts.vocabulary_size:
            assert join.join([example]).lessons
        else:
            with pytest.raises(CacheError, match="of another vocabulary"):
                join.join([example])


def test_only_kept_rationales_reach_the_lessons(prompts: Prompts, tmp_path: Path) -> None:
    kept, rejected, explained = (Example(e.question, e.answer) for e in examples(3))
    explained = replace(explained, rationale="Gold.")
    annotations = {e.id: annotation(prompts, e.answer) for e in (kept, rejected, explained)}
    ids = prompts.rationale_ids("By the teacher.")
    key = prompts.request(kept, "rationale").key
    reasoned = Annotation(key, {"rationale": Target(ids, soft(len(ids)))}, kept.answer, "By the teacher.")
    with Store(tmp_path, {"for": "test"}, TopK(k=3, temperature=1.0)).writing() as writer:
        writer.add([reasoned])
    filtered = {kept.id: [FilteredRationale(kept.id, replace(reasoned, targets={}), "gold", None)]}
    join = make_join(prompts, tmp_path, [kept, rejected, explained], annotations, rationales=filtered)
    lessons = join.join([kept, rejected, explained]).lessons
    sequences_by_example = {id_: lesson.sequences for lesson in lessons for id_ in lesson.example_ids}
    spans = {name: [s.spans for s in sequences] for name, sequences in sequences_by_example.items()}
    assert spans[kept.id] == spans[explained.id] == [{"answer"}, {"rationale"}]
    assert spans[rejected.id] == [{"answer"}]
    assert is_of(sequences_by_example[kept.id][1], prompts.rationale_prompt(kept, "By the teacher.", None))
    assert sequences_by_example[kept.id][1].targets[0].soft.num_positions == len(ids)
    assert sequences_by_example[explained.id][1].targets[0].soft is None


def test_each_further_rationale_is_a_lesson_of_its_own(prompts: Prompts, tmp_path: Path) -> None:
    (example,) = (Example(e.question, e.answer) for e in examples(1))
    texts = ("By the teacher.", "In other words.", "Once more.")
    rationales = [Annotation("", {}, example.answer, text, is_sampled=bool(index)) for index, text in enumerate(texts)]
    filtered = {example.id: [FilteredRationale(example.id, rationale, "gold", None, 0.75) for rationale in rationales]}
    words = frozenset((span, "labels") for span in SPANS)
    records = {example.id: annotation(prompts, example.answer)}
    join = make_join(prompts, tmp_path, [example], records, rationales=filtered, needed=words)
    joined_lessons = join.join([example]).lessons
    assert [[s.spans for s in lesson.sequences] for lesson in joined_lessons] == [
        [{"answer"}, {"rationale"}],
        [{"rationale"}],
        [{"rationale"}],
    ]
    expected_prompts = [prompts.rationale_prompt(example, text, None) for text in texts]
    assert all(is_of(le.sequences[-1], prompt) for le, prompt in zip(joined_lessons, expected_prompts, strict=True))
    assert {(*lesson.example_ids, lesson.answer, lesson.confidence) for lesson in joined_lessons} == {
        (example.id, example.answer, 0.75)
    }


def test_a_reasoned_answer_follows_its_rationale(prompts: Prompts, tmp_path: Path) -> None:
    example = examples(2)[1]
    join = make_join(prompts, tmp_path, [example], {example.id: annotation(prompts, example.answer)}, answer="reasoned")
    (lesson,) = join.join([example, Example("And this, which nobody explained?", "3")]).lessons
    (sequence,) = lesson.sequences
    assert is_of(sequence, prompts.rationale_prompt(example, example.rationale, example.answer))
    assert [target.is_labelled for target in sequence.targets] == [True, True]


@pytest.mark.parametrize(("conclusion", "learned"), [("8", "8"), ("7", "7"), ("9", "7")])
def test_a_rationale_is_followed_by_the_right_answer_that_it_leads_to(
    conclusion: str, learned: str, prompts: Prompts, tmp_path: Path
) -> None:
    example = Example("How many?", "7", accepted=("8",))
    rationale = Annotation("", {}, conclusion, "By the teacher.")
    filtered = {example.id: [FilteredRationale(example.id, rationale, "gold", None)]}
    words = frozenset((span, "labels") for span in SPANS)
    join = make_join(prompts, tmp_path, [example], {}, rationales=filtered, needed=words, answer="reasoned")
    ((sequence,),) = (lesson.sequences for lesson in join.join([example]).lessons)
    assert is_of(sequence, prompts.rationale_prompt(example, "By the teacher.", learned))
    assert [target.is_labelled for target in sequence.targets] == [True, True]


def test_unread_targets_make_no_lesson_and_too_long_examples_are_listed(prompts: Prompts, tmp_path: Path) -> None:
    short, long = Example("Why?"), Example("why " * 300, "3")
    annotations = {short.id: annotation(prompts, "8")}
    join = make_join(prompts, tmp_path, [short], annotations, needed=frozenset({("answer", "labels")}))
    joined = join.join([short, long])
    assert joined.lessons == []
    assert joined.lost == {short.id: "no label", long.id: "too long"}
    assert joined.counts == RowCounts(2, {"no label": 1, "too long": 1}, 0)
    assert set(joined.too_long) == {long.id}
    assert "over max_length=256" in joined.too_long[long.id]


@pytest.mark.parametrize("is_soft", [True, False])
def test_an_annotation_that_holds_its_targets_is_not_looked_up_in_the_cache(
    is_soft: bool, prompts: Prompts, tmp_path: Path
) -> None:
    example = replace(examples(1)[0], rationale=None)
    ids, answer_ids = prompts.rationale_ids("By the teacher."), prompts.answer_ids(example.answer)
    stored = {"rationale": Target(ids, soft(len(ids))), "answer": Target(answer_ids, soft(len(answer_ids)))}
    whole = Annotation("f" * 32, stored, example.answer, "By the teacher.")
    held = replace(whole, targets=stored | {"answer" if is_soft else "rationale": Target(ids, None)})
    filtered = {example.id: [FilteredRationale(example.id, held, "gold", None)]}
    with Store(tmp_path, {"for": "test"}, TopK(k=3, temperature=1.0)).writing() as writer:
        writer.add([whole])
    join = make_join(prompts, tmp_path, [example], {}, rationales=filtered, answer="reasoned")
    ((sequence,),) = (lesson.sequences for lesson in join.join([example]).lessons)
    (number, span) = (len(ids), "rationale") if is_soft else (len(answer_ids), "answer")
    softs = {name: target.soft for name, target in by_span(sequence).items() if target.soft}
    assert softs == {span: SoftPlace(("f" * 32, span), number)}


def paired(prompts: Prompts, folder: Path, id_V: np.ndarray, answer: str = "8") -> Joined:
    """Join an unlabelled example, of which the teacher has soft targets for its answer, with paired tokens."""
    example = Example("Paired?")
    join = make_join(prompts, folder, [example], {example.id: annotation(prompts, answer)}, pairing=Pairing(id_V))
    return join.join([example])


def test_soft_targets_are_left_out_where_one_of_the_models_lacks_a_token_of_the_text(
    prompts: Prompts, tmp_path: Path
) -> None:
    same = np.arange(prompts.vocabulary_size)
    ids = prompts.answer_ids("8")
    (lesson,) = paired(prompts, tmp_path / "same", same).lessons
    assert lesson.sequences[0].targets[0].soft.num_positions == len(ids)
    teacher_lacks, student_lacks = same.copy(), same.copy()
    student_lacks[[ids[0], -1]] = -1, ids[0]  # another token of the teacher is the student's first one
    teacher_lacks[ids[0]] = same[-1]  # no token of the teacher is the student's first one
    for name, id_V in (("student", student_lacks), ("teacher", teacher_lacks)):
        (lesson,) = paired(prompts, tmp_path / name, id_V).lessons
        assert lesson.sequences[0].targets[0].soft is None
    swapped = same.copy()
    swapped[[ids[0], 0]] = 0, ids[0]
    with pytest.raises(CacheError, match="tokenize this target differently"):
        paired(prompts, tmp_path / "swapped", swapped)


def test_positions_are_counted_by_span_and_source() -> None:
    prompt = Prompt((0,) * 12, {"rationale": (3, 8), "answer": (8, 12)})
    place = SoftPlace(("0" * 32, "rationale"), 4)
    sequence = TrainingSequence.of(prompt, "", {"answer"}, {"rationale": place})
    numbers = {"labels": (0, 4), "teacher": (5, 0), "soft": (4, 0)}
    spans: tuple[Span, ...] = ("rationale", "answer")
    expected = {(span, key): pair[index] for key, pair in numbers.items() for index, span in enumerate(spans)}
    assert dict(sequence.counts()) == expected
    twice = Lesson((sequence,) * 2)
    assert twice.counts() == Counter({key: 2 * number for key, number in expected.items()})
    assert twice.num_tokens == 24


def test_a_student_writes_an_answer_first_unless_it_is_to_reason() -> None:
    assert (first_span("direct"), first_span("reasoned")) == ("answer", "rationale")


def test_an_example_that_is_neither_learned_nor_lost_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 rows were read, but 0 kept"):
        _ = Joined(2, [], {"a": "too long"}, {}).counts


def test_a_student_learns_from_train_and_is_validated_on_validation_only(configured: Callable[..., DictConfig]) -> None:
    job = prepare(configured("loss=[answer,kl,rationale]"), Path("unused"))
    curriculum, splits = build_curriculum(job), job.annotation_job.splits
    train_ids, validation_ids = (
        {id_ for lesson in part for id_ in lesson.example_ids} for part in (curriculum.train, curriculum.validation)
    )
    assert train_ids
    assert train_ids <= {example.id for example in splits.train}
    assert validation_ids == {example.id for example in splits.validation}


def test_test_questions_reach_the_teacher_without_their_answers(configured: Callable[..., DictConfig]) -> None:
    job = prepare(configured("loss=[answer,kl,rationale,rationale_kl]"), Path("unused"))
    teacher = CountingTeacher(job.annotation_job.teacher)
    build_curriculum(replace(job, annotation_job=replace(job.annotation_job, teacher=teacher)))
    splits = job.annotation_job.splits
    test_ids = {example.id for example in splits.test}
    test_requests = [request for request in teacher.asked if request.example.id in test_ids]
    assert {request.example.id for request in test_requests} == test_ids
    assert {(request.example.answer, request.example.rationale) for request in test_requests} == {(None, None)}
    assert {e.answer for e in splits.train if e.answer} <= {request.example.answer for request in teacher.asked}
