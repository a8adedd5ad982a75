"""Loading causal language models, whose body and head are called separately."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, get_logger

from distill.errors import ConfigError, in_one_line
from distill.losses.head import Shape
from distill.models import hub
from distill.models.dropout import set_dropout

disable_progress_bar()

# What the code of a model raises when its files are damaged, its package is missing, or it cannot do what is asked.
MODEL_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
_NAMES_SHOWN = 3
_MAX_GAP = 1e-2  # relative


def flush_denormals() -> None:
    """Flush numbers below 1e-38 to zero: nothing needs them, and a CPU is up to a hundred times slower with them.

    Call it before the first computation, since threads inherit the setting when they are created.
    """
    torch.set_flush_denormal(True)


def load(
    folder: Path, dtype: torch.dtype, *, from_scratch: bool = False, dropout: float | None = None
) -> PreTrainedModel:
    """Load a model folder; with `from_scratch`, initialize new weights from its configuration.

    `dropout` replaces the probabilities in this configuration, None for none.

    Only safetensors are read, and no code from the folder is run. Raises ConfigError unless the files hold exactly
    the weights of the model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if dropout is not None:
            set_dropout(config, dropout)
        if from_scratch:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = from_files(folder, dtype=dtype, **({} if dropout is None else {"config": config}))
        assert isinstance(model, PreTrainedModel)
        _name_body(model)
        _check_seam(model)
    except MODEL_ERRORS as error:
        raise ConfigError(f"{folder} does not open as a causal language model: {_reason(folder, error)}") from None
    return model


def check_weights(folder: Path) -> None:
    """Raise ConfigError unless the files hold exactly the weights of the model; no weight is read.

    A folder without weights, or one whose weights are still on the hub, passes: a complete cache needs none.
    """
    if not any(folder.glob("*.safetensors")) or hub.lacks_weights(folder):
        return
    try:
        from_files(folder, device_map="meta")
    except MODEL_ERRORS as error:
        if isinstance(error, ImportError) or not quantization(folder):  # some quantizers do not support `meta`
            raise ConfigError(f"{folder} does not open as a causal language model: {_reason(folder, error)}") from None


def from_files(folder: Path, **options: Any) -> Any:
    """Open a model with `from_pretrained`; raise ConfigError if a weight is missing, unused or of another shape."""
    with without_report():
        opened: tuple[Any, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(  # type: ignore[assignment]
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    model, info = opened
    problems = {
        "weights of the model are missing in its files": info["missing_keys"],
        "weights in the files are not used by the model": info["unexpected_keys"],
        "weights have another shape than the model's": [name for name, *_ in info["mismatched_keys"]],
    }
    if any(problems.values()):
        counted = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in problems.items() if names)
        raise ConfigError(
            f"{folder} does not hold the weights of {type(model).__name__}: {counted}. Weights that are not loaded "
            "would be random; save the model again, whole and under its own names"
        )
    return model


def _name_body(model: Any) -> None:
    """Let `base_model` be the body in families whose class names none, such as Llama 4."""
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"


@contextmanager
def without_report() -> Iterator[None]:
    """Within the block transformers does not log its table of missing weights, which the error repeats in a line."""
    logger, errors_only = get_logger("transformers.modeling_utils"), _ErrorsOnly()
    logger.addFilter(errors_only)  # a raised level would make transformers check its plans for tensor parallelism
    try:
        yield
    finally:
        logger.removeFilter(errors_only)


class _ErrorsOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR


def listed(names: Iterable[str]) -> str:
    """The first few of these names, in order, and how many more there are."""
    first = sorted(names)
    more = f" and {len(first) - _NAMES_SHOWN} more" if len(first) > _NAMES_SHOWN else ""
    return ", ".join(first[:_NAMES_SHOWN]) + more


def _reason(folder: Path, error: BaseException) -> str:
    """The error in one line; for a quantized model, what to do about it."""
    reason, method = in_one_line(error), quantization(folder)
    if method is None:
        return reason
    return (
        f"its weights are quantized ({method}), and {reason.rstrip('.')}. Install the package that it needs, or use "
        "the model that is not quantized; a quantized model can be a teacher, not a student"
    )


def quantization(folder: Path) -> str | None:
    """Name of the method with which the weights are quantized, None if they are not."""
    try:
        settings = json.loads((folder / "config.json").read_text()).get("quantization_config")
        return str(settings.get("quant_method", "unknown method")) if settings else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # damaged; loading it has raised


@torch.inference_mode()
def _check_seam(model: Any) -> None:
    """Raise ConfigError unless the logits are shape(head(body(ids))) with a known `Shape`."""
    was_training = model.training
    model.eval()
    ids_BT = torch.arange(1, 5).unsqueeze(0)
    logits_V = model(ids_BT).logits[0, -1].float()
    hidden_H = model.base_model(ids_BT).last_hidden_state[0, -1]
    model.train(was_training)
    if not logits_V.isfinite().all():
        broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
        raise ConfigError(
            f"{type(model).__name__} has logits that are not finite; weights that are not finite: "
            f"{listed(broken) or 'none'}. Replace them with an intact copy"
        )
    gap = (logits_V - Shape.of(model)(model.get_output_embeddings()(hidden_H)).float()).abs().max()
    if not gap <= min(_MAX_GAP, torch.finfo(model.dtype).eps ** 0.5) * logits_V.abs().max():  # NaN is refused as well
        raise ConfigError(
            f"{type(model).__name__} is not supported: its logits are not those of a linear head, a scale and a "
            f"soft cap (difference {gap:.3g})"
        )
