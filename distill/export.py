"""Export: write a run's student as a Hugging Face folder with a model card and a task for lm-eval."""

from __future__ import annotations

from pathlib import Path

from distill.app.command import command
from distill.app.config import Config


def main(config: Config) -> None:
    """Export the student; print the folder and how to use it."""
    from distill.app.config import local_root
    from distill.exports.folder import Files, export, opened_with  # slow: only once the overrides are checked

    to, tools = Path(config.to).resolve(), local_root(config.root) / "tools"
    files = Files(config.format, config.gguf, config.num_compared, config.max_loss, tools, config.onnx)
    usage = export(Path(config.run).resolve(), to, files)
    print(f"{to}\nopens with {opened_with(to)}.from_pretrained({str(to)!r})\n{usage}")


if __name__ == "__main__":
    command("export", main)
