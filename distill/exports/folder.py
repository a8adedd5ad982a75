"""Export a run's student as a Hugging Face folder with a model card and an lm-evaluation-harness task."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from distill.app import config as configuration
from distill.errors import ConfigError
from distill.exports.harness import HarnessTask, harness_task
from distill.prompts.cues import build_prompts
from distill.records import Example
from distill.reports.runs import Run, read_run
from distill.reports.text import to_markdown
from distill.reports.verdicts import summarise

_CARD_HEAD = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [distillation]\n---\n\n"


def export(run_dir: Path, to: Path) -> str:
    """Copy the student of a run to the new folder `to`, with a model card and an lm-eval task of its test questions.

    Returns how to run the task, or why it has none; the student is exported in either case.
    """
    student = run_dir / "student"
    if not (student / "config.json").is_file():
        raise ConfigError(f"{run_dir} has no student; give the folder of a finished run: run=…")
    if links := [path for path in (student, *student.rglob("*")) if path.is_symlink()]:
        raise ConfigError(f"{links[0]} is a link, and links are not exported; replace it with the file itself")
    if to.exists():
        raise ConfigError(f"{to} already exists; give a new folder: to=…")
    run = read_run(run_dir)
    shutil.copytree(student, to)
    try:
        task = _task(run)
        task.write(to)
        usage = _usage(task)
        message = f"evaluates with lm-eval: cd {shlex.quote(str(to))} && {task.command}"
        message += f"\n({task.caution})" if task.caution else ""
    except (*configuration.INVALID_CONFIG, ValueError) as error:
        usage, message = "", f"no lm-eval task: {' '.join(str(error).split())}"
    origin = f"Distilled by `distill` from {run.facts.get('teacher')} on the task {run.facts.get('task')}.\n\n"
    (to / "README.md").write_text(f"{_CARD_HEAD}# {run.name}\n\n{origin}{to_markdown(summarise([run]))}{usage}")
    return message


def _task(run: Run) -> HarnessTask:
    """Make a task of the student's test questions, with its prompts; the task's data is not needed."""
    config = configuration.of({key: run.config[key] for key in ("task", "prompt") if key in run.config})
    configuration.check(config)
    if config.task.answer_mode != "direct":
        raise ConfigError("the student reasons before it answers, and the harness only scores direct answers")
    if damaged := [problem for problem in run.problems if problem.startswith("predictions.jsonl")]:
        raise ConfigError(*damaged)
    prompts = build_prompts(config, run.folder / "student")
    examples = [Example(row["question"], row["gold"]) for row in run.predictions]
    return harness_task(config.task.name, prompts, configuration.build(config.task.examples).choices, examples)


def _usage(task: HarnessTask) -> str:
    usage = f"\n## lm-evaluation-harness\n\nTo evaluate the {len(task.rows)} test questions, run in this folder:\n\n"
    usage += f"```bash\n{task.command}\n```\n\n`acc` is the student's accuracy above."
    return f"{usage} However, {task.caution}.\n" if task.caution else f"{usage}\n"
