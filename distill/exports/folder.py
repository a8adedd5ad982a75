"""Export a run's student as a Hugging Face folder with a model card, an example and an lm-evaluation-harness task.

Files in other formats stand beside its weights; each is opened by its own engine, and what it lost is measured.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from distill import __version__
from distill.app import config as configuration
from distill.app.config import Config
from distill.app.console import say
from distill.app.files import Json, sha256, write_json
from distill.errors import ConfigError
from distill.exports import class_example, llama_cpp, onnx
from distill.exports.card import card, files_line
from distill.exports.class_files import Texts, usage, write_onnx
from distill.exports.harness import HarnessTask, harness_task
from distill.exports.measuring import Questions, measure
from distill.exports.recipe import Recipe, make_recipe, num_literal
from distill.lessons.join import first_span
from distill.models import loading
from distill.models.classifiers import is_classifier
from distill.prompts.rendering import Prompts, TooLong, build_prompts
from distill.prompts.serving import served_tokenizer
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Example, Message
from distill.reports.runs import Run, mapping, number, read_run
from distill.students.classifier import saved_classifier
from distill.students.saving import write_greedy_settings
from distill.tasks import Task

FORMATS = ("safetensors", "gguf", "onnx")


@dataclass(frozen=True)
class Files:
    """The files to write beside the weights, and what they may lose; `tools` is the folder of downloaded programs."""

    formats: Sequence[str]
    gguf: Sequence[str]
    num_compared: int
    max_loss: float
    tools: Path
    onnx: Sequence[str] = ()

    def check(self) -> None:
        """Raise ConfigError for formats that are not known, or cannot be written here."""
        if unknown := [name for name in self.formats if name not in FORMATS]:
            raise ConfigError(f"format={unknown}: expected {' or '.join(FORMATS)}")
        if unknown := [kind for kind in self.gguf if kind not in llama_cpp.KINDS]:
            raise ConfigError(f"gguf={unknown}: expected some of {', '.join(llama_cpp.KINDS)}")
        if unknown := [kind for kind in self.onnx if kind not in onnx.KINDS]:
            raise ConfigError(f"onnx={unknown}: expected some of {', '.join(onnx.KINDS)}")
        if self.num_compared < 1:
            raise ConfigError(f"num_compared={self.num_compared}: expected at least 1, or files would not be measured")
        if "gguf" in self.formats:
            llama_cpp.require_llama_cpp()
        if "onnx" in self.formats:
            onnx.require_onnx()

    def check_for(self, student: Path) -> None:
        """Raise ConfigError for formats that this student cannot have."""
        unsupported = "gguf" if is_classifier(student) else "onnx"
        if unsupported in self.formats:
            kind = "has a class head" if unsupported == "gguf" else "writes text"
            instead = "format=onnx" if unsupported == "gguf" else "format=gguf"
            raise ConfigError(f"format={unsupported} is not supported for a student that {kind}; use {instead}")


ONLY_WEIGHTS = Files(("safetensors",), (), 1, 0.0, Path())


def export(run_dir: Path, to: Path, files: Files = ONLY_WEIGHTS) -> str:
    """Copy the student of a run to the new folder `to`, with a model card, an example and its test questions.

    Returns how to use them, or why they are missing; the student is exported in either case. Raises ConfigError, once
    all else is written, with the files that could not be made, or lost too much and were removed.
    """
    files.check()
    student = run_dir / "student"
    if not (student / "config.json").is_file():
        raise ConfigError(f"{run_dir} has no student; give the folder of a finished run: run=…")
    if links := [path for path in (student, *student.rglob("*")) if path.is_symlink()]:
        raise ConfigError(f"{links[0]} is a link, and links are not exported; replace it with the file itself")
    if to.exists():
        raise ConfigError(f"{to} already exists; give a new folder: to=…")
    files.check_for(student)
    run = read_run(run_dir)
    if is_classifier(student):
        return _export_classifier(run, to, files)
    questions = _test_questions(run).first(files.num_compared) if "gguf" in files.formats else None
    shutil.copytree(student, to)
    _write_tokenizer(run, to)
    recipe, count, message = _write_recipe(run, to)
    to_evaluate, harness_message = _write_task(run, to)
    rows, problems = _write_gguf(run, to, files, questions) if questions else ([], [])
    (to / "README.md").write_text(card(run, recipe, count, to_evaluate, rows), encoding="utf-8")
    if problems:
        raise ConfigError(*problems)
    return "\n".join([message, harness_message, *(f"{row['file']}: {files_line(row)}" for row in rows)])


def opened_with(folder: Path) -> str:
    """Name of the class of transformers that opens an exported student."""
    return "AutoModelForSequenceClassification" if is_classifier(folder) else "AutoModelForCausalLM"


def _export_classifier(run: Run, to: Path, files: Files) -> str:
    """The same for a student with a class head, which needs no prompt."""
    student = run.folder / "student"
    prompts, model = saved_classifier(student, *_limits(run))
    examples = [*map(_example, run.predictions)][: files.num_compared] if "onnx" in files.formats else []
    texts = Texts.of(prompts, configuration.build(_config(run).task.examples), examples) if examples else None
    shutil.copytree(student, to)
    shutil.copyfile(class_example.__file__, to / "example.py")
    rows, problems = write_onnx(model, texts, to, files.onnx, files.max_loss) if texts else ([], [])
    if texts:
        write_json(to / "export.json", {"version": __version__, "run": run.name, "files": rows})
    text = card(run, None, 0, usage(prompts.labels, rows), rows, classes=prompts.labels)
    (to / "README.md").write_text(text, encoding="utf-8")
    if problems:
        raise ConfigError(*problems)
    example = f'answers with transformers alone: python {shlex.quote(str(to / "example.py"))} "a text"'
    return "\n".join([example, *(f"{row['file']}: {files_line(row)}" for row in rows)])


def _limits(run: Run) -> tuple[int | None, TooLong]:
    """How long a text could be in training, and what became of a longer one."""
    prompt = mapping(run.config.get("prompt"))
    limit, ways = number(prompt.get("max_length")), (way for way in get_args(TooLong) if way == prompt.get("too_long"))
    return (None if limit is None else int(limit)), next(ways, "drop")


def _write_gguf(run: Run, to: Path, files: Files, questions: Questions) -> tuple[list[Json], list[str]]:
    """Write and measure the GGUF files; return the rows of export.json, and why others were removed or not made."""
    rows, problems = list[Json](), list[str]()
    student = loading.load(to, torch.float32).eval()
    with _without_padding(student, to, questions.prompts.vocabulary_size) as folder:
        for kind in dict.fromkeys(files.gguf):
            file = to / f"student.{kind}.gguf"
            try:
                llama_cpp.write(folder, file, kind, files.tools)
                rows.append(_measured(file, kind, questions, student, files.max_loss))
            except ConfigError as error:  # no file stays that was not measured
                file.unlink(missing_ok=True)
                problems += error.problems
    write_json(to / "export.json", {"version": __version__, "run": run.name, "files": rows})
    return rows, problems


def _measured(file: Path, kind: str, questions: Questions, student: Any, max_loss: float) -> Json:
    """Return the file's row in export.json; ConfigError if it lost too much."""
    say(f"answering {len(questions.examples)} test questions with {file.name} ...")
    row: Json = {"file": file.name, "format": "gguf", "weights": kind, "size_bytes": file.stat().st_size}
    row |= {"sha256": sha256(file), "converter": llama_cpp.CONVERTER}
    with llama_cpp.opened(file, questions.context) as engine:
        row |= {"engine": engine.version} | measure(engine, questions, student)
    if (row.get("student_accuracy") or 0) - (row.get("accuracy") or 0) > max_loss:
        raise ConfigError(f"{file.name} loses more than max_loss={max_loss} and was removed: {files_line(row)}")
    return row


