"""The data that flows through the pipeline, as frozen dataclasses.

Dimensions, used as suffixes of every tensor with two or more of them:

    B  example (or sequence) in a batch      V  vocabulary
    T  token position in a sequence          E  kept entries of a soft target, of all positions concatenated
    N  supervised position                   H  hidden size
"""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distill.errors import CacheError

Span = Literal["answer", "rationale"]
SPANS: tuple[Span, ...] = ("answer", "rationale")
SPLITS = ("train", "validation", "test")
SoftTargetsKey = tuple[str, Span]  # identifies stored soft targets: the key of their request, and the span
AnswerDefect = Literal["unmatched", "empty", "truncated", "unreadable"]
RejectionReason = Literal[
    "disagrees",
    "outvoted",
    "no reference",
    "unmatched",
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
_ROUNDING = 1e-4  # a sum of float32 probabilities may exceed 1 by this much


def content_id(text: str) -> str:
    """Hash a text, ignoring only its outer spaces and whether letters are composed; 32 hexadecimal digits."""
    return _digest(unicodedata.normalize("NFC", text).strip())


def folded_id(text: str) -> str:
    """Hash a text, ignoring case, all spacing and compatibility forms: near duplicates in prose, not the same text."""
    return _digest(" ".join(unicodedata.normalize("NFKC", text).casefold().split()))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """A turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """A question of a task with its gold `answer` and `rationale`, None where unlabelled.

    A student is trained on `answer`; the other `accepted` answers are right as well. `choices` are all possible answers
    where they are its own, and not those of the task. `history` is the conversation before the question, which is then
    the last message of the user.
    """

    question: str
    answer: str | None = None
    rationale: str | None = None
    accepted: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    history: tuple[Message, ...] = ()

    @cached_property
    def id(self) -> str:
        """Content hash of what is asked: equal questions have equal ids in every split and task."""
        if not self.history and not self.choices:
            return content_id(self.question)
        turns = [(message.role, content_id(message.content)) for message in self.history]
        return _digest(repr((turns, content_id(self.question), [*map(content_id, self.choices)])))

    @property
    def opening(self) -> str:
        """The first message of the user: conversations that begin alike belong to one split."""
        return next((message.content for message in self.history if message.role == "user"), self.question)

    @property
    def text(self) -> str:
        """The question, and what was said before it."""
        return "\n".join([message.content for message in self.history if message.role != "system"] + [self.question])

    def unlabelled(self) -> Example:
        """The same question, without an answer and a rationale."""
        return Example(self.question, choices=self.choices, history=self.history)

    @property
    def right_answers(self) -> tuple[str, ...]:
        """All answers that are right; empty if unlabelled."""
        return () if self.answer is None else (self.answer, *self.accepted)


@dataclass(frozen=True)
class RowCounts:
    """What became of `read` rows: `lost` counts those left out by reason, `kept` the others."""

    read: int
    lost: Mapping[str, int] = field(default_factory=dict)
    kept: int = 0

    def __post_init__(self) -> None:
        """Check that no row vanished: read = lost + kept."""
        if self.read != sum(self.lost.values()) + self.kept:
            raise ValueError(f"{self.read} rows were read, but {self.kept} kept and {dict(self.lost)} left out")

    def less(self, reason: str, number: int) -> RowCounts:
        """Leave out `number` more rows for this reason."""
        return self.then(RowCounts(self.kept, {reason: number} if number else {}, self.kept - number))

    def then(self, later: RowCounts) -> RowCounts:
        """Join with the counts of a later stage, which read the rows that this one kept."""
        if later.read != self.kept:
            raise ValueError(f"a stage kept {self.kept} rows, but the next one read {later.read}")
        lost = {reason: self.lost.get(reason, 0) + later.lost.get(reason, 0) for reason in {**self.lost, **later.lost}}
        return RowCounts(self.read, lost, later.kept)


@dataclass(frozen=True)
class Splits:
    """A task's examples, disjoint by content; labelled train examples come first.

    `counts` says by split what became of the rows that were read. Rows of a file from which several splits are drawn
    are counted in the split that they were drawn for.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    counts: Mapping[str, RowCounts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the counts; splits without counts have lost no row."""
        sizes = {name: len(getattr(self, name)) for name in SPLITS}
        if not self.counts:
            object.__setattr__(self, "counts", {name: RowCounts(size, {}, size) for name, size in sizes.items()})
        if sizes != (kept := {name: counts.kept for name, counts in self.counts.items()}):
            raise ValueError(f"the splits have {sizes} examples, but their counts say {kept}")

    @classmethod
    def disjoint(
        cls,
        train: Sequence[Example],
        validation: Sequence[Example],
        test: Sequence[Example],
        *,
        counts: Mapping[str, RowCounts] | None = None,
    ) -> Splits:
        """Keep each question once, in the last split that has it, and count the rows that are left out.

        `counts` are those of an earlier stage, which kept these examples.
        """
        kept: dict[str, tuple[Example, ...]] = {}
        joined: dict[str, RowCounts] = {}
        later: dict[str, Example] = {}
        for name, examples in (("test", test), ("validation", validation), ("train", train)):
            others = [example for example in examples if example.id not in later]
            own: dict[str, Example] = {}
            for example in others:
                own.setdefault(example.id, example)
            kept[name] = tuple(own.values())
            read = counts[name] if counts else RowCounts(len(examples), {}, len(examples))
            elsewhere = read.less("in another split", len(examples) - len(others))
            joined[name] = elsewhere.less("repeated", len(others) - len(own))
            later |= own
        return cls(kept["train"], kept["validation"], kept["test"], {name: joined[name] for name in SPLITS})


@dataclass(frozen=True)
class Prompt:
    """Token ids and the half-open ranges of the supervised spans, in order of position."""

    ids: tuple[int, ...]
    spans: Mapping[Span, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the spans; the token at position 0 has no context to be predicted from."""
        for name, (start, stop) in self.spans.items():
            if not 1 <= start < stop <= len(self.ids):
                raise ValueError(f"span {name!r} = [{start}, {stop}) does not lie in [1, {len(self.ids)})")


@dataclass(frozen=True)
class SoftTargets:
    """Next-token distributions: the kept ids of each row with their probabilities under the *full* softmax.

    Row n is the teacher's distribution for token n of its span. Its first `num_exact_N[n]` entries are exact;
    `tail_N[n]` is the probability mass of all other ids. The next `num_drawn_N[n]` entries are samples from this
    tail; `logprobs_E` holds the log of their weights. A row may have no samples by chance; they represent the tail
    all the same. If `num_drawn_N` is None nothing was sampled and the tail is a single bucket. Dense targets have V
    exact entries. `entropy_N` is that of the whole distributions, in nats, where it decides which rows are stored; it
    is not stored itself.
    """

    ids_E: np.ndarray
    logprobs_E: np.ndarray
    tail_N: np.ndarray
    num_exact_N: np.ndarray
    num_drawn_N: np.ndarray | None = None
    entropy_N: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check that the shapes agree."""
        if len(self.num_exact_N) != len(self.tail_N) or {len(self.ids_E), len(self.logprobs_E)} != {self.num_N.sum()}:
            shapes = [x.shape for x in (self.ids_E, self.logprobs_E, self.tail_N, self.num_N)]
            raise CacheError(f"soft targets have inconsistent shapes: {', '.join(map(str, shapes))}")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tail_N)

    def __getitem__(self, rows: slice | np.ndarray) -> SoftTargets:
        """Select rows."""
        num_N = self.num_N[rows]
        first_N = (np.cumsum(self.num_N) - self.num_N)[rows]
        row_E, offset_E = ragged_indices(num_N)
        entries = first_N[row_E] + offset_E
        drawn_N, entropy_N = self.num_drawn_N, self.entropy_N
        return SoftTargets(
            self.ids_E[entries],
            self.logprobs_E[entries],
            self.tail_N[rows],
            self.num_exact_N[rows],
            None if drawn_N is None else drawn_N[rows],
            None if entropy_N is None else entropy_N[rows],
        )

    @classmethod
    def join(cls, parts: Sequence[SoftTargets]) -> SoftTargets:
        """Concatenate soft targets of one codec."""
        if len({part.num_drawn_N is None for part in parts}) != 1:
            raise CacheError("soft targets with and without sampled entries cannot be joined: two codecs made them")
        columns = [[getattr(part, f.name) for part in parts] for f in fields(cls)]
        return cls(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]

    @property
    def num_N(self) -> np.ndarray:  # noqa: N802 - the suffix names the dimensions
        """Number of entries of each row."""
        if self.num_drawn_N is None:
            return self.num_exact_N
        num_N: np.ndarray = self.num_exact_N + self.num_drawn_N
        return num_N

    @property
    def is_exact_E(self) -> np.ndarray:  # noqa: N802
        """Whether each entry is exact rather than sampled."""
        row_E, offset_E = ragged_indices(self.num_N)
        is_exact_E: np.ndarray = offset_E < self.num_exact_N[row_E]
        return is_exact_E

    def rows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over the rows as (ids, log-probabilities)."""
        cuts = np.cumsum(self.num_N)[:-1]
        return zip(np.split(self.ids_E, cuts), np.split(self.logprobs_E, cuts), strict=True)

    def buckets(self) -> SoftTargets:
        """Return the bucket reading: exact entries and one bucket for the tail. Sampled entries are dropped."""
        if self.num_drawn_N is None:
            return self
        is_exact_E = self.is_exact_E
        return SoftTargets(self.ids_E[is_exact_E], self.logprobs_E[is_exact_E], self.tail_N, self.num_exact_N)

    def for_training(self) -> SoftTargets:
        """Return the sampled reading if the tail was sampled, else the bucket reading.

        The sampled reading has exact and sampled entries and no tail, so the expected target is the teacher's
        distribution. A row sums to 1 only on average; renormalising it would reintroduce a bias.
        """
        return self if self.num_drawn_N is None else replace(self, tail_N=np.zeros_like(self.tail_N))

    def check(self) -> None:
        """Raise CacheError if a row is not a distribution; every codec calls this before packing."""
        head = self.buckets()
        row_E, _ = ragged_indices(head.num_exact_N)
        mass_N = np.bincount(row_E, np.exp(head.logprobs_E.astype(np.float64)), len(self)) + self.tail_N
        conditions = {
            "ids are not negative": (self.ids_E >= 0).all(),
            "log-probabilities are numbers of at most 0": (self.logprobs_E <= _ROUNDING).all(),
            "tails are probabilities": ((self.tail_N >= 0) & (self.tail_N <= 1 + _ROUNDING)).all(),
            "rows have a mass above 0 and at most 1": ((mass_N > 0) & (mass_N <= 1 + _ROUNDING)).all(),
        }
        violated = [condition for condition, holds in conditions.items() if not holds]
        if violated:
            raise CacheError(f"invalid soft targets, not written; violated: {'; '.join(violated)}")


def ragged_indices(num_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of each entry, and its offset in the row, for ragged rows of `num_N` entries."""
    row_E = np.repeat(np.arange(len(num_N), dtype=np.int32), num_N)
    return row_E, np.arange(len(row_E)) - (np.cumsum(num_N, dtype=np.int64) - num_N)[row_E]


@dataclass(frozen=True)
class ScoredTokens:
    """The tokens of one span as the teacher read them, and which of them have soft targets.

    `chosen` are the offsets of these tokens in the span, ascending; None: all tokens have soft targets.
    """

    token_ids: tuple[int, ...]
    chosen: tuple[int, ...] | None = None

    @property
    def num_positions(self) -> int:
        """Number of tokens with soft targets."""
        return len(self.token_ids if self.chosen is None else self.chosen)


@dataclass(frozen=True)
class Target:
    """The tokens of one span as the teacher read them, and its soft targets for all of them or for the `chosen` ones.

    Row n of `soft` is the distribution for token n, or for token `chosen[n]`: offsets in the span, ascending.
    """

    token_ids: tuple[int, ...]
    soft: SoftTargets | None
    chosen: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check that there is one distribution per predicted token, L - 1 for L tokens, or per chosen one of these."""
        number = self.scored.num_positions
        if self.soft is not None and len(self.soft) != number:
            raise CacheError(
                f"{number} {'target' if self.chosen is None else 'chosen'} tokens came with {len(self.soft)} "
                "distributions; expected one distribution per token"
            )
        if self.chosen is not None and not _are_ascending(self.chosen, len(self.token_ids)):
            raise CacheError(
                f"soft targets are for the tokens {self.chosen} of {len(self.token_ids)}; expected at least one token, "
                "in ascending order"
            )

    @property
    def scored(self) -> ScoredTokens:
        """The tokens, without their soft targets."""
        return ScoredTokens(self.token_ids, self.chosen)


def _are_ascending(offsets: tuple[int, ...], stop: int) -> bool:
    """Whether there are offsets, all of them are in [0, stop), and each is greater than the one before."""
    bounds = (-1, *offsets, stop)
    return bool(offsets) and all(left < right for left, right in itertools.pairwise(bounds))


@dataclass(frozen=True)
class Request:
    """A question to the teacher. Span `answer` requests a direct answer, `rationale` reasoning and then an answer.

    `question_ids` follow the shared prefix and precede the teacher's output. `key` is the hash of everything in the
    request that the teacher's targets depend on. With `given_ids` the teacher scores these tokens instead of
    generating. A rationale may be requested several times: `sample` 0 is decoded greedily, others are sampled.
    `is_held_out`: no student learns from it, so soft targets of all its tokens are kept to measure students by.
    """

    key: str
    span: Span
    example: Example
    question_ids: tuple[int, ...]
    given_ids: tuple[int, ...] = ()
    sample: int = 0
    is_held_out: bool = False


def unique_requests(requests: Iterable[Request]) -> list[Request]:
    """Drop requests with a repeated key, in order."""
    return list({request.key: request for request in requests}.values())


@dataclass(frozen=True)
class Group:
    """Requests of one span that are annotated and written together.

    Groups depend on the examples alone, not on the cache or the number of processes. A record therefore has the
    same neighbours, and the same bytes, however often annotation was interrupted.
    """

    name: str
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Annotation:
    """The teacher's output for one request, unfiltered.

    `answer` is in canonical form, or None if the text contains no answer; after a rationale it is the answer that
    the reasoning led to. `text` is what the teacher wrote as its answer, unread; None where it wrote none: it chose one
    of a task's choices, or only scored a given text. `choice_logprobs` are those of a task's fixed choices, in their
    order. `is_truncated`: the token limit ended the text, so its answer may be cut off.
    """

    key: str
    targets: Mapping[Span, Target]
    answer: str | None
    rationale: str | None = None
    is_sampled: bool = False
    is_truncated: bool = False
    choice_logprobs: tuple[float, ...] = ()
    text: str | None = None

    @property
    def defect(self) -> AnswerDefect | None:
        """Why the answer, or the rationale with its answer, cannot be learned; None if it can."""
        if self.text is None and self.rationale is None:
            return "unmatched" if self.answer is None else None
        words = self.text if self.rationale is None else self.rationale
        if not (words or "").strip():
            return "empty"
        if self.is_truncated:
            return "truncated"
        return "unreadable" if self.answer is None else None

    @property
    def whole_answer(self) -> str | None:
        """The answer, None if the text that it was read from was cut off."""
        return None if self.is_truncated else self.answer

    @property
    def confidence(self) -> float | None:
        """Probability of the answer among the task's choices, of which it is the most likely; None without choices."""
        scores = np.exp(self.choice_logprobs)
        return float(scores.max() / scores.sum()) if self.choice_logprobs else None


@dataclass(frozen=True)
class FilteredRationale:
    """A teacher's rationale, and why it was rejected; `reason` is None if it was kept.

    `compared_with` names the reference for its answer: the gold answer; without one, the majority of the example's
    samples; for a single sample, the teacher's direct answer. `confidence` is the share of the example's samples
    that led to the same answer.
    """

    example_id: str
    annotation: Annotation
    compared_with: Literal["gold", "votes", "teacher"]
    reason: RejectionReason | None
    confidence: float | None = None


@dataclass(frozen=True)
class Entries:
    """The entries of the soft targets of N positions, concatenated.

    `ends_N` is the end of each position's entries. It stays on the host, so that chunking by it does not wait for
    the device. `tail_N` is the mass of all other ids; None if there is no tail.
    """

    ends_N: np.ndarray
    position_E: Int[Tensor, "E"]
    ids_E: Int[Tensor, "E"]
    logprobs_E: Float[Tensor, "E"]
    tail_N: Float[Tensor, "N"] | None

    def to(self, device: torch.device) -> Entries:
        """Move the tensors to a device."""
        return replace(self, **_tensors_on(self, device))


@dataclass(frozen=True)
class Batch:
    """One microbatch. Sequences are padded on the right; losses ignore padding.

    The label of position n is `label_N[n]`, predicted from hidden state `[sequence_N[n], before_N[n]]`. `target_N`
    numbers the targets, each an answer or a rationale. `is_soft_N` marks positions with soft targets. A token attends
    to earlier tokens of its own branch and of branch 0, the shared beginning; `position_BT` counts along this path.
    `branch_BT` is None without branches. `counts` are the positions per (span, source) in the *whole* optimizer step,
    over all microbatches and processes: the divisors of the losses' sums.
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
    target_N: Int[Tensor, "N"]
    is_soft_N: Bool[Tensor, "N"]
    soft: Entries | None
    counts: Mapping[tuple[Span, str], int]
    example_ids: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """Move the tensors to a device."""
        return replace(self, soft=self.soft and self.soft.to(device), **_tensors_on(self, device))


def _tensors_on(data: Batch | Entries, device: torch.device) -> dict[str, Any]:
    values = {f.name: getattr(data, f.name) for f in fields(data)}
    return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
