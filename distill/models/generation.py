"""How texts are generated: by the most likely tokens or by sampling, at least how long, and what ends them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.app.quoting import escape_problem
from distill.errors import ConfigError

IsComplete = Callable[[Sequence[int]], bool]  # whether the tokens of a generated text hold a text that ends it
_OF_TRANSFORMERS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # where a model samples and does not say how
_CHANGES_NOTHING: dict[str, Any] = {
    "temperature": 0.0,
    "top_k": None,
    "from_model": False,
    "min_new_tokens": 0,
    "stops": [],
}


@final
@dataclass(frozen=True, kw_only=True)
class Generation:
    """Settings of the texts that a model generates.

    `temperature`      temperature of an example's first text; 0: each token is the most likely one.
    `sampling_temperature`   temperature of its further texts, which are always sampled.
    `top_p`, `top_k`   sampled tokens are among the most likely ones, as few as have this mass, and at most so many.
    `from_model`       whether these four are those of the model, where it samples.
    `min_new_tokens`   number of tokens before which no end token comes.
    `stops`            texts that end a generated text where the first of them occurs; it is no part of it.
    """

    temperature: float
    sampling_temperature: float
    top_p: float
    top_k: int | None
    from_model: bool
    min_new_tokens: int
    stops: Sequence[str]

    def __post_init__(self) -> None:
        """Raise ConfigError with all invalid values."""
        conditions = {
            f"temperature={self.temperature}: expected 0 for the most likely tokens, or a positive number": (
                0 <= self.temperature < math.inf
            ),
            f"sampling_temperature={self.sampling_temperature}: expected a positive number; for greedy texts alone set "
            "teacher.rationales_each=1": 0 < self.sampling_temperature < math.inf,
            f"top_p={self.top_p}: expected a probability above 0 and at most 1": 0 < self.top_p <= 1,
            f"top_k={self.top_k}: expected at least 1, or null for all": self.top_k is None or self.top_k > 0,
            f"min_new_tokens={self.min_new_tokens}: expected at least 0": self.min_new_tokens >= 0,
            f"stops={list(self.stops)}: expected texts of at least one character": all(self.stops),
        }
        problems = [f"teacher.kind.generation.{problem}" for problem, is_valid in conditions.items() if not is_valid]
        problems += filter(None, (escape_problem("teacher.kind.generation.stops", stop) for stop in self.stops))
        if problems:
            raise ConfigError(*problems)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide a text, without those that change nothing."""
        settings = {f.name: getattr(self, f.name) for f in fields(self)} | {"stops": list(self.stops)}
        unchanging = _CHANGES_NOTHING.items()
        return {name: value for name, value in settings.items() if (name, value) not in unchanging}

    def for_model(self, folder: Path) -> Generation:
        """The settings for the model in a folder, with its own ones if `from_model`."""
        if not self.from_model:
            return self
        path = folder / "generation_config.json"
        try:
            settings = json.loads(path.read_text())
            if not settings.get("do_sample"):
                return replace(self, temperature=0.0)
            own = _OF_TRANSFORMERS | {name: v for name in _OF_TRANSFORMERS if (v := settings.get(name)) is not None}
            temperature, top_p, top_k = float(own["temperature"]), float(own["top_p"]), int(own["top_k"])
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"teacher.kind.generation.from_model=true: {path} cannot be read ({error}); expected a model that "
                "comes with settings for generation; else set from_model=false, temperature, top_p and top_k"
            ) from None
        return replace(
            self,
            temperature=temperature,
            sampling_temperature=temperature or self.sampling_temperature,
            top_p=top_p,
            top_k=top_k or None,
        )

    def temperature_of(self, sample: int) -> float:
        """Temperature of an example's text of this number; 0: its tokens are the most likely ones."""
        return self.sampling_temperature if sample else self.temperature

    def cut(self, text: str) -> str:
        """The text before the first of `stops`; all of it if none occurs."""
        return text[: min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=len(text))]


def draw(
    logits_BV: Float[Tensor, "B V"],
    uniform_B: Float[Tensor, "B"],
    *,
    temperature: float | Float[Tensor, "B"],
    top_p: float,
    top_k: int | None = None,
) -> Int[Tensor, "B"]:
    """Sample a token per row from the nucleus of softmax(logits / temperature), by inverting its CDF at `uniform_B`.

    The nucleus is the smallest set of most probable tokens with at least `top_p` of the mass (Holtzman et al. 2020,
    arXiv 1904.09751, eq. 2); with `top_k`, of the mass of so many most probable tokens. The CDF starts at the most
    probable token, so a uniform of 0 draws that token.
    """
    ordered_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    ordered_BV = ordered_BV[:, :top_k]
    # The greatest logit is subtracted so that no temperature overflows; the sum in double loses no token.
    temperature_B1 = torch.as_tensor(temperature, dtype=torch.float64, device=logits_BV.device).reshape(-1, 1)
    mass_BV = ((ordered_BV - ordered_BV[:, :1]).double() / temperature_B1).softmax(-1).cumsum(-1)
    last_B1 = (mass_BV < top_p).sum(-1, keepdim=True).clamp(max=mass_BV.shape[1] - 1)
    point_B1 = uniform_B.unsqueeze(-1) * mass_BV.gather(-1, last_B1)
    return ids_BV.gather(-1, torch.searchsorted(mass_BV, point_B1)).squeeze(-1)
