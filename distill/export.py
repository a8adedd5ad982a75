"""Export: a run's student as a Hugging Face folder with a model card and its test questions for lm-eval."""

from __future__ import annotations

from pathlib import Path

from distill.app.command import command
from distill.app.config import Config


def main(config: Config) -> None:
    """Export, and say where."""
    from distill.exports.folder import export  # takes seconds: after the configuration is known to be right

    to = Path(config.to).resolve()
    told = export(Path(config.run).resolve(), to)
    print(f"{to}\nopens with AutoModelForCausalLM.from_pretrained({str(to)!r})\n{told}")


if __name__ == "__main__":
    command("export", main)
