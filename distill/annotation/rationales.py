"""Which of a teacher's rationales are worth learning from: they lead to the right answer, and how they do is sound.

What is right is the gold answer; or, where nobody gave one, what most of an example's samples led to
(self-consistency: Wang et al. 2022, arXiv 2203.11171); or, of a single sample, the teacher's direct answer.
Texts alone decide the rest: no model is asked. Every rationale that is not kept has one reason, the first of

    empty, truncated, unreadable        there is nothing to judge
    disagrees, outvoted                 it led to another answer
    wrong arithmetic, too short, too long, repetitive, foreign, leaks the answer
    near duplicate, surplus             another one that was kept says the same, or there are enough of the example
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
from distill.records import Annotation, CheckedRationale, Example, Reason, content_id
from distill.tasks.expressions import NUMBER, value_of

By = Literal["gold", "votes", "teacher"]
Shingles = frozenset[tuple[str, ...]]
# A sign of a script that writes no spaces between words counts as a word.
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+(?:[.,'’][^\W぀-ヿ㐀-鿿]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?:\s|$)|[。！？\n]")

_OPERAND = rf"(?:\( ?)*(?:-?\$?|\$-){NUMBER}(?: ?%)?(?: ?\))*"
_SIGN = r"[-+*/×÷−–]"
_TERM = rf"(?: ?(?:{_SIGN}|x) ?{_OPERAND})"
_EQUALS = r" ?(?:==?|equals|is equal to) ?"
# Not from the middle of a run of brackets: what cannot begin at its first cannot begin at any, and there may be many.
_CHAIN = re.compile(rf"(?<!\()(?<!\( ){_OPERAND}{_TERM}*(?:{_EQUALS}{_OPERAND}{_TERM}*)*")
# What stands before a first side, or after a last one, of which only a part was found.
_BEFORE = re.compile(
    r"[\w.:,^!)}%$]$|(?:\d|\([^()]*\)|[^\s(] ?[-+*/×÷−–^]|\b(?:x|of|times|plus|minus|by|over|twice|half|double)) ?$"
)
_AFTER = re.compile(
    rf"[.,:]\d| ?(?:\d|r ?\d|[\^!]|(?:{_SIGN}|x) ?[\w($]|(?:k|bn)\b|hundred|thousand|[mb]illion|dozen)"
    r"| ?(?:(?:with|and) )?(?:a )?(?:r\b|rem|\d+ (?:is |are )?(?:left|over|remain))"
)
_LOOK_BACK = 12  # characters: more than the longest of these words
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
class Checks:
    """What is asked of a rationale, the right answer apart.

    `min_confidence`   share of an example's samples that the answer with the most votes needs to be believed.
    `arithmetic`       every equation in the text that can be worked out is true.
    `min_words`, `max_words`   how long it may be; a sign of Chinese or Japanese is a word.
    `max_repetition`   share of the sentences, or of the runs of four words, that were there before.
    `script`           most letters are of this script, as Unicode names it: LATIN, CYRILLIC, CJK, ...
    `leak`             it does not give the answer in the place of reasoning: it is neither the answer alone, with
                       or without words like "it is" or "the answer is" before it, nor begins with words of the latter
                       kind. An answer that ends a calculation, or is spoken of later on, is no leak.
    `near_duplicates`  Jaccard similarity of two examples' sets of three-word runs from which the later is left out.
    `per_example`      how many rationales of an example are kept.
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
        """Raise ConfigError with every value that cannot be meant."""
        longest, near = math.inf if self.max_words is None else self.max_words, self.near_duplicates
        wanted = {
            f"min_confidence={self.min_confidence}: wanted a share, 0 ... 1": 0 <= self.min_confidence <= 1,
            f"min_words={self.min_words}, max_words={self.max_words}: wanted 0 <= min_words <= max_words": (
                0 <= self.min_words <= longest
            ),
            f"max_repetition={self.max_repetition}: wanted a share, 0 ... 1": 0 <= self.max_repetition <= 1,
            f"script={self.script}: no letter has this word in its Unicode name; wanted LATIN, CYRILLIC, ...": (
                self.script is None or _is_script(self.script)
            ),
            f"near_duplicates={near}: wanted a similarity above 0 and at most 1, or null": near is None
            or 0 < near <= 1,
            f"per_example={self.per_example}: wanted 1 or more, or null for all": (
                self.per_example is None or self.per_example > 0
            ),
        }
        broken = [f"rationales.{problem}" for problem, holds in wanted.items() if not holds]
        if broken:
            raise ConfigError(*broken)

    def reason(self, text: str, answer: str) -> Reason | None:
        """What is wrong with a text that led to this answer, the right one."""
        words = _words(text)
        found: list[tuple[Reason, Callable[[], bool]]] = [
            ("wrong arithmetic", lambda: self.arithmetic and has_wrong_arithmetic(text)),
            ("too short", lambda: len(words) < self.min_words),
            ("too long", lambda: self.max_words is not None and len(words) > self.max_words),
            ("repetitive", lambda: repetition(text) > self.max_repetition),
            ("foreign", lambda: self.script is not None and is_foreign(text, self.script)),
            ("leaks the answer", lambda: self.leak and leaks(text, answer)),
        ]
        return next((reason for reason, holds in found if holds()), None)


