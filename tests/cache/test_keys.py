"""Law 8: every setting that decides a target is in the key; what is not in the key changes no target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from distill.annotation.annotation_job import AnnotationJob, open_annotation_job
from distill.annotation.fill import fill
from distill.app.fingerprint import arguments_of, fingerprint_of
from distill.records import Annotation
from tests.cases import with_template
from tests.conftest import compose, conf_names, make_model, tiny_overrides
from tests.teachers.conftest import is_close

GROUPS = ("teacher", "prompt", "rationales", "cache", "task")
# Values that need another one of their own kind; all other values are changed by their type.
OTHERS: dict[str, Any] = {
    "task.read.kind": "line",
    "cache.positions.by": "random",
    "task.answer_mode": "reasoned",
    "task.options.answer": "text",
    "prompt.without_template": "zephyr",
    "prompt.too_long": "cut",
    "teacher.kind.dtype": "bfloat16",
    "teacher.kind.generation.temperature": 0.5,
    "teacher.kind.generation.top_k": 5,
    "teacher.kind.generation.stops": ["x"],
    "teacher.calibrate": 3,
    "teacher.batch_unit": "tokens",
    "rationales.script": "LATIN",
    "rationales.near_duplicates": 0.9,
    "rationales.max_words": 150,
    "rationales.per_example": 2,
    "rationales.min_confidence": 0.5,
    "cache.codec.temperature": 2.0,
    "teacher.rationales_each": 2,
    "teacher.answers_each": 2,
}
# Where something is, how the task picks its rows, and what is not a value of its own.
PLACES = ("teacher.model", "teacher.kind.files", "cache.dir", "cache.accept", "task.path", "task.examples")
PLACES += (
    "task.splits",
    "task.test_path",
    "task.validation_path",
    "task.question",
    "task.answer",
    "task.rationale",
    "task.choices",
)


def leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}")
    else:
        yield path, node


def changed(key: str, value: Any) -> Any:
    """Another value of a setting."""
    if key in OTHERS:
        return OTHERS[key] if value != OTHERS[key] else None
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2
    return f"{value}x" if isinstance(value, str) else None


@pytest.fixture
def base(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Callable[..., DictConfig]:
    """Compose a run whose files hold choices and recorded answers for a few questions; chat models have a template."""
    rows = [{"question": f"Is {i} {'even' if i % 2 else 'odd'}?", "answer": "has"} for i in range(24)]
    words = {"question": "", "teacher_answer": "gets", "teacher_rationale": "It is so."}
    words |= {f"{column}x": text for column, text in words.items()}
    recorded = [words | {"question": row["question"], "questionx": row["question"]} for row in rows]
    for name, content in (("rows", rows), ("recorded", recorded)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    tiny = tiny_overrides(tmp_path, teacher_folder, student_folder)

    def base(**groups: str) -> DictConfig:
        task = ["task=jsonl", f"task.path={tmp_path / 'rows.jsonl'}", "task.choices=[has,gets]"]
        shot = "task.examples.shots=[{question:Is it?,rationale:It is.,answer:has}]"
        kept = [o for o in tiny if not o.startswith(("task", "cache", "teacher", "prompt"))]
        teacher = groups.get("teacher", "causal_lm")
        prompt = groups.get("prompt", "cues")
        folder = teacher_folder
        if prompt == "chat":
            folder = with_template(teacher_folder, tmp_path / "chat", "Zephyr")
        own = [f"teacher={teacher}", f"teacher.model={folder}", f"prompt={prompt}"]
        if teacher == "recorded":
            own.append(f"teacher.kind.files=[{tmp_path / 'recorded.jsonl'}]")
        else:
            own += ["teacher.kind.dtype=float32", "teacher.kind.max_new_tokens=6", "teacher.calibrate=0"]
        settings = ["prompt.num_shots=0", f"cache={groups.get('cache', 'topk')}"]
        settings += [f"rationales={groups.get('rationales', 'checked')}"]
        return compose(*kept, *task, shot, *own, *settings)

    return base


def with_value(config: DictConfig, key: str, value: Any) -> DictConfig:
    other = config.copy()
    OmegaConf.update(other, key, value)
    return other


UNLIKE_ONLY_IN_NAME = ("smollm2_135m", "few_shot")
SLOW = ("rationales", "teacher", "task", "auto", "chat", "dense", "rs_kd", "sampled")


def options() -> list[Any]:
    """All options of the groups; the files of tasks and of models on the hub differ only in their data."""
    pairs = [(group, name) for group in GROUPS for name in conf_names(group) if group != "task" or name == "jsonl"]
    pairs = [(group, name) for group, name in pairs if name not in UNLIKE_ONLY_IN_NAME]
    return [pytest.param(*pair, marks=[pytest.mark.slow] * bool({*pair} & {*SLOW})) for pair in pairs]


@pytest.mark.parametrize(("group", "name"), options())
def test_every_setting_is_in_the_key_or_changes_no_target(
    group: str, name: str, base: Callable[..., DictConfig], tmp_path: Path
) -> None:
    config = base(**{group: name})
    ours = open_annotation_job(config)
    unchanged = []
    for key, value in leaves(OmegaConf.to_container(config[group], resolve=True), group):
        if key.startswith(PLACES) or key.endswith("_") or changed(key, value) is None:
            continue
        theirs = open_annotation_job(with_value(config, key, changed(key, value)))
        if theirs.store.fingerprint == ours.store.fingerprint:
            unchanged.append((key, changed(key, value)))
    assert not [key for key, _ in unchanged if key.startswith(("cache.codec.", "teacher.kind.", "task.layout."))]
    records = annotated(ours)
    for number, (key, value) in enumerate(unchanged):
        other = with_value(with_value(config, key, value), "cache.dir", str(tmp_path / f"other{number}"))
        job = open_annotation_job(other)
        assert_same(records, annotated(job), key)


def annotated(job: AnnotationJob) -> dict[str, Annotation]:
    """What the teacher leaves for a few questions, by the key of the request."""
    unlabelled = [replace(example, answer=None) for example in sorted(job.splits.train, key=lambda e: e.id)[:4]]
    filled = fill(job, {"answer": unlabelled, "rationale": unlabelled[:2]})
    return {request.key: job.store.read(request.key) for request in filled.all_requests}


def assert_same(ours: Mapping[str, Annotation], theirs: Mapping[str, Annotation], key: str) -> None:
    shared = ours.keys() & theirs.keys()
    assert shared, key
    for name in shared:
        left, right = (replace(side[name], answer=None) for side in (ours, theirs))  # answers are read when used
        if left.targets and all(target.soft for target in left.targets.values()):
            assert is_close(left, right, 1e-4), key
        else:
            assert left == right, key


def test_a_new_parameter_is_in_the_fingerprint_unless_the_class_says_why_not() -> None:
    class Part:
        not_in_key = ("place",)

        def __init__(self, *, size: int, added: float, place: str) -> None:
            self.arguments = arguments_of(locals())

    part = Part(size=1, added=0.5, place="here")
    assert fingerprint_of(part, part.arguments) == {"part": "Part", "size": 1, "added": 0.5}
    opaque = Part(size=1, added=np.float64(0.5), place="here")
    assert fingerprint_of(opaque, opaque.arguments)["added"] == 0.5
    with pytest.raises(TypeError, match="has no JSON form"):
        fingerprint_of(part, {"model": object()})


def test_special_tokens_are_in_the_key_and_the_state_of_a_call_is_not(
    configured: Callable[..., DictConfig], teacher_folder: Path, tmp_path: Path
) -> None:
    def digest(**settings: Any) -> str:
        folder = shutil.copytree(teacher_folder, tmp_path / f"model{len(list(tmp_path.iterdir()))}")
        for name, changes in settings.items():
            path = folder / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return open_annotation_job(configured(f"teacher.model={folder}")).store.digest

    same = digest()
    state = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    assert digest(tokenizer={"truncation": state}) == same
    assert digest(tokenizer_config={"eos_token": "<s>"}) != same
    assert digest(tokenizer_config={"pad_token": "</s>"}) != same


def test_a_model_is_identified_by_its_content(configured: Callable[..., DictConfig], tmp_path: Path) -> None:
    first = make_model(tmp_path / "first", seed=1)
    copy, other = shutil.copytree(first, tmp_path / "copy"), make_model(tmp_path / "other", seed=3)
    digests = [open_annotation_job(configured(f"teacher.model={f}")).store.digest for f in (first, copy, other)]
    assert digests[0] == digests[1] != digests[2]
