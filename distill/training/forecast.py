"""What a run will need, said before it begins: examples, tokens, bytes, hours, memory, beside what there is.

What the cache holds is counted. What a teacher has yet to say is bounded: every answer and rationale is taken to be as
long as it can be, and every soft target to take as many bytes as its codec can make of one. A few requests are
annotated to see how long that takes; nothing is stored.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from distill.annotation.fill import Filled, Source, check_rationales, loaded, plan, to_ask
from distill.annotation.inspection import Estimate, estimate
from distill.app.machine import free_memory
from distill.cache.shard import packed
from distill.errors import ConfigError
from distill.lessons.curriculum import Curriculum, Job, join_of, kept_of, teach, wanted, words_to_read
from distill.lessons.join import Lesson, Read, Records
from distill.prompts.cues import Prompts
from distill.prompts.tokenizers import vocabulary_fingerprint
from distill.records import SPANS, Annotation, CheckedRationale, Example, Request, SoftTargets, Span, Target
from distill.training.preflight import Finding, Plan, needed
from distill.training.preflight.needs import kept_bytes, told_bytes, told_seconds

# Of a shard's two headers and its line in a manifest; of a record's key (twice), lengths and flags; of a token's text.
_SHARD_BYTES, _RECORD_BYTES, _TEXT_BYTES = 12_288, 256, 16
_LIKE_EACH_OTHER = 64  # soft targets whose mean size is taken
_UNLIKELY = -30.0  # the log of what is as good as 0, and no error in a distribution
Rows = Callable[[int], SoftTargets]
Texts = Mapping[tuple[str, Span], str]


@dataclass(frozen=True)
class Asked:
    """What one teacher is to be asked; `is_bound` where another has yet to say the words that it is to read."""

    name: str
    source: Source
    filled: Filled
    missing: Sequence[Request]
    most_tokens: int  # of a text that it writes
    text_bytes: int  # of the texts that it only hands on
    is_bound: bool

    @property
    def speaks(self) -> bool:
        """Whether a model has to be loaded."""
        return bool(self.missing) and self.source.teacher.gives_soft_targets

    def num_written(self, request: Request) -> int:
        """Tokens of a request's targets that it does not read in it, at most."""
        longest = _longest_choice(self.source)
        if request.given_ids or not self.source.teacher.gives_soft_targets:
            return 0
        if request.span == "answer":
            return longest or self.most_tokens + 1
        return self.most_tokens + longest + 2  # before each of its two parts stands a space, behind them an end


@dataclass(frozen=True)
class Foreseen:
    """What was found about the teachers, and what the student will learn, or lessons at least as long."""

    findings: Sequence[Finding]
    curriculum: Curriculum
    is_bound: bool
    cache_bytes: Mapping[Path, int]  # that each cache will grow by, at most


def foresee(job: Job) -> Foreseen:
    """Look at what is there, and measure the teachers; each is out of memory again on return."""
    asked, curriculum = _asked(job)
    findings, grown = [_examples(job, asked)], dict[Path, int]()
    for each in asked:
        grown[each.source.store.folder] = _most_bytes(each)
        findings += _annotating(each, grown[each.source.store.folder])
    return Foreseen(findings, curriculum, any(each.missing for each in asked), grown)


def training(foreseen: Foreseen, what: Plan) -> list[Finding]:
    """What the student will need; lessons and their soft targets are those that were foreseen."""
    findings = [*_steps(foreseen, what), *needed(what)]
    disk: dict[int, int] = {}
    for folder, num_bytes in (*foreseen.cache_bytes.items(), (what.run_dir, kept_bytes(what))):
        mount = _existing(folder).stat().st_dev
        disk[mount] = disk.get(mount, 0) + num_bytes
    mount = what.run_dir.stat().st_dev
    if any(foreseen.cache_bytes.values()) and disk[mount] > kept_bytes(what):
        findings.append(_disk("disk in all", disk[mount], what.run_dir, "for cache, student and a checkpoint", True))
    return findings


def verdict(findings: Sequence[Finding], is_bound: bool) -> str:
    """One sentence: whether the run fits, and what to do."""
    lacking = [finding.check for finding in findings if finding.stops]
    unknown = [finding.check for finding in findings if finding.passed is None]
    if lacking:
        exact = ". These are bounds: python -m distill.annotate fills the cache, then they are exact" * is_bound
        return f"The run does not fit: {', '.join(lacking)}; what to do is said above{exact}."
    beside = f" as far as is known (not known: {', '.join(unknown)})" if unknown else ""
    return f"The run fits{beside}{', even at these bounds' * is_bound}; leave out plan=true to start it."