def check(
    examples: Sequence[Example],
    samples: Mapping[str, Sequence[Annotation]],
    direct: Mapping[str, str],
    value: Callable[[str], str],
    checks: Checks,
) -> list[CheckedRationale]:
    """Say of each of the teacher's rationales whether it is to be learned from, in the order of examples and samples.

    `samples` are what the teacher left for requests of a rationale, `direct` its answers without reasoning, both by
    example id; two answers agree where `value` makes the same of them. An example with one sample, no gold and no
    direct answer is left out: nothing can be said of it. `checks` judge those that led to the right answer.
    """
    found = []
    for example in examples:
        for one in _compared(example, samples.get(example.id, ()), direct.get(example.id), value, checks):
            text, answer = one.annotation.rationale, one.annotation.answer
            is_right = one.reason is None and text is not None and answer is not None
            found.append(replace(one, reason=checks.reason(text or "", answer or "")) if is_right else one)
    return _without_repeats(found, checks)


def yield_by_reason(checked: Iterable[CheckedRationale]) -> dict[str, int]:
    """How many rationales were kept, and how many were not, by the reason."""
    counts = Counter(one.reason or "kept" for one in checked)
    return {"kept": counts.pop("kept", 0), **dict(counts.most_common())}


def _compared(
    example: Example,
    samples: Sequence[Annotation],
    direct: str | None,
    value: Callable[[str], str],
    checks: Checks,
) -> list[CheckedRationale]:
    """Each sample beside what is known; what is cut off has no vote, for its answer may be half of one."""
    votes = Counter(value(one.answer) for one in samples if one.answer is not None and not one.is_truncated)

    def compared(one: Annotation, by: By, known: str | None) -> CheckedRationale:
        found = None if one.answer is None else value(one.answer)
        reason = _unusable(one) or (None if found == known else "outvoted" if by == "votes" else "disagrees")
        has_share = len(samples) > 1 and found is not None
        return CheckedRationale(example.id, one, by, reason, votes[found or ""] / len(samples) if has_share else None)

    if example.answer is not None:
        known = value(example.answer)
        return [compared(one, "gold", known) for one in samples]
    if len(samples) > 1:
        winner = _winner(votes, len(samples), checks.min_confidence)
        return [compared(one, "votes", winner) for one in samples]
    return [] if direct is None else [compared(one, "teacher", value(direct)) for one in samples]


def _winner(votes: Counter[str], number: int, min_share: float) -> str | None:
    """What has the most votes, and of all so many as it needs; a tie has no winner."""
    (first, most), (_, second) = [*votes.most_common(2), ("", 0), ("", 0)][:2]
    return first if most > second and most / number >= min_share else None


def _unusable(annotation: Annotation) -> Reason | None:
    if not (annotation.rationale or "").strip():
        return "empty"
    if annotation.is_truncated:
        return "truncated"
    return "unreadable" if annotation.answer is None else None


