"""Filtering of a teacher's rationales: kept ones lead to the right answer by sound reasoning.

The right answer is the gold answer; without one, the majority answer of an example's samples (self-consistency: Wang
et al. 2022, arXiv 2203.11171); for a single sample, the teacher's direct answer. The other filters read the text
alone and use no model. A rejected rationale has a single reason, the first of

    unmatched                           a recording has none for the question
    empty, truncated, unreadable        no complete text or no answer
    no reference                        neither a gold answer nor a readable direct answer to compare with
    disagrees, outvoted                 it led to another answer
    wrong arithmetic, too short, too long, repetitive, foreign, leaks the answer
    near duplicate, surplus             a similar one was kept, or enough of the example were kept
"""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import dropwhile, pairwise
from typing import Literal, final

from distill.errors import ConfigError
from distill.records import Annotation, Example, FilteredRationale, RejectionReason, folded_id
from distill.tasks.expressions import NUMBER, evaluate_expression

Reference = Literal["gold", "votes", "teacher"]
Shingles = frozenset[tuple[str, ...]]
# In scripts without spaces between words each character counts as a word.
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+(?:[.,'’][^\W぀-ヿ㐀-鿿]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?:\s|$)|[。！？\n]")

_OPERAND = rf"(?:\( ?)*(?:-?\$?|\$-){NUMBER}(?: ?%)?(?: ?\))*"
_SIGN = r"[-+*/×÷−–]"
_TERM = rf"(?: ?(?:{_SIGN}|x) ?{_OPERAND})"
_EQUALS = r" ?(?:==?|equals|is equal to) ?"
# Never starts inside a run of brackets: if no match starts at the first bracket, none starts at the others either.
_CHAIN = re.compile(rf"(?<!\()(?<!\( ){_OPERAND}{_TERM}*(?:{_EQUALS}{_OPERAND}{_TERM}*)*")
# Context that shows that only a part of the first or of the last side was matched.
_BEFORE = re.compile(
    r"[\w.:,^!)}%$]$|(?:\d|\([^()]*\)|[^\s(] ?[-+*/×÷−–^]|\b(?:x|of|times|plus|minus|by|over|twice|half|double)) ?$"
)
_AFTER = re.compile(
    rf"[.,:]\d| ?(?:\d|r ?\d|[\^!]|(?:{_SIGN}|x) ?[\w($]|(?:k|bn)\b|hundred|thousand|[mb]illion|dozen)"
    r"| ?(?:(?:with|and) )?(?:a )?(?:r\b|rem|\d+ (?:is |are )?(?:left|over|remain))"
)
_LOOK_BACK = 12  # characters: longer than all words of _BEFORE
_NO_OPERATION = re.compile(rf" ?{_OPERAND}")
_ROUND = str.maketrans("[]", "()")
_SHARE = re.compile(rf"({NUMBER}) ?%")
_RELATIVE = re.compile(rf"([-+]) ?({NUMBER}) ?%")
_RESULT = re.compile(r"[-$\d, ]*(?:\.(\d+))? ?(%?)")

_LEAD = r"(?:(?:so|thus|hence|therefore|then)\b,? )?"
_LABEL = r"(?:answer|label|result|solution|class|category|choice|sentiment|verdict|rating|conclusion)"
_ANNOUNCED = (
    rf"{_LEAD}(?:(?:the|my|our|its) )?(?:(?:final|correct|right) )?{_LABEL} ?(?:is|would be|should be|must be|:|=) ?"
)
_CALLED = rf"{_LEAD}(?:it is|it's|this is|that is|that's) "


@final
@dataclass(frozen=True, kw_only=True)
class RationaleFilter:
    """Criteria for keeping a rationale.

    `min_confidence`   minimum share of an example's samples for the majority answer to count as right.
    `arithmetic`       reject texts with a false equation; equations that cannot be evaluated are ignored.
    `min_words`, `max_words`   allowed length; each Chinese or Japanese character is a word.
    `max_repetition`   maximum share of the sentences, or of the four-word runs, that repeat an earlier one.
    `script`           required script of most letters, by its name in Unicode: LATIN, CYRILLIC, CJK, ...
    `leak`             reject texts that state the answer instead of reasoning: the answer alone, possibly after words
                       like "it is" or "the answer is", or a text that begins with "the answer is ...". An answer at
                       the end of a calculation or later in the text is no leak.
    `near_duplicates`  minimum Jaccard similarity of the three-word runs to reject a text as a near duplicate of one
                       kept for another example.
    `per_example`      maximum number of rationales kept per example.
    """

    min_confidence: float
    arithmetic: bool
    min_words: int
    max_words: int | None
    max_repetition: float
    script: str | None
    leak: bool
    near_duplicates: float | None
    per_example: int | None

    def __post_init__(self) -> None:
        """Raise ConfigError with all invalid values."""
        longest, near = math.inf if self.max_words is None else self.max_words, self.near_duplicates
        conditions = {
            f"min_confidence={self.min_confidence}: expected a share, 0 ... 1": 0 <= self.min_confidence <= 1,
            f"min_words={self.min_words}, max_words={self.max_words}: expected 0 <= min_words <= max_words": (
                0 <= self.min_words <= longest
            ),
            f"max_repetition={self.max_repetition}: expected a share, 0 ... 1": 0 <= self.max_repetition <= 1,
            f"script={self.script}: no letter has this word in its Unicode name; expected LATIN, CYRILLIC, ...": (
                self.script is None or _is_script(self.script)
            ),
            f"near_duplicates={near}: expected a similarity above 0 and at most 1, or null": near is None
            or 0 < near <= 1,
            f"per_example={self.per_example}: expected at least 1, or null for all": (
                self.per_example is None or self.per_example > 0
            ),
        }
        problems = [f"rationales.{problem}" for problem, is_valid in conditions.items() if not is_valid]
        if problems:
            raise ConfigError(*problems)

    def rejection_reason(self, text: str, answer: str) -> RejectionReason | None:
        """Return why to reject a text that led to the right answer, or None to keep it."""
        words = _words(text)
        criteria: list[tuple[RejectionReason, Callable[[], bool]]] = [
            ("wrong arithmetic", lambda: self.arithmetic and has_wrong_arithmetic(text)),
            ("too short", lambda: len(words) < self.min_words),
            ("too long", lambda: self.max_words is not None and len(words) > self.max_words),
            ("repetitive", lambda: repetition(text) > self.max_repetition),
            ("foreign", lambda: self.script is not None and is_foreign(text, self.script)),
            ("leaks the answer", lambda: self.leak and leaks(text, answer)),
        ]
        return next((reason for reason, is_met in criteria if is_met()), None)


def filter_samples(
    examples: Sequence[Example],
    samples: Mapping[str, Sequence[Annotation]],
    direct: Mapping[str, str],
    value: Callable[[str], str],
    criteria: RationaleFilter,
    is_same: Callable[[str, str], bool] | None = None,
) -> list[FilteredRationale]:
    """Keep or reject each of the teacher's rationales, in the order of examples and samples.

    `samples` are the annotations of rationale requests, `direct` the teacher's direct answers, both by example id.
    Samples with equal values vote together. An answer agrees with a reference if `is_same` says so of both, by default
    if their values are equal. Every sample has its entry in the result, so none
    is lost without a reason. `criteria` apply to rationales that led to the right answer.
    """
    rationales, agrees = [], is_same or (lambda answer, reference: value(answer) == value(reference))
    for example in examples:
        of_example = samples.get(example.id, ()), direct.get(example.id)
        for rationale in _compare(example, *of_example, value, agrees, criteria):
            text, answer = rationale.annotation.rationale, rationale.annotation.answer
            if rationale.reason is None and text is not None and answer is not None:
                rationale = replace(rationale, reason=criteria.rejection_reason(text, answer))
            rationales.append(rationale)
    return _reject_repeats(rationales, criteria)


def count_by_reason(rationales: Iterable[FilteredRationale]) -> dict[str, int]:
    """Count kept rationales, and rejected ones by their reason."""
    counts = Counter(rationale.reason or "kept" for rationale in rationales)
    return {"kept": counts.pop("kept", 0), **dict(counts.most_common())}


def _compare(
    example: Example,
    samples: Sequence[Annotation],
    direct: str | None,
    value: Callable[[str], str],
    is_same: Callable[[str, str], bool],
    criteria: RationaleFilter,
) -> list[FilteredRationale]:
    """Compare the samples' answers with the reference. A truncated sample has no vote: its answer may be cut off."""
    votes = Counter(value(s.answer) for s in samples if s.answer is not None and not s.is_truncated)

    def compare(
        sample: Annotation, reference: Reference, right: Sequence[str], wrong: RejectionReason
    ) -> FilteredRationale:
        answer = sample.answer
        is_right = answer is not None and any(is_same(answer, reference) for reference in right)
        reason = sample.defect or (None if is_right else wrong)
        has_votes = len(samples) > 1 and answer is not None
        confidence = votes[value(answer)] / len(samples) if has_votes and answer is not None else None
        return FilteredRationale(example.id, sample, reference, reason, confidence)

    if example.answer is not None:
        return [compare(sample, "gold", example.right_answers, "disagrees") for sample in samples]
    if len(samples) > 1:
        winner = _winner(votes, len(samples), criteria.min_confidence)
        answers = [s.answer for s in samples if s.answer is not None and value(s.answer) == winner]
        return [compare(sample, "votes", answers[:1], "outvoted") for sample in samples]
    if direct is None:
        return [compare(sample, "teacher", [], "no reference") for sample in samples]
    return [compare(sample, "teacher", [direct], "disagrees") for sample in samples]


def _winner(votes: Counter[str], num_samples: int, min_share: float) -> str | None:
    """Return the answer with the most votes, if these are at least `min_share` of the samples and not tied."""
    (first, num_first), (_, num_second) = [*votes.most_common(2), ("", 0), ("", 0)][:2]
    return first if num_first > num_second and num_first / num_samples >= min_share else None


def _reject_repeats(rationales: Sequence[FilteredRationale], criteria: RationaleFilter) -> list[FilteredRationale]:
    """Reject near duplicates of kept rationales, and those beyond the number to keep per example."""
    texts = [rationale.annotation.rationale or "" for rationale in rationales if rationale.reason is None]
    near = None if criteria.near_duplicates is None else _NearDuplicates(texts, criteria.near_duplicates)
    seen, num_kept, results = set[tuple[str, str]](), Counter[str](), list[FilteredRationale]()
    for rationale in rationales:
        text, example_id, reason = rationale.annotation.rationale or "", rationale.example_id, rationale.reason
        if reason is None:
            identity = (example_id, folded_id(text))
            if identity in seen or (near is not None and near.has_similar(text, example_id)):
                reason = "near duplicate"
            elif criteria.per_example is not None and num_kept[example_id] >= criteria.per_example:
                reason = "surplus"
            else:
                num_kept[example_id] += 1
                if near is not None:
                    near.add(text, example_id)
            seen.add(identity)
        results.append(replace(rationale, reason=reason))
    return results


@final
class _NearDuplicates:
    """Exact search for similar kept texts without comparing all pairs.

    If two sets have a Jaccard similarity of at least t, they share at least t of the elements of each. With all
    elements in one order, they then share one of their first |A| - ceil(t |A|) + 1 elements: the prefix filter
    (Chaudhuri et al. 2006; Bayardo et al. 2007). Ordered by rarity, few texts share these elements, and only such
    texts are compared, exactly.

    MinHash with 128 permutations missed up to 1 pair in 50 even with exact comparison of its candidates (datasketch
    2.0, 1.5 times as slow; rensa 0.5 took a third of the time, but missed 1 pair in 100 at t = 0.5).
    """

    def __init__(self, texts: Sequence[str], similarity: float) -> None:
        self._similarity = similarity
        self._shingles = {text: _shingles(text) for text in texts}
        self._frequency = Counter(shingle for text in texts for shingle in self._shingles[text])
        self._kept: dict[tuple[str, ...], list[tuple[str, Shingles]]] = defaultdict(list)

    def add(self, text: str, example_id: str) -> None:
        """Add a kept text, one of the constructor's `texts`."""
        shingles = self._shingles[text]
        for shingle in self._rare(shingles):
            self._kept[shingle].append((example_id, shingles))

    def has_similar(self, text: str, example_id: str) -> bool:
        """Whether a similar text was kept for another example."""
        shingles = self._shingles[text]
        return any(
            other_id != example_id and len(shingles & others) / len(shingles | others) >= self._similarity
            for shingle in self._rare(shingles)
            for other_id, others in self._kept.get(shingle, ())
        )

    def _rare(self, shingles: Shingles) -> list[tuple[str, ...]]:
        ordered = sorted(shingles, key=lambda shingle: (self._frequency[shingle], shingle))
        # Subtract 1e-9 so that rounding never hides a pair.
        return ordered[: len(ordered) - math.ceil(self._similarity * len(ordered) - 1e-9) + 1]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def _shingles(text: str) -> Shingles:
    """Runs of three words; a single shorter run if the text has fewer words."""
    words = _words(text)
    return frozenset(_runs(words, min(3, len(words)))) if words else frozenset()


def repetition(text: str) -> float:
    """Share of the sentences, or of the four-word runs, that repeat an earlier one; the greater of both."""
    sentences = [tuple(_words(sentence)) for sentence in _SENTENCE_END.split(text)]
    return max(_repeated([s for s in sentences if s]), _repeated(_runs(_words(text), 4)))


def _repeated(parts: Sequence[tuple[str, ...]]) -> float:
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def is_foreign(text: str, script: str) -> bool:
    """Whether less than half of a text's letters are of this script; False for a text without letters."""
    letters = [char for char in text if char.isalpha()]
    return sum(_is_in_script(char, script) for char in letters) < len(letters) / 2


def _is_in_script(char: str, script: str) -> bool:
    return script.upper() in unicodedata.name(char, "").split()


def _is_script(script: str) -> bool:
    return any(_is_in_script(chr(code), script) for code in range(sys.maxunicode) if chr(code).isalpha())


def leaks(text: str, answer: str) -> bool:
    """Whether a text states the answer instead of reasoning, as described in `RationaleFilter`."""
    plain, answer_pattern = _unquoted(text), re.escape(_unquoted(answer))
    alone = rf"(?:{_ANNOUNCED}|{_CALLED})?{answer_pattern}[.!]?"
    # A number at the beginning of a calculation is no leak.
    first = rf"{_ANNOUNCED}{answer_pattern}(?!\w|[.,]\d| ?{_SIGN} ?[\d(]| ?[=x] ?\d)"
    return bool(re.fullmatch(alone, plain) or re.match(first, plain))


def _unquoted(text: str) -> str:
    plain = re.sub(r"[\"“”`$*]|(?<!\w)['‘]|['’](?!\w)", "", text.casefold())
    return " ".join(plain.replace("’", "'").split())


def has_wrong_arithmetic(text: str) -> bool:
    """Whether a text contains a false equation. Equations that cannot be evaluated or matched whole are ignored.

    A result with decimals may be rounded to them (10 / 3 = 3.33); a whole result must be exact. A percentage may be a
    fraction (20% * 50 = 10), a unit (20% + 30% = 50%) or relative (50 - 20% = 40). Steps may be chained, as in
    2 + 3 = 5 - 1 = 4. The left side must contain an operation: `x = 4` and `3 feet = 1 yard` are not equations.
    """
    return any(_is_wrong(sides) for sides in _equations(text))


def _equations(text: str) -> Iterator[list[str]]:
    """Yield the sides of each equation; the first side has an operation."""
    for line in text.casefold().replace("**", " ").translate(_ROUND).splitlines():
        plain = " ".join(line.split())
        for match in _CHAIN.finditer(plain):
            sides = re.split(_EQUALS, match.group())
            if len(sides) > 1:
                yield _complete_sides(sides, plain, match)


def _complete_sides(sides: list[str], line: str, match: re.Match[str]) -> list[str]:
    """Drop sides that were matched only in part, brackets around all sides, and leading sides without operation."""
    first, last = sides[0], sides[-1]
    opening, closing = (max(0, n) for n in (first.count("(") - first.count(")"), last.count(")") - last.count("(")))
    sides = [first[opening:], *sides[1:-1], last[: len(last) - closing]]
    if _AFTER.match(line, match.end()):
        sides.pop()
    start = match.start() + opening
    # A hyphen at the beginning of a line may be a minus sign or the bullet of a list.
    is_part = _BEFORE.search(line[max(0, start - _LOOK_BACK) : start]) or (start == 0 and first.startswith("-"))
    return list(dropwhile(_NO_OPERATION.fullmatch, sides[1:] if is_part else sides))


def _is_wrong(sides: Sequence[str]) -> bool:
    for number, (left, right) in enumerate(pairwise(sides)):
        is_chained = number + 2 < len(sides)
        if _is_false(left, right) and not (is_chained and not _is_false(left, _first_number(right))):
            return True
    return False


def _first_number(side: str) -> str:
    match = re.search(rf"-?\$?{NUMBER}(?: ?%)?", side)
    return match.group() if match else side


def _is_false(left: str, right: str) -> bool:
    """Whether two sides differ under every interpretation of percentages."""
    try:
        readings = zip(_values(left), _values(right), _roundings(right), strict=True)
        return all(abs(value - result) > rounding for value, result, rounding in readings)
    except ValueError:
        return False


def _values(side: str) -> list[Fraction]:
    """Evaluate a side with percentages as fractions, as units, and relative to the number before them."""
    relative = _RELATIVE.sub(r"*(1\1\2/100)", side)
    readings = [_SHARE.sub(r"(\1/100)", side), side.replace("%", ""), _SHARE.sub(r"(\1/100)", relative)]
    return [evaluate_expression(reading.replace("x", "*")) for reading in readings]


def _roundings(side: str) -> list[Fraction]:
    """Return the rounding error allowed for a result, half of its last digit, in each of these interpretations."""
    match = _RESULT.fullmatch(side)
    digits, percent = match.groups() if match else (None, "")
    if not digits and not percent:
        return [Fraction(0)] * 3
    half = Fraction(1, 2 * 10 ** len(digits or ""))
    return [half / 100, half, half / 100] if percent else [half] * 3
