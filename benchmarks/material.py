"""Workloads to measure: the default teacher with its requests, its distributions along real texts, filled stores."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, final

import torch
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor

from distill.annotation.annotation_job import AnnotationJob, open_annotation_job
from distill.annotation.positions import ALL_POSITIONS
from distill.annotation.requests import group_requests
from distill.annotation.teacher_module import TeacherModule
from distill.app import config as configuration
from distill.cache import Codec
from distill.cache.store import Store
from distill.models.batches import BatchLimit
from distill.models.placement import place
from distill.models.reading import PrefixedReader
from distill.prompts.cues import Layout
from distill.prompts.rendering import Prompts
from distill.records import Example, Request, Span, Splits
from distill.students.causal_lm import TokenSeam, open_student
from distill.teachers import Calibration, Teacher
from distill.teachers.causal_lm import CausalLMTeacher
from distill.training.module import StudentModule

_TOKENS_PER_TEXT = 200


@final
class Solutions:
    """A task whose answers are whole solutions: every text is a valid answer."""

    version = "1"
    is_free_text = True
    choices: Sequence[str] = ()

    def splits(self) -> Splits:
        """Empty: examples are passed to the teacher directly."""
        return Splits((), (), ())

    def shots(self) -> Sequence[Example]:
        """None."""
        return ()

    def read_answer(self, text: str, example: Example) -> str:  # noqa: ARG002 - all tasks have it
        """The text."""
        return text

    def value(self, answer: str) -> str:
        """The answer itself."""
        return answer

    def is_same(self, answer: str, reference: str) -> bool:
        """Whether the answers are equal."""
        return answer == reference


@dataclass(frozen=True)
class Workload:
    """A loaded teacher with its requests, in the order of the data."""

    module: TeacherModule
    model: Any
    prompts: Prompts
    codec: Codec
    requests: tuple[Request, ...]
    batch_size: int
    group_size: int

    @classmethod
    def of(
        cls, teacher: Teacher, prompts: Prompts, codec: Codec, requests: tuple[Request, ...], sizes: tuple[int, int]
    ) -> Workload:
        """Load the teacher; `sizes` are those of a batch and of a group."""
        module = TeacherModule(teacher, ALL_POSITIONS, BatchLimit(sizes[0]))
        return cls(module, place(teacher.load()), prompts, codec, requests, *sizes)

    def prompt(self, request: Request) -> tuple[int, ...]:
        """Everything before the target: the input of a reader that shares no prefix."""
        return self.prompts.prefix(request.span) + request.question_ids

    def target(self, request: Request) -> tuple[int, ...]:
        """The tokens of the example's answer."""
        assert request.example.answer is not None
        return self.prompts.answer_ids(request.example.answer)

    def sequences(self) -> list[tuple[tuple[int, ...], int]]:
        """Every prompt followed by its target, with the index at which the target starts."""
        prompts = [(self.prompt(request), self.target(request)) for request in self.requests]
        return [(prompt + target, len(prompt)) for prompt, target in prompts]

    def fill(self, folder: Path) -> Store:
        """Annotate and store all requests, as `annotation.fill` does once its teacher is loaded."""
        store = Store(folder / uuid.uuid4().hex, {"made for": "a benchmark"}, self.codec)
        with store.writing() as writer:
            for group in group_requests(self.requests, self.group_size):
                store.claims.take(group.name)
                writer.write(group, self.module.predict_step(group))
        return store


def compose(*overrides: str) -> DictConfig:
    """The configuration of `python -m distill.train`."""
    return configuration.compose("train", list(overrides))


def codec(cache: str, **changes: int) -> Codec:
    """Build the codec of a file in conf/cache, with `changes` to its settings."""
    node = compose(f"cache={cache}").cache.codec
    built: Codec = configuration.build(node, **changes)
    return built


