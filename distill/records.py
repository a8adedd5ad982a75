"""What flows through the pipeline: plain frozen records, and the errors a user may see.

Dimensions, used as suffixes of every tensor with two or more of them:

    B  example (or sequence) in a batch      V  vocabulary
    T  token position in a sequence          K  kept entries of a soft target
    N  supervised position                   H  hidden size

Errors (each message says what happened, what was found, what was wanted, what to do):

    Exception
    └── DistillError          exit code 1
        ├── ConfigError       2   the configuration cannot work; lists every problem
        ├── CacheError        3   the cache on disk is not what was asked for, or is damaged
        └── AnswerError       -   a text holds no readable answer; counted, never fatal
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Span = Literal["answer", "rationale"]
SPANS: tuple[Span, ...] = ("answer", "rationale")
Place = tuple[str, Span]  # where soft targets are: the key of a request, and which of its targets
Reason = Literal["disagrees", "unreadable", "truncated", "empty"]
_ROUNDING = 1e-4  # by which a sum of float32 probabilities may exceed 1


class DistillError(Exception):
    """Base of the errors that are the user's to mend; shown without a traceback."""

    exit_code = 1


class ConfigError(DistillError):
    """A configuration that cannot work. Takes all problems at once."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        """Keep every problem; the message lists them one below the other."""
        self.problems = problems
        lead = "" if len(problems) == 1 else f"{len(problems)} problems in the configuration:\n"
        super().__init__(lead + "\n".join(f"- {p}" if lead else p for p in problems))


class CacheError(DistillError):
    """A cache that is damaged, incomplete, or made by something else."""

    exit_code = 3


class AnswerError(DistillError):
    """A text in which no answer of the task could be read."""


def content_id(text: str) -> str:
    """Identity of a text up to case, spacing and Unicode form; 32 hexadecimal digits."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Example:
    """One question of a task; `answer` and `rationale` are gold, and None where nobody gave them."""

    question: str
    answer: str | None = None
    rationale: str | None = None

    @property
    def id(self) -> str:
        """Content hash of the question: the same text has the same id wherever it stands."""
        return content_id(self.question)


