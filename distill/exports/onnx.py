"""ONNX files of models with a class head: written by torch's exporter, and run by onnxruntime."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.app.console import say
from distill.errors import ConfigError

KINDS = ("float32", "int8")
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TO_INSTALL = "pip install 'distill[onnx]'"
_INPUTS = ("input_ids", "attention_mask")


def require_onnx() -> None:
    """Raise ConfigError without the packages that write and run ONNX files."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"format=onnx needs {' and '.join(missing)}: {_TO_INSTALL}")


def write(model: Any, file: Path, kind: str) -> None:
    """Write a model with a class head as an ONNX file of `kind`, one of `KINDS`, for any number and length of texts.

    int8: the matrices of weights are rounded, each to a scale of its own; activations are rounded as they come.
    """
    say(f"writing {file.name} ...")
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=file.parent) as temporary:
        plain = Path(temporary) / "model.onnx"
        _write_float32(model, plain)
        if kind == "float32":
            shutil.move(plain, file)
            return
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with _quiet():
            quantize_dynamic(plain, file, weight_type=QuantType.QInt8)


@final
class OnnxClassifier:
    """An ONNX file that onnxruntime has opened, on one thread."""

    def __init__(self, file: Path) -> None:
        """Raise ConfigError if onnxruntime cannot open the file."""
        import onnxruntime

        # It raises classes without a common base, and has no public names for them.
        from onnxruntime.capi import onnxruntime_pybind11_state as raised

        errors = (
            raised.Fail,
            raised.InvalidArgument,
            raised.InvalidGraph,
            raised.InvalidProtobuf,
            raised.NotImplemented,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.version = f"onnxruntime {version('onnxruntime')}"
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except errors as error:
            raise ConfigError(f"onnxruntime cannot open {file.name}: {' '.join(str(error).split())[:200]}") from None

    def logits(self, ids: Sequence[int]) -> Float[np.ndarray, "C"]:
        """The logits of the classes of a text."""
        ids_1T = np.array([ids], np.int64)
        (logits_1C,) = self._session.run(None, dict(zip(_INPUTS, (ids_1T, np.ones_like(ids_1T)), strict=True)))
        logits_C: np.ndarray = logits_1C[0]
        return logits_C


class _Logits(nn.Module):
    """A model whose only output are the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]) -> Float[Tensor, "B C"]:
        logits_BC: Tensor = self.model(input_ids, attention_mask=attention_mask).logits
        return logits_BC


def _write_float32(model: Any, file: Path) -> None:
    ids_BT = torch.arange(2, 14).reshape(2, 6)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 4:] = 0  # with padding, or masks would be left out of the graph
    any_size = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with _quiet():
        program = torch.onnx.export(
            _Logits(model.eval()),
            (ids_BT, mask_BT),
            dynamo=True,
            input_names=list(_INPUTS),
            output_names=["logits"],
            dynamic_shapes=dict.fromkeys(_INPUTS, any_size),
            verbose=False,
        )
        assert program is not None
        program.save(file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, torch's exporter and onnxruntime's quantizer do not log what cannot be acted on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
