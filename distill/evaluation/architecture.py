"""What decides how long an answer takes: the architecture, its type and device, and the shape of the work."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

import torch

from distill.app.machine import gpu_name, is_gpu

# Names and places, which a model of the same architecture has of its own.
_NAMES = ("_name_or_path", "name_or_path", "transformers_version", "architectures", "id2label", "label2id")


def architecture(model: Any, work: Any) -> str:
    """Return a key that models share if they are built alike and were given the same `work` on the same device.

    `work` holds plain numbers, such as the lengths of the questions and answers.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    place = (is_gpu(device) and gpu_name()) or platform.processor() or platform.machine()
    content = {
        "config": {key: value for key, value in model.config.to_dict().items() if key not in _NAMES},
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "dtypes": sorted({str(parameter.dtype) for parameter in parameters}),
        "device": [device.type, place, torch.get_num_threads()],
        "work": work,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