@contextmanager
def _without_padding(student: Any, folder: Path, vocabulary_size: int) -> Iterator[Path]:
    """A folder with the student without the embeddings of no token, which some readers of files refuse."""
    if student.get_input_embeddings().num_embeddings <= vocabulary_size:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix=".student-", dir=folder) as temporary:
        for file in folder.iterdir():
            if file.is_file() and file.suffix in (".json", ".jinja"):
                shutil.copy2(file, temporary)
        student.resize_token_embeddings(vocabulary_size, mean_resizing=False)
        student.save_pretrained(temporary)
        yield Path(temporary)


def _test_questions(run: Run) -> Questions:
    prompts, config, examples = _parts(run)
    task: Task = configuration.build(config.task.examples)
    written = tuple(row.get("student_written_answer") for row in run.predictions)
    return Questions(prompts, task, config.task.answer_mode, config.max_new_tokens, tuple(examples), written)


def _write_tokenizer(run: Run, to: Path) -> None:
    """Write what an earlier version did not save with a student: its prompt as a chat template, and greedy settings."""
    tokenizer, ends = load_tokenizer(to), tuple[int, ...]()
    try:
        prompts, config = _prompts(run)
        ends = prompts.ends
        tokenizer = served_tokenizer(prompts, first_span(config.task.answer_mode))
    except (*configuration.INVALID_CONFIG, ValueError):
        tokenizer.chat_template = None  # it may be that of the model that the student is made from
    write_greedy_settings(to, tokenizer, int(number(run.config.get("max_new_tokens")) or 0) or None, ends)