def _asked(job: Job) -> tuple[list[Asked], Curriculum]:
    """What is to be asked of each teacher, and what comes of it."""
    first = to_ask(job.source, wanted(job))
    missing = job.source.store.missing(first.every)
    most = _most_tokens(job)
    texts = sum(Path(file).stat().st_size for file in job.config.teacher.kind.get("files", ()))
    asked = [Asked("", job.source, first, missing, most, texts, False)]
    said, kept = Records(job.source.store, first.requests), {}
    widest = _widest(job.soft_source or job.source)
    rows = functools.cache(functools.partial(_copies, widest))
    if missing:
        said = Longest(said.store, first.requests, job.prompts, _longest_texts(job, first, most), rows)
        kept = _longest_rationales(job, first, said)
    else:
        kept = kept_of(check_rationales(job.source, first))
    soft_said = None
    if job.soft_source:
        words = words_to_read(job, said, kept)
        second = to_ask(job.soft_source, words, are_given=True)
        open_ = job.soft_source.store.missing(second.every)
        asked.append(Asked("soft ", job.soft_source, second, open_, most, 0, bool(missing)))
        soft_said = Longest(job.soft_source.store, second.requests, job.prompts, _texts_of(words), rows)
    if not any(each.missing for each in asked):
        return asked, teach(job)
    join = join_of(job, said, soft_said, kept)
    train, validation = join.lessons(job.source.splits.train), join.lessons(job.source.splits.validation)
    if not train:
        raise ConfigError(f"no train example has anything that the losses {sorted(job.objectives)} read")
    rationales = [rationale for each in kept.values() for rationale in each]
    too_long = {**first.too_long, **join.skipped}
    read = _reading([*train, *validation], widest)
    return asked, Curriculum(first, None, train, validation, read, rationales, too_long)


@dataclass(frozen=True)
class Longest(Records):
    """What a teacher would leave if it said these texts, each token with the soft target that takes most room."""

    prompts: Prompts
    texts: Texts
    rows: Rows

    def find(self, example_id: str, span: Span) -> Annotation | None:
        """What it would say, if it is to be asked."""
        request = self.requests.get((example_id, span))
        text = self.texts.get((example_id, span))
        if request is None or text is None:
            return None
        ids = self.prompts.answer_ids(text) if span == "answer" else self.prompts.rationale_ids(text)
        said = {"answer": text} if span == "answer" else {"answer": None, "rationale": text}
        return Annotation(request.key, {span: Target(ids, self.rows(len(ids)))}, **said)


def _longest_texts(job: Job, first: Filled, most: int) -> Texts:
    """Of each answer and rationale the longest text that it can be, and still be learned."""
    filler, texts = _filler(job.prompts), dict[tuple[str, Span], str]()
    for (id_, span), request in sorted(first.requests.items()):  # answers come first
        example, room = request.example, _room(job.prompts, request.example, span) - 1
        if span == "answer":
            choices = sorted(job.source.task.choices, key=lambda choice: len(job.prompts.answer_ids(choice)))
            texts[id_, span] = example.answer or (choices[-1] if choices else filler(min(most, room)))
        else:
            if job.config.task.answer_mode == "reasoned":
                last = example.answer or texts.get((id_, "answer"), "")
                room -= len(job.prompts.bridge()) + len(job.prompts.answer_ids(last))
            texts[id_, span] = filler(min(most, room))
    return texts


def _longest_rationales(job: Job, first: Filled, said: Longest) -> dict[str, list[CheckedRationale]]:
    found = {}
    for id_, samples in first.samples.items():
        annotation, last = said.find(id_, "rationale"), said.find(id_, "answer")
        assert annotation is not None
        targets = {**(last.targets if last else {}), **annotation.targets}
        answer = first.requests[id_, "rationale"].example.answer or (last.answer if last else None)
        whole = Annotation(annotation.key, targets, answer, annotation.rationale)
        confidence = 1.0 if job.source.rationales_each > 1 else None
        found[id_] = [CheckedRationale(id_, whole, "teacher", None, confidence)] * len(samples)
    return found


def _texts_of(words: Mapping[Span, Sequence[Example]]) -> Texts:
    return {
        (example.id, span): text
        for span, examples in words.items()
        for example in examples
        if (text := example.answer if span == "answer" else example.rationale) is not None
    }


