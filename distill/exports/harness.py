"""A run's test questions as a task of EleutherAI's lm-evaluation-harness, which runs without `distill`.

The harness tokenizes a prompt and its answer as one text; a student learned them in pieces, each tokenized separately.
With most tokenizers the tokens are the same; questions for which they differ are counted. Each choice ends in the text
of the end token, so the harness scores whole answers too. The harness also treats padding rows of a model's head as
tokens: if those rows are untrained, answers of several tokens may score differently.
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
from distill.prompts.rendering import Prompts
from distill.records import Example
from distill.tasks import Task, choices_of, is_right

FOLDER = "lm_eval"
_MAX_NAME = 50  # characters, of up to four bytes each; a file name has at most 255 bytes


@dataclass(frozen=True)
class HarnessTask:
    """A multiple-choice task: prompts and their choices; the model's answer is the most likely choice.

    Rows have their choices where `choices` is empty. `gold` of a row has the places of all choices that are right. Of
    free texts, whose `gold` is the text, the harness generates as `writing` says, and compares. `num_differing` counts
    the prompts that the harness tokenizes differently from the student's training.
    """

    name: str
    choices: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    num_differing: int
    writing: Mapping[str, Any] | None = None

    @property
    def command(self) -> str:
        """Command that runs the task offline from the model's folder."""
        arguments = f"--model hf --model_args pretrained=. --tasks {self.name} --include_path {FOLDER}"
        return f"HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 lm_eval run {arguments}"

    @property
    def figure(self) -> str:
        """What the harness measures, and which figure of the student's it equals."""
        if self.writing:
            return (
                "`chrf` is the chrF of all the student's texts together; the mean over texts above may differ a little."
            )
        return "`acc` is the student's accuracy above."

    @property
    def caution(self) -> str:
        """A caveat on the figure that the harness measures; empty if it equals the student's."""
        if not self.num_differing:
            return ""
        number = f"{self.num_differing} of {len(self.rows)}"
        return f"the harness tokenizes {number} questions differently from training, so its figure may differ"

    def write(self, model_folder: Path) -> None:
        """Write the task and its prompts to a subfolder of the model's folder."""
        folder = model_folder / FOLDER
        folder.mkdir()
        (folder / f"{self.name}.yaml").write_text(yaml.safe_dump(self._definition(), sort_keys=False))
        (folder / f"{self.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def _definition(self) -> dict[str, Any]:
        metric, aggregation = ("chrf", "chrf") if self.writing else ("acc", "mean")
        choices = {"doc_to_choice": list(self.choices) or "choices"}
        answers = {"generation_kwargs": self.writing} if self.writing else choices
        return {
            "task": self.name,
            "dataset_path": "json",
            # Relative to the working directory: the harness cannot name a file next to this one.
            "dataset_kwargs": {"data_files": {"test": f"{FOLDER}/{self.name}.jsonl"}},
            "test_split": "test",
            "output_type": "generate_until" if self.writing else "multiple_choice",
            "num_fewshot": 0,
            "doc_to_text": "prompt",
            **answers,
            "doc_to_target": "gold",
            "target_delimiter": "",  # the choices include the delimiter
            "metric_list": [{"metric": metric, "aggregation": aggregation, "higher_is_better": True}],
        }


def harness_task(
    name: str, prompts: Prompts, task: Task, examples: Sequence[Example], max_new_tokens: int
) -> HarnessTask:
    """Make a task of the examples as `prompts` render them; ConfigError if the harness cannot score the answers.

    Of free texts, those with a gold text are compared with texts of at most `max_new_tokens`.
    """
    # The prefix avoids clashes with tasks of the harness.
    safe_name = "distill_" + re.sub(r"[^\w.-]+", "_", name)[:_MAX_NAME]
    if task.is_free_text:
        return _text_task(safe_name, prompts, [example for example in examples if example.answer], max_new_tokens)
    if not task.choices and not all(example.choices for example in examples):
        raise ConfigError(f"the answers of {name} are free text, which the harness cannot read as the task does")
    rows, num_differing = [], 0
    for example in examples:
        gold, answers = _gold(task, example), _continuations(prompts, choices_of(task, example))
        ids, text = _prompt(prompts, example)
        own = {"choices": list(answers)} if example.choices else {}
        rows.append({"id": example.id, "prompt": text, "gold": gold, **own})
        num_differing += any(_harness_tokens(prompts, text, answer) != (ids, answers[answer]) for answer in answers)
    choices = tuple(_continuations(prompts, tuple(task.choices)))
    return HarnessTask(safe_name, choices, tuple(rows), num_differing)


def _text_task(name: str, prompts: Prompts, examples: Sequence[Example], max_new_tokens: int) -> HarnessTask:
    """A task in which the student's texts are compared with the gold ones.

    Not by the likelihood of the gold texts: the harness counts the white space at the end of a prompt as theirs.
    """
    if not examples:
        raise ConfigError(f"{name} has no gold texts, with which the harness could compare those of the student")
    read = [_prompt(prompts, example) for example in examples]
    pairs = zip(examples, read, strict=True)
    rows = tuple({"id": example.id, "prompt": text, "gold": example.answer} for example, (_, text) in pairs)
    num_differing = sum(_harness_tokens(prompts, text, "")[0] != ids for ids, text in read)
    ends = [prompts.token_text(end) for end in prompts.ends]
    writing = {"until": ends, "max_gen_toks": max_new_tokens, "do_sample": False}
    return HarnessTask(name, (), rows, num_differing, writing)


def _prompt(prompts: Prompts, example: Example) -> tuple[tuple[int, ...], str]:
    """Token ids of a prompt, and the text that the harness reads."""
    ids = prompts.prefix("answer") + prompts.question(example, "answer")
    return ids, prompts.frame.pieces.decode(ids[_num_added(prompts, ids) :], skip_special=False)


def _gold(task: Task, example: Example) -> list[int]:
    """Places of the choices that are right."""
    choices = choices_of(task, example)
    right = [place for place, choice in enumerate(choices) if is_right(task, choice, example)]
    if not right:
        raise ConfigError(f"a test question has the answer {example.answer!r}; expected one of {', '.join(choices)}")
    return right


def _num_added(prompts: Prompts, ids: Sequence[int]) -> int:
    """Number of special tokens at the start of a prompt that the harness's tokenizer adds by itself."""
    start = prompts.frame.pieces.start
    return len(start) if tuple(ids[: len(start)]) == start else 0


def _continuations(prompts: Prompts, choices: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Texts of whole answers after a prompt, and their token ids."""
    return {_continuation(prompts, text): ids for text, ids in zip(choices, prompts.choice_ids(choices), strict=True)}


def _continuation(prompts: Prompts, choice: str) -> str:
    """Text of a whole answer after a prompt, with its end token; alone, some tokenizers drop its leading space."""
    *_, cue = prompts.frame.question("answer", "")
    text = prompts.decode(cue + prompts.answer_ids(choice)).removeprefix(prompts.decode(cue))
    return f"{text}{prompts.token_text(prompts.end)}"


def _harness_tokens(prompts: Prompts, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokenize a prompt and its answer as the harness does: the answer's tokens are those after the prompt's."""
    before, whole = (tuple(prompts.tokenizer.encode(text)) for text in (prompt, prompt + answer))
    return before, whole[len(before) :]
