"""Loading causal language models, whose body and head are called separately."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from distill.errors import ConfigError
from distill.losses.head import Shape

disable_progress_bar()


def flush_denormals() -> None:
    """Flush numbers below 1e-38 to zero: nothing needs them, and a CPU is up to a hundred times slower with them.

    Call it before the first computation, since threads inherit the setting when they are created.
    """
    torch.set_flush_denormal(True)


def native_dtype() -> torch.dtype:
    """bfloat16 if the machine computes in it at full speed, else float32."""
    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def load(folder: Path, dtype: torch.dtype, *, from_scratch: bool = False) -> PreTrainedModel:
    """Load a model folder; with `from_scratch`, initialize new weights from its configuration.

    Only safetensors are read, and no code from the folder is run.
    """
    try:
        if from_scratch:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder} does not open as a causal language model: {error}") from None
    _check_seam(model)
    assert isinstance(model, PreTrainedModel)
    return model


@torch.inference_mode()
def _check_seam(model: Any) -> None:
    """Raise ConfigError unless the logits are shape(head(body(ids))) with a known `Shape`."""
    ids_BT = torch.arange(1, 5).unsqueeze(0)
    logits_V = model(ids_BT).logits[0, -1].float()
    hidden_H = model.base_model(ids_BT).last_hidden_state[0, -1]
    gap = (logits_V - Shape.of(model)(model.get_output_embeddings()(hidden_H)).float()).abs().max()
    if gap > 1e-2 * logits_V.abs().max():
        raise ConfigError(
            f"{type(model).__name__} is not supported: its logits are not those of a linear head, a scale and a "
            f"soft cap (difference {gap:.3g})"
        )
