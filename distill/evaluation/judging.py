"""The judge command: ask what the cache lacks, write each run's judgements beside its predictions, print the table."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from distill.annotation.annotation_job import AnnotationJob, open_annotation_job
from distill.annotation.fill import fill
from distill.annotation.reader import AnnotationReader
from distill.app.config import Config
from distill.app.console import terminal_width
from distill.app.files import Json, write_json_lines
from distill.errors import ConfigError
from distill.records import Example
from distill.reports.judgements import CHECK, JUDGEMENTS_FILE, judged
from distill.reports.runs import find_runs, mapping, read_run, read_runs
from distill.reports.text import judgements_text
from distill.reports.verdicts import summarise
from distill.tasks.judging import GOLD, OTHERS, TEACHER, Contest, Judging, Pair

_LEVEL = 0.95
_WINS = ({"A": 1.0, "B": 0.0, "tie": 0.5}, {"A": 0.0, "B": 1.0, "tie": 0.5})  # of the answer shown first, or second


def judge(config: Config) -> float:
    """Judge the contests of all runs; return the win rate of the runs, from 0 to 1."""
    folders = find_runs([config.runs] if isinstance(config.runs, str) else list(config.runs))
    first = read_runs(folders)[0]
    config.runs = list(map(str, folders))
    config.judge.model = config.judge.model or mapping(first.config.get("teacher")).get("model")
    if not config.judge.model:
        raise ConfigError(f"judge.model is missing, and {first.folder} names no teacher: judge.model=<id or folder>")
    config.task.name = f"judge-{first.facts.get('task')}"
    job = open_annotation_job(config, name="judge")
    assert isinstance(job.task, Judging)
    questions = [example for contest in job.task.contests for pair in contest.pairs for example in _questions(pair)]
    filled = fill(job, {"answer": questions})
    reader, name = job.reader(filled.requests), _name(config, job)
    for contest in job.task.contests:
        lines = [_judgement(contest, pair, reader, name) for pair in contest.pairs]
        _write(contest, name, lines)
    rivals = {_rival(contest) for contest in job.task.contests}
    table = judged(summarise(read_runs(folders), _LEVEL).trained)
    table = [line for line in table if line.judge == name and line.against in rivals]
    print(judgements_text(table, width=terminal_width()))
    return next((line.win_rate for line in table if line.against != CHECK), math.nan)


def _name(config: Config, job: AnnotationJob) -> str:
    """What identifies the judge in reports: its model, and the cache that holds its prompts and verdicts."""
    model = str(config.judge.model).partition("#")[0].rstrip("/").rpartition("/")[2]
    return f"{model} ({job.store.folder.name.rpartition('-')[2][:8]})"


def _questions(pair: Pair) -> Sequence[Example]:
    """The questions to the judge: equal texts are a tie without one."""
    return () if pair.answer == pair.rival else pair.orders


def _judgement(contest: Contest, pair: Pair, reader: AnnotationReader, name: str) -> Json:
    """Return a line of judgements.jsonl; its score is None if a question was too long for the judge."""
    annotations = [reader.find_words(example.id, "answer") for example in _questions(pair)]
    verdicts = [annotation.answer for annotation in annotations if annotation and annotation.answer]
    wins = [of_order[verdict] for of_order, verdict in zip(_WINS, verdicts, strict=False)]
    is_judged, is_changed = len(wins) == 2 or not annotations, len(set(wins)) == 2
    score = None if not is_judged else wins[0] if wins and not is_changed else 0.5
    shown: dict[str, Any] = {"verdicts": verdicts, "is_changed": is_changed, "is_identical": not annotations}
    return {"judge": name, "against": _rival(contest), "id": pair.example_id, "score": score, **shown}


def _write(contest: Contest, name: str, lines: Sequence[Json]) -> None:
    """Replace the earlier judgements of this contest by this judge."""
    others = [
        line
        for line in read_run(contest.run).judgements
        if (line.get("judge"), line.get("against")) != (name, _rival(contest))
    ]
    write_json_lines(contest.run / JUDGEMENTS_FILE, [*others, *lines])


def _rival(contest: Contest) -> str:
    """The name of the rival in judgements: of another run, its name without its seed."""
    if contest.against == OTHERS:
        return CHECK
    is_run = contest.against not in (GOLD, TEACHER)
    return re.sub(r"-seed\d+$", "", read_run(contest.against).name) if is_run else contest.against