def _most_tokens(job: Job) -> int:
    """Of a text that the first teacher writes, in the student's tokens.

    Its words are decoded and cut into tokens anew: a space comes before them, and a token that is a part of a letter
    comes back as the sign for what is none.
    """
    source, prompts = job.source, job.prompts
    generation = source.store.fingerprint["teacher"].get("generation")
    if not generation or vocabulary_fingerprint(source.prompts.tokenizer) != vocabulary_fingerprint(prompts.tokenizer):
        return prompts.max_length
    return 1 + int(generation["max_new_tokens"]) * len(prompts.encode("\N{REPLACEMENT CHARACTER}"))


def _room(prompts: Prompts, example: Example, span: Span) -> int:
    """Tokens that fit behind a question."""
    try:
        return prompts.max_length - len(prompts.question(example, span))
    except ValueError:  # no lesson is made of it
        return 1


def _filler(prompts: Prompts) -> Callable[[int], str]:
    """Texts of as many tokens as are asked for, at least one: a word that is one token, again and again."""
    pieces = ((token_id, prompts.piece(token_id)) for token_id in range(prompts.vocabulary_size))
    words = (piece for token_id, piece in pieces if piece[:1] == " " and prompts.encode(piece * 3) == (token_id,) * 3)
    word = next((word.strip() for word in words if word.strip().isalpha()), "a")
    return lambda number: " ".join([word] * max(1, number))


def _longest_choice(source: Source) -> int:
    return max((len(source.prompts.answer_ids(choice)) for choice in source.task.choices), default=0)


def _widest(source: Source) -> SoftTargets:
    """The soft target that takes most bytes: even over a part of the vocabulary, of which size is tried."""
    size, found = source.prompts.vocabulary_size, list[SoftTargets]()
    for number in {size, *(2**power - 1 for power in range(1, size.bit_length()))}:
        logprobs_1V = torch.full((1, size), _UNLIKELY)
        logprobs_1V[:, -number:] = 0.0  # ids above 16 bits take more
        found.append(source.codec.cut(logprobs_1V.log_softmax(-1), torch.zeros(1, dtype=torch.float64)))
    return max(found, key=lambda row: _packed_bytes(row, source))


def _copies(row: SoftTargets, number: int) -> SoftTargets:
    return row[np.zeros(number, np.int64)]


def _packed_bytes(row: SoftTargets, source: Source) -> float:
    """Of one such soft target among its like."""
    soft = _copies(row, _LIKE_EACH_OTHER)
    annotation = Annotation("", {"answer": Target((0,) * len(soft), soft)}, None)
    return sum(array.nbytes for array in packed(annotation, source.codec).values()) / len(soft)


def _reading(lessons: Sequence[Lesson], row: SoftTargets) -> Read:
    softs = (soft for lesson in lessons for sequence in lesson.sequences for soft in sequence.soft.values())
    number = {soft.place: soft.num_positions for soft in softs}
    return lambda places: _copies(row, sum(number[place] for place in places))


def _most_bytes(asked: Asked) -> int:
    """That the cache will grow by, at most."""
    source, lacking = asked.source, {request.key for request in asked.missing}
    if not lacking:
        return 0
    groups = plan(asked.filled.every, source.group_size)
    num_shards = sum(any(request.key in lacking for request in group.requests) for group in groups)
    fixed = num_shards * _SHARD_BYTES + len(lacking) * _RECORD_BYTES + 2 * asked.text_bytes
    if not source.teacher.gives_soft_targets:
        return fixed
    per_token = _packed_bytes(_widest(source), source) + 4 + _TEXT_BYTES
    num_tokens = sum(asked.num_written(request) + len(request.given_ids) for request in asked.missing)
    return fixed + round(num_tokens * per_token)


def _examples(job: Job, asked: Sequence[Asked]) -> Finding:
    splits, num_too_long = job.source.splits, len({id_ for each in asked for id_ in each.filled.too_long})
    sizes = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    told = ", ".join(f"{len(examples)} {name}" for name, examples in sizes.items())
    labelled = sum(example.answer is not None for example in splits.train)
    rest = f"; {labelled} of train have a label; {num_too_long} too long for max_length={job.prompts.max_length}"
    return _known("examples", told + rest)


