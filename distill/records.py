"""What flows through the pipeline: plain frozen records, and the errors a user may see.

Dimensions, used as suffixes of every tensor with two or more of them:

    B  example (or sequence) in a batch      V  vocabulary
    T  token position in a sequence          E  kept entry of a soft target, of all positions one after the other
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.errors import CacheError

Span = Literal["answer", "rationale"]
SPANS: tuple[Span, ...] = ("answer", "rationale")
Place = tuple[str, Span]  # where soft targets are: the key of a request, and which of its targets
Reason = Literal[
    "disagrees",
    "outvoted",
    "unreadable",
    "truncated",
    "empty",
    "wrong arithmetic",
    "too short",
    "too long",
    "repetitive",
    "foreign",
    "leaks the answer",
    "near duplicate",
    "surplus",
]
_ROUNDING = 1e-4  # by which a sum of float32 probabilities may exceed 1


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
    """Token ids and the half-open ranges of them that are to be learned, in order of position.

    With `branches`, the places where they begin, what stands before the first of them goes on in more than one way:
    each branch follows it directly, and none sees another.
    """

    ids: tuple[int, ...]
    spans: Mapping[Span, tuple[int, int]] = field(default_factory=dict)
    branches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """A token at position 0 has nothing before it, so nothing can predict it."""
        for name, (start, stop) in self.spans.items():
            if not 1 <= start < stop <= len(self.ids):
                raise ValueError(f"span {name!r} = [{start}, {stop}) does not lie in [1, {len(self.ids)})")


@dataclass(frozen=True)
class SoftTargets:
    """Next-token distributions, one after the other: kept ids with their probabilities under the *full* softmax.

    Row n is the distribution from which token n of its span was to be drawn. Its first `num_exact_N[n]` entries
    are exact, and `tail_N` is what they leave over. The next `num_drawn_N[n]` are draws from what is left over,
    each standing for a weight whose log is in `logprobs_E`; draws stand for it also where a row happens to have
    none. Without `num_drawn_N` nothing was drawn: what is left over is one bucket. Dense has V exact entries.
    """

    ids_E: np.ndarray
    logprobs_E: np.ndarray
    tail_N: np.ndarray
    num_exact_N: np.ndarray
    num_drawn_N: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Shapes agree."""
        if len(self.num_exact_N) != len(self.tail_N) or {len(self.ids_E), len(self.logprobs_E)} != {self.num_N.sum()}:
            shapes = [x.shape for x in (self.ids_E, self.logprobs_E, self.tail_N, self.num_N)]
            raise CacheError(f"soft targets of unlike shapes: {', '.join(map(str, shapes))}")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tail_N)

    def __getitem__(self, rows: slice | np.ndarray) -> SoftTargets:
        """The same targets for some of the rows."""
        num_N = self.num_N[rows]
        first_N = (np.cumsum(self.num_N) - self.num_N)[rows]
        row_E, place_E = spread(num_N)
        entries = first_N[row_E] + place_E
        drawn = self.num_drawn_N
        return SoftTargets(
            self.ids_E[entries],
            self.logprobs_E[entries],
            self.tail_N[rows],
            self.num_exact_N[rows],
            drawn if drawn is None else drawn[rows],
        )

    @classmethod
    def join(cls, parts: Sequence[SoftTargets]) -> SoftTargets:
        """Targets one after the other."""
        if len({part.num_drawn_N is None for part in parts}) != 1:
            raise CacheError("soft targets with draws and without cannot be joined: two codecs made them")
        columns = [[getattr(part, f.name) for part in parts] for f in fields(cls)]
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]

    @property
    def num_N(self) -> np.ndarray:  # noqa: N802 - a tensor's dimensions stand in its name
        """Entries of each row."""
        if self.num_drawn_N is None:
            return self.num_exact_N
        num_N: np.ndarray = self.num_exact_N + self.num_drawn_N
        return num_N

    @property
    def is_exact_E(self) -> np.ndarray:  # noqa: N802
        """Whether an entry is exact, or else a draw."""
        row_E, place_E = spread(self.num_N)
        is_exact_E: np.ndarray = place_E < self.num_exact_N[row_E]
        return is_exact_E

    def rows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and log-probabilities of each row."""
        cuts = np.cumsum(self.num_N)[:-1]
        return zip(np.split(self.ids_E, cuts), np.split(self.logprobs_E, cuts), strict=True)

    def buckets(self) -> SoftTargets:
        """The bucket reading: exact entries, and one outcome for all the rest. Draws are dropped."""
        if self.num_drawn_N is None:
            return self
        is_exact_E = self.is_exact_E
        return SoftTargets(self.ids_E[is_exact_E], self.logprobs_E[is_exact_E], self.tail_N, self.num_exact_N)

    def for_training(self) -> SoftTargets:
        """The sampled reading where draws stand for the rest, else the bucket reading.

        Sampled: exact entries and draws, nothing left over, so that the expected target is the teacher's
        distribution. A row sums to 1 on average only, and is not renormalised: that would bring the bias back.
        """
        return self if self.num_drawn_N is None else replace(self, tail_N=np.zeros_like(self.tail_N))

    def check(self) -> None:
        """Raise CacheError where a row is no distribution; every writer asks this first."""
        head = self.buckets()
        row_E, _ = spread(head.num_exact_N)
        mass_N = np.bincount(row_E, np.exp(head.logprobs_E.astype(np.float64)), len(self)) + self.tail_N
        wanted = {
            "an entry has an id": (self.ids_E >= 0).all(),
            "a log-probability is -inf or a number not above 0": (self.logprobs_E <= _ROUNDING).all(),
            "a tail is a probability": ((self.tail_N >= 0) & (self.tail_N <= 1 + _ROUNDING)).all(),
            "a row says something, and claims no more than a whole distribution": (
                (mass_N > 0) & (mass_N <= 1 + _ROUNDING)
            ).all(),
        }
        broken = [law for law, holds in wanted.items() if not holds]
        if broken:
            raise CacheError(f"soft targets that are none, so they are not written; broken: {'; '.join(broken)}")


def spread(num_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row, and the place in it, of each entry of rows of these lengths."""
    row_E = np.repeat(np.arange(len(num_N), dtype=np.int32), num_N)
    return row_E, np.arange(len(row_E)) - (np.cumsum(num_N, dtype=np.int64) - num_N)[row_E]


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
    in the request that the teacher's targets depend on. With `given_ids` the teacher reads these in the place of
    words of its own. A rationale may be asked for several times: `sample` 0 is the most likely words, others are
    drawn.
    """

    key: str
    span: Span
    example: Example
    question_ids: tuple[int, ...]
    given_ids: tuple[int, ...] = ()
    sample: int = 0


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

    @property
    def choice_probabilities(self) -> tuple[float, ...]:
        """How likely each of the task's choices is, one of them being said."""
        scores = np.exp(self.choice_logprobs)
        return tuple((scores / scores.sum()).tolist())


