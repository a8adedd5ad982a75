"""Have the teacher answer, and reason about, what the cache lacks; or look into the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.annotation.codec_probe import candidates, compare, sample, table
from distill.annotation.fill import Share, Source, check_rationales, fill, loaded, open_source, to_ask, without_answers
from distill.annotation.inspection import estimate, export_table, rescore, show
from distill.app import config as configuration
from distill.app.config import Config
from distill.app.console import is_first_process, say
from distill.cache.codecs.dense import Dense
from distill.errors import CacheError, ConfigError
from distill.records import SPANS, Example, Request, Span, unique_requests

_RESCORED = 32


def annotate(config: Config) -> float:
    """Fill the cache for all splits and say what it holds; or only look into it."""
    configuration.check(config)
    source = open_source(config)
    wanted = _wanted(config, source)
    if not (config.show or config.export or config.dry_run or config.verify or config.probe):
        return _filled(source, wanted, _share(config))
    asked = to_ask(source, wanted)
    if config.show:
        print(_shown(source, asked.every, str(config.show)))
    elif config.export:
        number = export_table(source.store, asked.every, source.prompts, Path(config.export))
        print(f"{config.export}\n{number} targets with their tokens, ids and log-probabilities")
    elif config.dry_run:
        print(_estimated(source, asked.every))
    elif config.probe:
        print(_probed(config, source, unique_requests(asked.requests.values())))
    else:  # a text that was drawn may be another one where rounding differs
        print(_verified(source, unique_requests(asked.requests.values()), config.seed))
    return 0.0


def _wanted(config: Config, source: Source) -> dict[Span, Sequence[Example]]:
    splits, wanted = source.splits, dict[Span, Sequence[Example]]()
    if "answer" in config.spans:
        wanted["answer"] = [*splits.train, *splits.validation, *without_answers(splits.test)]
    if "rationale" in config.spans:
        wanted["rationale"] = splits.train[: source.num_rationales]
    return wanted


def _share(config: Config) -> Share:
    part, _, parts = str(config.part).partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise ConfigError(f"part={config.part}: wanted part/parts, for example part=3/16 for the third of sixteen")
    return Share(int(part), int(parts), config.devices)


def _filled(source: Source, wanted: Mapping[Span, Sequence[Example]], share: Share) -> float:
    filled = fill(source, wanted, share=share)
    checked = check_rationales(source, filled)
    kept = sum(rationale.reason is None for rationale in checked)
    if not is_first_process():
        return float(filled.num_annotated)
    print(
        f"{source.store.place}\n{len(source.store)} records, {filled.num_annotated} of them new in "
        f"{filled.seconds:.0f} s; {kept} of {len(checked)} rationales are kept; "
        f"{len(filled.too_long)} examples too long"
    )
    return float(filled.num_annotated)


def _shown(source: Source, requests: Sequence[Request], which: str) -> str:
    found = [
        request
        for request in requests
        if which in (request.key, request.example.id) or request.example.question.startswith(which)
    ]
    there = [request for request in found if request.key in source.store]
    if not there:
        raise ConfigError(
            f"show={which}: {len(found)} examples begin so and none of them is in {source.store.folder}; "
            "give an example's id, a record's key or the beginning of a question"
        )
    return "\n\n".join(show(request, source.store.read(request.key), source.prompts) for request in there)


def _estimated(source: Source, requests: Sequence[Request]) -> str:
    missing = source.store.missing(requests)
    told = f"{source.store.place}\n{len(requests) - len(missing)} records are there, {len(missing)} are missing"
    if not missing:
        return told
    with loaded(source.teacher):
        found = estimate(source.teacher, source.codec, missing, source.batch_size)
    return (
        f"{told}; they will take about {found.seconds:.0f} s and {found.num_bytes / 1e6:.2f} MB "
        f"(measured on {found.num_sampled} of them; nothing was stored)"
    )


def _probed(config: Config, source: Source, requests: Sequence[Request]) -> str:
    teacher = source.teacher_with(codec=Dense())
    say(f"reading a few hundred of {len(requests)} targets whole, and what each codec makes of them; nothing is stored")
    with loaded(teacher):
        wholes = sample(teacher, requests, config.seed)
    if not wholes:
        raise ConfigError("this teacher gives no soft targets, so there is nothing that a codec could keep")
    found = compare(wholes, candidates(config.cache.codec.get("temperature", 1.0)))
    return table(found, sum(map(len, wholes)))


def _verified(source: Source, requests: Sequence[Request], seed: int) -> str:
    problems = source.store.check()
    if problems:
        raise CacheError("\n".join(problems))
    told = [f"{source.store.place}\n{len(source.store)} records: all checksums are right"]
    with loaded(source.teacher):
        for span in SPANS:
            asked = [request for request in requests if request.span == span]
            found = rescore(source.store, source.teacher, asked, _RESCORED, seed)
            told.append(
                f"{found.num_records} {span}s asked again: at most {found.from_live:.4f} away from the live teacher, "
                f"which is {found.noise_floor:.4f} away from itself in other company"
            )
            if not found.is_close:
                raise CacheError(f"{told[0]}, but {told[-1]}. Another teacher, or another machine, made these records")
    return "\n".join(told)
