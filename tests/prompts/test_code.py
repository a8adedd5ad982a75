"""A tokenizer is data: code beside it is not run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from distill.prompts.tokenizers import load_tokenizer


def test_code_that_a_tokenizers_settings_name_is_not_run(student_folder: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(student_folder, folder)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Own: ...\n")
    for name, part in (("config.json", {"AutoConfig": "own.Own"}), ("tokenizer_config.json", {})):
        settings = json.loads((folder / name).read_text())
        own = {"auto_map": part or {"AutoTokenizer": ["own.Own", "own.Own"]}}
        (folder / name).write_text(json.dumps(settings | own))
    assert type(load_tokenizer(folder)).__module__.startswith("transformers.")
    assert not marker.exists()