@dataclass(frozen=True)
class CheckedRationale:
    """A teacher's rationale, and how the answer that it led to compares with what is known.

    Compared with the gold answer, or where there is none with what most samples led to, or with the teacher's direct
    answer; `reason` says why it is not to be learned from, and is None for one that is. `confidence` is the share of
    the example's samples that led to the same answer.
    """

    example_id: str
    annotation: Annotation
    compared_with: Literal["gold", "votes", "teacher"]
    reason: Reason | None
    confidence: float | None = None


@dataclass(frozen=True)
class Entries:
    """What is kept of a target at each of N positions, one after the other.

    `ends_N` (on the host: chunks are cut by it, and no device is waited for) says where each position's entries
    end. `tail_N` is what they leave over; None where that is nothing.
    """

    ends_N: np.ndarray
    position_E: Int[Tensor, "E"]
    ids_E: Int[Tensor, "E"]
    logprobs_E: Float[Tensor, "E"]
    tail_N: Float[Tensor, "N"] | None

    def to(self, device: torch.device) -> Entries:
        """The same entries on another device."""
        return replace(self, **_moved(self, device))


@dataclass(frozen=True)
class Batch:
    """One microbatch. Sequences are padded on the right; no loss looks at padding.

    Position n is predicted from hidden state `[sequence_N[n], before_N[n]]` and should be `label_N[n]`. It has soft
    targets where `is_soft_N` says so. A token sees what stands before it in its own branch and in branch 0, which
    all go on from: `position_BT` is its place there. Without branches `branch_BT` is None.
    `counts` are positions per (span, source) in the *whole* optimizer step, over all its microbatches
    and processes: what a loss's sum is divided by.
    """

    input_ids_BT: Int[Tensor, "B T"]
    mask_BT: Int[Tensor, "B T"]
    position_BT: Int[Tensor, "B T"]
    branch_BT: Int[Tensor, "B T"] | None
    sequence_N: Int[Tensor, "N"]
    before_N: Int[Tensor, "N"]
    label_N: Int[Tensor, "N"]
    is_labelled_N: Bool[Tensor, "N"]
    span_N: Int[Tensor, "N"]
    is_soft_N: Bool[Tensor, "N"]
    soft: Entries | None
    counts: Mapping[tuple[Span, str], int]
    example_ids: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch, its tensors on another device."""
        return replace(self, soft=self.soft and self.soft.to(device), **_moved(self, device))


def _moved(record: Batch | Entries, device: torch.device) -> dict[str, Any]:
    found = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: value.to(device) for name, value in found.items() if isinstance(value, Tensor)}