def _write_recipe(run: Run, to: Path) -> tuple[Recipe | None, int, str]:
    try:
        prompts, config, examples = _parts(run)
        questions = [example for example in examples if not example.history]  # example.py takes single questions
        recipe = make_recipe(prompts, config, questions)
        recipe.write(to)
        count = num_literal(recipe, prompts, questions)
    except (*configuration.INVALID_CONFIG, ValueError) as error:
        return None, 0, f"no example: {' '.join(str(error).split())}"
    usage = recipe.usage.replace("example.py", shlex.quote(str(to / "example.py")), 1)
    return recipe, count, f"answers with transformers alone: python {usage}"


def _write_task(run: Run, to: Path) -> tuple[str, str]:
    """Write the harness's task; return its section of the card, and how to run it or why it is missing."""
    try:
        task = _task(run)
        task.write(to)
    except (*configuration.INVALID_CONFIG, ValueError) as error:
        return "", f"no lm-eval task: {' '.join(str(error).split())}"
    message = f"evaluates with lm-eval: cd {shlex.quote(str(to))} && {task.command}"
    return _usage(task), message + (f"\n({task.caution})" if task.caution else "")


def _prompts(run: Run) -> tuple[Prompts, Config]:
    """The student's prompts and its configuration; the task's data is not needed."""
    config = _config(run)
    return build_prompts(config, run.folder / "student"), config


def _config(run: Run) -> Config:
    """The part of a run's configuration that says what the student was asked."""
    config = configuration.of(
        {key: run.config[key] for key in ("task", "prompt", "max_new_tokens") if key in run.config}
    )
    configuration.check(config)
    return config


def _parts(run: Run) -> tuple[Prompts, Config, Sequence[Example]]:
    """The student's prompts, its configuration and test questions."""
    prompts, config = _prompts(run)
    if damaged := [problem for problem in run.problems if problem.startswith("predictions.jsonl")]:
        raise ConfigError(*damaged)
    return prompts, config, [*map(_example, run.predictions)]


def _example(row: Mapping[str, Any]) -> Example:
    """The question of a prediction, with its right answers."""
    history = tuple(Message(**message) for message in row.get("history", ()))
    accepted, choices = tuple(row.get("accepted") or ()), tuple(row.get("choices") or ())
    return Example(row["question"], row["gold"], accepted=accepted, choices=choices, history=history)


def _task(run: Run) -> HarnessTask:
    prompts, config, examples = _parts(run)
    if config.task.answer_mode != "direct":
        raise ConfigError("the student reasons before it answers, and the harness only scores direct answers")
    task = configuration.build(config.task.examples)
    return harness_task(config.task.name, prompts, task, examples, config.max_new_tokens)


def _usage(task: HarnessTask) -> str:
    usage = f"\n## lm-evaluation-harness\n\nTo evaluate the {len(task.rows)} test questions, run in this folder:\n\n"
    usage += f"```bash\n{task.command}\n```\n\n{task.figure}"
    return f"{usage} However, {task.caution}.\n" if task.caution else f"{usage}\n"
