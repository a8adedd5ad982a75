"""A teacher whose answers and rationales were recorded in files, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from torch import nn

from distill.app.console import say
from distill.app.files import sha256
from distill.app.fingerprint import arguments_of, fingerprint_of
from distill.cache import Cut
from distill.errors import ConfigError
from distill.prompts.rendering import Prompts
from distill.records import Annotation, Request, content_id
from distill.tasks import Task, readable_answer
from distill.tasks.columns import with_columns
from distill.tasks.tables import matching_files, raise_problems, read_file
from distill.tasks.texts import joined_text, question_layout, text_of
from distill.teachers import Calibration


@final
class RecordedTeacher:
    """Reads annotations from files with a row per question; several rows of a question are its samples.

    Texts have no distributions, so there are no soft targets. A question without a row gets neither answer nor
    rationale.
    """

    gives_soft_targets = False
    # The recording holds the answers: no weights are read, no choices scored, no distributions stored.
    not_in_key = ("folder", "hashes", "calibration", "codec")

    def __init__(
        self,
        *,
        folder: Path,
        hashes: Path,
        prompts: Prompts,
        task: Task,
        calibration: Calibration,
        codec: Cut,
        files: list[str],
        question: str,
        answer: str,
        rationale: str | None,
    ) -> None:
        """`question`, `answer` and `rationale` are columns of `files`; all teachers have the other arguments."""
        self._arguments = arguments_of(locals())
        self._prompts, self._task = prompts, task
        matches = {file: matching_files(file) for file in files}
        self._columns = {"question": question, "answer": answer, "rationale": rationale}
        self._rows: dict[str, list[dict[str, str]]] = {}
        missing_files = [file for file, matching in matches.items() if not matching]
        if missing_files or not files:
            problem = f"{', '.join(missing_files)} does not exist" if missing_files else "the list is empty"
            raise ConfigError(f"teacher.kind.files: {problem}; expected files with the teacher's answers")
        self._files = list(dict.fromkeys(file for matching in matches.values() for file in matching))

    def fingerprint(self) -> dict[str, Any]:
        """All settings, with the hashes of the files, and the task's choices."""
        contents = {"files": [sha256(file) for file in self._files], "task": list(self._task.choices)}
        return fingerprint_of(self, self._arguments, **contents)

    def backend(self) -> dict[str, str]:
        """Empty: nothing is computed."""
        return {}

    def load(self) -> nn.Module:
        """Read the files; there is no model."""
        question, answer, rationale = self._columns.values()
        for table in map(read_file, self._files):
            layout = question_layout(table, str(question))
            problems = []
            columns = [*layout.columns, *(name for name in (answer, rationale) if name)]
            for place, row in with_columns(table, columns).rows.items():
                try:
                    texts = {
                        "answer": text_of(row.get(str(answer))),
                        "rationale": joined_text(row.get(rationale)) if rationale else "",
                    }
                    self._rows.setdefault(content_id(layout.lay_out(row)), []).append(texts)
                except (ValueError, RecursionError) as error:
                    problems.append(f"{place}: {error}")
            raise_problems(table.name, problems, "a question and texts in every row")
        num_rows = sum(map(len, self._rows.values()))
        say(f"recorded: {num_rows} answers to {len(self._rows)} questions in {len(self._files)} files")
        return nn.Module()

    def close(self) -> None:
        """Release the rows."""
        self._rows = {}

    def num_tokens(self, request: Request) -> int:
        """Number of tokens of the question; no model reads it."""
        return len(request.question_ids)

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        """Look up the recorded answer and rationale of every request."""
        return [self._annotation(request) for request in requests]

    def _annotation(self, request: Request) -> Annotation:
        example = request.example  # a file has questions as they are shown, with their choices in the text if at all
        rows = self._rows.get(content_id(example.question) if example.choices else example.id, [])
        if request.sample >= len(rows):
            return Annotation(request.key, {}, None)
        row = rows[request.sample]
        rationale = row["rationale"] if request.span == "rationale" else None
        answer = readable_answer(self._task, row["answer"], request.example)
        return Annotation(request.key, {}, answer, rationale, text=row["answer"])