def student(
    folder: Path, config: DictConfig, vocabulary_size: int, cache_codec: Codec
) -> tuple[StudentModule, torch.optim.Optimizer]:
    """Build the student of a configuration with its losses, and its optimizer."""
    settings = config.student
    model = open_student(
        folder,
        keep_layers=settings.keep_layers,
        freeze=list(settings.freeze),
        from_scratch=False,
        lora=configuration.build(settings.lora),
        dropout=settings.dropout,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    module = StudentModule(
        model,
        objectives={name: configuration.build(node) for name, node in config.loss.items()},
        seam=TokenSeam(vocabulary_size),
        retemper=cache_codec.at_temperature,
        make_optimizer=configuration.build(config.optim.optimizer),
        make_schedule=configuration.build(config.optim.schedule),
        seed=0,
    )
    return module, module.configure_optimizers()["optimizer"]


def default_source(folder: Path) -> AnnotationJob:
    """The default task and teacher, not loaded, with a store below `folder`."""
    return open_annotation_job(compose(f"cache.dir={folder / 'default'}"))


def default_workload(source: AnnotationJob, number: int, batch_size: int) -> Workload:
    """Labelled examples of the default task."""
    requests = tuple(source.prompts.request(example, "answer") for example in source.splits.train[:number])
    return Workload.of(source.teacher, source.prompts, source.codec, requests, (batch_size, source.group_size))


def solutions_workload(source: AnnotationJob, examples: Sequence[Example], cache: str, batch_size: int) -> Workload:
    """Questions as prompts, solutions as targets."""
    return _workload(source, Layout("", "Question:", "", "Answer:"), examples, cache, batch_size)


def texts_workload(source: AnnotationJob, examples: Sequence[Example], cache: str, batch_size: int) -> Workload:
    """The same texts behind a number as the prompt: nearly every token is a target."""
    texts = [Example(str(index), f"{example.question}\n{example.answer}") for index, example in enumerate(examples)]
    return _workload(source, Layout("", "", "", ""), texts, cache, batch_size)


def _workload(
    source: AnnotationJob, layout: Layout, examples: Sequence[Example], cache: str, batch_size: int
) -> Workload:
    prompts = Prompts(source.prompts.tokenizer, layout, (), max_length=4096, too_long="refuse")
    cache_codec = codec(cache)
    teacher = CausalLMTeacher(
        folder=source.folder,
        hashes=source.store.folder,
        prompts=prompts,
        task=Solutions(),
        calibration=Calibration(0, ()),
        codec=cache_codec,
        constrain=False,
        dtype="auto",
        generation=configuration.build(compose().teacher.kind.generation),
        max_new_tokens=1,  # a free answer is always generated; here it ends after one token
    )
    requests = tuple(prompts.request(example, "answer") for example in examples)
    return Workload.of(teacher, prompts, cache_codec, requests, (batch_size, source.group_size))


def read_solutions(path: Path) -> list[Example]:
    """GSM8K with its solutions as answers, which a file holds in one field or in two."""
    lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(): JSON strings may hold U+2028
    rows = [json.loads(line) for line in lines if line]
    return [Example(row["question"], _solution(row)) for row in rows]


def _solution(row: dict[str, str]) -> str:
    return f"{row['human_rationale']}\n#### {row['answer']}" if "human_rationale" in row else row["answer"]


def manual() -> list[Example]:
    """Paragraphs of Python's manual in random order: English text available on every machine."""
    texts = (paragraph for topic in topics.values() for paragraph in topic.split("\n\n"))
    paragraphs = [" ".join(text.split()) for text in texts if text[:1].isalpha() and len(text) > 200]
    return [Example(paragraph) for paragraph in random.Random(0).sample(sorted(paragraphs), len(paragraphs))]


def chat(reader: PrefixedReader, prompts: Prompts, examples: Sequence[Example]) -> Iterator[Float[Tensor, "N V"]]:
    """Distributions along solutions in the model's chat template, one tensor per text."""
    tokenizer: Any = prompts.tokenizer
    for example in examples:
        turn = [{"role": "user", "content": example.question}]
        before = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(before, add_special_tokens=False).input_ids
        yield _distributions(reader, prompt, (*prompts.encode(str(example.answer)), prompts.end))


def prose(reader: PrefixedReader, prompts: Prompts, examples: Sequence[Example]) -> Iterator[Float[Tensor, "N V"]]:
    """Distributions along texts that are joined from sentences or paragraphs."""
    ids: tuple[int, ...] = ()
    for example in examples:
        ids += prompts.encode(f"{example.question}\n")
        if len(ids) > _TOKENS_PER_TEXT:
            yield _distributions(reader, ids[:1], ids[1:])
            ids = ()


def take_positions(texts: Iterator[Float[Tensor, "N V"]], number: int) -> list[Float[Tensor, "N V"]]:
    """The first `number` positions of the texts, still one tensor per text."""
    taken: list[Tensor] = []
    while number > 0:
        taken.append(next(texts)[:number])
        number -= len(taken[-1])
    return taken


@torch.inference_mode()
def _distributions(reader: PrefixedReader, prompt: Sequence[int], target: Sequence[int]) -> Float[Tensor, "N V"]:
    reading = reader.read([prompt])
    hidden_BTH = reading.feed(torch.tensor([target[:-1]]))
    return reader.logprobs(torch.cat([reading.last_BH, hidden_BTH[0]]))


def widen(logprobs_NV: Float[Tensor, "N V"], size: int) -> Float[Tensor, "N W"]:
    """The same distributions over `size` tokens: improbable tokens are added, and ids shuffled."""
    generator = torch.Generator().manual_seed(0)
    num_positions, num_tokens = logprobs_NV.shape
    order_W = torch.randperm(size, generator=generator)
    noise_NX = torch.randn(num_positions, size - num_tokens, generator=generator)
    extra_NX = logprobs_NV.min(-1, keepdim=True).values + noise_NX
    return torch.cat([logprobs_NV, extra_NX], -1)[:, order_W].log_softmax(-1)


def with_span(workload: Workload, span: Span) -> Workload:
    """The same examples with requests for another span."""
    requests = tuple(workload.prompts.request(request.example, span) for request in workload.requests)
    return replace(workload, requests=requests)
