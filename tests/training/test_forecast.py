"""The forecast of a run: counts are exact, bounds hold, and nothing is stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from transformers import AutoTokenizer

from distill.errors import ConfigError
from distill.lessons.curriculum import Job, build_curriculum, prepare
from distill.models import loading
from distill.records import Example
from distill.training import forecast as forecasting
from distill.training.forecast import forecast_run
from distill.training.job import plan
from tests.conftest import CountingTeacher, compose, run, tiny_overrides
from tests.teachers.conftest import record_answers, without

Configured = Callable[..., DictConfig]
WITH_RATIONALES = ["teacher.num_rationales=9", "num_samples=2"]
LOSSES = "loss=[answer,kl,rationale,rationale_kl]"


def with_counting_teachers(job: Job) -> tuple[Job, list[CountingTeacher]]:
    """Replace the teachers of a job by counting ones."""
    first = CountingTeacher(job.annotation_job.teacher)
    job = replace(job, annotation_job=replace(job.annotation_job, teacher=first))
    if job.soft_annotation_job is None:
        return job, [first]
    second = CountingTeacher(job.soft_annotation_job.teacher)
    return replace(job, soft_annotation_job=replace(job.soft_annotation_job, teacher=second)), [first, second]


def forecast_by_check(text: str) -> dict[str, str]:
    """The printed text of each check, with continued lines joined; for equal names the last one."""
    texts, name = dict[str, str](), ""
    for line in text.splitlines()[1:]:
        if not line.strip() or line.strip().startswith("->"):
            continue
        name = line[6:22].strip() or name
        texts[name] = (texts.get(name, "") if not line[6:22].strip() else "") + " " + " ".join(line[22:76].split())
    return texts


def first_number(text: str) -> int:
    """The first number in a text."""
    return int(re.findall(r"\d[\d,]*", text)[0].replace(",", ""))


def files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.is_file())


def encoder(folder: Path) -> Callable[[str], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def test_token_counts_equal_a_count_by_hand(
    configured: Configured, tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = prepare(configured(LOSSES, *WITH_RATIONALES), tmp_path / "run")
    plan(job)
    printed = forecast_by_check(capsys.readouterr().out)
    encode, layout, splits = encoder(teacher_folder), job.prompts.layout, job.annotation_job.splits
    shots = list(job.annotation_job.task.shots())[:2]

    def num_tokens(*texts: str) -> int:
        return sum(len(encode(text)) for text in texts)

    def num_prefix_tokens(cues: Sequence[str]) -> int:
        start = [f"{layout.instruction}\n\n"] if layout.instruction else []
        parts = [
            (f"{layout.question_cue} {s.question}\n", *(f for cue in cues for f in (cue, shown_target(s, cue))), "\n")
            for s in shots
        ]
        ends = len(shots)
        return num_tokens(*start) + sum(num_tokens(*part) for part in parts) + ends

    def shown_target(shot: Example, cue: str) -> str:
        return f" {shot.answer}" if cue == layout.answer_cue else f" {shot.rationale}"

    def num_question_tokens(example: Example, cue: str) -> int:
        return num_tokens(layout.question_cue, f" {example.question}", "\n", cue)

    unlabelled_test = [Example(example.question) for example in splits.test]
    answer_examples = {e.question: e for e in [*splits.train, *splits.validation, *unlabelled_test]}.values()
    rationale_examples = [*(e for e in splits.train[:9] if e.rationale is None), *splits.test[:2]]
    assert len(rationale_examples) == 5
    num_between = len(shots) * num_tokens("\n")  # between a shot's rationale and its answer
    num_read = (
        num_prefix_tokens([layout.answer_cue])
        + num_prefix_tokens([layout.rationale_cue, layout.answer_cue])
        + num_between
    )
    num_read += sum(
        num_question_tokens(e, layout.answer_cue) + (num_tokens(f" {e.answer}") + 1 if e.answer else 0)
        for e in answer_examples
    )
    num_read += sum(num_question_tokens(e, layout.rationale_cue) for e in rationale_examples)
    assert first_number(printed["records"]) == len(answer_examples) + len(rationale_examples)
    max_answer_tokens = 1 + 6 * num_tokens("\N{REPLACEMENT CHARACTER}")
    unlabelled = [e for e in answer_examples if e.answer is None]
    num_written = len(unlabelled) * (max_answer_tokens + 1) + len(rationale_examples) * (max_answer_tokens + 2)
    assert [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) to", printed["tokens"])] == [num_read, num_written]


def teacher_tokens(job: Job) -> tuple[int, int]:
    text = next(finding.found for finding in forecast_run(job).findings if finding.check == "tokens")
    num_read, num_written = (int(figure.replace(",", "")) for figure in re.findall(r"([\d,]+) to", text))
    return num_read, num_written


def test_example_counts_are_those_of_the_splits(configured: Configured, tmp_path: Path) -> None:
    job = prepare(configured("loss=[answer]"), tmp_path)
    text = forecast_run(job).findings[0].found
    assert text.startswith("12 train, 4 validation, 4 test; 6 of train are labelled; 0 exceed")


def soft_teacher_overrides(teacher_folder: Path) -> list[str]:
    names = {"model": teacher_folder, "kind.dtype": "float32", "kind.max_new_tokens": 6, "batch_size": 5}
    return ["teacher@soft_teacher=causal_lm", *(f"soft_teacher.{name}={value}" for name, value in names.items())]


CASES = {
    "one": [LOSSES],
    "labels": ["loss=[answer]", "teacher.group_size=1"],
    "drawn": [LOSSES, "cache=sampled", "~cache.codec.k"],
    "reasoned": ["loss=[answer,kl,rationale]", "task.answer_mode=reasoned"],
    "votes": [LOSSES, "teacher.rationales_each=3", "rationales=all"],
    "two": [LOSSES, "soft"],
    "cut": [LOSSES, "prompt.max_length=60", "prompt.too_long=cut"],
}
FAST_CASES = ("one",)


@pytest.mark.parametrize(
    "case", [case if case in FAST_CASES else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_bounds_are_not_below_the_actual_figures(
    case: str, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    case_overrides = [override for override in CASES[case] if override not in ("soft", "~cache.codec.k")]
    case_overrides += soft_teacher_overrides(teacher_folder) if "soft" in CASES[case] else []
    tiny = tiny_overrides(tmp_path, teacher_folder, student_folder)
    if case == "drawn":
        tiny = [override for override in tiny if not override.startswith("cache")]
    config = compose(*tiny, *WITH_RATIONALES, *case_overrides, "rationales=all")
    job, teachers = with_counting_teachers(prepare(config, tmp_path))
    before = files(tmp_path)
    forecast = forecast_run(job)
    assert files(tmp_path) == before
    assert all(teacher.num_loads == 1 for teacher in teachers)
    max_missing = {f.check: int(f.found.split()[0]) for f in forecast.findings if f.check.endswith("records")}
    _, max_written = teacher_tokens(job)
    curriculum = build_curriculum(prepare(config, tmp_path))
    for name, source, filled in (
        ("", job.annotation_job, curriculum.filled),
        ("soft ", job.soft_annotation_job, curriculum.soft_filled),
    ):
        if source is None or filled is None:
            continue
        source.store.refresh()
        assert filled.num_annotated <= max_missing[f"{name}records"]
        num_bytes = sum(path.stat().st_size for path in source.store.folder.rglob("*") if path.is_file())
        assert num_bytes <= forecast.cache_bytes[source.store.folder]
        annotations = [source.store.read(request.key) for request in filled.all_requests]
        num_written = sum(
            len(target.token_ids)
            for annotation, request in zip(annotations, filled.all_requests, strict=True)
            for target in annotation.targets.values()
            if not request.given_ids
        )
        assert num_written <= max_written
    longest = dict.fromkeys((lesson.example_ids for lesson in forecast.curriculum.train), 0)
    for lesson in forecast.curriculum.train:
        longest[lesson.example_ids] = max(longest[lesson.example_ids], lesson.num_tokens)
    for lesson in curriculum.train:
        assert lesson.num_tokens <= longest[lesson.example_ids]
    assert len(curriculum.train) <= len(forecast.curriculum.train)
    assert max(lesson.num_tokens for lesson in forecast.curriculum.train) <= 2 * config.prompt.max_length


def test_a_complete_cache_is_counted_without_loading_a_teacher(
    configured: Configured, tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(
        LOSSES, *WITH_RATIONALES, *soft_teacher_overrides(teacher_folder), "trainer.max_steps=3", "batch_size=4"
    )
    curriculum = build_curriculum(prepare(config, tmp_path))
    cache = files(tmp_path / "cache")
    job, teachers = with_counting_teachers(prepare(config, tmp_path / "run"))
    plan(job)
    assert [teacher.num_loads for teacher in teachers] == [0, 0]
    assert files(tmp_path / "cache") == cache
    assert not files(tmp_path / "run")
    printed = forecast_by_check(capsys.readouterr().out)
    assert printed["records"].split()[0] == printed["soft records"].split()[0] == "0"
    assert first_number(printed["lessons"]) == len(curriculum.train)
    assert "at most" not in printed["lessons"].partition(",")[0]
    assert not {"weights", "annotation", "cache", "soft weights"} & printed.keys()


def test_the_forecast_stores_nothing_and_releases_the_teacher(
    configured: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, (teacher,) = with_counting_teachers(prepare(configured(LOSSES, *WITH_RATIONALES), tmp_path / "run"))
    plan(job)
    assert teacher.num_loads == 1
    with pytest.raises(AttributeError):
        teacher.close()  # already closed
    assert [path for path in files(tmp_path) if "/hashes/" not in path] == []
    assert "The run fits, even at these upper bounds" in " ".join(capsys.readouterr().out.split())


def test_a_recorded_teacher_is_not_loaded_and_its_texts_are_bounded(
    configured: Configured, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    splits = prepare(configured(), tmp_path).annotation_job.splits
    tiny = without(tiny_overrides(tmp_path, teacher_folder, student_folder), "teacher")
    config = compose(*tiny, *record_answers(tmp_path, splits), LOSSES, *soft_teacher_overrides(teacher_folder))
    job, teachers = with_counting_teachers(prepare(config, tmp_path))
    forecast = forecast_run(job)
    assert [teacher.num_loads for teacher in teachers] == [0, 1]
    assert {"soft tokens", "soft annotation", "soft weights", "cache"} <= {f.check for f in forecast.findings}
    assert not {"tokens", "annotation", "weights"} & {f.check for f in forecast.findings}
    curriculum = build_curriculum(prepare(config, tmp_path))
    for folder, max_bytes in forecast.cache_bytes.items():
        assert 0 < sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= max_bytes
    assert max(lesson.num_tokens for lesson in curriculum.train) <= max(x.num_tokens for x in forecast.curriculum.train)


def test_teacher_weights_are_counted_in_the_dtype_they_are_loaded_in(
    configured: Configured, tmp_path: Path, teacher_folder: Path
) -> None:
    numel = sum(p.numel() for p in loading.load(teacher_folder, torch.float32).parameters())
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        job = prepare(configured("loss=[answer]", f"teacher.kind.dtype={dtype}"), tmp_path)
        (weights,) = (f for f in forecast_run(job).findings if f.check == "weights")
        assert weights.found.startswith(f"{numel * size / 2**20:.1f} MiB for the teacher in {dtype}")


def test_all_missing_resources_are_listed_without_loading_a_teacher(
    configured: Configured,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(forecasting, "free_memory", lambda device: 1000)
    monkeypatch.setattr(forecasting.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10_000}))
    job, (teacher,) = with_counting_teachers(prepare(configured(LOSSES, *WITH_RATIONALES), tmp_path / "run"))
    with pytest.raises(ConfigError) as caught:
        plan(job)
    assert teacher.num_loads == 0
    assert caught.value.exit_code == 2
    checks = [problem.partition(":")[0] for problem in caught.value.problems]
    assert checks == ["weights", "cache", "disk", "total disk"]
    output = capsys.readouterr().out
    assert "The run does not fit: weights, cache, disk, total disk" in " ".join(output.split())
    assert "Free space on the disk of" in " ".join(output.split())


def test_an_unknown_resource_is_not_a_failure(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(forecasting, "free_memory", lambda device: None)
    assert plan(prepare(configured("loss=[answer]"), tmp_path / "run")) == 0.0
    assert "as far as is known (unknown: weights)" in " ".join(capsys.readouterr().out.split())


def test_a_cache_at_a_url_is_read_and_not_written(configured: Configured, tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    job = prepare(configured("loss=[answer]", f"cache.dir=file://{bucket}"), tmp_path / "run")
    (cache,) = (f for f in forecast_run(job).findings if f.check == "cache")
    assert cache.passed
    assert f"file://{bucket} (free space unknown)" in cache.found
    assert not bucket.exists()


@pytest.mark.slow
def test_plan_prints_the_forecast_and_leaves_no_run(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> None:
    process = run(tmp_path, *tiny_overrides(tmp_path, teacher_folder, student_folder), "plan=true")
    assert process.returncode == 0, process.stderr
    assert "The run fits" in process.stdout
    assert max(map(len, process.stdout.splitlines()[:-1])) <= 110
    written = [name for name in files(tmp_path) if "hashes/" not in name]  # remembered hashes of weights are no run
    assert {Path(name).name for name in written} <= {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert all(".hydra" in name for name in written)


@pytest.mark.parametrize("name", ["sampled", "topk", "rs_kd", "dense"])
def test_no_distribution_takes_more_bytes_than_the_largest_target(
    name: str, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    tiny = [
        override
        for override in tiny_overrides(tmp_path, teacher_folder, student_folder)
        if not override.startswith("cache")
    ]
    source = prepare(compose(*tiny, f"cache={name}", "loss=[answer]"), tmp_path).annotation_job
    max_bytes = forecasting._packed_bytes(forecasting._largest_target(source), source)
    generator = torch.Generator().manual_seed(0)
    for sharpness in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0):
        logits_NV = sharpness * torch.randn(64, source.prompts.vocabulary_size, generator=generator)
        targets = source.codec.cut(logits_NV.log_softmax(-1), torch.rand(64, generator=generator, dtype=torch.float64))
        num_bytes = sum(array.nbytes for array in source.codec.pack(targets).values()) / len(targets)
        assert num_bytes <= max_bytes * 1.02  # bit planes are padded to whole bytes
