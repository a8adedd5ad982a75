"""Laws 2, 3, 5, 8: which position learns what, whatever stands beside it, and how many of them there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from distill.cache.codecs.topk import TopK
from distill.cache.store import Store
from distill.errors import CacheError
from distill.lessons.curriculum import prepare, teach
from distill.lessons.join import Join, Records
from distill.prompts.cues import Prompts
from distill.records import SPANS, Annotation, CheckedRationale, Example, Target
from tests.conftest import CountingTeacher, examples
from tests.lessons.conftest import soft

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


def test_gold_answers_are_labels_and_teacher_answers_are_not(prompts: Prompts, tmp_path: Path) -> None:
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
    with pytest.raises(CacheError, match="tokenize this target differently"):
        joined(prompts, tmp_path, [example], {example.id: wrong}).lessons([example])


def test_targets_with_ids_beyond_the_vocabulary_are_refused(prompts: Prompts, tmp_path: Path) -> None:
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


def test_only_kept_rationales_reach_the_lessons(prompts: Prompts, tmp_path: Path) -> None:
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


def test_unread_targets_make_no_lesson_and_too_long_examples_are_listed(prompts: Prompts, tmp_path: Path) -> None:
    short, long = Example("Why?"), Example("why " * 300, "3")
    every = {short.id: annotation(prompts, "8")}
    join = joined(prompts, tmp_path, [short], every, needed=frozenset({("answer", "labels")}))
    assert join.lessons([short, long]) == []
    assert set(join.skipped) == {long.id}
    assert "over max_length=256" in join.skipped[long.id]


def test_a_student_learns_from_train_and_is_validated_on_validation_only(configured: Callable[..., DictConfig]) -> None:
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
