"""What is measured: the default teacher with what it is asked, its distributions along real texts, stores of them."""

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

from distill.annotation.fill import Source, open_source, plan
from distill.annotation.teacher_module import TeacherModule
from distill.app import config as configuration
from distill.cache import Codec
from distill.cache.store import Store
from distill.models.reading import PrefixedReader
from distill.prompts.cues import Layout, Prompts
from distill.records import Example, Request, Span, Splits
from distill.students.causal_lm import open_student
from distill.teachers.causal_lm import CausalLMTeacher
from distill.training.module import StudentModule

_TOKENS_OF_A_TEXT = 200


@final
class Solutions:
    """A task whose answers are whole solutions: any text is one."""

    version = "1"
    choices: tuple[str, ...] = ()

    def splits(self) -> Splits:
        """Nothing: examples are given to the teacher directly."""
        return Splits((), (), ())

    def shots(self) -> Sequence[Example]:
        """None."""
        return ()

    def read_answer(self, text: str) -> str:
        """The text."""
        return text

    def value(self, answer: str) -> str:
        """The answer itself."""
        return answer


@dataclass(frozen=True)
class Asked:
    """A loaded teacher with what it is asked, in the order of the data."""

    module: TeacherModule
    prompts: Prompts
    codec: Codec
    requests: tuple[Request, ...]
    batch_size: int
    group_size: int

    @property
    def model(self) -> Any:
        """The teacher's weights."""
        return self.module.model

    def prompt(self, request: Request) -> tuple[int, ...]:
        """All that stands before the target, as one who shares nothing has to read it."""
        return self.prompts.prefix(request.span) + request.question_ids

    def target(self, request: Request) -> tuple[int, ...]:
        """The tokens of a given answer."""
        assert request.example.answer is not None
        return self.prompts.answer_ids(request.example.answer)

    def whole(self) -> list[tuple[tuple[int, ...], int]]:
        """Each prompt with its target, and where the target starts."""
        prompts = [(self.prompt(request), self.target(request)) for request in self.requests]
        return [(prompt + target, len(prompt)) for prompt, target in prompts]

    def fill(self, folder: Path) -> Store:
        """Annotate and store everything, as `distill.annotate.fill` does once its teacher is loaded."""
        store = Store(folder / uuid.uuid4().hex, {"made": "for a measurement"}, self.codec)
        with store.writing() as writer:
            for group in plan(self.requests, self.group_size):
                store.claims.take(group.name)
                writer.write(group, self.module.predict_step(group))
        return store


def compose(*overrides: str) -> DictConfig:
    """The configuration of `python -m distill.train`."""
    return configuration.compose("train", list(overrides))


def codec(cache: str, **changes: int) -> Codec:
    """The codec of a file in conf/cache, with other numbers where they are given."""
    node = compose(f"cache={cache}").cache.codec
    made: Codec = configuration.build(node, **changes)
    return made


