"""Evaluate a model on a task: most likely and generated answers, agreement with the teacher, latency."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn

from distill.app.machine import extra_bytes, timings
from distill.cache.store import Store
from distill.evaluation.architecture import architecture
from distill.evaluation.likelihoods import Closeness, closeness_of, likelihoods
from distill.evaluation.metrics import Prediction, score
from distill.evaluation.texts import TextMeasures, require_text_measures, wording
from distill.lessons.join import AnswerMode, first_span
from distill.models.batches import BatchLimit
from distill.models.body import Way
from distill.models.placement import on_device
from distill.models.reading import PrefixedReader, Reading
from distill.prompts.rendering import Prompts, Reply
from distill.records import Annotation, Example, Span, Target
from distill.students.saving import size_bytes
from distill.tasks import Task, choices_of, is_right, readable_answer

_DEFAULT_LIMIT = BatchLimit(32)
_LATENCY_EXAMPLES, _LATENCY_ROUNDS, _LATENCY_SECONDS = 6, 5, 1.0
_LATENCY_TOKENS = 100  # written by a model: texts this long are timed on fewer examples


@final
class Evaluation:
    """One model on one task, in one answer mode."""

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        task: Task,
        mode: AnswerMode,
        max_new_tokens: int,
        limit: BatchLimit = _DEFAULT_LIMIT,
    ) -> None:
        """With mode "direct" the model answers at once, with "reasoned" after a rationale."""
        require_text_measures(task)
        self._limit = limit
        self._model, self._prompts, self._task, self._mode = model, prompts, task, mode
        self._span = first_span(mode)
        self._max_new_tokens = max_new_tokens
        self._way: Way | None = None

    @torch.inference_mode()
    def predict(self, examples: Sequence[Example], teacher: Mapping[str, Annotation]) -> list[Prediction]:
        """Answer the examples in order; `teacher` has annotations by example id.

        A question that is too long and dropped has no answer, which counts as wrong.
        """
        with on_device(self._model):
            return self._predict_all(examples, teacher)

    def _predict_all(self, examples: Sequence[Example], teacher: Mapping[str, Annotation]) -> list[Prediction]:
        reader = self._reader(self._span)
        questions = self._questions(examples, self._span)
        dropped = [index for index in range(len(examples)) if index not in questions]
        results = {i: as_prediction(self._task, examples[i], None, None, teacher.get(examples[i].id)) for i in dropped}
        # Batches of similar lengths need little padding.
        order = list(questions)
        lengths = [len(questions[index]) + self._room(examples[index]) for index in order]
        for places in self._limit.batches(lengths):
            indices = [order[place] for place in places]
            batch = [examples[index] for index in indices]
            annotations = [teacher.get(example.id) for example in batch]
            predictions = self._predict(reader, batch, [questions[index] for index in indices], annotations)
            results |= dict(zip(indices, predictions, strict=True))
        return [results[index] for index in range(len(examples))]

    @torch.inference_mode()
    def rationales(self, examples: Sequence[Example]) -> list[str]:
        """Return the model's rationale for each example; empty if the question was dropped."""
        questions = self._questions(examples, "rationale")
        if not questions:
            return [""] * len(examples)
        order, texts = list(questions), dict[int, str]()
        with on_device(self._model):
            reader = self._reader("rationale")
            for places in self._limit.batches([len(questions[index]) + self._max_new_tokens for index in order]):
                indices = [order[place] for place in places]
                reading = reader.read([questions[index] for index in indices])
                written = reading.greedy(max_new_tokens=self._max_new_tokens, stops=self._prompts.ends)
                texts |= zip(indices, (self._prompts.split_reply(ids).rationale for ids in written), strict=True)
        return [texts.get(index, "") for index in range(len(examples))]

    def _questions(self, examples: Sequence[Example], span: Span) -> dict[int, tuple[int, ...]]:
        """Return the token ids of questions that are not too long, by index of their example."""
        questions: dict[int, tuple[int, ...]] = {}
        for index, example in enumerate(examples):
            with suppress(ValueError):
                questions[index] = self._prompts.question(example, span)
        return questions

    def _room(self, example: Example) -> int:
        """Return the number of tokens that are read or written after a question."""
        is_read = self._task.is_free_text and example.answer is not None
        num_read = len(self._prompts.answer_ids(example.answer or "")) if is_read else 0
        return max(self._max_answer_tokens(example), num_read)

    def _choice_ids(self, example: Example) -> tuple[tuple[int, ...], ...]:
        return self._prompts.choice_ids(choices_of(self._task, example))

    def _max_answer_tokens(self, example: Example) -> int:
        """The limit of a written answer: a model that has not learned to stop would go on, and stay unreadable."""
        choices = self._choice_ids(example) if self._mode == "direct" else ()
        return max(map(len, choices), default=self._max_new_tokens)

    def _write(self, reading: Reading, examples: Sequence[Example]) -> list[list[int]]:
        limits = [self._max_answer_tokens(example) for example in examples]
        written = reading.greedy(max_new_tokens=max(limits), stops=self._prompts.ends)
        return [ids[:limit] for ids, limit in zip(written, limits, strict=True)]

    def fits(self, example: Example) -> bool:
        """Whether the question is not too long."""
        return bool(self._questions([example], self._span))

    def with_model(self, model: Any) -> Evaluation:
        """Return the same evaluation with another model."""
        return Evaluation(model, self._prompts, self._task, self._mode, self._max_new_tokens, self._limit)

    @property
    def model(self) -> Any:
        """The evaluated model."""
        return self._model

    @property
    def weights_bytes(self) -> int:
        """Memory that the model's weights take."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    def answering(self) -> Callable[[Example], int]:
        """Read the prefix, and return a function that answers one question and counts the tokens that it writes.

        It is valid while the model stays on its device.
        """
        reader = self._reader(self._span)

        @torch.inference_mode()
        def answer(example: Example) -> int:
            reading = reader.read(list(self._questions([example], self._span).values()))
            if choices_of(self._task, example) and self._mode == "direct":
                self._choose(reading, [example], [None])
                return 0
            return sum(map(len, self._write(reading, [example])))

        return answer

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of the prefix and of each question."""
        questions = self._questions(examples, self._span).values()
        return [len(self._prompts.prefix(self._span)), *map(len, questions)]

    def _reader(self, span: Span) -> PrefixedReader:
        # New each time: the model may have been trained since. How it is read is a matter of its architecture.
        prefix = self._prompts.prefix(span)
        reader = PrefixedReader(self._model.eval(), prefix, self._prompts.vocabulary_size, self._way)
        self._way = reader.way
        return reader

    def _predict(
        self,
        reader: PrefixedReader,
        examples: Sequence[Example],
        questions: Sequence[tuple[int, ...]],
        teacher: Sequence[Annotation | None],
    ) -> list[Prediction]:
        reading = reader.read(questions)
        written = self._write(reading, examples)
        texts = [self._prompts.text(ids) for ids in written]
        rationales: list[str | None] = [None] * len(examples)
        if self._mode == "reasoned":
            replies = [self._prompts.split_reply(ids) for ids in written]
            rationales, texts = [reply.rationale for reply in replies], [reply.answer for reply in replies]
            questions = [(*q, *self._reasoning(r)) for q, r in zip(questions, replies, strict=True)]
            reading = reader.read(questions)
        answers = [readable_answer(self._task, text, example) for text, example in zip(texts, examples, strict=True)]
        if self._task.is_free_text:
            has_ended = [self._prompts.has_ended(ids) for ids in written]
            measures = self._text_measures(reader, questions, examples, teacher, answers, has_ended)
            return [
                replace(
                    as_prediction(self._task, e, answers[k], answers[k], teacher[k]),
                    text=measures[k],
                    rationale=rationales[k],
                )
                for k, e in enumerate(examples)
            ]
        best, confidence = self._choose(reading, examples, answers)
        closeness = self._closeness(reading, teacher) if self._mode == "direct" else [None] * len(examples)
        return [
            replace(
                as_prediction(self._task, example, best[k], answers[k], annotation),
                confidence=confidence[k],
                kl=along.kl if along else None,
                acceptance=(along.accepted_low, along.accepted_high) if along else None,
                rationale=rationales[k],
            )
            for k, (example, annotation, along) in enumerate(zip(examples, teacher, closeness, strict=True))
        ]

    def _reasoning(self, reply: Reply) -> tuple[int, ...]:
        """Token ids of the model's rationale, after which its answer is scored."""
        return (*self._prompts.rationale_ids(reply.rationale), *self._prompts.separator_ids())

    def _choose(
        self, reading: Reading, examples: Sequence[Example], answers: Sequence[str | None]
    ) -> tuple[list[str | None], list[float | None]]:
        """Return the most likely choices and their probabilities; without choices the generated answers."""
        best, confidence = list(answers), list[float | None]([None] * len(answers))
        for row, logprob_C in enumerate(self._choice_logprobs(reading, examples)):
            if len(logprob_C):
                probability_C = logprob_C.softmax(-1)
                best[row] = choices_of(self._task, examples[row])[int(probability_C.argmax())]
                confidence[row] = float(probability_C.max())
        return best, confidence

    def _choice_logprobs(self, reading: Reading, examples: Sequence[Example]) -> Sequence[Tensor]:
        """Return the log-probabilities [C] of the choices of each example."""
        if any(example.choices for example in examples):
            return reading.own_choice_logprobs(list(map(self._choice_ids, examples)))
        choices = self._prompts.choice_ids(self._task.choices)
        return list(reading.choice_logprobs(reading.first_BV, choices)) if choices else []

    def _text_measures(
        self,
        reader: PrefixedReader,
        questions: Sequence[tuple[int, ...]],
        examples: Sequence[Example],
        teacher: Sequence[Annotation | None],
        answers: Sequence[str | None],
        has_ended: Sequence[bool],
    ) -> list[TextMeasures]:
        """Read the gold texts and the teacher's after the questions; compare the model's own texts with them."""
        gold = [Target(self._prompts.answer_ids(e.answer), None) if e.answer else None for e in examples]
        along_gold = likelihoods(reader, questions, gold)
        along_teacher = likelihoods(reader, questions, list(map(self._teacher_text, teacher)))
        theirs = [annotation.whole_answer if annotation else None for annotation in teacher]
        return [
            TextMeasures(
                gold=along_gold[k],
                gold_bytes=_num_bytes(example.answer),
                teacher=along_teacher[k],
                teacher_bytes=_num_bytes(theirs[k]),
                length=len(self._prompts.encode(text)) if (text := answers[k]) else 0,
                reference_length=len(self._prompts.encode(example.answer or theirs[k] or "")),
                has_ended=has_ended[k],
                wording=wording(text or "", example.right_answers),
                teacher_wording=wording(text or "", [annotation.answer] if annotation and annotation.answer else []),
            )
            for k, (example, annotation) in enumerate(zip(examples, teacher, strict=True))
        ]

    def _teacher_text(self, annotation: Annotation | None) -> Target | None:
        """Return the direct answer of the teacher in the tokens of the model, if whole; with soft targets if shared."""
        if annotation is None or self._mode == "reasoned" or (answer := annotation.whole_answer) is None:
            return None
        target = annotation.targets.get("answer")
        return target if target and target.soft else Target(self._prompts.answer_ids(answer), None)

    def _closeness(self, reading: Reading, teacher: Sequence[Annotation | None]) -> list[Closeness | None]:
        """Compare with the teacher over the tokens of its direct answer; both share a vocabulary."""
        targets = [annotation.targets.get("answer") if annotation else None for annotation in teacher]
        read = [target.token_ids[:-1] if target and target.soft else () for target in targets]
        longest = max(map(len, read))
        later: Sequence[Tensor] = [reading.first_BV[:0]] * len(targets)
        if longest:
            padded = [[*ids, *[0] * (longest - len(ids))] for ids in read]
            hidden_BTH = reading.feed(torch.tensor(padded, device=reading.last_BH.device))
            hidden_NH = torch.cat([hidden_TH[: len(ids)] for hidden_TH, ids in zip(hidden_BTH, read, strict=True)])
            later = reading.reader.logprobs(hidden_NH).split([len(ids) for ids in read])
        return [
            closeness_of(torch.cat([first_V.unsqueeze(0), later_NV]), target)
            for first_V, later_NV, target in zip(reading.first_BV, later, targets, strict=True)
        ]


