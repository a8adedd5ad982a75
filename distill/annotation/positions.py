"""Which tokens of a long answer keep soft targets, so that the cache is smaller.

A student learns most where its teacher hesitates: of the positions of each target, those with the highest entropy are
kept (selective distillation, SE-KD: arXiv 2602.01395), or random ones, as a control. The last position is always kept:
the teacher is certain of the end token, and a student that never sees it does not stop. Losses on words see all tokens.
Only what a student learns from is cut down: held-out examples keep all positions, so that students are measured alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from distill.app.fingerprint import arguments_of, fingerprint_of
from distill.cache import Codec, Cut, uniforms
from distill.errors import ConfigError
from distill.records import SPANS, Annotation, Request, SoftTargets, Span, Target


@final
class Positions:
    """The share of the positions of each answer and rationale that keep soft targets, and how they are chosen."""

    def __init__(self, *, share: float, by: Literal["entropy", "random"]) -> None:
        """Of T positions, the last one and `share` of the others are kept, rounded, and at least one."""
        self._arguments = arguments_of(locals())
        if not 0 < share <= 1:
            raise ConfigError(f"cache.positions.share={share}: expected a share above 0 and at most 1, which keeps all")
        self._share, self._by = share, by

    @property
    def are_all(self) -> bool:
        """Whether every position is kept."""
        return self._share == 1

    @property
    def description(self) -> str:
        """Which positions are kept, in words."""
        if self.are_all:
            return "all"
        where = "of the highest entropy" if self._by == "entropy" else "at random"
        return f"{self._share:g} of the positions of each target of train, {where}; all of validation and test"

    def number(self, num_tokens: int) -> int:
        """Number of positions that are kept of a target of so many tokens."""
        return min(num_tokens, 1 + max(1, round(self._share * (num_tokens - 1))))

    def most(self, request: Request, num_tokens: int) -> int:
        """Return the greatest number of positions that are kept of so many tokens in the targets of a request."""
        if self.are_all or request.is_held_out:
            return num_tokens
        return min(num_tokens, int(self._share * num_tokens) + 2 * len(SPANS))

    def fingerprint(self) -> dict[str, Any]:
        """What decides which positions are kept; empty if all are, as in caches made before there was a choice."""
        return {} if self.are_all else {"positions": fingerprint_of(self, self._arguments)}

    def cut(self, codec: Codec) -> Cut:
        """Return what cuts a teacher's distributions as the codec does, and measures them if the choice needs it."""
        return codec if self.are_all or self._by == "random" else _WithEntropy(codec)

    def keyed(self, request: Request, *, is_held_out: bool) -> Request:
        """Return the request with a key of its own if, being held out, it keeps more positions than others."""
        if self.are_all or not is_held_out:
            return request
        key = hashlib.blake2b(f"{request.key}/every position".encode(), digest_size=16).hexdigest()
        return replace(request, key=key, is_held_out=True)

    def reduced(self, requests: Sequence[Request], annotations: Sequence[Annotation]) -> list[Annotation]:
        """Return the annotations of the requests with the soft targets of the chosen positions alone."""
        if self.are_all:
            return list(annotations)
        return [
            annotation
            if request.is_held_out
            else replace(
                annotation,
                targets={span: self._chosen(target, span, request) for span, target in annotation.targets.items()},
            )
            for request, annotation in zip(requests, annotations, strict=True)
        ]

    def _chosen(self, target: Target, span: Span, request: Request) -> Target:
        num_tokens = len(target.token_ids)
        if target.soft is None or self.number(num_tokens) == num_tokens:
            return target
        # Sorting is stable: of equal scores the first positions are taken.
        scores = self._scores(target.soft, f"{request.key}/{span}/positions")
        ranking = np.argsort(-scores[:-1], kind="stable")
        rows = np.sort([*ranking[: self.number(num_tokens) - 1], num_tokens - 1])
        return Target(target.token_ids, target.soft[rows], tuple(rows.tolist()))

    def _scores(self, soft: SoftTargets, name: str) -> np.ndarray:
        if self._by == "random":
            return uniforms(name, len(soft), 0)
        if soft.entropy_N is None:
            raise ValueError("positions are chosen by entropy, but the teacher was built to cut without measuring it")
        return soft.entropy_N


ALL_POSITIONS = Positions(share=1.0, by="entropy")


@dataclass(frozen=True)
class _WithEntropy:
    """Cuts like a codec, and adds the entropy of each whole distribution, in nats, at temperature 1."""

    codec: Codec

    @property
    def seed(self) -> int | None:
        return self.codec.seed

    def cut(self, logprobs_NV: Float[Tensor, "N V"], uniform_N: Float[Tensor, "N"]) -> SoftTargets:
        entropy_N = torch.special.entr(logprobs_NV.exp()).sum(-1, dtype=torch.float64)
        return replace(self.codec.cut(logprobs_NV, uniform_N), entropy_N=entropy_N.cpu().numpy())
