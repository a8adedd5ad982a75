"""A run's student as a Hugging Face folder with a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig

from distill import config as configuration
from distill.records import ConfigError
from distill.report import read_run, summarise, to_markdown


def export(run_dir: Path, to: Path) -> None:
    """Copy the student of a run to `to`, which must not exist yet, and write its card."""
    student = run_dir / "student"
    if not (student / "config.json").is_file():
        raise ConfigError(f"{run_dir} holds no student; give the folder of a run that ended: run=…")
    if to.exists():
        raise ConfigError(f"{to} exists already; give a folder that does not")
    run = read_run(run_dir)
    shutil.copytree(student, to)
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [distillation]\n---\n\n"
    made = f"Made by `distill` from {run.facts.get('teacher')} on the task {run.facts.get('task')}.\n\n"
    (to / "README.md").write_text(f"{head}# {run.name}\n\n{made}{to_markdown(summarise([run]))}")


def main(config: DictConfig) -> None:
    """Export and say where."""
    configuration.check(config)
    to = Path(config.to).resolve()
    export(Path(config.run).resolve(), to)
    print(f"{to}\nopens with AutoModelForCausalLM.from_pretrained({str(to)!r})")


if __name__ == "__main__":
    configuration.command("export", main)