@dataclass(frozen=True)
class Splits:
    """A task's examples, disjoint by content; the labelled train examples come first."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def disjoint(cls, train: Sequence[Example], validation: Sequence[Example], test: Sequence[Example]) -> Splits:
        """Drop from train, then from validation, what a later split holds; count what was dropped."""
        dropped: dict[str, int] = {}
        seen: set[str] = set()
        kept: dict[str, tuple[Example, ...]] = {}
        for name, examples in (("test", test), ("validation", validation), ("train", train)):
            fresh: list[Example] = []
            for example in examples:
                if example.id not in seen:
                    seen.add(example.id)
                    fresh.append(example)
            kept[name] = tuple(fresh)
            if len(fresh) < len(examples):
                dropped[name] = len(examples) - len(fresh)
        return cls(kept["train"], kept["validation"], kept["test"], dropped)


@dataclass(frozen=True)
class Prompt:
    """Token ids and the half-open ranges of them that are to be learned, in order of position."""

    ids: tuple[int, ...]
    spans: Mapping[Span, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """A token at position 0 has nothing before it, so nothing can predict it."""
        for name, (start, stop) in self.spans.items():
            if not 1 <= start < stop <= len(self.ids):
                raise ValueError(f"span {name!r} = [{start}, {stop}) does not lie in [1, {len(self.ids)})")


@dataclass(frozen=True)
class SoftTargets:
    """Next-token distributions: kept ids with their probabilities under the *full* softmax, and the mass left over.

    Row n is the distribution from which token n of its span was to be drawn. Its first `num_exact_N[n]` entries
    (None: all K) are exact, and `tail_N` is what they leave over. Further entries are draws from what is left
    over, each standing for a weight whose log is in `logprobs_NK`; `is_tail_drawn` says that draws stand for it,
    also where a row happens to have none. Rows are ragged: an entry that does not exist has id -1 and
    log-probability -inf. Dense is K = V.
    """

    ids_NK: np.ndarray
    logprobs_NK: np.ndarray
    tail_N: np.ndarray
    num_exact_N: np.ndarray = None  # type: ignore[assignment]
    is_tail_drawn: bool = False

    def __post_init__(self) -> None:
        """Shapes agree, and no draw is taken for an exact entry."""
        given: Any = self.num_exact_N
        if given is None:
            every_N = np.full(len(self.tail_N), self.ids_NK.shape[1], np.int32)
            object.__setattr__(self, "num_exact_N", every_N)
        if self.ids_NK.shape != self.logprobs_NK.shape or not (
            len(self.ids_NK) == len(self.tail_N) == len(self.num_exact_N)
        ):
            shapes = [x.shape for x in (self.ids_NK, self.logprobs_NK, self.tail_N, self.num_exact_N)]
            raise CacheError(f"soft targets of unlike shapes: {', '.join(map(str, shapes))}")
        is_ragged = (self.num_exact_N < self.ids_NK.shape[1]).any()
        if is_ragged and not self.is_tail_drawn and (self.ids_NK[~self._is_exact_NK()] >= 0).any():
            raise CacheError("soft targets hold draws, and do not say so (is_tail_drawn)")

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.tail_N)

    def __getitem__(self, rows: slice | np.ndarray) -> SoftTargets:
        """The same targets for some of the positions."""
        arrays = {name: getattr(self, name)[rows] for name in ("ids_NK", "logprobs_NK", "tail_N", "num_exact_N")}
        return replace(self, **arrays)

    @classmethod
    def join(cls, parts: Sequence[SoftTargets]) -> SoftTargets:
        """Targets one after the other, padded to the largest K."""
        if len({part.is_tail_drawn for part in parts}) != 1:
            raise CacheError("soft targets with draws and without cannot be joined: two codecs made them")
        shape = sum(map(len, parts)), max(part.ids_NK.shape[1] for part in parts)
        ids_NK, logprobs_NK = np.full(shape, -1, parts[0].ids_NK.dtype), np.full(shape, -np.inf, np.float32)
        start = 0
        for part in parts:
            rows, columns = slice(start, start + len(part)), slice(part.ids_NK.shape[1])
            ids_NK[rows, columns], logprobs_NK[rows, columns] = part.ids_NK, part.logprobs_NK
            start += len(part)
        tail_N, num_exact_N = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("tail_N", "num_exact_N")
        )
        return cls(ids_NK, logprobs_NK, tail_N, num_exact_N, parts[0].is_tail_drawn)

    def buckets(self) -> SoftTargets:
        """The bucket reading: exact entries, and one outcome for all the rest. Draws are dropped."""
        if not self.is_tail_drawn:
            return self
        width = int(self.num_exact_N.max(initial=0))
        is_exact_NK = self._is_exact_NK()[:, :width]
        ids_NK = np.where(is_exact_NK, self.ids_NK[:, :width], -1)
        logprobs_NK = np.where(is_exact_NK, self.logprobs_NK[:, :width], -np.inf)
        return SoftTargets(ids_NK, logprobs_NK, self.tail_N, self.num_exact_N)

    def for_training(self) -> SoftTargets:
        """The sampled reading where draws stand for the rest, else the bucket reading.

        Sampled: exact entries and draws, nothing left over, so that the expected target is the teacher's
        distribution. A row sums to 1 on average only, and is not renormalised: that would bring the bias back.
        """
        return replace(self, tail_N=np.zeros_like(self.tail_N)) if self.is_tail_drawn else self

    def check(self) -> None:
        """Raise CacheError where a row is no distribution; every writer asks this first."""
        is_kept_NK, is_exact_NK, p_NK = self.ids_NK >= 0, self._is_exact_NK(), np.exp(self.logprobs_NK)
        mass_N = np.where(is_exact_NK, p_NK, 0).sum(1) + self.tail_N
        wanted = {
            "entries that exist come first": (is_kept_NK[:, 1:] <= is_kept_NK[:, :-1]).all(),
            "exact entries exist": (is_kept_NK | ~is_exact_NK).all() and (self.num_exact_N >= 0).all(),
            "a log-probability is -inf or a number not above 0": (self.logprobs_NK <= _ROUNDING).all(),
            "an entry that does not exist has no probability": not p_NK[~is_kept_NK].any(),
            "a tail is a probability": ((self.tail_N >= 0) & (self.tail_N <= 1 + _ROUNDING)).all(),
            "a row says something, and claims no more than a whole distribution": (
                (mass_N > 0) & (mass_N <= 1 + _ROUNDING)
            ).all(),
        }
        broken = [law for law, holds in wanted.items() if not holds]
        if broken:
            raise CacheError(f"soft targets that are none, so they are not written; broken: {'; '.join(broken)}")

    def _is_exact_NK(self) -> np.ndarray:  # noqa: N802 - a tensor's dimensions stand in its name
        return np.arange(self.ids_NK.shape[1]) < self.num_exact_N[:, None]


@dataclass(frozen=True)
class Target:
    """The tokens of one span as the teacher was made to read them, and what it expected at each."""

    token_ids: tuple[int, ...]
    soft: SoftTargets | None

    def __post_init__(self) -> None:
        """One distribution per predicted token: a sequence of L tokens has exactly L - 1."""
        if self.soft is not None and len(self.soft) != len(self.token_ids):
            raise CacheError(
                f"{len(self.token_ids)} target tokens came with {len(self.soft)} distributions; "
                "each predicted token needs exactly one"
            )


@dataclass(frozen=True)
class Request:
    """A question to the teacher: `answer` asks for the answer, `rationale` for reasoning and then the answer.

    `question_ids` stand between the shared prefix and what the teacher says; `key` is the hash of everything
    in the request that the teacher's targets depend on.
    """

    key: str
    span: Span
    example: Example
    question_ids: tuple[int, ...]


def distinct(requests: Iterable[Request]) -> list[Request]:
    """One request of each key, in order."""
    return list({request.key: request for request in requests}.values())


@dataclass(frozen=True)
class Group:
    """Requests of one span that are computed and written together; a function of the examples alone.

    Not of what the cache holds already, nor of how many processes work: so a record has the same neighbours, and
    the same bytes, however often the work was broken off.
    """

    name: str
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Annotation:
    """What the teacher left for one request, unchecked.

    `answer` is canonical, or None where the text held none; after a rationale it is the answer the
    reasoning led to. `choice_logprobs` are those of a task's fixed choices, in their order.
    """

    key: str
    targets: Mapping[Span, Target]
    answer: str | None
    rationale: str | None = None
    is_sampled: bool = False
    is_truncated: bool = False
    choice_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class CheckedRationale:
    """A teacher's rationale, and how the answer that it led to compares with what is known.

    Compared with the gold answer, or where there is none with the teacher's direct answer; `reason` says
    why it is not to be learned from, and is None for one that is.
    """

    example_id: str
    annotation: Annotation
    compared_with: Literal["gold", "teacher"]
    reason: Reason | None


@dataclass(frozen=True)
class SoftRows:
    """The soft targets of some supervised positions of a batch: `rows_M` index into its N positions."""

    rows_M: Int[Tensor, "M"]
    ids_MK: Int[Tensor, "M K"]
    logprobs_MK: Float[Tensor, "M K"]
    tail_M: Float[Tensor, "M"]


@dataclass(frozen=True)
class Batch:
    """One microbatch. Sequences are padded on the right; no loss looks at padding.

    Position n is predicted from hidden state `[sequence_N[n], before_N[n]]` and should be `label_N[n]`.
    `counts` are positions per (span, source) in the *whole* optimizer step, over all its microbatches
    and processes: what a loss's sum is divided by.
    """

    input_ids_BT: Int[Tensor, "B T"]
    mask_BT: Int[Tensor, "B T"]
    sequence_N: Int[Tensor, "N"]
    before_N: Int[Tensor, "N"]
    label_N: Int[Tensor, "N"]
    is_labelled_N: Bool[Tensor, "N"]
    span_N: Int[Tensor, "N"]
    soft: SoftRows | None
    counts: Mapping[tuple[Span, str], int]
    example_ids: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch, its tensors on another device."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name.split("_")[-1].isupper()}
        soft = self.soft and replace(
            self.soft, **{f.name: getattr(self.soft, f.name).to(device) for f in fields(self.soft)}
        )
        return replace(self, soft=soft, **tensors)
