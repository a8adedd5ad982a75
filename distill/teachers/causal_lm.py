"""A teacher that runs a causal language model in this process, few-shot, with a shared prefix computed once.

If a question has choices, the answer is the most likely choice, read to its end token. A small model prefers some
words regardless of the question, so choices can be calibrated: they get offsets that make the median question of a
sample undecided (after Zhao et al. 2021, "Calibrate Before Use", with real instead of content-free questions). Where
questions have choices of their own, these are the offsets of their letters. The answer can also be constrained to the
choices, as in constrained decoding. Soft targets include both, see `choices`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.app.files import Json
from distill.app.fingerprint import arguments_of, fingerprint_of
from distill.cache import Cut, uniforms
from distill.errors import ConfigError
from distill.models import hub, identity, loading, placement
from distill.models.generation import Generation
from distill.models.reading import PrefixedReader, Reading
from distill.prompts.rendering import Prompts
from distill.records import Annotation, Request, SoftTargets, Span, Target
from distill.tasks import Task, choices_of, readable_answer, with_reading
from distill.teachers import Calibration
from distill.teachers.choices import Adjusting, Adjustment, OwnAdjustments, Place, calibrated_offsets

_CALIBRATION_BATCH = 32
_BORDER_TOKENS = 4  # before those of a text, which are decoded otherwise at a beginning


@final
class CausalLMTeacher:
    """Soft targets and rationales from a model of the transformers library."""

    gives_soft_targets = True
    # The codec is in the cache's fingerprint beside the teacher. `hashes` is only a place. The settings of `generation`
    # stand beside the others, as they did before they were a part.
    not_in_key = ("codec", "hashes", "generation")

    def __init__(
        self,
        *,
        folder: Path,
        hashes: Path,
        prompts: Prompts,
        task: Task,
        calibration: Calibration,
        codec: Cut,
        constrain: bool,
        dtype: Literal["auto", "float32", "bfloat16", "float16"],
        max_new_tokens: int,
        generation: Generation,
    ) -> None:
        """`codec` truncates soft targets; without questions in `calibration`, choices are not calibrated.

        `hashes` is the folder that keeps the hashes of weights. `generation` says how answers that are no choices are
        written, and rationales.
        """
        self._arguments = arguments_of(locals())
        if generation.min_new_tokens > max_new_tokens:
            raise ConfigError(
                f"teacher.kind.generation.min_new_tokens={generation.min_new_tokens} is more than "
                f"teacher.kind.max_new_tokens={max_new_tokens}; decrease it, or increase the limit"
            )
        self._folder, self._hashes, self._prompts, self._task, self._codec = folder, hashes, prompts, task, codec
        self._dtype = placement.native_dtype() if dtype == "auto" else getattr(torch, dtype)
        self._max_new_tokens, self._constrain = max_new_tokens, constrain
        self._generation = generation.for_model(folder)
        self._calibration, self._choices = calibration, prompts.choice_ids(task.choices)
        self._calibrated = _calibrated(task, calibration)
        self._readers: dict[Span, PrefixedReader] = {}

    def fingerprint(self) -> dict[str, Any]:
        """All settings, with the content of the model's folder, and the task's choices.

        How the task reads an answer is not part of it: texts are stored, and read when they are used.
        """
        contents: dict[str, Any] = {
            "folder": identity.fingerprint(self._folder, self._hashes),
            "task": list(self._task.choices),
        }
        has_choices = bool(self._choices or self._calibrated)
        num_calibrated = self._calibration.number if has_choices else 0  # the questions are a record of the cache
        contents |= self._generation.fingerprint()
        return fingerprint_of(self, self._arguments, **contents, calibration=num_calibrated)

    def backend(self) -> dict[str, str]:
        """Versions of the libraries and the dtype in use: with others, targets differ by rounding."""
        versions = {name: version(name) for name in ("torch", "transformers")}
        return versions | {"dtype": str(self._dtype).removeprefix("torch.")}

    def load(self) -> nn.Module:
        """Load the weights, frozen and in eval mode; those of a hub model are downloaded now."""
        hub.download_weights(self._folder)
        model: nn.Module = loading.load(self._folder, self._dtype).eval().requires_grad_(False)
        self._model: Any = model
        return model

    def close(self) -> None:
        """Release the weights and everything computed with them."""
        self._readers = {}
        self.__dict__.pop("_offsets", None)
        del self._model

    def num_tokens(self, request: Request) -> int:
        """Number of tokens after the shared prefix: those to read, and those that are written at most."""
        choices = choices_of(self._task, request.example) if request.span == "answer" else ()
        longest_choice = max(map(len, self._prompts.choice_ids(choices)), default=0)
        return len(request.question_ids) + (len(request.given_ids) or longest_choice or self._max_new_tokens)

    @torch.inference_mode()
    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        """Annotate requests of a single span; ValueError if their spans differ."""
        spans = {request.span for request in requests}
        if len(spans) != 1:
            raise ValueError(f"all requests of a call must have the same span, got {sorted(spans)}")
        _ = self._offsets  # before the first record of any span: all records of a cache share one calibration
        by_way = defaultdict[Callable[[Sequence[Request]], list[Annotation]], list[Request]](list)
        for request in requests:
            by_way[self._way(request)].append(request)
        annotations = [annotation for way, members in by_way.items() for annotation in way(members)]
        by_key = {annotation.key: annotation for annotation in annotations}
        return [by_key[request.key] for request in requests]

    def _way(self, request: Request) -> Callable[[Sequence[Request]], list[Annotation]]:
        """How to annotate. Given texts are only scored, nothing is generated; but choices always need all scores."""
        if request.span == "answer" and choices_of(self._task, request.example):
            return self._choose
        if request.given_ids:
            return self._score
        return self._answer if request.span == "answer" else self._reason

    def _score(self, requests: Sequence[Request]) -> list[Annotation]:
        """Soft targets at every token of the given texts."""
        targets, span = [request.given_ids for request in requests], requests[0].span
        reader = self._reader(span)
        hidden_NH = reader.hidden_before_targets([request.question_ids for request in requests], targets)
        uniform_N = torch.cat([self._uniforms(r, len(ids)) for r, ids in zip(requests, targets, strict=True)])
        soft, annotations = self._truncate(reader, hidden_NH, uniform_N), list[Annotation]()
        for request, ids in zip(requests, targets, strict=True):
            annotations.append(Annotation(request.key, {span: Target(ids, soft[: len(ids)])}, None))
            soft = soft[len(ids) :]
        return annotations

    def _choose(self, requests: Sequence[Request]) -> list[Annotation]:
        reading, chosen = self._read(requests), list[Annotation]()
        adjustment, scores = self._scored(requests, reading)
        for request, score_C in zip(requests, scores, strict=True):
            answer = choices_of(self._task, request.example)[int(score_C.argmax())]
            chosen.append(Annotation(request.key, {}, answer, choice_logprobs=tuple(score_C.tolist())))
        return self._with_targets(requests, chosen, reading, adjustment)

    def _answer(self, requests: Sequence[Request]) -> list[Annotation]:
        reading = self._read(requests)
        return self._with_targets(requests, self._write(requests, reading), reading, None)

    def _with_targets(
        self, requests: Sequence[Request], chosen: Sequence[Annotation], reading: Reading, adjustment: Adjusting | None
    ) -> list[Annotation]:
        """Annotations of answers, with their soft targets, or with those of the given answers."""
        pairs = zip(requests, chosen, strict=True)
        answers = [with_reading(annotation, self._task, request.example).whole_answer for request, annotation in pairs]
        own_ids = [self._prompts.answer_ids(answer) if answer else () for answer in answers]
        ids = [request.given_ids or own for request, own in zip(requests, own_ids, strict=True)]
        softs = self._soft_targets(requests, reading, ids, adjustment)
        return [
            replace(annotation, targets={"answer": Target(i, soft)} if i else {})
            for annotation, i, soft in zip(chosen, ids, softs, strict=True)
        ]

    def _write(self, requests: Sequence[Request], reading: Reading) -> list[Annotation]:
        """Direct answers as generated texts, without targets."""
        return [
            Annotation(
                request.key,
                {},
                readable_answer(self._task, text.strip(), request.example),
                is_sampled=self._is_sampled(request),
                is_truncated=not has_ended,
                text=text.strip(),
            )
            for request, (text, has_ended) in zip(requests, self._generated(requests, reading), strict=True)
        ]

    def _reason(self, requests: Sequence[Request]) -> list[Annotation]:
        reading = self._read(requests)
        generated = self._generated(requests, reading)
        replies = [self._prompts.reply(text) for text, _ in generated]
        pairs = zip(requests, replies, strict=True)
        answers = [readable_answer(self._task, reply.answer, request.example) for request, reply in pairs]
        rationales = [self._prompts.rationale_ids(r.rationale) if r.rationale else () for r in replies]
        # Generated text is tokenized again and read again, so that text, ids and targets always match.
        endings = [self._prompts.answer_ids(a) if a and r else () for a, r in zip(answers, rationales, strict=True)]
        bridge = self._prompts.separator_ids()
        sequences = [(*r, *bridge, *ending) if ending else r for r, ending in zip(rationales, endings, strict=True)]
        softs = self._soft_targets(requests, reading, sequences, None)
        return [
            Annotation(
                request.key,
                _targets(rationales[k], endings[k], softs[k]),
                answers[k],
                replies[k].rationale,
                is_sampled=self._is_sampled(request),
                is_truncated=not generated[k][1],
                text=replies[k].answer,
            )
            for k, request in enumerate(requests)
        ]

    def _generated(self, requests: Sequence[Request], reading: Reading) -> list[tuple[str, bool]]:
        """The texts up to the first text that stops them, and whether they ended before the limit."""
        texts = list[tuple[str, bool]]()
        for ids in self._generate(requests, reading):
            whole = self._prompts.generated_text(ids)
            text = self._generation.cut(whole)
            texts.append((text, self._prompts.has_ended(ids) or text != whole))
        return texts

    def _generate(self, requests: Sequence[Request], reading: Reading) -> list[list[int]]:
        """Tokens of generated texts; the random numbers of a sampled one depend only on the key of its request."""
        generation = self._generation
        ending: dict[str, Any] = {
            "stops": self._prompts.ends,
            "min_new_tokens": generation.min_new_tokens,
            "is_complete": self._is_complete if generation.stops else None,
        }
        is_sampled_B = [self._is_sampled(request) for request in requests]
        if not any(is_sampled_B):
            return reading.greedy(max_new_tokens=self._max_new_tokens, **ending)
        # Not the random numbers of the codec: its draws must be independent of the generated tokens.
        keys = [f"{request.key}/words" for request in requests]
        uniforms_BN = torch.stack([torch.from_numpy(uniforms(key, self._max_new_tokens, 0)) for key in keys])
        uniforms_BN[[not is_sampled for is_sampled in is_sampled_B]] = 0.0
        temperature_B = torch.tensor([generation.temperature_of(request.sample) or 1.0 for request in requests])
        ending |= {"top_p": generation.top_p, "top_k": generation.top_k}
        return reading.sampled(uniforms_BN=uniforms_BN, temperature=temperature_B.double(), **ending)

    def _is_sampled(self, request: Request) -> bool:
        return self._generation.temperature_of(request.sample) > 0

    def _is_complete(self, ids: Sequence[int]) -> bool:
        """Whether the last of these tokens completes a text that ends a text."""
        # A token has at least one byte, and a character at most four; only where the end matches is all decoded.
        longest = 4 * max(map(len, self._generation.stops)) + _BORDER_TOKENS
        return self._stopped(ids[-longest:]) and self._stopped(ids)

    def _stopped(self, ids: Sequence[int]) -> bool:
        text = self._prompts.decode(ids)
        return self._generation.cut(text) != text

    def _reader(self, span: Span) -> PrefixedReader:
        if any(not reader.is_valid for reader in self._readers.values()):
            self._readers, self._offset_V = {}, None
        if span not in self._readers:
            prefix = self._prompts.prefix(span)
            way = next((reader.way for reader in self._readers.values()), None)  # the architecture decides it
            self._readers[span] = PrefixedReader(self._model, prefix, self._prompts.vocabulary_size, way)
        return self._readers[span]

    def _read(self, requests: Sequence[Request]) -> Reading:
        return self._reader(requests[0].span).read([request.question_ids for request in requests])

    def _scored(self, requests: Sequence[Request], reading: Reading) -> tuple[Adjusting, Sequence[Tensor]]:
        """The adjustment of a batch, and the log-probabilities [C] of each prompt's choices among themselves."""
        if any(request.example.choices for request in requests):
            choices = [choices_of(self._task, request.example) for request in requests]
            own = self._own_adjustments(reading, choices)
            return OwnAdjustments(own), [adjustment.score_BC[0] for adjustment in own]
        token_logprobs = reading.token_logprobs(reading.first_BV, self._choices)
        offset_C = self._offset_of(self._task.choices, reading)
        adjustment = Adjustment.of(self._choices, offset_C, self._constrain, token_logprobs)
        return adjustment, list(adjustment.score_BC)

    def _own_adjustments(self, reading: Reading, choices: Sequence[tuple[str, ...]]) -> list[Adjustment]:
        ids = [self._prompts.choice_ids(of_prompt) for of_prompt in choices]
        return [
            Adjustment.of(
                ids[row], self._offset_of(choices[row], reading), self._constrain, [x.unsqueeze(0) for x in own]
            )
            for row, own in enumerate(reading.own_token_logprobs(ids))
        ]

    def _offset_of(self, choices: Sequence[str], reading: Reading) -> Float[Tensor, "C"]:
        offsets = [self._offsets.get(choice, 0.0) for choice in choices]
        return torch.tensor(offsets, dtype=torch.float32, device=reading.first_BV.device)

    @cached_property
    def _offsets(self) -> Mapping[str, float]:
        """Offsets of the choices, those of an earlier calibration if there was one; none without calibration."""
        if not self._calibrated:
            return {}
        recall = self._calibration.recall
        record = recall("calibration", self._calibrate) if recall else self._calibrate()
        return dict(zip(record["choices"], map(float, record["offsets"]), strict=True))

    def _calibrate(self) -> Json:
        """Measure the offsets of the choices on the calibration questions, without those that are too long."""
        reader, requests, chunks = self._reader("answer"), dict[str, Request](), list[Tensor]()
        for example in self._calibration.questions:
            with suppress(ValueError):  # too long
                requests[example.id] = self._prompts.request(example, "answer")
        ordered, choices = list(requests.values()), self._calibrated
        if not ordered:
            raise ConfigError("every question to calibrate on is too long; increase prompt.max_length")
        for start in range(0, len(ordered), _CALIBRATION_BATCH):
            batch = ordered[start : start + _CALIBRATION_BATCH]
            reading = reader.read([request.question_ids for request in batch])
            chunks.append(self._scores(reading, [choices_of(self._task, request.example) for request in batch]))
        offset_C = calibrated_offsets(torch.cat(chunks))
        return {"choices": list(choices), "offsets": offset_C.tolist(), "questions": list(requests)}

    def _scores(self, reading: Reading, choices: Sequence[tuple[str, ...]]) -> Float[Tensor, "N C"]:
        """Log-probabilities of the calibrated choices, NaN where a question does not have one."""
        if self._choices:
            return reading.choice_logprobs(reading.first_BV, self._choices)
        own = reading.own_choice_logprobs([self._prompts.choice_ids(of_prompt) for of_prompt in choices])
        missing = torch.full((len(self._calibrated),), torch.nan, device=reading.first_BV.device)
        return torch.stack([torch.cat([score_C, missing[len(score_C) :]]) for score_C in own])

    def _soft_targets(
        self,
        requests: Sequence[Request],
        reading: Reading,
        targets: Sequence[tuple[int, ...]],
        adjustment: Adjusting | None,
    ) -> list[SoftTargets]:
        """Distributions at every token of the targets; the first follows the prompt, which has been read."""
        # No target depends on the prediction after the last token, so that token is not read.
        first_BV, lengths = reading.first_BV, [max(0, len(ids) - 1) for ids in targets]
        padded = [[*ids[:-1], *[0] * (max(lengths) - n)] for ids, n in zip(targets, lengths, strict=True)]
        uniforms_BN = [self._uniforms(r, max(1, len(ids))) for r, ids in zip(requests, targets, strict=True)]
        if adjustment:
            first_BV = adjustment.adjust(first_BV, [(row, ()) for row in range(len(targets))])
        parts = [self._codec.cut(first_BV, torch.stack([uniform_N[0] for uniform_N in uniforms_BN]))]
        if max(lengths):
            hidden_BTH = reading.feed(torch.tensor(padded, device=first_BV.device))
            is_read_BT = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
            later_NH = hidden_BTH[is_read_BT.to(hidden_BTH.device)]
            places = [(row, ids[: 1 + n]) for row, ids in enumerate(targets) for n in range(lengths[row])]
            uniform_N = torch.cat([uniform_N[1:] for uniform_N in uniforms_BN])
            parts.append(self._truncate(reading.reader, later_NH, uniform_N, adjustment, places))
        joined = SoftTargets.join(parts)
        by_target, start = list[SoftTargets](), len(targets)
        for row, (ids, length) in enumerate(zip(targets, lengths, strict=True)):
            rows = [joined[row : row + min(1, len(ids))], joined[start : start + length]]
            by_target.append(SoftTargets.join(rows))
            start += length
        return by_target

    def _truncate(
        self,
        reader: PrefixedReader,
        hidden_NH: Float[Tensor, "N H"],
        uniform_N: Float[Tensor, "N"],
        adjustment: Adjusting | None = None,
        places: Sequence[Place] = (),
    ) -> SoftTargets:
        parts, start = list[SoftTargets](), 0
        for logprobs_MV in reader.logprobs_in_chunks(hidden_NH):
            stop = start + len(logprobs_MV)
            if adjustment:
                logprobs_MV = adjustment.adjust(logprobs_MV, places[start:stop])
            parts.append(self._codec.cut(logprobs_MV, uniform_N[start:stop]))
            start = stop
        return SoftTargets.join(parts)

    def _uniforms(self, request: Request, number: int) -> Float[Tensor, "N"]:
        """Random numbers for the positions of a target, the same in any batch."""
        return torch.from_numpy(uniforms(request.key, number, self._codec.seed or 0))


def _calibrated(task: Task, calibration: Calibration) -> tuple[str, ...]:
    """The choices to calibrate: those of the task, or the letters of its questions; empty without calibration."""
    if not calibration.questions:
        return ()
    choices = {choices_of(task, example) for example in calibration.questions}
    longest = max(choices, key=len)
    if any(longest[: len(few)] != few for few in choices):
        raise ConfigError(
            f"teacher.calibrate={calibration.number}: the questions have choices of their own, as texts, which are too "
            "rare to calibrate; set teacher.calibrate=0, or task.options.answer=letter"
        )
    return longest


def _targets(rationale: tuple[int, ...], answer: tuple[int, ...], soft: SoftTargets) -> dict[Span, Target]:
    """Split the distributions of the sequence `rationale, bridge, answer` into the targets of the two spans."""
    targets: dict[Span, Target] = {}
    if rationale:
        targets["rationale"] = Target(rationale, soft[: len(rationale)])
    if answer:
        targets["answer"] = Target(answer, soft[len(soft) - len(answer) :])
    return targets
