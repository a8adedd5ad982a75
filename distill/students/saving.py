"""Saving a student in the type in which it is shipped, and reopening it: what is evaluated is what is on disk."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from distill.errors import ConfigError, DistillError
from distill.models import loading
from distill.students.layers import BROKEN_MODEL, largest_difference, probe

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES_IN_FILES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_ROUNDING = 0.25  # of the logits' spread; more is no rounding, but an overflow or another model


class SavedStudentError(DistillError):
    """The student on disk is not the one in memory."""


@dataclass(frozen=True)
class SavedStudent:
    """A student as reopened from disk; `rounding` is the change of its logits by its type, relative to their spread."""

    model: PreTrainedModel
    dtype: str
    rounding: float


def saved_dtype(setting: str | None, folder: Path) -> torch.dtype:
    """The type in which to save a student: as set, or else that of most weights in its source's folder."""
    if setting is None:
        setting = _dtype_of_files(folder)
    if setting not in _DTYPES:
        raise ConfigError(f"student.save_dtype={setting}: expected null or one of {', '.join(_DTYPES)}")
    return _DTYPES[setting]


def save_student(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    max_new_tokens: int,
    ends: Sequence[int] = (),
) -> SavedStudent:
    """Write a causal model with its tokenizer and the settings to generate as it is evaluated; see `save_model`.

    A text that it generates ends at any of `ends`, by default at the tokenizer's end.
    """
    return save_model(
        model,
        folder,
        dtype,
        complete=lambda written: write_greedy_settings(written, tokenizer, max_new_tokens, ends),
        reopen=lambda written: loading.load(written, torch.float32),
    )


def save_model(
    model: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    *,
    complete: Callable[[Path], None],
    reopen: Callable[[Path], PreTrainedModel],
) -> SavedStudent:
    """Write weights (safetensors) and configuration, `complete` the folder, and return the student as reopened.

    Rounds the model's own weights to `dtype`; the reopened student is in float32. The folder appears once the reopened
    student computes the same logits as the rounded one; otherwise SavedStudentError is raised.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.cpu().zero_grad(set_to_none=True)  # makes room for the reopened one
    try:
        before = probe(model)
        _round(model, dtype)
        rounded = probe(model)
        rounding = _rounding(before, rounded, dtype)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            written = Path(temporary) / "model"
            _write(model, written, dtype)
            complete(written)
            reopened = reopen(written)
            if gap := largest_difference(probe(reopened), rounded):
                raise ValueError(f"its logits differ by up to {gap:.3g} from those of the student in memory")
            if folder.exists():
                shutil.rmtree(folder)
            written.rename(folder)
    except (*BROKEN_MODEL, ConfigError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SavedStudentError(f"{type(model).__name__} cannot be saved and reopened: {reason}") from None
    return SavedStudent(reopened, str(dtype).removeprefix("torch."), rounding)


def write_greedy_settings(
    folder: Path, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int | None, ends: Sequence[int] = ()
) -> None:
    """Write a tokenizer, and settings to generate as the student is evaluated; without `ends`, to the tokenizer's end.

    Removes the chat templates that the folder has: the student knows only the prompt that the tokenizer renders.
    """
    for template in (*folder.glob("*chat_template*"), folder / "additional_chat_templates"):
        shutil.rmtree(template) if template.is_dir() else template.unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    _greedy(folder, tokenizer, max_new_tokens, ends).save_pretrained(folder)


def size_bytes(folder: Path) -> int:
    """Size in bytes of the weights in a model folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _greedy(
    folder: Path, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int | None, ends: Sequence[int]
) -> GenerationConfig:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config(decoder=True)
    padding_rows = list(range(max(tokenizer.get_vocab().values()) + 1, config.vocab_size))
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(ends) if len(ends) > 1 else tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        suppress_tokens=padding_rows or None,  # rows of the head that belong to no token
    )


@torch.no_grad()
def _round(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


def _write(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    cast: dict[tuple[int, torch.Size], Tensor] = {}  # weights that are shared stay shared

    def as_saved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return cast.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(dtype))

    model.save_pretrained(folder, state_dict={name: as_saved(tensor) for name, tensor in model.state_dict().items()})
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(folder)


def _rounding(before: Tensor, rounded: Tensor, dtype: torch.dtype) -> float:
    """Return how much rounding changed the logits, as a part of their spread; ValueError if it is too much."""
    if torch.equal(before, rounded):
        return 0.0
    spread = (before - before.mean(-1, keepdim=True)).square().mean().sqrt()
    rounding = float((rounded - before).square().mean().sqrt() / spread)
    if not rounding <= _MAX_ROUNDING:
        raise ValueError(
            f"in {dtype} its logits change by {rounding:.3g} of their spread (at most {_MAX_ROUNDING}); set "
            "student.save_dtype=float32"
        )
    return rounding


def _dtype_of_files(folder: Path) -> str:
    """Name of the type of most weights in a folder; float32 if none is a type in which students are saved."""
    sizes: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                part = weights.get_slice(name)
                sizes[part.get_dtype()] += torch.Size(part.get_shape()).numel()
    known = [name for name, _ in sizes.most_common() if name in _NAMES_IN_FILES]
    return _NAMES_IN_FILES[known[0]] if known else "float32"
