"""Students with a batch of lessons and their teachers, and the variants of an optimizer step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import material
from benchmarks.measure import Variant
from distill.annotation.reader import AnnotationReader
from distill.app import config as configuration
from distill.app.progress import progress
from distill.cache.store import Store
from distill.lessons.collate import collate
from distill.lessons.join import Join, Lesson, TrainingSequence, with_shared_turns
from distill.lessons.loader import StepSampler
from distill.losses.head import head_loss
from distill.models.placement import native_dtype
from distill.prompts import auto
from distill.prompts.cues import Layout
from distill.prompts.rendering import Prompts
from distill.prompts.vocabularies import Pairing
from distill.records import Annotation, Batch, Example, Message, Request, SoftTargets, Target
from distill.training.module import StudentModule

_EXAMPLES, _WIDE_EXAMPLES = 8, 4  # per step
_WIDE = 151936  # the vocabulary of Qwen2.5; the shape is that of its smallest model, with fewer layers
_WIDE_SHAPE: Mapping[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
_WIDE_LAYERS = {"student": 4, "teacher": 12}
_LOOP_STEPS, _LOOP_START = 40, 4  # steps of a loop measurement; the first ones are not counted


@dataclass(frozen=True)
class Pair:
    """A student with one batch of lessons, the store of their soft targets, and the teacher that produced them."""

    module: StudentModule
    optimizer: torch.optim.Optimizer
    teacher: Any
    tokenizer: Any
    lessons: Sequence[Lesson]
    store: Store
    vocabulary_size: int

    @property
    def counts(self) -> Counter[Any]:
        """Supervised positions of the whole step, by loss source."""
        return sum((lesson.counts() for lesson in self.lessons), Counter[Any]())

    def batch(self) -> Batch:
        """Collate the batch, reading the store."""
        return collate(self.lessons, self.counts, 0, self.store.soft_targets)

    def save(self, folder: Path) -> None:
        """Save models, tokenizer and batch for another process."""
        batch = self.batch()
        for name, model in (("student", self.module.model), ("teacher", self.teacher)):
            model.save_pretrained(folder / name)
            self.tokenizer.save_pretrained(folder / name)
        tensors = {"input_ids": batch.input_ids_BT, "attention_mask": batch.mask_BT, "labels": labels(batch)}
        save_file(tensors, folder / "batch.safetensors")


def labels(batch: Batch) -> Int[Tensor, "B T"]:
    """Labels as Hugging Face expects them: -100 at unsupervised positions."""
    labels_BT = torch.full_like(batch.input_ids_BT, -100)
    labels_BT[batch.sequence_N, batch.before_N + 1] = batch.label_N
    return labels_BT


def _default_pair(kind: Literal["solutions", "texts"], folder: Path, data: Path) -> Pair:
    """The default teacher and student on GSM8K; targets are the solutions, or every token of the text."""
    source = material.default_source(folder)
    make_workload = material.solutions_workload if kind == "solutions" else material.texts_workload
    workload = make_workload(source, material.read_solutions(data)[:_EXAMPLES], "topk", _EXAMPLES)
    config = material.compose("student.freeze=[]", "loss=[answer,kl]")
    module, optimizer = material.student(source.folder, config, workload.prompts.vocabulary_size, workload.codec)
    tokenizer, store = source.prompts.tokenizer, workload.fill(folder)
    lessons = _lessons(workload.prompts, workload.requests, store)
    return Pair(module, optimizer, workload.model, tokenizer, lessons, store, workload.prompts.vocabulary_size)


def _wide_pair(folder: Path, data: Path) -> Pair:
    """The same texts for models with a large vocabulary, random weights and random soft targets."""
    source = material.default_source(folder)
    workload = material.solutions_workload(
        source, material.read_solutions(data)[:_WIDE_EXAMPLES], "topk", _WIDE_EXAMPLES
    )
    torch.manual_seed(0)
    student, teacher = (_wide_model(_WIDE_LAYERS[role]) for role in ("student", "teacher"))
    student.save_pretrained(folder / "wide")
    config = material.compose("student.freeze=[]", "student.keep_layers=null", "loss=[answer,kl]")
    module, optimizer = material.student(folder / "wide", config, _WIDE, workload.codec)
    store = Store(folder / "wide-cache", {"made for": "a benchmark"}, workload.codec)
    with store.writing() as writer:
        writer.add([_random_annotation(workload, request) for request in workload.requests])
    teacher = teacher.to(native_dtype()).eval()
    return Pair(
        module,
        optimizer,
        teacher,
        source.prompts.tokenizer,
        _lessons(workload.prompts, workload.requests, store),
        store,
        _WIDE,
    )


def _wide_model(num_layers: int) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=_WIDE, num_hidden_layers=num_layers, tie_word_embeddings=True, **_WIDE_SHAPE)
    )


def _random_annotation(workload: material.Workload, request: Request) -> Annotation:
    target = workload.target(request)
    n, k = len(target), workload.codec.fingerprint()["k"]
    logprobs_NK = torch.randn(n, k).log_softmax(-1) + np.log(0.9)
    ids_NK = torch.stack([torch.randperm(_WIDE)[:k] for _ in range(n)]).int()
    order_NK = logprobs_NK.argsort(-1, descending=True)
    entries = (ids_NK.gather(-1, order_NK), logprobs_NK.gather(-1, order_NK))
    ids_E, logprobs_E = (x.flatten().numpy() for x in entries)
    soft = SoftTargets(ids_E, logprobs_E, np.full(n, 0.1, np.float32), np.full(n, k))
    return Annotation(request.key, {"answer": Target(target, soft)}, request.example.answer)


def _lessons(prompts: Prompts, requests: Sequence[Request], store: Store) -> Sequence[Lesson]:
    wide_prompts = Prompts(
        prompts.tokenizer, prompts.layout, (), max_length=prompts.max_length, too_long=prompts.too_long
    )
    wide_prompts.__dict__["vocabulary_size"] = _WIDE  # random soft targets have ids beyond this tokenizer's vocabulary
    needed = frozenset({("answer", "labels"), ("answer", "soft")})
    by_example_and_span = {(request.example.id, request.span): request for request in requests}
    settings: Any = {
        "soft_teacher": None,
        "rationales": {},
        "further_answers": {},
        "answer": "direct",
        "needed": needed,
    }
    join = Join(
        prompts=wide_prompts,
        teacher=AnnotationReader(store, by_example_and_span, material.Solutions(), prompts),
        pairing=Pairing(),
        too_long={},
        **settings,
    )
    return join.join([request.example for request in requests]).lessons


PAIRS: Mapping[str, Callable[[Path, Path], Pair]] = {
    "step on solutions": partial(_default_pair, "solutions"),
    "step on texts": partial(_default_pair, "texts"),
    "step at V=151936": _wide_pair,
}


def step_variants(pair: Pair) -> dict[str, Variant]:
    """One optimizer step, from making the batch to the new weights; each variant as its users would write it."""
    model, batch, labels_BT = pair.module.model, pair.batch(), labels(pair.batch())
    step = partial(optimizer_step, pair.module, pair.optimizer)

    def plain(logprobs: Callable[[], Float[Tensor, "N V"]]) -> Tensor:
        output = model(batch.input_ids_BT, attention_mask=batch.mask_BT, labels=labels_BT)
        log_q_NV = output.logits.float().log_softmax(-1)[batch.sequence_N, batch.before_N]
        total: Tensor = output.loss + kl_div(log_q_NV, logprobs(), log_target=True, reduction="batchmean")
        return total

    def cached() -> Float[Tensor, "N V"]:
        soft = pair.batch().soft
        assert soft is not None
        log_t_NV = torch.full((len(batch.label_N), pair.vocabulary_size), -30.0)
        log_t_NV[soft.position_E, soft.ids_E] = soft.logprobs_E
        return log_t_NV

    def online() -> Float[Tensor, "N V"]:
        with torch.no_grad():
            logits_BTV = pair.teacher(batch.input_ids_BT, attention_mask=batch.mask_BT).logits
            log_t_NV: Tensor = logits_BTV.float().log_softmax(-1)[batch.sequence_N, batch.before_N]
        return log_t_NV

    def backbone() -> Tensor:
        total: Tensor = model.base_model(batch.input_ids_BT, attention_mask=batch.mask_BT).last_hidden_state.sum()
        return total

    return {
        "ours": step(lambda: total_loss(pair.module, pair.batch())),
        "CE alone": step(lambda: model(batch.input_ids_BT, attention_mask=batch.mask_BT, labels=labels_BT).loss),
        "KD from the cache, full logits": step(partial(plain, cached)),
        "online KD": step(partial(plain, online)),
        "backbone alone": step(backbone),
    }


def total_loss(module: StudentModule, batch: Batch) -> Tensor:
    """Weighted sum of all losses of a batch."""
    return head_loss(module.hidden(batch), module.head(), list(module.terms(batch).values()))[0]


def optimizer_step(module: StudentModule, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Variant:
    """Return a function that makes the optimizer step that Lightning makes, without Lightning."""

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=native_dtype() == torch.bfloat16):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return run


# Answer and rationale


TWO_TASKS = ("two tasks, default", "two tasks, long prompts")


def two_task_variants(case: str, folder: Path, data: Path) -> dict[str, Variant]:
    """Cross-entropy on answers and rationales: with a shared prompt, without it, and by two passes of the model."""
    source = material.default_source(folder)
    config = material.compose("loss=[answer,rationale]")
    module, optimizer = material.student(source.folder, config, source.prompts.vocabulary_size, source.codec)
    prompts = source.prompts.zero_shot(source.prompts.tokenizer)
    if case == "two tasks, default":
        examples = _explained_reviews(source)
    else:
        layout = Layout("", "Question:", "Solution:", "Answer:")
        prompts = Prompts(prompts.tokenizer, layout, (), max_length=4096, too_long="refuse")
        examples = _long_questions(data)
    pairs = [_two_sequences(prompts, example) for example in examples]
    separate = [Lesson(pair) for pair in pairs]
    counts = sum((lesson.counts() for lesson in separate), Counter[Any]())
    branched = [lesson.branched() for lesson in separate]
    tasks = [[Lesson((pair[task],)) for pair in pairs] for task in (0, 1)]
    passes = [collate(task_lessons, {}, 0, _no_soft_targets) for task_lessons in tasks]

    def ours(lessons: Sequence[Lesson]) -> Tensor:
        return total_loss(module, collate(lessons, counts, 0, _no_soft_targets))

    def two_passes() -> Tensor:
        pass_losses = [
            module.model(batch.input_ids_BT, attention_mask=batch.mask_BT, labels=labels(batch)).loss
            for batch in passes
        ]
        total: Tensor = torch.stack(pass_losses).sum()
        return total

    losses: dict[str, Callable[[], Tensor]] = {
        "ours": partial(ours, branched),
        "ours in two": partial(ours, separate),
        "two passes": two_passes,
    }
    return {name: optimizer_step(module, optimizer, compute_loss) for name, compute_loss in losses.items()}


def _no_soft_targets(keys: Sequence[Any]) -> SoftTargets:
    raise AssertionError(f"no loss reads soft targets, but {len(keys)} were requested")


def _two_sequences(prompts: Prompts, example: Example) -> tuple[TrainingSequence, TrainingSequence]:
    assert example.answer is not None
    assert example.rationale is not None
    return (
        TrainingSequence.of(prompts.answer_prompt(example, example.answer), example.id, {"answer"}, {}),
        TrainingSequence.of(prompts.rationale_prompt(example, example.rationale, None), example.id, {"rationale"}, {}),
    )


def _explained_reviews(source: Any) -> list[Example]:
    """A step of the default task: reviews of median length, with the rationales of its demonstrations."""
    shots = source.prompts.shots
    reviews = sorted(source.splits.train[:160], key=lambda example: len(source.prompts.encode(example.question)))
    middle = reviews[len(reviews) // 2 :][:_EXAMPLES]
    return [
        replace(review, answer=shot.answer, rationale=shot.rationale)
        for review, shot in zip(middle, [*shots, *shots], strict=False)
    ]


def _long_questions(data: Path) -> list[Example]:
    """Questions, each behind three solved ones."""
    solved_examples = material.read_solutions(data)[: 4 * _EXAMPLES]
    long_examples = []
    for start in range(0, len(solved_examples), 4):
        *solved, last = solved_examples[start : start + 4]
        context = "\n\n".join(f"{example.question}\n{example.answer}" for example in solved)
        rationale, _, answer = str(last.answer).rpartition("####")
        long_examples.append(Example(f"{context}\n\n{last.question}", answer.strip(), rationale.strip()))
    return long_examples


# Conversations


TURNS = "turns of a conversation"
_TURNS = 4  # in each conversation


def turn_lessons(prompts: Prompts, data: Path) -> list[Lesson]:
    """A lesson for each turn of conversations in which solved questions follow each other."""
    solved, lessons = material.read_solutions(data)[: _TURNS * _EXAMPLES], []
    layout: Any = configuration.build(material.compose("prompt=chat").prompt.layout)
    prompts = Prompts(prompts.tokenizer, auto.Layout(layout, "zephyr"), (), max_length=4096, too_long="refuse")
    history: tuple[Message, ...] = ()
    for number, example in enumerate(solved):
        turn = replace(example, history=history if number % _TURNS else ())
        answer = str(turn.answer)
        lessons.append(Lesson((TrainingSequence.of(prompts.answer_prompt(turn, answer), turn.id, {"answer"}, {}),)))
        history = (*turn.history, Message("user", turn.question), Message("assistant", answer))
    return lessons


def turn_variants(folder: Path, data: Path) -> dict[str, Variant]:
    """Cross-entropy on the answers of all turns, one sequence for each conversation or for each turn."""
    source = material.default_source(folder)
    config = material.compose("loss=[answer]")
    module, optimizer = material.student(source.folder, config, source.prompts.vocabulary_size, source.codec)
    separate = turn_lessons(source.prompts, data)
    counts = sum((lesson.counts() for lesson in separate), Counter[Any]())

    def ours(lessons: Sequence[Lesson]) -> Tensor:
        """As many sequences at a time as there are conversations, of similar lengths."""
        ordered = sorted(lessons, key=lambda lesson: lesson.num_tokens)
        parts = (ordered[start : start + _EXAMPLES] for start in range(0, len(ordered), _EXAMPLES))
        batches = (collate(part, counts, 0, _no_soft_targets) for part in parts)
        return torch.stack([total_loss(module, batch) for batch in batches]).sum()

    lessons = {"one sequence": with_shared_turns(separate), "one for each turn": separate}
    return {name: optimizer_step(module, optimizer, partial(ours, part)) for name, part in lessons.items()}


# The loop around the step


def loop_step_seconds(folder: Path) -> dict[str, Callable[[], list[float]]]:
    """Seconds per step of a short run in a plain loop, and in Lightning's loop as the train command sets it up."""
    source, config = material.default_source(folder), material.compose("loss=[answer]")
    module, optimizer = material.student(source.folder, config, source.prompts.vocabulary_size, source.codec)
    lessons = _answer_lessons(source)

    def batches() -> DataLoader[Batch]:
        collated: Any = _Collated(lessons)
        return DataLoader(collated, sampler=_sampler(lessons, config, _LOOP_STEPS), batch_size=None)

    def plain() -> list[float]:
        ends = [time.perf_counter()]
        for batch in batches():
            optimizer_step(module, optimizer, partial(total_loss, module, batch))()
            ends.append(time.perf_counter())
        seconds: list[float] = np.diff(ends)[_LOOP_START:].tolist()
        return seconds

    def in_lightning() -> list[float]:
        clock = _Clock()
        is_bfloat16_fast = native_dtype() == torch.bfloat16
        trainer: lightning.Trainer = configuration.build(
            material.compose(f"trainer.max_steps={_LOOP_STEPS}").trainer,
            precision="bf16-mixed" if is_bfloat16_fast else "32-true",
            callbacks=[progress("steps", _LOOP_STEPS), clock],
            logger=CSVLogger(folder / "loop", name="", version=""),
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        trainer.fit(module, batches())
        torch.use_deterministic_algorithms(False)
        seconds: list[float] = np.diff(clock.ends)[_LOOP_START - 1 :].tolist()
        return seconds

    return {"plain": plain, "Lightning": in_lightning}


class _Clock(lightning.Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


class _Collated:
    def __init__(self, lessons: Sequence[Lesson]) -> None:
        self._lessons = lessons

    def __getitem__(self, microbatch: Any) -> Batch:
        return collate([self._lessons[index] for index in microbatch.indices], microbatch.counts, 0, _no_soft_targets)


def padding_fraction(folder: Path) -> float:
    """Fraction of padding among the tokens that the student of the default task reads in a run."""
    config = material.compose()
    lessons = _answer_lessons(material.default_source(folder))
    sampler = _sampler(lessons, config, config.trainer.max_steps)
    steps = [[lessons[index].num_tokens for index in microbatch.indices] for microbatch in sampler]
    return 1 - sum(map(sum, steps)) / sum(len(step) * max(step) for step in steps)


def _sampler(lessons: Sequence[Lesson], config: Any, num_steps: int) -> StepSampler:
    size = config.batch_size
    return StepSampler(lessons, batch_size=size, batch_unit="examples", num_microbatches=1, num_steps=num_steps, seed=0)


def _answer_lessons(source: Any) -> Sequence[Lesson]:
    """Lessons of the default task, all with an answer."""
    prompts = source.prompts.zero_shot(source.prompts.tokenizer)
    targets = [(e, prompts.answer_prompt(e, e.answer or "positive")) for e in source.splits.train]
    return [Lesson((TrainingSequence.of(target, e.id, {"answer"}, {}),)) for e, target in targets]
