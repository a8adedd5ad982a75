"""A run's student as a Hugging Face folder with a model card, and its test questions for lm-evaluation-harness."""

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

_HEAD = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [distillation]\n---\n\n"


def export(run_dir: Path, to: Path) -> str:
    """Copy the student of a run to `to`, which must not exist yet; write its card and its task for lm-eval.

    Returns how to run the task, or why there is none; the student is exported in either case.
    """
    student = run_dir / "student"
    if not (student / "config.json").is_file():
        raise ConfigError(f"{run_dir} holds no student; give the folder of a run that ended: run=…")
    if links := [path for path in (student, *student.rglob("*")) if path.is_symlink()]:
        raise ConfigError(f"{links[0]} is a link, and what it leads to is not exported; put the file itself there")
    if to.exists():
        raise ConfigError(f"{to} exists already; give a folder that does not")
    run = read_run(run_dir)
    shutil.copytree(student, to)
    try:
        task = _task(run)
        task.write(to)
        usage = _usage(task)
        told = f"evaluates with lm-eval: cd {shlex.quote(str(to))} && {task.command}"
        told += f"\n({task.caution})" if task.caution else ""
    except (*configuration.UNUSABLE, ValueError) as error:
        usage, told = "", f"without a task for lm-eval: {' '.join(str(error).split())}"
    made = f"Made by `distill` from {run.facts.get('teacher')} on the task {run.facts.get('task')}.\n\n"
    (to / "README.md").write_text(f"{_HEAD}# {run.name}\n\n{made}{to_markdown(summarise([run]))}{usage}")
    return told


def _task(run: Run) -> HarnessTask:
    """The questions that the run's student was tested on, as it was asked them; the task's data is not needed."""
    config = configuration.of({key: run.config[key] for key in ("task", "prompt") if key in run.config})
    configuration.check(config)
    if config.task.answer_mode != "direct":
        raise ConfigError("this student reasons before it answers, and the harness asks only once")
    if damaged := [problem for problem in run.problems if problem.startswith("predictions.jsonl")]:
        raise ConfigError(*damaged)
    prompts = build_prompts(config, run.folder / "student")
    examples = [Example(row["question"], row["gold"]) for row in run.predictions]
    return harness_task(config.task.name, prompts, configuration.build(config.task.examples).choices, examples)


def _usage(task: HarnessTask) -> str:
    told = f"\n## lm-evaluation-harness\n\nThe {len(task.rows)} test questions, from this folder:\n\n"
    told += f"```bash\n{task.command}\n```\n\n`acc` is the student's accuracy above."
    return f"{told} But {task.caution}.\n" if task.caution else f"{told}\n"