def _annotating(asked: Asked, most_bytes: int) -> list[Finding]:
    """What one teacher will read, write, take and leave."""
    number = len(asked.filled.every)
    told = f"{len(asked.missing)} of {number} are missing" + (" at most" if asked.is_bound else "")
    findings = [_known(f"{asked.name}records", told, f"{number - len(asked.missing)} are there")]
    if not asked.missing:
        return findings
    if asked.speaks:
        weights, device = _weights(asked), _device()
        findings += [_tokens(asked), weights]
        if not weights.stops:
            findings.append(_hours(asked, _measured(asked, device)))
    folder, store = asked.source.store.folder, asked.source.store
    where = f"for records at {store.place} (there: unknown)" if store.place != str(folder) else "for records"
    return [*findings, _disk(f"{asked.name}cache", most_bytes, folder, where, False)]


def _tokens(asked: Asked) -> Finding:
    """Prompts and given words, what stands before all questions once; and what is written in their place."""
    prompts, spans = asked.source.prompts, {request.span for request in asked.missing}
    num_read = sum(len(prompts.prefix(span)) for span in SPANS if span in spans)
    num_read += sum(len(request.question_ids) + len(request.given_ids) for request in asked.missing)
    num_written = sum(map(asked.num_written, asked.missing))
    at_most = " at most" if asked.is_bound else ""
    return _known(f"{asked.name}tokens", f"{num_read:,} to read{at_most}, {num_written:,} to write at most")


def _weights(asked: Asked) -> Finding:
    size, dtype = 0, str(asked.source.store.fingerprint["teacher"].get("dtype", "float32"))
    for file in asked.source.folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            size += sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    num_bytes, there = size * getattr(torch, dtype).itemsize, free_memory(_device())
    return Finding(
        f"{asked.name}weights",
        None if there is None else num_bytes <= there,
        f"{told_bytes(num_bytes)} of the teacher's in {dtype}, on {_device()}",
        f"<= {'unknown' if there is None else told_bytes(there)}",
        "Take a smaller teacher, or a machine with more memory; nothing of it was measured",
        True,
    )


def _measured(asked: Asked, device: torch.device) -> Estimate | None:
    """What a few requests take, or None where there is not the memory for them."""
    source = asked.source
    try:
        with loaded(source.teacher) as model:
            model.to(device)
            return estimate(source.teacher, source.codec, asked.missing, source.batch_size)
    except torch.OutOfMemoryError:
        return None


def _hours(asked: Asked, found: Estimate | None) -> Finding:
    told = f"about {told_seconds(found.seconds)}, measured on {found.num_sampled} requests" if found else "unknown"
    return Finding(
        f"{asked.name}annotation",
        found is not None,
        told + ("; that cache will be about " + told_bytes(found.num_bytes) if found else ""),
        "memory for a batch of them",
        f"Lower {'soft_' if asked.name else ''}teacher.batch_size",
        True,
    )


def _steps(foreseen: Foreseen, what: Plan) -> list[Finding]:
    """How much is learned from, how often; of lessons at least as long, where some are still unknown."""
    at_most = " at most" if foreseen.is_bound else ""
    number, total = len(what.lessons), sum(lesson.num_tokens for lesson in what.lessons)
    is_counted = what.batch_unit == "examples"
    per_step = what.batch_size * total / number if is_counted else what.batch_size
    epochs = what.num_steps * what.batch_size / (number if is_counted else total)
    return [
        _known(
            "lessons", f"{number:,}{at_most}, of {max(lesson.num_tokens for lesson in what.lessons)} tokens at most"
        ),
        _known("steps", f"{what.num_steps:,} of {what.batch_size} {what.batch_unit}, {epochs:.1f} epochs"),
        _known(
            "lesson tokens",
            f"{per_step:,.0f} per step{at_most}, {per_step * what.num_steps:,.0f} in all, padding apart",
        ),
        _known("devices", f"{what.num_devices} of kind {what.device.type}"),
    ]


def _disk(check: str, num_bytes: int, folder: Path, what: str, is_all: bool) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free
    return Finding(
        check,
        num_bytes <= free,
        f"{told_bytes(num_bytes)} at most {what}",
        f"<= {told_bytes(free)}",
        f"Make room on the disk of {folder}, "
        + ("or set root to another" if is_all else "or set cache.dir to another"),
        True,
    )


def _known(check: str, found: str, there: str = "") -> Finding:
    return Finding(check, True, found, there, "", False)


def _existing(folder: Path) -> Path:
    """The folder, or what of its path there is."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _device() -> torch.device:
    """Where a teacher is put."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