def _num_bytes(text: str | None) -> int:
    return len((text or "").encode())


def _is_same(task: Task, answer: str | None, reference: str | None) -> bool:
    return answer is not None and reference is not None and task.is_same(answer, reference)


def as_prediction(
    task: Task, example: Example, answer: str | None, written: str | None, annotation: Annotation | None = None
) -> Prediction:
    """Compare an answer with the gold answer and, if annotated, with the teacher's; free texts are not compared."""
    is_text = task.is_free_text
    return Prediction(
        example_id=example.id,
        question=example.question,
        history=example.history,
        gold=example.answer or "",
        accepted=example.accepted,
        right_values=() if is_text else tuple(dict.fromkeys(map(task.value, example.right_answers))),
        answer=answer,
        written_answer=written,
        is_correct=None if is_text else is_right(task, answer, example),
        is_written_correct=None if is_text else is_right(task, written, example),
        choices=example.choices,
        confidence=None,
        kl=None,
        text=TextMeasures() if is_text else None,
        **(_comparison(task, example, answer, annotation) if annotation else {}),
    )


def _comparison(task: Task, example: Example, answer: str | None, annotation: Annotation) -> dict[str, Any]:
    """Return the teacher's answer to the same question and, unless they are free texts, whether the two agree."""
    if task.is_free_text:
        return {"teacher_answer": annotation.answer}
    return {
        "teacher_answer": annotation.answer,
        "teacher_confidence": annotation.confidence,
        "is_teacher_correct": is_right(task, annotation.answer, example),
        "agrees": None if annotation.answer is None else _is_same(task, answer, annotation.answer),
    }


