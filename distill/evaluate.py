"""Evaluate a model on a task: answers by likelihood and as written, agreement with the teacher, latency."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel

from distill import config as configuration
from distill import metrics, models
from distill.data import AnswerMode
from distill.losses.forward_kl import ForwardKL
from distill.metrics import Prediction
from distill.prompts import Prompts, load_tokenizer
from distill.records import Annotation, AnswerError, Example
from distill.student import size_bytes
from distill.tasks import Task

_BATCH = 32
_LATENCY_EXAMPLES = 20


class Evaluation:
    """One model on one task, in the way that it answers."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts, task: Task, answer: AnswerMode) -> None:
        """The model answers directly, or after its reasoning."""
        self._prompts, self._task, self._answer = prompts, task, answer
        self._model = model
        span = "answer" if answer == "direct" else "rationale"
        self._span = span
        self._reader = models.PrefixedReader(model, prompts.prefix(span), prompts.vocabulary_size)
        self._choices = [prompts.encode(f" {choice}") for choice in task.choices]

    @torch.inference_mode()
    def predict(
        self, examples: Sequence[Example], teacher: Mapping[str, Annotation], max_new_tokens: int
    ) -> list[Prediction]:
        """Answer each example; `teacher` holds the teacher's annotation by example id, where there is one."""
        self._model.eval()
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].question))
        found: dict[int, Prediction] = {}
        for start in range(0, len(order), _BATCH):
            indices = order[start : start + _BATCH]
            part = [examples[index] for index in indices]
            found |= dict(zip(indices, self._predict(part, teacher, max_new_tokens), strict=True))
        return [found[index] for index in range(len(examples))]

    @torch.inference_mode()
    def rationales(self, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
        """What the model writes when asked to reason."""
        prefix = self._prompts.prefix("rationale")
        reader = models.PrefixedReader(self._model, prefix, self._prompts.vocabulary_size)
        reading = reader.read([self._prompts.question(example, "rationale") for example in examples])
        written = reading.greedy(
            reader.logprobs(reading.last_BH), max_new_tokens=max_new_tokens, stop=self._prompts.end
        )
        return [self._prompts.take_apart(ids).rationale or "" for ids in written]

    def milliseconds(self, examples: Sequence[Example], max_new_tokens: int) -> float:
        """Median time to answer one question alone."""
        times = []
        for example in examples[:_LATENCY_EXAMPLES]:
            start = time.perf_counter()
            self.predict([example], {}, max_new_tokens)
            times.append(time.perf_counter() - start)
        return 1000 * sorted(times)[len(times) // 2]

    def _predict(
        self, examples: Sequence[Example], teacher: Mapping[str, Annotation], max_new_tokens: int
    ) -> list[Prediction]:
        reading = self._reader.read([self._prompts.question(e, self._span) for e in examples])
        first_BV = self._reader.logprobs(reading.last_BH)
        written = reading.greedy(first_BV, max_new_tokens=max_new_tokens, stop=self._prompts.end)
        rationales: list[str | None] = [None] * len(examples)
        texts = [self._prompts.text(ids) for ids in written]
        if self._answer == "reasoned":
            replies = [self._prompts.take_apart(ids) for ids in written]
            rationales, texts = [reply.rationale for reply in replies], [reply.answer for reply in replies]
            thought = [
                (*self._prompts.question(e, "rationale"), *self._prompts.rationale_ids(r or ""), *self._prompts.bridge())
                for e, r in zip(examples, rationales, strict=True)
            ]
            reading = self._reader.read(thought)
            first_BV = self._reader.logprobs(reading.last_BH)
        answers = [self._read(text) for text in texts]
        probabilities: list[tuple[float, ...]] = [()] * len(examples)
        best = list(answers)
        if self._choices:
            scores_BC = reading.choice_logprobs(first_BV, self._choices).softmax(-1)
            probabilities = [tuple(row) for row in scores_BC.tolist()]
            best = [self._task.choices[k] for k in scores_BC.argmax(-1).tolist()]
        annotations = [teacher.get(example.id) for example in examples]
        kls = self._divergences(reading, first_BV, annotations)
        return [
            Prediction(
                e.id, e.question, e.answer or "", best[k], answers[k], True, probabilities[k],
                a.answer if a else None, kls[k], rationales[k],
            )
            for k, (e, a) in enumerate(zip(examples, annotations, strict=True))
        ]

    def _divergences(
        self, reading: models.Reading, first_BV: Float[Tensor, "B V"], annotations: Sequence[Annotation | None]
    ) -> list[float | None]:
        """KL to the teacher at its direct answer; a reasoned answer has another context, so none there."""
        targets = [a.targets.get("answer") if a and self._answer == "direct" else None for a in annotations]
        longest = max((len(t.token_ids) - 1 for t in targets if t), default=0)
        if longest == 0:
            return [None] * len(targets)
        padded = [[*t.token_ids[:-1], *[0] * (longest - len(t.token_ids) + 1)] if t else [0] * longest for t in targets]
        hidden_BTH = reading.feed(torch.tensor(padded, device=first_BV.device))
        found: list[float | None] = []
        for row, target in enumerate(targets):
            if target is None or target.soft is None:
                found.append(None)
                continue
            later_NV = self._reader.logprobs(hidden_BTH[row, : len(target.token_ids) - 1])
            logprobs_NV = torch.cat([first_BV[row : row + 1], later_NV]).cpu()
            kept_NK = logprobs_NV.gather(-1, torch.from_numpy(target.soft.ids_NK.astype("int64")))
            rest_N1 = (1 - kept_NK.exp().sum(-1, keepdim=True)).clamp(min=1e-9).log()
            t_NK = torch.from_numpy(target.soft.logprobs_NK)
            tail_N1 = torch.from_numpy(target.soft.tail_N).unsqueeze(-1).log()
            value_N, _ = ForwardKL()(torch.cat([kept_NK, rest_N1], -1), torch.cat([t_NK, tail_N1], -1))
            found.append(float(value_N.mean()))
        return found

    def _read(self, text: str) -> str | None:
        try:
            return self._task.read_answer(text)
        except AnswerError:
            return None


def teacher_predictions(
    examples: Sequence[Example], annotations: Mapping[str, Annotation]
) -> list[Prediction]:
    """The teacher's answers as they stand in the cache."""
    return [
        Prediction(
            e.id, e.question, e.answer or "", a.answer, None, False,
            tuple(torch.tensor(a.choice_logprobs).softmax(-1).tolist()) if a.choice_logprobs else (), None, None,
        )
        for e, a in ((e, annotations[e.id]) for e in examples if e.id in annotations)
    ]


def main(config: DictConfig) -> float:
    """Evaluate one model folder, print and write its row."""
    configuration.check(config)
    root = Path(config.root).resolve()
    folder = models.resolve(config.model, root)
    task: Task = configuration.build(config.task.examples)
    prompts = Prompts(
        load_tokenizer(folder),
        configuration.build(config.task.layout),
        (),
        max_length=config.prompt.max_length,
        too_long=config.prompt.too_long,
    )
    model = models.load(folder, torch.float32).eval()
    evaluation = Evaluation(model, prompts, task, config.task.answer)
    examples = getattr(task.splits(), config.split)
    predictions = evaluation.predict(examples, {}, max_new_tokens=40)
    row: dict[str, Any] = metrics.score(predictions, task.choices)
    row |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "size_bytes": size_bytes(folder),
        "ms_per_example": evaluation.milliseconds(examples, 40),
    }
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(row, indent=1))
    low, high = row["interval"]
    print(f"{folder}: accuracy {row['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {len(examples)} {config.split} examples")
    print(f"row and reliability: {out / 'evaluation.json'}")
    return float(row["accuracy"])


if __name__ == "__main__":
    configuration.command("evaluate", main)
