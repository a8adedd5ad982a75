"""What becomes of examples of every kind under settings of every kind: whole lessons, sources, places and reasons."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from distill.annotation.reader import AnnotationReader
from distill.cache.codecs.topk import TopK
from distill.cache.store import Store
from distill.lessons.join import AnswerMode, Join, Joined, Lesson, Needed
from distill.prompts.rendering import Prompts
from distill.prompts.vocabularies import Pairing
from distill.records import Annotation, Example, FilteredRationale, Request, Target
from tests.conftest import arithmetic
from tests.lessons.conftest import soft

EXAMPLES = {
    "explained": Example("Which one is explained?", "7", "It says so."),
    "taught": Example("Which one is taught?", "7", accepted=("8",)),
    "free": Example("Which one is free?"),
    "cut": Example("Which one is cut?"),
    "silent": Example("Which one is silent?"),
    "absent": Example("Which one is absent?"),
    "alone": Example("Which one is alone?", "7"),
    "long": Example("Which one is long? " * 40, "7"),
    "unread": Example("Which one is unread?"),
}
WRITTEN = {  # the teacher's answers
    "explained": Annotation("", {}, "7", text="7"),
    "taught": Annotation("", {}, "7", text="7"),
    "free": Annotation("", {}, "5", choice_logprobs=(-1.0, -1.0)),
    "cut": Annotation("", {}, "5", is_truncated=True, text="5"),
    "silent": Annotation("", {}, None),
}
REASONED = {"taught": (("8", "By eights."), ("7", "By sevens.")), "free": (("5", "By fives."),)}  # and its rationales


def scored(prompts: Prompts, annotation: Annotation) -> Annotation:
    """The annotation with soft targets for all its words."""
    words = {"answer": prompts.answer_ids(annotation.answer or "")}
    if annotation.rationale is not None:
        words["rationale"] = prompts.rationale_ids(annotation.rationale)
    spans = {span: Target(ids, soft(len(ids))) for span, ids in words.items()}
    return replace(annotation, targets=spans if annotation.answer else {})


def reader_of(prompts: Prompts, folder: Path, written: dict[tuple[str, str], Annotation]) -> AnnotationReader:
    """A cache with annotations by example and request; a key begins with the name of the cache."""
    store = Store(folder, {"for": folder.name}, TopK(k=3, temperature=1.0))
    keys = {name: f"{folder.name}{number:031x}" for number, name in enumerate(written)}
    with store.writing() as writer:
        writer.add([replace(scored(prompts, annotation), key=keys[name]) for name, annotation in written.items()])
    requests = {(EXAMPLES[name].id, span): Request(key, span, EXAMPLES[name], ()) for (name, span), key in keys.items()}
    return AnnotationReader(store, requests, arithmetic(), prompts)


def join(prompts: Prompts, root: Path, answer: AnswerMode, needed: Needed, *, has_second: bool) -> Joined:
    """The lessons with the targets of one teacher (cache a), or with the soft targets of a second one (cache b)."""
    teacher = reader_of(prompts, root / "a", {(name, "answer"): written for name, written in WRITTEN.items()})
    samples = {
        name: [
            replace(scored(prompts, Annotation("", {}, conclusion, text)), key=f"c{number:031x}")
            for number, (conclusion, text) in enumerate(pairs, 10 * index)
        ]
        for index, (name, pairs) in enumerate(REASONED.items())
    }
    with teacher.store.writing() as writer:
        writer.add([*itertools.chain(*samples.values())])
    second = {
        ("explained", "rationale"): Annotation("", {}, "7", "It says so."),
        ("taught", "answer"): WRITTEN["taught"],
    }
    second["taught", "rationale"] = Annotation("", {}, *REASONED["taught"][0])
    rationales = {
        EXAMPLES[name].id: [FilteredRationale("", replace(a, targets={}), "gold", None, 0.75) for a in annotations]
        for name, annotations in samples.items()
    }
    made = Join(
        prompts=prompts,
        teacher=teacher,
        soft_teacher=reader_of(prompts, root / "b", second) if has_second else None,
        rationales=rationales,
        further_answers={},
        answer=answer,
        needed=needed,
        pairing=Pairing(),
        too_long={EXAMPLES["unread"].id: "by 3 tokens"},
    )
    return made.join([*EXAMPLES.values()])


def described(prompts: Prompts, lesson: Lesson) -> list[str]:
    """Each sequence of a lesson: its spans with their words, * for labels, and the keys of soft targets."""
    lines = []
    for sequence in lesson.sequences:
        words = []
        for target in sequence.targets:
            span, ids = target.span, sequence.ids[target.start : target.stop]
            text = prompts.tokenizer.decode(ids, skip_special_tokens=True).strip()
            place = target.soft
            key = f" ({place.place[0][0]}{int(place.place[0][1:], 16)})" if place else ""
            if place:  # what ends a text has labels alone
                ending = tuple(ids[place.num_positions :])
                assert place.place[1] == span
                assert ending in ((), (prompts.end,), prompts.separator_ids())
            words.append(f"{'*' * target.is_labelled}{text}{key}")
        lines.append(" | ".join(words))
    return lines


LABELS: Needed = frozenset({("answer", "labels")})
WORDS: Needed = LABELS | {("rationale", "labels")}
ALL: Needed = WORDS | {("answer", "soft"), ("rationale", "soft")}
# Per setting: whether soft targets are a second teacher's, the lessons, and the names of the lost examples by reason.
OUTCOMES: list[tuple[AnswerMode, Needed, bool, list[tuple[str, ...]], dict[str, str]]] = [
    (
        "direct",
        LABELS,
        False,
        [("explained", "*7"), ("taught", "*7"), ("alone", "*7")],
        {"no label": "free cut silent absent", "too long": "long unread"},
    ),
    (
        "direct",
        WORDS,
        False,
        [
            ("explained", "*7", "*It says so."),
            ("taught", "*7", "*By eights."),
            ("taught", "*By sevens."),
            ("free", "*By fives."),
            ("alone", "*7"),
        ],
        {"no label": "cut silent absent", "too long": "long unread"},
    ),
    (
        "direct",
        frozenset({("rationale", "labels")}),
        False,
        [("explained", "*It says so."), ("taught", "*By eights."), ("taught", "*By sevens."), ("free", "*By fives.")],
        {"no rationale": "cut silent absent alone", "too long": "long unread"},
    ),
    (
        "direct",
        frozenset({("answer", "teacher")}),
        False,
        [("free", "5")],
        {
            "no loss on its label": "explained taught alone",
            "truncated": "cut",
            "unmatched": "silent",
            "not annotated": "absent",
            "too long": "long unread",
        },
    ),
    (
        "direct",
        frozenset({("answer", "soft")}),
        False,
        [("explained", "*7 (a0)"), ("taught", "*7 (a1)"), ("free", "5 (a2)")],
        {
            "truncated": "cut",
            "unmatched": "silent",
            "not annotated": "absent",
            "no soft targets": "alone",
            "too long": "long unread",
        },
    ),
    (
        "direct",
        ALL,
        False,
        [
            ("explained", "*7 (a0)", "*It says so."),
            ("taught", "*7 (a1)", "*By eights. (c0)"),
            ("taught", "*By sevens. (c1)"),
            ("free", "5 (a2)", "*By fives. (c10)"),
            ("alone", "*7"),
        ],
        {"truncated": "cut", "unmatched": "silent", "not annotated": "absent", "too long": "long unread"},
    ),
    (
        "direct",
        ALL,
        True,
        [
            ("explained", "*7", "*It says so. (b0)"),
            ("taught", "*7 (b1)", "*By eights. (b2)"),
            ("taught", "*By sevens."),
            ("free", "*By fives."),
            ("alone", "*7"),
        ],
        {"truncated": "cut", "unmatched": "silent", "not annotated": "absent", "too long": "long unread"},
    ),
    (
        "reasoned",
        LABELS,
        False,
        [
            ("explained", "*It says so.\nAnswer: | *7"),
            ("taught", "*By eights.\nAnswer: | *8"),
            ("taught", "*By sevens.\nAnswer: | *7"),
        ],
        {"no rationale": "free cut silent absent alone long", "too long": "unread"},
    ),
    (
        "reasoned",
        ALL,
        False,
        [
            ("explained", "*It says so.\nAnswer: | *7"),
            ("taught", "*By eights.\nAnswer: (c0) | *8 (c0)"),
            ("taught", "*By sevens.\nAnswer: (c1) | *7 (c1)"),
            ("free", "*By fives.\nAnswer: (c10) | 5 (c10)"),
        ],
        {"no rationale": "cut silent absent alone long", "too long": "unread"},
    ),
    (
        "reasoned",
        ALL,
        True,
        [
            ("explained", "*It says so.\nAnswer: (b0) | *7 (b0)"),
            ("taught", "*By eights.\nAnswer: (b2) | *8 (b2)"),
            ("taught", "*By sevens.\nAnswer: | *7"),
            ("free", "*By fives.\nAnswer: | 5"),
        ],
        {"no rationale": "cut silent absent alone long", "too long": "unread"},
    ),
]
ANSWERS = {"explained": ("7", None), "taught": ("7", 0.75), "free": ("5", 0.5), "alone": ("7", None)}


@pytest.mark.parametrize(("answer", "needed", "has_second", "lessons", "lost"), OUTCOMES)
def test_an_example_becomes_these_lessons_or_is_lost_for_this_reason(
    answer: AnswerMode,
    needed: Needed,
    has_second: bool,
    lessons: list[tuple[str, ...]],
    lost: dict[str, str],
    prompts: Prompts,
    tmp_path: Path,
) -> None:
    joined = join(prompts, tmp_path, answer, needed, has_second=has_second)
    name_of = {example.id: name for name, example in EXAMPLES.items()}
    assert [
        (*map(name_of.get, lesson.example_ids), *described(prompts, lesson)) for lesson in joined.lessons
    ] == lessons
    assert {name_of[key]: reason for key, reason in joined.lost.items()} == {
        name: reason for reason, names in lost.items() for name in names.split()
    }
    for lesson in joined.lessons:
        assert (lesson.answer, lesson.confidence) == ANSWERS[name_of[lesson.example_ids[0]]]
    assert joined.counts.read == len(EXAMPLES) == joined.counts.kept + sum(joined.counts.lost.values())
    assert {name_of[key] for key in joined.too_long} == ({"long"} if answer == "direct" else set())
