"""A run's test questions as a task of EleutherAI's lm-evaluation-harness, which needs nothing of `distill` to run it.

The harness reads a prompt and its answer as one text; a student learned them in pieces, each tokenized by itself.
Most tokenizers make the same tokens of both; where one does not, the questions that differ are counted. It also takes
padding rows of a model's head for tokens: it may judge answers of several tokens otherwise if those rows are untrained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill.errors import ConfigError
from distill.prompts.cues import Prompts
from distill.records import Example

FOLDER = "lm_eval"
_MOST_OF_A_NAME = 50  # characters, of up to four bytes; a file's name has at most 255


@dataclass(frozen=True)
class HarnessTask:
    """Prompts with a few possible answers, the most likely of which is the model's.

    `num_differing` counts the prompts of which the harness makes other tokens than the student learned.
    """

    name: str
    choices: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    num_differing: int

    @property
    def command(self) -> str:
        """What runs the task offline, started in the model's folder."""
        what = f"--model hf --model_args pretrained=. --tasks {self.name} --include_path {FOLDER}"
        return f"HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 lm_eval run {what}"

    @property
    def caution(self) -> str:
        """What a reader of its accuracy must know; empty where there is nothing."""
        if not self.num_differing:
            return ""
        number = f"{self.num_differing} of {len(self.rows)}"
        return f"in {number} questions the harness makes other tokens than the student learned, so its accuracy differs"

    def write(self, model_folder: Path) -> None:
        """Put the task and its prompts into a folder of their own in the model's folder."""
        folder = model_folder / FOLDER
        folder.mkdir()
        (folder / f"{self.name}.yaml").write_text(yaml.safe_dump(self._definition(), sort_keys=False))
        (folder / f"{self.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def _definition(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "dataset_path": "json",
            # Seen from where the harness is started: it has no way to name a file beside this one.
            "dataset_kwargs": {"data_files": {"test": f"{FOLDER}/{self.name}.jsonl"}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "num_fewshot": 0,
            "doc_to_text": "prompt",
            "doc_to_choice": list(self.choices),
            "doc_to_target": "gold",
            "target_delimiter": "",  # the choices begin with what stands before them
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }


def harness_task(name: str, prompts: Prompts, choices: Sequence[str], examples: Sequence[Example]) -> HarnessTask:
    """The task of answering the examples as `prompts` ask them; ConfigError where the harness cannot judge answers."""
    if not choices:
        raise ConfigError(f"the answers of {name} are free text, and how they are read cannot be told to the harness")
    if unknown := [example.answer for example in examples if example.answer not in choices]:
        raise ConfigError(f"{unknown[0]!r} answers a test question, but is none of {', '.join(choices)}")
    answers = {_continuation(prompts, choice): prompts.encode(f" {choice}") for choice in choices}
    rows, num_differing = [], 0
    for example in examples:
        ids = prompts.prefix("answer") + prompts.question(example, "answer")
        text = _text(prompts, ids)
        rows.append({"id": example.id, "prompt": text, "gold": choices.index(str(example.answer))})
        num_differing += any(_read(prompts, text, answer) != (ids, answers[answer]) for answer in answers)
    # The harness has tasks of its own, some of them of the same names.
    plain = re.sub(r"[^\w.-]+", "_", name)[:_MOST_OF_A_NAME]
    return HarnessTask(f"distill_{plain}", tuple(answers), tuple(rows), num_differing)


def _text(prompts: Prompts, ids: Sequence[int]) -> str:
    return str(prompts.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _continuation(prompts: Prompts, choice: str) -> str:
    """An answer's text as it goes on from a prompt's: some tokenizers leave out a space that a text begins with."""
    cue = prompts.encode(prompts.layout.answer_cue)
    return _text(prompts, cue + prompts.encode(f" {choice}")).removeprefix(_text(prompts, cue))


def _read(prompts: Prompts, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of a prompt and of its answer as the harness finds them: the answer's are those that come on top."""
    before, whole = (tuple(prompts.tokenizer.encode(text)) for text in (prompt, prompt + answer))
    return before, whole[len(before) :]