def student(
    folder: Path, config: DictConfig, vocabulary_size: int, kept: Codec
) -> tuple[StudentModule, torch.optim.Optimizer]:
    """The student of a configuration, its losses and its optimizer."""
    settings = config.student
    model = open_student(
        folder,
        keep_layers=settings.keep_layers,
        freeze=list(settings.freeze),
        from_scratch=False,
        lora=configuration.build(settings.lora),
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    module = StudentModule(
        model,
        objectives={name: configuration.build(node) for name, node in config.loss.items()},
        vocabulary_size=vocabulary_size,
        retemper=kept.at_temperature,
        make_optimizer=configuration.build(config.optim.optimizer),
        make_schedule=configuration.build(config.optim.schedule),
        seed=0,
    )
    return module, module.configure_optimizers()["optimizer"]


def default_source(folder: Path) -> Source:
    """The default task and teacher, nothing of it loaded; its store is below `folder`."""
    return open_source(compose(f"cache.dir={folder / 'default'}"))


def default_asked(source: Source, number: int, batch_size: int) -> Asked:
    """Labelled examples of the default task."""
    requests = tuple(source.prompts.request(example, "answer") for example in source.splits.train[:number])
    module = TeacherModule(source.teacher, batch_size)
    return Asked(module, source.prompts, source.codec, requests, batch_size, source.group_size)


def solutions_asked(source: Source, examples: Sequence[Example], cache: str, batch_size: int) -> Asked:
    """Given solutions behind their questions."""
    return _given(source, Layout("", "Question:", "", "Answer:"), examples, cache, batch_size)


def texts_asked(source: Source, examples: Sequence[Example], cache: str, batch_size: int) -> Asked:
    """The same texts with next to nothing before them (a number): every token is a target."""
    texts = [Example(str(place), f"{one.question}\n{one.answer}") for place, one in enumerate(examples)]
    return _given(source, Layout("", "", "", ""), texts, cache, batch_size)


def _given(source: Source, layout: Layout, examples: Sequence[Example], cache: str, batch_size: int) -> Asked:
    prompts = Prompts(source.prompts.tokenizer, layout, (), max_length=4096, too_long="refuse")
    kept = codec(cache)
    teacher = CausalLMTeacher(
        folder=source.folder,
        prompts=prompts,
        task=Solutions(),
        calibration=(),
        codec=kept,
        constrain=False,
        dtype="auto",
        sampling_temperature=0.7,
        top_p=0.95,
        max_new_tokens=1,  # an own answer is always asked for; here it is the first token after the prompt
    )
    requests = tuple(prompts.request(example, "answer") for example in examples)
    return Asked(TeacherModule(teacher, batch_size), prompts, kept, requests, batch_size, source.group_size)


def solutions(path: Path) -> list[Example]:
    """GSM8K with its solutions as answers, whether the file has them in one field or in two."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Example(row["question"], _solution(row)) for row in rows]


def _solution(row: dict[str, str]) -> str:
    return f"{row['human_rationale']}\n#### {row['answer']}" if "human_rationale" in row else row["answer"]


def manual() -> list[Example]:
    """Paragraphs of Python's manual in an order of chance: English that is on every machine."""
    texts = (paragraph for topic in topics.values() for paragraph in topic.split("\n\n"))
    paragraphs = [" ".join(text.split()) for text in texts if text[:1].isalpha() and len(text) > 200]
    return [Example(paragraph) for paragraph in random.Random(0).sample(sorted(paragraphs), len(paragraphs))]


def chat(reader: PrefixedReader, prompts: Prompts, examples: Sequence[Example]) -> Iterator[Float[Tensor, "N V"]]:
    """Distributions along solutions in the model's chat template, text by text."""
    tokenizer: Any = prompts.tokenizer
    for example in examples:
        turn = [{"role": "user", "content": example.question}]
        before = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(before, add_special_tokens=False).input_ids
        yield _along(reader, prompt, (*prompts.encode(str(example.answer)), prompts.end))


def prose(reader: PrefixedReader, prompts: Prompts, examples: Sequence[Example]) -> Iterator[Float[Tensor, "N V"]]:
    """Distributions along sentences or paragraphs, several of them a text."""
    ids: tuple[int, ...] = ()
    for example in examples:
        ids += prompts.encode(f"{example.question}\n")
        if len(ids) > _TOKENS_OF_A_TEXT:
            yield _along(reader, ids[:1], ids[1:])
            ids = ()


def positions(texts: Iterator[Float[Tensor, "N V"]], number: int) -> list[Float[Tensor, "N V"]]:
    """The first so many positions of the texts, which stay apart."""
    found: list[Tensor] = []
    while number > 0:
        found.append(next(texts)[:number])
        number -= len(found[-1])
    return found


@torch.inference_mode()
def _along(reader: PrefixedReader, prompt: Sequence[int], target: Sequence[int]) -> Float[Tensor, "N V"]:
    reading = reader.read([prompt])
    hidden_BTH = reading.feed(torch.tensor([target[:-1]]))
    return reader.logprobs(torch.cat([reading.last_BH, hidden_BTH[0]]))


def widened(logprobs_NV: Float[Tensor, "N V"], size: int) -> Float[Tensor, "N W"]:
    """The same distributions over a larger vocabulary: improbable tokens are added, and ids shuffled."""
    generator = torch.Generator().manual_seed(0)
    num_positions, num_tokens = logprobs_NV.shape
    place_W = torch.randperm(size, generator=generator)
    noise_NX = torch.randn(num_positions, size - num_tokens, generator=generator)
    extra_NX = logprobs_NV.min(-1, keepdim=True).values + noise_NX
    return torch.cat([logprobs_NV, extra_NX], -1)[:, place_W].log_softmax(-1)


def asked_again(asked: Asked, span: Span) -> Asked:
    """The same examples asked for the other span."""
    requests = tuple(asked.prompts.request(request.example, span) for request in asked.requests)
    return replace(asked, requests=requests)
