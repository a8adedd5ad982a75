"""Evaluate a model with a class head: its class of each text, agreement with the teacher, latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.evaluation.answers import as_prediction
from distill.evaluation.likelihoods import closeness_of
from distill.evaluation.metrics import Prediction
from distill.models.batches import BatchLimit
from distill.models.classifiers import class_logits
from distill.models.placement import on_device
from distill.prompts.classes import ClassPrompts
from distill.records import Annotation, Example
from distill.tasks import Task


@final
class ClassEvaluation:
    """One model with a class head on one task."""

    def __init__(self, model: Any, prompts: ClassPrompts, task: Task, limit: BatchLimit) -> None:
        """The model's classes are the labels of `prompts`, in their order."""
        self.model = model
        self._prompts, self._task, self._limit = prompts, task, limit

    @torch.inference_mode()
    def predict(self, examples: Sequence[Example], teacher: Mapping[str, Annotation]) -> list[Prediction]:
        """Answer the examples in order; `teacher` has annotations by example id, with classes as targets.

        A text that is too long and dropped has no answer, which counts as wrong.
        """
        with on_device(self.model):
            logprobs = self.logprobs(examples)
        return [
            self._prediction(example, teacher.get(example.id), logprobs.get(index))
            for index, example in enumerate(examples)
        ]

    @torch.inference_mode()
    def logprobs(self, examples: Sequence[Example]) -> dict[int, Float[Tensor, "C"]]:
        """Log-probabilities of the classes, by the index of each text that is not too long."""
        texts, results = self._texts(examples), dict[int, Tensor]()
        self.model.eval()
        order = list(texts)
        for places in self._limit.batches([len(texts[index]) for index in order]):
            indices = [order[place] for place in places]
            logits_BC = class_logits(self.model, [texts[index] for index in indices], self._prompts.end)
            results |= zip(indices, logits_BC.float().log_softmax(-1).cpu(), strict=True)
        return results

    def labelled(self, examples: Sequence[Example]) -> tuple[Float[np.ndarray, "N C"], Int[np.ndarray, "N"]]:
        """Return the log-probabilities of the classes of texts whose right class is known, and these classes."""
        with on_device(self.model):
            logprobs = self.logprobs(examples)
        known = {index: examples[index].answer for index in sorted(logprobs)}
        labels = {index: self._prompts.labels.index(answer) for index, answer in known.items() if answer is not None}
        logprobs_NC = np.array([logprobs[index].numpy() for index in labels], np.float64)
        return logprobs_NC.reshape(-1, len(self._prompts.labels)), np.array([*labels.values()], np.int64)

    def rationales(self, examples: Sequence[Example]) -> list[str]:
        """Return no reasoning: a class head writes none."""
        return [""] * len(examples)

    def fits(self, example: Example) -> bool:
        """Whether the text is not too long."""
        return bool(self._texts([example]))

    def with_model(self, model: Any) -> ClassEvaluation:
        """Return the same evaluation with another model."""
        return ClassEvaluation(model, self._prompts, self._task, self._limit)

    @property
    def weights_bytes(self) -> int:
        """Memory that the model's weights take."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def answering(self) -> Callable[[Example], int]:
        """Return a function that answers one question; it writes no tokens."""
        self.model.eval()

        @torch.inference_mode()
        def answer(example: Example) -> int:
            class_logits(self.model, list(self._texts([example]).values()), self._prompts.end).argmax(-1).tolist()
            return 0

        return answer

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of each text."""
        return list(map(len, self._texts(examples).values()))

    def _texts(self, examples: Sequence[Example]) -> dict[int, tuple[int, ...]]:
        """Return the token ids of texts that are not too long, by index of their example."""
        texts: dict[int, tuple[int, ...]] = {}
        for index, example in enumerate(examples):
            with suppress(ValueError):
                texts[index] = self._prompts.question(example, "answer")
        return texts

    def _prediction(
        self, example: Example, annotation: Annotation | None, logprob_C: Float[Tensor, "C"] | None
    ) -> Prediction:
        if logprob_C is None:
            return replace(as_prediction(self._task, example, None, None, annotation), is_written_correct=None)
        answer = self._prompts.labels[int(logprob_C.argmax())]
        closeness = closeness_of(logprob_C.unsqueeze(0), annotation.targets.get("answer") if annotation else None)
        return replace(
            as_prediction(self._task, example, answer, None, annotation),
            is_written_correct=None,
            confidence=float(logprob_C.max().exp()),
            kl=closeness.kl if closeness else None,
        )
