"""Short instructions on texts of another task, without gold answers: only the teacher's can be learned."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import final

from distill.errors import ConfigError
from distill.records import Example, Splits
from distill.tasks import Task
from distill.tasks.answers import AnswerFormat
from distill.tasks.splitting import cut, make_splits


@final
class Instructions:
    """Each text of a task with one of the instructions, in turn. Answers are free text."""

    version = "1"
    is_free_text = True
    choices: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        texts: Task,
        instructions: list[str],
        num_train: int,
        num_validation: int,
        num_test: int,
        split_seed: int,
    ) -> None:
        """`texts` is the task whose questions are the texts."""
        if not instructions or len(set(instructions)) < len(instructions):
            raise ConfigError(f"task.examples.instructions={instructions}: expected at least 1, all of them different")
        self._texts, self._instructions = texts, instructions
        self._sizes = {"num_test": num_test, "num_validation": num_validation, "num_train": num_train}
        self._split_seed = split_seed
        self._format = AnswerFormat(kind="text", pattern=None, choices=[])

    def splits(self) -> Splits:
        """Draw the splits from the texts, shuffled by the seed."""
        splits = self._texts.splits()
        texts = [example.question for part in (splits.test, splits.validation, splits.train) for example in part]
        if len(texts) < sum(self._sizes.values()):
            sizes = ", ".join(f"task.examples.{name}={size}" for name, size in self._sizes.items())
            raise ConfigError(f"{sizes}: there are {len(texts)} texts; lower these numbers")
        random.Random(self._split_seed).shuffle(texts)
        pairs = zip(itertools.cycle(self._instructions), texts, strict=False)
        examples = [Example(f"{instruction}\n\n{text}") for instruction, text in pairs]
        test, validation, train, rest = cut(examples, self._sizes.values())
        lost = sum((Counter(counts.lost) for counts in splits.counts.values()), Counter({"over num_train": len(rest)}))
        return make_splits(labelled=(), unlabelled=train, validation=validation, test=test, lost=lost)

    def shots(self) -> Sequence[Example]:
        """None: an instruction needs no demonstration."""
        return ()

    def read_answer(self, text: str, example: Example) -> str:
        """The whole text, which may have several lines."""
        return self._format.read(text)

    def value(self, answer: str) -> str:
        """The answer itself."""
        return answer

    def is_same(self, answer: str, reference: str) -> bool:
        """Whether the texts are equal."""
        return answer == reference
