"""Rows of tokens that a model has read after a prefix, to which more can be fed, and which can be rewound."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from distill.models.body import Body, copied_rows

Ids = Sequence[Sequence[int]]


@runtime_checkable
class Rows(Protocol):
    """A batch of texts in a model."""

    @property
    def last_BH(self) -> Float[Tensor, "B H"]:  # noqa: N802 - names of tensors end in their dimensions
        """Hidden states at the last token of each prompt."""
        ...

    def feed(self, ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
        """Read further tokens; return the hidden states at all of them."""
        ...

    def rewind(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` tokens of each row."""
        ...

    def copied(self, places: Sequence[int]) -> Rows:
        """A new batch of the rows at these places, in ascending order; this one stays as it is."""
        ...


@final
class PaddedRows:
    """Rows in one cache, padded on the left: all end in one column, and no padding precedes what is fed later."""

    def __init__(self, body: Body, prompts: Ids) -> None:
        self._body, self._cache, self._prompts = body, body.new_cache(len(prompts)), prompts
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        is_read = [[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts]
        ids_BT = torch.tensor(ids, dtype=torch.long, device=body.device)
        self._mask_BS = torch.tensor(is_read, dtype=torch.bool, device=body.device)
        self._fed_BT = ids_BT[:, :0]
        self.last_BH = body.advance(ids_BT, self._mask_BS, self._cache)[:, -1]

    def feed(self, ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
        self._mask_BS = torch.cat([self._mask_BS, torch.ones_like(ids_BT, dtype=torch.bool)], 1)
        self._fed_BT = torch.cat([self._fed_BT, ids_BT], 1)
        return self._body.advance(ids_BT, self._mask_BS, self._cache)

    def rewind(self, num_tokens: int) -> None:
        if num_tokens:
            self._cache.crop(-num_tokens)
            self._mask_BS = self._mask_BS[:, :-num_tokens]
            self._fed_BT = self._fed_BT[:, :-num_tokens]

    def copied(self, places: Sequence[int]) -> PaddedRows:
        rows = copy.copy(self)
        chosen = torch.tensor(places, device=self._mask_BS.device)
        rows._cache = copied_rows(self._cache, places, self._body.device)
        rows._prompts = [self._prompts[place] for place in places]
        rows._mask_BS, rows._fed_BT = self._mask_BS[chosen], self._fed_BT[chosen]
        rows.last_BH = self.last_BH[chosen]
        return rows

    def has_room(self, num_tokens: int) -> bool:
        """Whether so many more tokens fit into the attention window."""
        return self._body.fits_window(self._mask_BS.shape[1] + num_tokens)

    def texts(self) -> list[list[int]]:
        """All tokens of each row after the prefix."""
        return [[*prompt, *fed] for prompt, fed in zip(self._prompts, self._fed_BT.tolist(), strict=True)]


@final
class GroupedRows:
    """Rows of equal length together, without padding: right for any causal model, of whatever attention or states."""

    def __init__(self, body: Body, prompts: Ids) -> None:
        self._groups = {tuple(places): _Group(body, [prompts[k] for k in places]) for places in _by_length(prompts)}
        self.last_BH = self._in_order([group.last_BH for group in self._groups.values()])

    def feed(self, ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
        return self._in_order([group.feed(ids_BT[list(places)]) for places, group in self._groups.items()])

    def rewind(self, num_tokens: int) -> None:
        for group in self._groups.values():
            group.rewind(num_tokens)

    def copied(self, places: Sequence[int]) -> GroupedRows:
        rows, new_place = copy.copy(self), {place: k for k, place in enumerate(places)}
        rows._groups = {}
        for members, group in self._groups.items():
            if kept := [k for k, place in enumerate(members) if place in new_place]:
                rows._groups[tuple(new_place[members[k]] for k in kept)] = group.copied(kept)
        rows.last_BH = self.last_BH[torch.tensor(places, device=self.last_BH.device)]
        return rows

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        order = torch.tensor([place for places in self._groups for place in places], device=parts[0].device)
        return torch.cat(list(parts))[order.argsort()]


@final
class _Group:
    """Rows of equal length, with their cache; without one they are read anew when more is fed."""

    def __init__(self, body: Body, rows: Ids) -> None:
        self._body = body
        self._ids_BS = torch.tensor(rows, dtype=torch.long, device=body.device)
        self._cache: DynamicCache | None
        hidden_BTH, self._cache = body.begin(self._ids_BS)
        self.last_BH = hidden_BTH[:, -1]

    def feed(self, ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
        num_read, num_new = self._ids_BS.shape[1], ids_BT.shape[1]
        self._ids_BS = torch.cat([self._ids_BS, ids_BT], 1)
        if self._cache is not None and (num_new == 1 or self._body.way == "grouped"):
            return self._body.proceed(ids_BT, num_read, self._cache)
        hidden_BTH, self._cache = self._body.begin(self._ids_BS)
        return hidden_BTH[:, -num_new:]

    def rewind(self, num_tokens: int) -> None:
        if num_tokens:
            self._ids_BS = self._ids_BS[:, :-num_tokens]
            if self._cache is not None and not _crop(self._cache, num_tokens):
                self._cache = None

    def copied(self, places: Sequence[int]) -> _Group:
        group, chosen = copy.copy(self), torch.tensor(places, device=self._ids_BS.device)
        group._ids_BS, group.last_BH = self._ids_BS[chosen], self.last_BH[chosen]
        group._cache = self._cache and copied_rows(self._cache, places, self._body.device)
        return group


def hidden_at_all(body: Body, texts: Ids) -> list[Tensor]:
    """Hidden states [T, H] at every token of each text, read after the prefix in groups of equal length."""
    hidden: list[Tensor] = [torch.empty(0)] * len(texts)
    for places in _by_length(texts):
        ids_BT = torch.tensor([list(texts[place]) for place in places], dtype=torch.long, device=body.device)
        for place, hidden_TH in zip(places, body.begin(ids_BT)[0], strict=True):
            hidden[place] = hidden_TH
    return hidden


def _by_length(rows: Ids) -> list[list[int]]:
    """Places of the rows, those of equal length together."""
    lengths = list(map(len, rows))
    return [[place for place, length in enumerate(lengths) if length == each] for each in sorted(set(lengths))]


def _crop(cache: DynamicCache, num_tokens: int) -> bool:
    """Drop the last tokens of a cache; False if it cannot, since the state after them does not tell the one before."""
    if not getattr(cache, "is_croppable", True):
        return False
    try:
        cache.crop(-num_tokens)
    except RuntimeError:  # a layer with limited attention has dropped keys that are needed again
        return False
    return True
