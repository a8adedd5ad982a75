"""What a run will need, said beforehand: counted, bounded, measured; nothing is stored and nothing is made up."""

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
from distill.lessons.curriculum import Job, prepare, teach
from distill.models import loading
from distill.records import Example
from distill.training import forecast as forecasting
from distill.training.forecast import foresee
from distill.training.job import plan
from tests.conftest import CountingTeacher, compose, run, tiny_overrides
from tests.teachers.conftest import recorded, without

Configured = Callable[..., DictConfig]
SPEAKING = ["teacher.num_rationales=9", "num_samples=2"]
LOSSES = "loss=[answer,kl,rationale,rationale_kl]"


def counting(job: Job) -> tuple[Job, list[CountingTeacher]]:
    """The same job, its teachers counted."""
    first = CountingTeacher(job.source.teacher)
    job = replace(job, source=replace(job.source, teacher=first))
    if job.soft_source is None:
        return job, [first]
    second = CountingTeacher(job.soft_source.teacher)
    return replace(job, soft_source=replace(job.soft_source, teacher=second)), [first, second]


def lines(text: str) -> dict[str, str]:
    """What is said of each check, of the same name the last, its continued lines joined."""
    found, name = dict[str, str](), ""
    for line in text.splitlines()[1:]:
        if not line.strip() or line.strip().startswith("->"):
            continue
        name = line[6:22].strip() or name
        found[name] = (found.get(name, "") if not line[6:22].strip() else "") + " " + " ".join(line[22:76].split())
    return found


def number(text: str) -> int:
    """The first number in a text."""
    return int(re.findall(r"\d[\d,]*", text)[0].replace(",", ""))


def files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.is_file())