@runtime_checkable
class Answering(Protocol):
    """What answers single questions, as it is timed."""

    @property
    def model(self) -> Any:
        """The model that answers."""
        ...

    @property
    def weights_bytes(self) -> int:
        """Memory that the model's weights take."""
        ...

    def fits(self, example: Example) -> bool:
        """Whether the question is not too long."""
        ...

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return the numbers of tokens that decide how long it takes to read the questions."""
        ...

    def answering(self) -> Callable[[Example], int]:
        """Return a function that answers a question and counts the tokens that it writes."""
        ...


def speeds(evaluations: Mapping[str, Answering], examples: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """Measure time and peak memory of answering a single question, taking the models in turn.

    `architecture` is a key of the model's architecture and of its work; models that share it are equally fast.
    """
    with ExitStack() as stack:
        for evaluation in evaluations.values():
            stack.enter_context(on_device(evaluation.model))
        return _speeds(evaluations, examples)


def _speeds(evaluations: Mapping[str, Answering], examples: Sequence[Example]) -> dict[str, dict[str, Any]]:
    examples = [example for example in examples if all(evaluation.fits(example) for evaluation in evaluations.values())]
    if not examples:
        return {name: {"ms_per_example": None, "peak_bytes": None} for name in evaluations}
    answering = {name: evaluation.answering() for name, evaluation in evaluations.items()}
    timed, written = _answered(answering, examples[:_LATENCY_EXAMPLES])
    times = timings(answering, timed, num_rounds=_LATENCY_ROUNDS, max_seconds=_LATENCY_SECONDS)
    return {
        name: {
            "ms_per_example": round(times[name].median, 3),
            "ms_fastest": round(times[name].fastest, 3),
            "ms_slowest": round(times[name].slowest, 3),
            "architecture": architecture(evaluation.model, [evaluation.lengths(timed), written[name]]),
            "peak_bytes": _peak_bytes(evaluation, partial(answering[name], timed[0])),
        }
        for name, evaluation in evaluations.items()
    }


def _answered(
    answering: Mapping[str, Callable[[Example], int]], examples: Sequence[Example]
) -> tuple[list[Example], dict[str, list[int]]]:
    """Answer examples until a model has written many tokens; return them, and the numbers of tokens by model."""
    written: dict[str, list[int]] = {name: [] for name in answering}
    for number, example in enumerate(examples, start=1):
        for name, answer in answering.items():
            written[name].append(answer(example))
        if max(map(sum, written.values())) >= _LATENCY_TOKENS:
            return list(examples[:number]), written
    return list(examples), written


def _peak_bytes(evaluation: Answering, answer: Callable[[], object]) -> int | None:
    extra = extra_bytes(answer)
    return None if extra is None else extra + evaluation.weights_bytes


def model_row(predictions: Sequence[Prediction], model: nn.Module) -> dict[str, Any]:
    """Return a model's row of results, from its predictions and parameters."""
    row = score(predictions)
    parameters = list(model.parameters())
    row |= {"parameters": sum(p.numel() for p in parameters), "training_seconds": None}
    return row | {"dtype": str(parameters[0].dtype).removeprefix("torch.")}


