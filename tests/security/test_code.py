"""Code in models, checkpoints and caches is never run."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from distill.app.files import sha256
from distill.cache.codecs.topk import TopK
from distill.cache.shard import SUFFIXES
from distill.cache.store import Store
from distill.errors import CacheError, ConfigError
from distill.lessons.curriculum import build_curriculum, prepare
from distill.models import loading, naming
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Annotation
from distill.students.causal_lm import open_student
from distill.training.fit import build_training, fit
from tests.conftest import WHOLE_STUDENT, environment, make_model, tiny_overrides
from tests.security.conftest import ROOT, MakesFolderWhenUnpickled

SOURCES = sorted((ROOT / "distill").rglob("*.py"))


def calls(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """All calls in a source file: the called name and its keyword arguments; non-constant values are an ellipsis."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: getattr(k.value, "value", ...) for k in node.keywords if k.arg}


def imported_names(path: Path) -> set[str]:
    """Full names of everything that a source file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    from_imports = (node for node in nodes if isinstance(node, ast.ImportFrom))
    return modules | {f"{node.module}.{alias.name}" for node in from_imports for alias in node.names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_unpickles_evaluates_text_or_uses_http(path: Path) -> None:
    imported = imported_names(path) - {"pickle.UnpicklingError"}
    packages = {name.partition(".")[0] for name in imported}
    assert not packages & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code"}
    assert not packages & {"requests", "httpx", "aiohttp", "http"}
    assert not [name for name in imported if name.startswith("urllib.request")]
    for name, keywords in calls(path):
        function_name = name.rpartition(".")[2]
        assert name not in {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load"}, name
        assert not name.startswith("yaml.") or name.startswith("yaml.safe_"), name
        if function_name != "save_checkpoint":  # there it decides what is saved, not what may be unpickled
            assert keywords.get("weights_only", True) is True, name
        assert not keywords.get("allow_pickle"), name
        assert not keywords.get("shell"), name
        assert not keywords.get("trust_remote_code"), name
        if name == "torch.load" or function_name == "load_checkpoint":
            assert keywords.get("weights_only") is True, name
        if re.fullmatch(r"Auto\w+\.from_pretrained", name) and "gguf_file" not in keywords:
            assert keywords.get("trust_remote_code") is False, name


@pytest.mark.parametrize("has_seal", [True, False])
def test_a_hostile_checkpoint_is_refused_and_not_run(
    has_seal: bool, configured: Callable[..., DictConfig], tmp_path: Path, hostile_marker: Path
) -> None:
    checkpoint = tmp_path / "step-00000001.ckpt"
    torch.save({"state_dict": {}, "loops": MakesFolderWhenUnpickled(hostile_marker)}, checkpoint)
    job = prepare(configured("trainer.max_steps=2", "loss=[answer]", f"resume='{checkpoint}'"), tmp_path / "run")
    training = build_training(job, build_curriculum(job), open_student(job.student_folder, **WHOLE_STUDENT), [])
    if has_seal:  # by an attacker who knows the format of this run's checkpoints
        seal = {"sha256": sha256(checkpoint), "identity": dict(training.identity)}
        checkpoint.with_suffix(".json").write_text(json.dumps(seal))
    with pytest.raises(ConfigError, match="holds objects other than" if has_seal else "not a complete checkpoint"):
        fit(job, training)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_model_folder_of_pickles_is_refused_and_not_run(name: str, tmp_path: Path, hostile_marker: Path) -> None:
    folder = make_model(tmp_path / "model", seed=1)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": MakesFolderWhenUnpickled(hostile_marker)}, folder / name)
    with pytest.raises(ConfigError, match="does not open as a causal language model"):
        loading.load(folder, torch.float32)


def test_a_cache_of_pickles_is_refused_and_not_run(tmp_path: Path, hostile_marker: Path) -> None:
    codec, fingerprint = TopK(k=2, temperature=1.0), {"made for": "a test"}
    store = Store(tmp_path / "cache", fingerprint, codec)
    with store.writing() as writer:
        writer.add([Annotation("0" * 32, {}, "4")])
        writer.flush()
    torch.save(MakesFolderWhenUnpickled(hostile_marker), tmp_path / "evil")
    content = (tmp_path / "evil").read_bytes()
    for suffix in SUFFIXES:
        (shard,) = (tmp_path / "cache").glob(f"*.{suffix}")
        original = shard.read_bytes()
        shard.write_bytes(content)
        with pytest.raises(CacheError, match="damaged"):
            Store(tmp_path / "cache", fingerprint, codec).read("0" * 32)
        shard.write_bytes(original)
    for name in ("manifest.pkl", "0123456789abcdef.pt", "0123456789abcdef.npy"):
        (tmp_path / "cache" / name).write_bytes(content)
    assert Store(tmp_path / "cache", fingerprint, codec).read("0" * 32).answer == "4"


def add_code(
    folder: Path, hostile_marker: Path, *, model_type: str | None = None, tokenizer: str | None = None
) -> Path:
    """Add code to a model folder, with the settings that would load it."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(hostile_marker)!r})\nclass Evil: ...\n")
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
    }
    changes["config.json"] |= {"model_type": model_type} if model_type else {}
    changes["tokenizer_config.json"] |= {"tokenizer_class": tokenizer} if tokenizer else {}
    for name, change in changes.items():
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | change))
    return folder


REMOTE_CODE: dict[str, dict[str, Any]] = {"model": {"model_type": "evil"}, "tokenizer": {"tokenizer": "EvilTokenizer"}}


@pytest.fixture
def affirmative_stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard input answers yes to every question."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"y\nyes\n" * 99)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        yield


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("part", REMOTE_CODE)
def test_a_model_that_needs_remote_code_is_refused_for_any_reply(
    role: str,
    part: str,
    configured: Callable[..., DictConfig],
    tmp_path: Path,
    hostile_marker: Path,
    affirmative_stdin: None,
) -> None:
    folder = add_code(make_model(tmp_path / "evil", seed=1), hostile_marker, **REMOTE_CODE[part])
    with pytest.raises(ConfigError, match=r"evil .*code") as raised:
        prepare(configured(f"{role}.model={folder}"), tmp_path)
    assert len(raised.value.problems) == 1
    assert "trust_remote_code" not in str(raised.value)


@pytest.mark.slow
def test_a_command_never_asks_to_run_remote_code(
    tmp_path: Path, hostile_marker: Path, teacher_folder: Path, student_folder: Path
) -> None:
    evil = add_code(
        shutil.copytree(teacher_folder, tmp_path / "evil"),
        hostile_marker,
        **REMOTE_CODE["model"] | REMOTE_CODE["tokenizer"],
    )
    command = [sys.executable, "-m", "distill.train", *tiny_overrides(tmp_path, evil, student_folder)]
    pipes: dict[str, Any] = {"input": "y\nyes\n" * 99, "capture_output": True, "text": True}
    process = subprocess.run(command, env=environment(), cwd=tmp_path, timeout=120, check=False, **pipes)
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("ConfigError") == 1
    assert "Traceback" not in process.stderr
    assert "[y/N]" not in process.stdout + process.stderr


def test_a_known_model_is_opened_without_the_code_in_its_folder(tmp_path: Path, hostile_marker: Path) -> None:
    folder = add_code(make_model(tmp_path / "model", seed=1), hostile_marker)
    assert naming.resolve(str(folder), tmp_path) == folder
    assert type(loading.load(folder, torch.float32)).__module__.startswith("transformers.")
    assert type(load_tokenizer(folder)).__module__.startswith("transformers.")
