"""Which evaluation belongs to a model: that of its tokens, or that of its classes."""

from __future__ import annotations

from typing import Any

from distill.evaluation.answers import Evaluation
from distill.evaluation.classes import ClassEvaluation
from distill.lessons.join import AnswerMode
from distill.models.batches import BatchLimit
from distill.prompts.classes import ClassPrompts
from distill.prompts.rendering import Prompts
from distill.tasks import Task

AnyEvaluation = Evaluation | ClassEvaluation


def evaluation_of(
    model: Any, prompts: Prompts | ClassPrompts, task: Task, mode: AnswerMode, max_new_tokens: int, limit: BatchLimit
) -> AnyEvaluation:
    """Return the evaluation of a model that is asked by these prompts."""
    if isinstance(prompts, ClassPrompts):
        return ClassEvaluation(model, prompts, task, limit)
    return Evaluation(model, prompts, task, mode, max_new_tokens, limit)