def _without_repeats(checked: Sequence[CheckedRationale], checks: Checks) -> list[CheckedRationale]:
    """Of what was right so far, texts that stand for themselves, and so many of an example as are wanted."""
    texts = [one.annotation.rationale or "" for one in checked if one.reason is None]
    near = None if checks.near_duplicates is None else _NearDuplicates(texts, checks.near_duplicates)
    seen, num_kept, found = set[tuple[str, str]](), Counter[str](), list[CheckedRationale]()
    for one in checked:
        text, reason = one.annotation.rationale or "", one.reason
        if reason is None:
            same = (one.example_id, content_id(text))
            if same in seen or (near is not None and near.holds(text, one.example_id)):
                reason = "near duplicate"
            elif checks.per_example is not None and num_kept[one.example_id] >= checks.per_example:
                reason = "surplus"
            else:
                num_kept[one.example_id] += 1
                if near is not None:
                    near.add(text, one.example_id)
            seen.add(same)
        found.append(replace(one, reason=reason))
    return found


@final
class _NearDuplicates:
    """Texts that were kept, found again by those that are much like them, without comparing all with all.

    Of two sets with a Jaccard similarity of t or more, each holds at least t of its own entries in common with the
    other. So, with entries in one order, both have one in common among their first |A| - ceil(t |A|) + 1: the prefix
    filter (Chaudhuri et al. 2006; Bayardo et al. 2007). In order of rarity few texts share one, and only these are
    compared, exactly.
    """

    def __init__(self, texts: Iterable[str], similarity: float) -> None:
        self._similarity = similarity
        self._frequency = Counter(shingle for text in texts for shingle in _shingles(text))
        self._kept: dict[tuple[str, ...], list[tuple[str, Shingles]]] = defaultdict(list)

    def add(self, text: str, example_id: str) -> None:
        """Keep a text."""
        shingles = _shingles(text)
        for shingle in self._rare(shingles):
            self._kept[shingle].append((example_id, shingles))

    def holds(self, text: str, example_id: str) -> bool:
        """Whether a text that is much like this one was kept for another example."""
        mine = _shingles(text)
        return any(
            other_id != example_id and len(mine & others) / len(mine | others) >= self._similarity
            for shingle in self._rare(mine)
            for other_id, others in self._kept.get(shingle, ())
        )

    def _rare(self, shingles: Shingles) -> list[tuple[str, ...]]:
        ordered = sorted(shingles, key=lambda shingle: (self._frequency[shingle], shingle))
        # A little less than is needed in common, so that rounding never hides a pair.
        return ordered[: len(ordered) - math.ceil(self._similarity * len(ordered) - 1e-9) + 1]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def _shingles(text: str) -> Shingles:
    """Runs of three words; of fewer words, all of them."""
    words = _words(text)
    return frozenset(_runs(words, min(3, len(words)))) if words else frozenset()


def repetition(text: str) -> float:
    """Share of the sentences, or of the runs of four words, that stood in the text before; the greater of both."""
    sentences = [tuple(_words(sentence)) for sentence in _SENTENCE_END.split(text)]
    return max(_repeated([s for s in sentences if s]), _repeated(_runs(_words(text), 4)))


def _repeated(parts: Sequence[tuple[str, ...]]) -> float:
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def is_foreign(text: str, script: str) -> bool:
    """Whether most letters of a text are of another script than this one; a text without letters is of any."""
    letters = [char for char in text if char.isalpha()]
    return sum(_is_of(char, script) for char in letters) < len(letters) / 2


def _is_of(char: str, script: str) -> bool:
    return script.upper() in unicodedata.name(char, "").split()


def _is_script(script: str) -> bool:
    return any(_is_of(chr(code), script) for code in range(sys.maxunicode) if chr(code).isalpha())


