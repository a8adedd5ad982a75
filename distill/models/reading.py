"""Batched reading and generation after a shared prefix, in the fastest way that equals plain forward passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distill.losses.head import Shape
from distill.models.body import Body, Way
from distill.models.generation import IsComplete, draw
from distill.models.rows import GroupedRows, PaddedRows, Rows
from distill.models.verification import check_right_padding, read_whole, verified_way

_HEAD_ROWS, _CPU_ROWS = 256, 32
# logits [B, V], index of the new token in its text, places of the rows in the batch -> tokens [B]
ChooseToken = Callable[[Tensor, int, Sequence[int]], Tensor]


@final
class PrefixedReader:
    """Reads many prompts after a shared prefix."""

    def __init__(self, model: Any, prefix_ids: Sequence[int], vocabulary_size: int, way: Way | None = None) -> None:
        """Read the prefix with a model from `loading.load`; head rows from `vocabulary_size` on are padding.

        `way` is that of an earlier reader of the same model; without it, ways are compared with plain forward passes.
        The reader is invalid once the model's weights change.
        """
        self.vocabulary_size = vocabulary_size
        self._model, self._shape = model, Shape.of(model)
        self.way: Way = way or verified_way(model, self.logits, vocabulary_size)
        self._body = Body(model, prefix_ids, self.way)
        self.device: torch.device = self._body.device

    @property
    def is_valid(self) -> bool:
        """Whether the model is where it was, and of the type that it had, when it read the prefix."""
        return (self._model.device, self._model.dtype) == (self.device, self._body.dtype)

    @property
    def shares_prefix(self) -> bool:
        """Whether all rows read one copy of the prefix's keys and values."""
        return self._body.shares_prefix

    @torch.inference_mode()
    def logits(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... V"]:
        """Logits of hidden states, in float32."""
        return self._head(hidden).float()

    def logprobs(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... V"]:
        """Log of the full softmax over the vocabulary, in float32."""
        return self.logits(hidden).log_softmax(-1)

    def read(self, prompts: Sequence[Sequence[int]]) -> Reading:
        """Read a batch of prompts; further tokens can be fed to the result."""
        return Reading(self, self._rows(prompts), max(map(len, prompts)))

    def hidden_before_targets(
        self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> Float[Tensor, "N H"]:
        """Read prompts with their targets; return the hidden states that predict the targets' tokens, in order."""
        # The last token predicts nothing, so it is not read.
        texts = [[*prompt, *target[:-1]] for prompt, target in zip(prompts, targets, strict=True)]
        hidden = read_whole(self._body, texts)
        return torch.cat([hidden_TH[-len(target) :] for hidden_TH, target in zip(hidden, targets, strict=True)])

    def logprobs_in_chunks(self, hidden_NH: Float[Tensor, "N H"]) -> Iterator[Float[Tensor, "M V"]]:
        """Log-probabilities of hidden states, in chunks of a few rows that fit into a CPU's cache."""
        num_rows = _CPU_ROWS if self.device.type == "cpu" else _HEAD_ROWS
        for chunk_NH in hidden_NH.split(_HEAD_ROWS):
            for logits_MV in self._head(chunk_NH).split(num_rows):
                yield logits_MV.float().log_softmax(-1)

    def extended(self, rows: Rows, num_tokens: int) -> Rows:
        """The rows, or others with the same tokens if these have no room for so many more."""
        if isinstance(rows, PaddedRows) and not rows.has_room(num_tokens):
            return GroupedRows(self._body, rows.texts())
        return rows

    def room(self, prompts_length: int) -> int | None:
        """Number of tokens that can follow the prefix and prompts of this length; None without a limit."""
        limit = self._body.max_positions
        return None if limit is None else limit - len(self._body.prefix_ids) - prompts_length

    def _rows(self, prompts: Sequence[Sequence[int]]) -> Rows:
        is_padded = self.way == "batched" and self._body.fits_window(max(map(len, prompts)))
        return PaddedRows(self._body, prompts) if is_padded else GroupedRows(self._body, prompts)

    def _head(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... V"]:
        head: nn.Module = self._model.get_output_embeddings()
        return self._shape(head(hidden)[..., : self.vocabulary_size])


def check_student_reading(model: Any, vocabulary_size: int) -> None:
    """Raise ConfigError unless a student can be read, and computes with padding on the right what it does without."""
    reader = PrefixedReader(model, (), vocabulary_size)
    check_right_padding(model, reader.logits, vocabulary_size)


@final
class Reading:
    """A batch of prompts that have been read."""

    def __init__(self, reader: PrefixedReader, rows: Rows, length: int) -> None:
        """`length` is that of the longest prompt."""
        self.reader, self._rows, self._length = reader, rows, length
        self.last_BH = rows.last_BH

    @cached_property
    def first_BV(self) -> Float[Tensor, "B V"]:  # noqa: N802 - names of tensors end in their dimensions
        """Log-probabilities of the token after each prompt."""
        return self.reader.logprobs(self.last_BH)

    def feed(self, ids_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
        """Read further tokens, padded on the right; return the hidden states at all of them."""
        self._rows = self.reader.extended(self._rows, ids_BT.shape[1])
        return self._rows.feed(ids_BT)

    def rewind(self, num_tokens: int) -> None:
        """Drop the last `num_tokens` columns."""
        self._rows.rewind(num_tokens)

    def choice_logprobs(self, first_BV: Float[Tensor, "B V"], choices: Sequence[Sequence[int]]) -> Float[Tensor, "B C"]:
        """Log-probability of each choice as the continuation; `first_BV` holds those of its first token."""
        return torch.stack([logprobs_BT.sum(-1) for logprobs_BT in self.token_logprobs(first_BV, choices)], -1)

    def token_logprobs(
        self, first_BV: Float[Tensor, "B V"], choices: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, "B _"]]:
        """Log-probabilities of the tokens of each choice; a beginning that choices share is read once."""
        tokens = [[first_BV[:, ids[0]]] for ids in choices]
        read: tuple[int, ...] = ()
        for ids in sorted({tuple(ids[:-1]) for ids in choices if len(ids) > 1}):  # depth-first over shared beginnings
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(read, ids, strict=False)))
            self.rewind(len(read) - shared)
            fed_BT = torch.tensor([ids[shared:]] * len(first_BV), device=first_BV.device)
            logprobs_BTV = self.reader.logprobs(self.feed(fed_BT))
            for depth, (column, choice) in itertools.product(range(shared, len(ids)), enumerate(choices)):
                if len(choice) > depth + 1 and tuple(choice[: depth + 1]) == ids[: depth + 1]:
                    tokens[column].append(logprobs_BTV[:, depth - shared, choice[depth + 1]])
            read = ids
        self.rewind(len(read))
        return [torch.stack(columns, -1) for columns in tokens]

    def own_token_logprobs(self, choices: Sequence[Sequence[Sequence[int]]]) -> list[list[Float[Tensor, "_"]]]:
        """Log-probabilities of the tokens of each prompt's own choices, whose number may differ."""
        rows = range(len(choices))
        logprobs: list[list[Tensor]] = [[] for _ in rows]
        for column in range(max(map(len, choices))):
            members = [row for row in rows if column < len(choices[row])]
            read = [choices[row][column][:-1] if row in members else () for row in rows]
            hidden = self._fed(read)
            for row in members:
                later_TV = self.reader.logprobs(hidden[row])
                whole_TV = torch.cat([self.first_BV[row : row + 1], later_TV])
                ids_T = torch.tensor(choices[row][column], device=whole_TV.device)
                logprobs[row].append(whole_TV.gather(1, ids_T.unsqueeze(1)).squeeze(1))
        return logprobs

    def own_choice_logprobs(self, choices: Sequence[Sequence[Sequence[int]]]) -> list[Float[Tensor, "_"]]:
        """Log-probabilities of each prompt's own choices as the continuation."""
        return [
            torch.stack([logprobs_T.sum() for logprobs_T in of_prompt]) if of_prompt else self.last_BH.new_empty(0)
            for of_prompt in self.own_token_logprobs(choices)
        ]

    def _fed(self, texts: Sequence[Sequence[int]]) -> list[Float[Tensor, "_ H"]]:
        """Hidden states at the tokens of a text after each prompt, which are then dropped."""
        longest = max(map(len, texts))
        if not longest:
            return [self.last_BH[:0]] * len(texts)
        ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts], device=self.last_BH.device)
        hidden_BTH = self.feed(ids_BT)
        self.rewind(longest)
        return [hidden_TH[: len(ids)] for hidden_TH, ids in zip(hidden_BTH, texts, strict=True)]

    def greedy(
        self,
        *,
        max_new_tokens: int,
        stops: Sequence[int],
        min_new_tokens: int = 0,
        is_complete: IsComplete | None = None,
    ) -> list[list[int]]:
        """Continue all prompts with the most likely tokens, up to and including one of `stops`, or to the limit.

        None of `stops` is among the first `min_new_tokens`. A text also ends where `is_complete`, called with its
        tokens, says so.
        """
        ending = _Ending(max_new_tokens, stops, min_new_tokens, is_complete)
        return self._generate(lambda logits_BV, *_: logits_BV.argmax(-1), ending)

    def sampled(
        self,
        *,
        uniforms_BN: Float[Tensor, "B N"],
        stops: Sequence[int],
        temperature: float | Float[Tensor, "B"],
        top_p: float,
        top_k: int | None = None,
        min_new_tokens: int = 0,
        is_complete: IsComplete | None = None,
    ) -> list[list[int]]:
        """Continue all prompts with sampled tokens, up to and including one of `stops`, or to N tokens; as `greedy`.

        Token n of a row is drawn with `uniforms_BN[row, n]`, in [0, 1). A row of zeros gets the most likely tokens.
        """
        uniforms_BN = uniforms_BN.to(self.reader.device)
        temperature_B = torch.as_tensor(temperature, dtype=torch.float64).expand(len(uniforms_BN))

        def choose(logits_BV: Float[Tensor, "B V"], index: int, places: Sequence[int]) -> Int[Tensor, "B"]:
            uniform_B, temperature_of_B = uniforms_BN[places, index], temperature_B[places]
            return draw(logits_BV, uniform_B, temperature=temperature_of_B, top_p=top_p, top_k=top_k)

        return self._generate(choose, _Ending(uniforms_BN.shape[1], stops, min_new_tokens, is_complete))

    def _generate(self, choose: ChooseToken, ending: _Ending) -> list[list[int]]:
        """Generate up to the limit, or to the last position of the model; rows whose text has ended leave the batch."""
        room = self.reader.room(self._length)
        limit = ending.max_new_tokens if room is None else min(ending.max_new_tokens, room + 1)  # the last is not read
        texts: list[list[int]] = [[] for _ in self.last_BH]
        places, last_BH = list(range(len(texts))), self.last_BH
        rows: Rows | None = None  # the prompts that have been read stay as they are
        for index in range(limit):
            token_B = choose(ending.allowed(self.reader.logits(last_BH), index), index, places)
            for place, token_id in zip(places, token_B.tolist(), strict=True):
                texts[place].append(token_id)
            going = [k for k, place in enumerate(places) if not ending.is_reached(texts[place])]
            if not going or index + 1 == limit:
                break
            if rows is None or len(going) < len(places):
                rows = (rows or self._rows).copied(going)
                places, token_B = [places[k] for k in going], token_B[going]
            rows = self.reader.extended(rows, 1)
            last_BH = rows.feed(token_B.unsqueeze(1))[:, -1]
        return texts


@dataclass(frozen=True)
class _Ending:
    """Where generated texts end."""

    max_new_tokens: int
    stops: Sequence[int]
    min_new_tokens: int
    is_complete: IsComplete | None

    def allowed(self, logits_BV: Float[Tensor, "B V"], index: int) -> Float[Tensor, "B V"]:
        """The logits of the tokens at this index of the texts, none of which ends a text that is too short."""
        if index >= self.min_new_tokens:
            return logits_BV
        ends = torch.tensor([end for end in self.stops if 0 <= end < logits_BV.shape[1]], device=logits_BV.device)
        return logits_BV.index_fill(1, ends.long(), -torch.inf)

    def is_reached(self, ids: Sequence[int]) -> bool:
        """Whether a text ends with its last token."""
        return ids[-1] in self.stops or (self.is_complete is not None and self.is_complete(ids))
