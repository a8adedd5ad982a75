"""Generated one- and two-step word problems with gold rationales; reproducible by seed, no download."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import final

from distill.errors import AnswerError, ConfigError
from distill.records import Example, Splits
from distill.tasks.numerals import read_number
from distill.tasks.splitting import cut, make_splits

_NAMES = ("Ada", "Ben", "Chloe", "Dan", "Eva", "Finn", "Grace", "Hugo", "Iris", "Jon", "Kim", "Leo")
_THINGS = ("apples", "books", "coins", "pens", "shells", "stamps", "tickets", "stones", "cards", "eggs")


@final
class Arithmetic:
    """Addition and subtraction problems; answers are whole numbers."""

    version = "1"
    is_free_text = False
    choices: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        num_labelled: int,
        num_unlabelled: int,
        num_validation: int,
        num_test: int,
        num_shots: int,
        max_number: int,
        max_steps: int,
        split_seed: int,
    ) -> None:
        """`max_steps` (1 or 2) is the largest number of operations in a problem."""
        if max_steps not in (1, 2):
            raise ConfigError(f"task.max_steps={max_steps}: expected 1 or 2")
        self._sizes = (num_test, num_validation, num_shots, num_labelled, num_unlabelled)
        self._max_number, self._max_steps, self._split_seed = max_number, max_steps, split_seed

    def splits(self) -> Splits:
        """Disjoint, since all generated problems are distinct."""
        test, validation, _, labelled, unlabelled = self._problems()
        return make_splits(labelled=labelled, unlabelled=unlabelled, validation=validation, test=test)

    def shots(self) -> Sequence[Example]:
        """Further problems that are in no split."""
        return self._problems()[2]

    def read_answer(self, text: str, example: Example) -> str:
        """Read the first number in the text, which must be whole."""
        number, _ = read_number(0, text)
        if "." in number:
            raise AnswerError(f"{text[:60]!r} has no whole number")
        return number

    def value(self, answer: str) -> str:
        """The answer itself."""
        return answer

    def is_same(self, answer: str, reference: str) -> bool:
        """Whether the answers are equal."""
        return answer == reference

    def _problems(self) -> list[list[Example]]:
        rng = random.Random(self._split_seed)
        distinct: dict[str, Example] = {}
        for _ in range(20 * sum(self._sizes)):
            example = _problem(rng, self._max_number, rng.randint(1, self._max_steps))
            distinct.setdefault(example.id, example)
            if len(distinct) == sum(self._sizes):
                break
        else:
            raise ConfigError(f"max_number={self._max_number} allows too few distinct problems; increase it")
        return cut(list(distinct.values()), self._sizes)[:-1]


def _problem(rng: random.Random, max_number: int, num_steps: int) -> Example:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    have, more = rng.randint(2, max_number), rng.randint(2, max_number)
    total = have + more
    question = f"{name} has {have} {thing} and gets {more} more."
    rationale = f"{have} + {more} = {total}."
    if num_steps == 2:
        less = rng.randint(1, total - 1)
        question += f" Then {name} gives {less} away."
        rationale += f" {total} - {less} = {total - less}."
        total -= less
    return Example(f"{question} How many {thing} does {name} have now?", str(total), rationale)