def leaks(text: str, answer: str) -> bool:
    """Whether a text gives the answer in the place of reasoning, as `Checks` says."""
    plain, given = _unquoted(text), re.escape(_unquoted(answer))
    alone = rf"(?:{_ANNOUNCED}|{_CALLED})?{given}[.!]?"
    # Not a number that a calculation begins with.
    first = rf"{_ANNOUNCED}{given}(?!\w|[.,]\d| ?{_SIGN} ?[\d(]| ?[=x] ?\d)"
    return bool(re.fullmatch(alone, plain) or re.match(first, plain))


def _unquoted(text: str) -> str:
    plain = re.sub(r"[\"“”`$*]|(?<!\w)['‘]|['’](?!\w)", "", text.casefold())
    return " ".join(plain.replace("’", "'").split())


def has_wrong_arithmetic(text: str) -> bool:
    """Whether some equation in a text is false. What cannot be worked out, or was found only in part, is not judged.

    A result written with decimals may be rounded to them (10 / 3 = 3.33); a whole one is exact. A per cent may be a
    hundredth (20% * 50 = 10), a unit (20% + 30% = 50%) or relative (50 - 20% = 40). Steps may run on, as in
    2 + 3 = 5 - 1 = 4. The left of an equation has an operation: `x = 4` and `3 feet = 1 yard` are none.
    """
    return any(_is_wrong(sides) for sides in _equations(text))


def _equations(text: str) -> Iterator[list[str]]:
    """The sides of each equation, the first of them with an operation."""
    for line in text.casefold().replace("**", " ").translate(_ROUND).splitlines():
        plain = " ".join(line.split())
        for found in _CHAIN.finditer(plain):
            sides = re.split(_EQUALS, found.group())
            if len(sides) > 1:
                yield _whole(sides, plain, found)


def _whole(sides: list[str], line: str, found: re.Match[str]) -> list[str]:
    """The sides without those of which only a part was found, nor brackets around them all, nor mere numbers first."""
    first, last = sides[0], sides[-1]
    opening, closing = (max(0, n) for n in (first.count("(") - first.count(")"), last.count(")") - last.count("(")))
    sides = [first[opening:], *sides[1:-1], last[: len(last) - closing]]
    if _AFTER.match(line, found.end()):
        sides.pop()
    start = found.start() + opening
    # A stroke at the beginning of a line may be a minus, or open an item of a list.
    is_part = _BEFORE.search(line[max(0, start - _LOOK_BACK) : start]) or (start == 0 and first.startswith("-"))
    return list(dropwhile(_NO_OPERATION.fullmatch, sides[1:] if is_part else sides))


def _is_wrong(sides: Sequence[str]) -> bool:
    for place, (left, right) in enumerate(pairwise(sides)):
        runs_on = place + 2 < len(sides)
        if _is_false(left, right) and not (runs_on and not _is_false(left, _first_number(right))):
            return True
    return False


def _first_number(side: str) -> str:
    found = re.search(rf"-?\$?{NUMBER}(?: ?%)?", side)
    return found.group() if found else side


def _is_false(left: str, right: str) -> bool:
    """Whether two sides differ in each way in which per cents can be read."""
    try:
        readings = zip(_values(left), _values(right), _roundings(right), strict=True)
        return all(abs(value - result) > rounding for value, result, rounding in readings)
    except ValueError:
        return False


def _values(side: str) -> list[Fraction]:
    """What a side comes to with its per cents as hundredths, as units, and relative to what they are added to."""
    relative = _RELATIVE.sub(r"*(1\1\2/100)", side)
    readings = [_SHARE.sub(r"(\1/100)", side), side.replace("%", ""), _SHARE.sub(r"(\1/100)", relative)]
    return [value_of(reading.replace("x", "*")) for reading in readings]


def _roundings(side: str) -> list[Fraction]:
    """By how much a result may be off in each of these readings: half of its last digit."""
    found = _RESULT.fullmatch(side)
    digits, percent = found.groups() if found else (None, "")
    if not digits and not percent:
        return [Fraction(0)] * 3
    half = Fraction(1, 2 * 10 ** len(digits or ""))
    return [half / 100, half, half / 100] if percent else [half] * 3