def saved_type(folder: Path) -> str | None:
    """Return the type of the weights that a model folder's configuration names."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    named = config.get("dtype") or config.get("torch_dtype")
    return str(named) if named else None


def teacher_row(
    examples: Sequence[Example],
    annotations: Mapping[str, Annotation],
    task: Task,
    prompts: Prompts,
    store: Store,
    folder: Path | None,
) -> dict[str, Any]:
    """Return the teacher's row, from its cached answers and its cost; `folder` is None if it is not local."""
    predictions = [
        replace(
            as_prediction(task, example, annotation.answer, None),
            is_written_correct=None,
            confidence=annotation.confidence,
            text=_teacher_measures(prompts, example, annotation) if task.is_free_text else None,
        )
        for example in examples
        if (annotation := annotations.get(example.id))
    ]
    costs = sorted(store.costs, key=lambda cost: cost["ms_per_example"] is not None)
    cost: dict[str, Any] = costs[-1] if costs and folder else {}
    measured = {key: cost.get(key) for key in ("parameters", "ms_per_example")}
    measured |= {"size_bytes": (size_bytes(folder) or None) if folder else None, "training_seconds": None}
    measured |= {"dtype": saved_type(folder) if folder else None}
    return score(predictions) | measured


def _teacher_measures(prompts: Prompts, example: Example, annotation: Annotation) -> TextMeasures:
    """Measure the teacher's text. It answered without the gold text, so its likelihood of that is not known."""
    text = annotation.answer or ""
    return TextMeasures(
        length=len(prompts.encode(text)),
        reference_length=len(prompts.encode(example.answer or text)),
        has_ended=not annotation.is_truncated,
        wording=wording(text, example.right_answers),
    )