def encoded(folder: Path) -> Callable[[str], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def test_token_counts_equal_a_count_by_hand(
    configured: Configured, tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = prepare(configured(LOSSES, *SPEAKING), tmp_path / "run")
    plan(job)
    told = lines(capsys.readouterr().out)
    encode, layout, splits = encoded(teacher_folder), job.prompts.layout, job.source.splits
    shots = list(job.source.task.shots())[:2]

    def length(*texts: str) -> int:
        return sum(len(encode(text)) for text in texts)

    def prefix(cues: Sequence[str]) -> int:
        start = [f"{layout.instruction}\n\n"] if layout.instruction else []
        parts = [
            (f"{layout.question_cue} {s.question}\n", *(f for cue in cues for f in (cue, said(s, cue))), "\n")
            for s in shots
        ]
        ends = len(shots)
        return length(*start) + sum(length(*part) for part in parts) + ends

    def said(shot: Example, cue: str) -> str:
        return f" {shot.answer}" if cue == layout.answer_cue else f" {shot.rationale}"

    def question(example: Example, cue: str) -> int:
        return length(layout.question_cue, f" {example.question}", "\n", cue)

    blind = [Example(example.question) for example in splits.test]
    answers = {e.question: e for e in [*splits.train, *splits.validation, *blind]}.values()
    explained = [*(e for e in splits.train[:9] if e.rationale is None), *splits.test[:2]]
    assert len(explained) == 5
    between = len(shots) * length("\n")  # between a shot's reasoning and its answer
    reads = prefix([layout.answer_cue]) + prefix([layout.rationale_cue, layout.answer_cue]) + between
    reads += sum(question(e, layout.answer_cue) + (length(f" {e.answer}") + 1 if e.answer else 0) for e in answers)
    reads += sum(question(e, layout.rationale_cue) for e in explained)
    assert number(told["records"]) == len(answers) + len(explained)
    most = 1 + 6 * length("\N{REPLACEMENT CHARACTER}")
    unlabelled = [e for e in answers if e.answer is None]
    writes = len(unlabelled) * (most + 1) + len(explained) * (most + 2)
    assert [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) to", told["tokens"])] == [reads, writes]


def teacher_tokens(job: Job) -> tuple[int, int]:
    told = next(finding.found for finding in foresee(job).findings if finding.check == "tokens")
    reads, writes = (int(found.replace(",", "")) for found in re.findall(r"([\d,]+) to", told))
    return reads, writes


def test_example_counts_are_those_of_the_splits(configured: Configured, tmp_path: Path) -> None:
    job = prepare(configured("loss=[answer]"), tmp_path)
    told = foresee(job).findings[0].found
    assert told.startswith("12 train, 4 validation, 4 test; 6 of train are labelled; 0 exceed")


def soft(teacher_folder: Path) -> list[str]:
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


@pytest.mark.parametrize("case", CASES)
def test_bounds_are_not_below_the_actual_figures(
    case: str, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    more = [each for each in CASES[case] if each not in ("soft", "~cache.codec.k")]
    more += soft(teacher_folder) if "soft" in CASES[case] else []
    tiny = tiny_overrides(tmp_path, teacher_folder, student_folder)
    if case == "drawn":
        tiny = [each for each in tiny if not each.startswith("cache")]
    config = compose(*tiny, *SPEAKING, *more, "rationales=all")
    job, teachers = counting(prepare(config, tmp_path))
    before = files(tmp_path)
    foreseen = foresee(job)
    assert files(tmp_path) == before
    assert all(teacher.num_loads == 1 for teacher in teachers)
    number_missing = {f.check: int(f.found.split()[0]) for f in foreseen.findings if f.check.endswith("records")}
    _, writes = teacher_tokens(job)
    made = teach(prepare(config, tmp_path))
    for name, source, filled in (("", job.source, made.filled), ("soft ", job.soft_source, made.soft_filled)):
        if source is None or filled is None:
            continue
        source.store.refresh()
        assert filled.num_annotated <= number_missing[f"{name}records"]
        on_disk = sum(path.stat().st_size for path in source.store.folder.rglob("*") if path.is_file())
        assert on_disk <= foreseen.cache_bytes[source.store.folder]
        said = [source.store.read(request.key) for request in filled.every]
        written = sum(
            len(target.token_ids)
            for annotation, request in zip(said, filled.every, strict=True)
            for target in annotation.targets.values()
            if not request.given_ids
        )
        assert written <= writes
    longest = {lesson.example_id: 0 for lesson in foreseen.curriculum.train}
    for lesson in foreseen.curriculum.train:
        longest[lesson.example_id] = max(longest[lesson.example_id], lesson.num_tokens)
    for lesson in made.train:
        assert lesson.num_tokens <= longest[lesson.example_id]
    assert len(made.train) <= len(foreseen.curriculum.train)
    assert max(lesson.num_tokens for lesson in foreseen.curriculum.train) <= 2 * config.prompt.max_length


def test_a_complete_cache_is_counted_without_loading_a_teacher(
    configured: Configured, tmp_path: Path, teacher_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(LOSSES, *SPEAKING, *soft(teacher_folder), "trainer.max_steps=3", "batch_size=4")
    made = teach(prepare(config, tmp_path))
    cache = files(tmp_path / "cache")
    job, teachers = counting(prepare(config, tmp_path / "run"))
    plan(job)
    assert [teacher.num_loads for teacher in teachers] == [0, 0]
    assert files(tmp_path / "cache") == cache
    assert not files(tmp_path / "run")
    told = lines(capsys.readouterr().out)
    assert told["records"].split()[0] == told["soft records"].split()[0] == "0"
    assert number(told["lessons"]) == len(made.train)
    assert "at most" not in told["lessons"].partition(",")[0]
    assert not {"weights", "annotation", "cache", "soft weights"} & told.keys()


def test_the_forecast_stores_nothing_and_releases_the_teacher(
    configured: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, (teacher,) = counting(prepare(configured(LOSSES, *SPEAKING), tmp_path / "run"))
    plan(job)
    assert teacher.num_loads == 1
    with pytest.raises(AttributeError):
        teacher.close()  # it is closed already
    assert files(tmp_path) == []
    assert "The run fits, even at these upper bounds" in " ".join(capsys.readouterr().out.split())


def test_a_recorded_teacher_is_not_loaded_and_its_texts_are_bounded(
    configured: Configured, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    splits = prepare(configured(), tmp_path).source.splits
    tiny = without(tiny_overrides(tmp_path, teacher_folder, student_folder), "teacher")
    config = compose(*tiny, *recorded(tmp_path, splits), LOSSES, *soft(teacher_folder))
    job, teachers = counting(prepare(config, tmp_path))
    foreseen = foresee(job)
    assert [teacher.num_loads for teacher in teachers] == [0, 1]
    assert {"soft tokens", "soft annotation", "soft weights", "cache"} <= {f.check for f in foreseen.findings}
    assert not {"tokens", "annotation", "weights"} & {f.check for f in foreseen.findings}
    made = teach(prepare(config, tmp_path))
    for folder, most in foreseen.cache_bytes.items():
        assert 0 < sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= most
    assert max(lesson.num_tokens for lesson in made.train) <= max(x.num_tokens for x in foreseen.curriculum.train)


def test_teacher_weights_are_counted_in_the_dtype_they_are_loaded_in(
    configured: Configured, tmp_path: Path, teacher_folder: Path
) -> None:
    numel = sum(p.numel() for p in loading.load(teacher_folder, torch.float32).parameters())
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        job = prepare(configured("loss=[answer]", f"teacher.kind.dtype={dtype}"), tmp_path)
        (weights,) = (f for f in foresee(job).findings if f.check == "weights")
        assert weights.found.startswith(f"{numel * size / 2**20:.1f} MiB for the teacher in {dtype}")


def test_all_missing_resources_are_listed_without_loading_a_teacher(
    configured: Configured,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(forecasting, "free_memory", lambda device: 1000)
    monkeypatch.setattr(forecasting.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10_000}))
    job, (teacher,) = counting(prepare(configured(LOSSES, *SPEAKING), tmp_path / "run"))
    with pytest.raises(ConfigError) as caught:
        plan(job)
    assert teacher.num_loads == 0
    assert caught.value.exit_code == 2
    told = [problem.partition(":")[0] for problem in caught.value.problems]
    assert told == ["weights", "cache", "disk", "total disk"]
    out = capsys.readouterr().out
    assert "The run does not fit: weights, cache, disk, total disk" in " ".join(out.split())
    assert "Free space on the disk of" in " ".join(out.split())


def test_an_unknown_resource_is_not_a_failure(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(forecasting, "free_memory", lambda device: None)
    assert plan(prepare(configured("loss=[answer]"), tmp_path / "run")) == 0.0
    assert "as far as is known (unknown: weights)" in " ".join(capsys.readouterr().out.split())


def test_a_cache_at_a_url_is_read_and_not_written(configured: Configured, tmp_path: Path) -> None:
    there = tmp_path / "bucket"
    job = prepare(configured("loss=[answer]", f"cache.dir=file://{there}"), tmp_path / "run")
    (cache,) = (f for f in foresee(job).findings if f.check == "cache")
    assert cache.passed
    assert f"file://{there} (free space unknown)" in cache.found
    assert not there.exists()


def test_plan_prints_the_forecast_and_leaves_no_run(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> None:
    done = run(tmp_path, *tiny_overrides(tmp_path, teacher_folder, student_folder), "plan=true")
    assert done.returncode == 0, done.stderr
    assert "The run fits" in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 110
    left = [Path(name).name for name in files(tmp_path)]
    assert set(left) <= {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert all(".hydra" in name for name in files(tmp_path))


@pytest.mark.parametrize("name", ["sampled", "topk", "rs_kd", "dense"])
def test_no_distribution_takes_more_bytes_than_the_largest_target(
    name: str, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    tiny = [each for each in tiny_overrides(tmp_path, teacher_folder, student_folder) if not each.startswith("cache")]
    source = prepare(compose(*tiny, f"cache={name}", "loss=[answer]"), tmp_path).source
    most = forecasting._packed_bytes(forecasting._largest_target(source), source)
    generator = torch.Generator().manual_seed(0)
    for sharpness in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0):
        logits_NV = sharpness * torch.randn(64, source.prompts.vocabulary_size, generator=generator)
        soft = source.codec.cut(logits_NV.log_softmax(-1), torch.rand(64, generator=generator, dtype=torch.float64))
        found = sum(array.nbytes for array in source.codec.pack(soft).values()) / len(soft)
        assert found <= most * 1.02  # a plane of bits is rounded up
