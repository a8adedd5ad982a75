"""Answers questions with the student in this folder: python example.py "a question" "another one".

It needs only torch and transformers. prompt.json has the prompt: token ids before and after a question, which is
tokenized by itself, as in training. Each question gives one line of JSON. Where questions have choices of their own, it
is given as JSON too: python example.py '{"question": "a question and its choices", "choices": ["A", "B"]}'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def text_ids(tokenizer: Any, contexts: Sequence[str], text: str) -> list[int]:
    """Token ids of a text within the prompt. Tokenizers that change the start of a text get it after a context."""
    for context in contexts or ("",):
        before, ids = (_ids(tokenizer, part) for part in (context, context + text))
        if ids[: len(before)] == before:
            return ids[len(before) :]
    raise ValueError(f"no tokens for {text!r} apart from the text before it")


def prompt_ids(tokenizer: Any, prompt: Mapping[str, Any], question: str) -> list[int]:
    """Token ids of the whole prompt; ValueError if the question is too long."""
    ids = text_ids(tokenizer, prompt["contexts"], prompt["question_spaces"] + question)
    limit = prompt["max_question_tokens"]
    if len(ids) > limit and not (prompt["is_cut"] and limit > 0):
        raise ValueError(f"the question has {len(ids)} tokens; at most {limit} are allowed")
    return [*prompt["before"], *ids[:limit], *prompt["after"]]


def choice_ids(tokenizer: Any, prompt: Mapping[str, Any], choices: Sequence[str]) -> dict[str, list[int]]:
    """Token ids of possible answers, with the end token."""
    spaces, contexts = prompt["target_spaces"], prompt["contexts"]
    return {choice: [*text_ids(tokenizer, contexts, spaces + choice), prompt["end_id"]] for choice in choices}


def question_and_choices(prompt: Mapping[str, Any], argument: str) -> tuple[str, list[str]]:
    """The question of an argument of the command line, and its own choices."""
    if not (prompt["has_own_choices"] and argument.startswith("{")):
        return argument, []
    parsed = json.loads(argument)
    return parsed["question"], parsed["choices"]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) if text else []


class Student:
    """The student and its prompt."""

    def __init__(self, folder: Path) -> None:
        self.prompt = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()

    @torch.inference_mode()
    def reply(self, question: str, own_choices: Sequence[str] = ()) -> dict[str, Any]:
        """Return the answer, the answer as written, and the reasoning if the student reasons first."""
        ids = prompt_ids(self.tokenizer, self.prompt, question)
        choices = choice_ids(self.tokenizer, self.prompt, own_choices) or self.prompt["choices"]
        is_direct = self.prompt["mode"] == "direct"
        limit = max(map(len, choices.values())) if choices and is_direct else self.prompt["max_new_tokens"]
        reply, written = {}, self.write(ids, limit)
        if self.prompt["mode"] == "reasoned":
            rationale, cue, written = written.partition(self.prompt["answer_cue"])
            reply, written = {"rationale": rationale.strip()}, written if cue else ""
            reasoning = self.prompt["target_spaces"] + rationale.strip()
            ids += text_ids(self.tokenizer, self.prompt["contexts"], reasoning) + self.prompt["separator"]
        written = written.strip()
        return {"answer": self.choose(ids, choices) if choices else written, "written": written} | reply

    def write(self, ids: list[int], limit: int) -> str:
        """Return the most likely continuation; generation_config.json says how it is found."""
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        out = self.model.generate(**inputs, max_new_tokens=limit)[0, len(ids) :]
        return str(self.tokenizer.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def choose(self, ids: list[int], choices: Mapping[str, Sequence[int]]) -> str:
        """Return the choice that is most likely as a whole, with its end token."""
        scores: dict[str, float] = {}
        for choice, tokens in choices.items():
            logits = self.model(torch.tensor([[*ids, *tokens[:-1]]])).logits[0, -len(tokens) :]
            logprobs = logits[:, : self.prompt["vocabulary_size"]].float().log_softmax(-1)
            scores[choice] = sum(float(logprobs[n, token]) for n, token in enumerate(tokens))
        return max(scores, key=scores.__getitem__)


if __name__ == "__main__":
    student = Student(Path(__file__).parent)
    for argument in sys.argv[1:] or [student.prompt["example"]]:
        question, own_choices = question_and_choices(student.prompt, argument)
        print(json.dumps({"question": question} | student.reply(question, own_choices), ensure_ascii=False))
