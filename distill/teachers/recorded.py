"""Answers and rationales that were given elsewhere, by a model that is not here, in files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from torch import nn

from distill.cache import Codec
from distill.errors import ConfigError
from distill.prompts.cues import Prompts
from distill.records import Annotation, Example, Request, content_id
from distill.tasks import Task, readable_answer
from distill.tasks.tables import check_columns, composed, pieces_of, read_file, refuse, text_of


@final
class RecordedTeacher:
    """What stands in files, a row for each question; several rows of one question are its samples.

    There are no distributions in a text, so there are no soft targets. A question that is in no row gets neither
    answer nor rationale.
    """

    gives_soft_targets = False

    def __init__(
        self,
        *,
        folder: Path,
        prompts: Prompts,
        task: Task,
        calibration: Sequence[Example],
        codec: Codec,
        files: list[str],
        question: str,
        answer: str,
        rationale: str | None,
    ) -> None:
        """`question`, `answer` and `rationale` name columns; the rest is what every teacher is given."""
        self._prompts, self._task = prompts, task
        self._files = [Path(file) for file in files]
        self._columns = {"question": question, "answer": answer, "rationale": rationale}
        self._rows: dict[str, list[dict[str, str]]] = {}
        absent = [str(file) for file in self._files if not file.is_file()]
        if absent or not files:
            found = f"there is no file {', '.join(absent)}" if absent else "none is named"
            raise ConfigError(f"teacher.kind.files: {found}; wanted those with the teacher's answers")

    def fingerprint(self) -> dict[str, Any]:
        """The files' content, how they are read, and the prompts that requests are made with."""
        content = [hashlib.sha256(file.read_bytes()).hexdigest() for file in self._files]
        return {"recorded": content, "columns": self._columns, "prompts": self._prompts.fingerprint()}

    def load(self) -> nn.Module:
        """Read the files; there is no model."""
        question, *others = self._columns.values()
        for table in map(read_file, self._files):
            check_columns(table, [name for name in others if name])
            pieces = pieces_of(table, str(question))
            problems = []
            for place, row in table.rows.items():
                try:
                    texts = {key: text_of(row.get(name)) if name else "" for key, name in self._columns.items()}
                    self._rows.setdefault(content_id(composed(row, pieces)), []).append(texts)
                except (ValueError, RecursionError) as error:
                    problems.append(f"{place}: {error}")
            refuse(table.name, problems, "a question and texts in each row")
        return nn.Module()

    def close(self) -> None:
        """Let go of the rows."""
        self._rows = {}

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        """What stands in the files."""
        return [self._found(request) for request in requests]

    def _found(self, request: Request) -> Annotation:
        rows = self._rows.get(request.example.id, [])
        if request.sample >= len(rows):
            return Annotation(request.key, {}, None)
        row = rows[request.sample]
        rationale = row["rationale"] if request.span == "rationale" else None
        return Annotation(request.key, {}, readable_answer(self._task, row["answer"]), rationale)
