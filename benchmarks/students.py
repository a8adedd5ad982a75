"""What a student learns from each codec: the share of what whole distributions teach that is left in few bytes.

Students with the same start, data order and number of steps learn from gold tokens alone (`answers`), from the
teacher's whole distributions (`dense`), and from what each codec leaves of them. On texts that no student saw,

    share = (KL of answers - KL of codec) / (KL of answers - KL of dense),    KL = KL(teacher || student)

with KL over the whole vocabulary, per seed; seeds decide the order of the data. Teacher and student are those of
conf/teacher/smollm2_135m.yaml and conf/student/smollm2_6_layers.yaml, the texts are short problems of GSM8K with the
solutions that people wrote. The caches are made once; students see what comes back from a codec's bytes.

    scripts/benchmark students data=gsm8k_train.jsonl [num_steps=100 batch_size=4 num_held_out=80 num_seeds=3]

Every finished run is noted in $DISTILL_ROOT/benchmarks/students.jsonl, and what is noted there with the same settings
is not repeated: whoever was stopped goes on.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_linear_schedule_with_warmup

from benchmarks.measure import Row, keep
from distill.annotation.codec_probe import pass_through
from distill.app.files import sha256
from distill.cache import Codec
from distill.cache.codecs.rs_kd import RandomSampling
from distill.cache.codecs.sampled import Sampled
from distill.cache.codecs.topk import TopK
from distill.lessons.collate import collate
from distill.lessons.join import Lesson, SoftPlace, TrainingSequence
from distill.lessons.loader import StepSampler
from distill.losses import Objective
from distill.losses.cross_entropy import CrossEntropy
from distill.losses.forward_kl import ForwardKL
from distill.losses.head import head_loss
from distill.models import loading, naming
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Batch, Place, Prompt, SoftTargets, Span, content_id
from distill.reports.statistics import calibration_error
from distill.students.causal_lm import open_student
from distill.training.module import StudentModule

CONF = Path(__file__).parent.parent / "conf"
LABELS = Objective(CrossEntropy(), "rationale", "labels", 1.0, 1.0)
SOFT = Objective(ForwardKL(), "rationale", "soft", 1.0, 1.0)
SAMPLED = "sampled n=64 k_min=1"
RS_KD = "rs_kd, same bytes"
TOP_50 = "topk k=50"
CODECS: dict[str, Codec] = {
    SAMPLED: Sampled(n=64, k_min=1, seed=0, temperature=1.0),
    "topk k=13": TopK(k=13, temperature=1.0),
    TOP_50: TopK(k=50, temperature=1.0),
}
ARMS = ("answers", "dense", *CODECS, RS_KD)
NUM_MEASURED = 24  # texts on which sizes are matched
CHANGEABLE = {"num_steps", "batch_size", "num_held_out", "max_length"}


@dataclass(frozen=True)
class Settings:
    """All that decides a run, besides the code, its arm and its seed; `sha256` is that of the data."""

    sha256: str
    num_steps: int = 100
    batch_size: int = 4
    num_held_out: int = 80
    max_length: int = 112
    warmup_steps: int = 10
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Text:
    """A question with its solution; position n of the solution is predicted from `hidden_NH[n]` by the teacher."""

    id: str
    prompt: Prompt
    hidden_NH: Float[Tensor, "N H"]


Loss = Callable[[StudentModule, Batch, Sequence[Text]], Tensor]


@dataclass(frozen=True)
class Arm:
    """One way to train: its loss, and where that reads a cache, the bytes per position and what comes back of them."""

    objective: Objective
    loss: Loss
    num_bytes: float = 0.0
    codec: Mapping[str, Any] = field(default_factory=dict)
    cache: Sequence[SoftTargets] | None = None


@dataclass(frozen=True)
class Run:
    """One student: means over all held-out positions; `accuracy` and `ece` are those of its guesses of gold tokens."""

    arm: str
    seed: int
    num_bytes: float
    codec: Mapping[str, Any]
    kl: float
    agreement: float
    accuracy: float
    ece: float
    seconds: float


@dataclass(frozen=True)
class Teacher:
    """What is left of the teacher: the texts as it read them, and its head."""

    texts: Sequence[Text]
    weight_VH: Float[Tensor, "V H"]

    def logprobs(self, hidden_NH: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """Whole distributions."""
        return (hidden_NH @ self.weight_VH.T).log_softmax(-1)


def main(arguments: Sequence[str]) -> None:
    """Train what is not noted yet, and report."""
    data, num_seeds, settings = _given(arguments)
    root = Path(os.environ["DISTILL_ROOT"])
    notes = root / "benchmarks" / "students.jsonl"
    notes.parent.mkdir(parents=True, exist_ok=True)
    noted = _noted(notes, settings)
    wanted = [(name, seed) for seed in range(num_seeds) for name in ARMS]
    runs = [noted[place] for place in wanted if place in noted]
    missing = [place for place in wanted if place not in noted]
    for run in _new_runs(missing, data, root, settings) if missing else ():
        with notes.open("a") as file:
            file.write("\n" + json.dumps({"settings": asdict(settings), **asdict(run)}))
        _say(json.dumps(asdict(run)))
        runs.append(run)
    _report(runs)


def _new_runs(places: Sequence[tuple[str, int]], data: Path, root: Path, settings: Settings) -> Iterator[Run]:
    """Train and measure a student for each arm and seed."""
    loading.flush_denormals()
    student = _conf("student/smollm2_6_layers.yaml")
    folder = naming.resolve(student["model"], root)
    teacher = _read(naming.resolve(_conf("teacher/smollm2_135m.yaml")["model"], root), data, settings)
    num_train = settings.num_steps * settings.batch_size
    train, held_out = teacher.texts[:num_train], teacher.texts[num_train:]
    arms = _arms(teacher, train)
    whole = [teacher.logprobs(text.hidden_NH) for text in held_out]
    for name, seed in places:
        start, arm = time.perf_counter(), arms[name]
        model = open_student(
            folder,
            keep_layers=student["keep_layers"],
            freeze=student["freeze"],
            from_scratch=False,
            lora=None,
            gradient_checkpointing=False,
        )
        module = _module(model, arm.objective, settings)
        _train(module, arm, train, seed, settings)
        figures = _figures(module, held_out, whole, settings)
        seconds = round(time.perf_counter() - start, 1)
        yield Run(name, seed, num_bytes=arm.num_bytes, codec=arm.codec, seconds=seconds, **figures)


def _arms(teacher: Teacher, train: Sequence[Text]) -> dict[str, Arm]:
    codecs = CODECS | {RS_KD: _matched(teacher, train[:NUM_MEASURED])}
    caches, num_bytes = _caches(teacher, train, codecs)
    _say(f"{len(codecs)} caches of {sum(len(text.hidden_NH) for text in train)} positions are made")
    plain = {
        "answers": Arm(LABELS, _cached_loss),
        "dense": Arm(SOFT, partial(_dense_loss, teacher), 4.0 * len(teacher.weight_VH)),
    }
    return plain | {
        name: Arm(SOFT, _cached_loss, num_bytes[name], codec.fingerprint(), caches[name])
        for name, codec in codecs.items()
    }


def _given(arguments: Sequence[str]) -> tuple[Path, int, Settings]:
    given = dict(argument.partition("=")[::2] for argument in arguments)
    data, num_seeds = Path(given.pop("data", "")), int(given.pop("num_seeds", 3))
    if not data.is_file() or not set(given) <= CHANGEABLE:
        raise SystemExit(
            "benchmarks.students: data=<file> must name a file that exists: GSM8K's train split, a JSON object a line "
            "with question and answer, or question and human_rationale. To be had, under the MIT licence, as "
            "grade_school_math/data/train.jsonl of https://github.com/openai/grade-school-math. "
            f"Further arguments are num_seeds, {', '.join(sorted(CHANGEABLE))}; given was: {' '.join(arguments)}"
        )
    return data, num_seeds, Settings(sha256(data), **{name: int(value) for name, value in given.items()})


def _conf(name: str) -> Any:
    return yaml.safe_load((CONF / name).read_text())


@torch.no_grad()
def _read(folder: Path, data: Path, settings: Settings) -> Teacher:
    """Let the teacher read as many texts as are needed."""
    tokenizer = load_tokenizer(folder)
    number = settings.num_steps * settings.batch_size + settings.num_held_out
    with data.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    read = [(content_id(row["question"]), _prompt(tokenizer, row["question"], _solution(row))) for row in rows]
    short = {id_: prompt for id_, prompt in read if len(prompt.ids) <= settings.max_length}
    if len(short) < number:
        raise SystemExit(
            f"benchmarks.students: {number} texts of at most {settings.max_length} tokens are wanted, "
            f"{data} has {len(short)}; lower num_steps or num_held_out"
        )
    ids, prompts = list(short)[:number], list(short.values())[:number]
    model: Any = loading.load(folder, torch.float32).eval()
    hidden: dict[int, Tensor] = {}
    by_length = sorted(range(number), key=lambda index: len(prompts[index].ids))
    start = time.perf_counter()
    for first in range(0, number, settings.batch_size):
        indices = by_length[first : first + settings.batch_size]
        longest = max(len(prompts[index].ids) for index in indices)
        ids_BT = torch.tensor([[*prompts[i].ids, *[0] * (longest - len(prompts[i].ids))] for i in indices])
        with _precision():
            hidden_BTH = model.base_model(ids_BT, use_cache=False).last_hidden_state.float()
        for index, hidden_TH in zip(indices, hidden_BTH, strict=True):
            begin, end = prompts[index].spans["rationale"]
            hidden[index] = hidden_TH[begin - 1 : end - 1].clone()
    _say(f"the teacher read {number} texts in {time.perf_counter() - start:.0f} s")
    texts = [Text(id_, prompts[index], hidden[index]) for index, id_ in enumerate(ids)]
    return Teacher(texts, model.get_output_embeddings().weight.detach().clone())


def _prompt(tokenizer: Any, question: str, solution: str) -> Prompt:
    """The solution and its end are to be learned."""
    asked = tokenizer(f"Q: {question.strip()}\nA:", add_special_tokens=False).input_ids
    said = [*tokenizer(f" {solution.strip()}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return Prompt((*asked, *said), {"rationale": (len(asked), len(asked) + len(said))})


def _solution(row: Mapping[str, str]) -> str:
    """The published file has it as the answer, with calculator marks within and the number behind."""
    return row.get("human_rationale") or re.sub(r"<<.*?>>|\n####.*", "", row["answer"])


def _caches(
    teacher: Teacher, texts: Sequence[Text], codecs: Mapping[str, Codec]
) -> tuple[dict[str, list[SoftTargets]], dict[str, float]]:
    """What comes back of each text's distributions from each codec's bytes, and the bytes per position."""
    caches: dict[str, list[SoftTargets]] = {name: [] for name in codecs}
    sizes: Counter[str] = Counter()
    for text in texts:
        logprobs_NV = teacher.logprobs(text.hidden_NH)
        for name, codec in codecs.items():
            kept = pass_through(logprobs_NV, codec, text.id)
            sizes[name] += kept.num_bytes
            caches[name].append(kept.back.for_training())
    number = sum(len(text.hidden_NH) for text in texts)
    return caches, {name: sizes[name] / number for name in codecs}


def _matched(teacher: Teacher, texts: Sequence[Text]) -> RandomSampling:
    """Random sampling with as many draws as fit into the bytes of `SAMPLED`."""

    def size(codec: Codec) -> float:
        return _caches(teacher, texts, {"codec": codec})[1]["codec"]

    wanted, low, high = size(CODECS[SAMPLED]), 8, 255
    while high - low > 1:
        middle = (low + high) // 2
        fits = size(RandomSampling(n=middle, seed=0, temperature=1.0)) <= wanted
        low, high = (middle, high) if fits else (low, middle)
    _say(f"{SAMPLED} takes {wanted:.2f} B on {NUM_MEASURED} texts; so does rs_kd n={low}")
    return RandomSampling(n=low, seed=0, temperature=1.0)


def _cached_loss(module: StudentModule, batch: Batch, texts: Sequence[Text]) -> Tensor:  # noqa: ARG001
    """As the project computes it."""
    total, _ = head_loss(_hidden(module, batch), module.head(), list(module.terms(batch).values()))
    return total


def _dense_loss(teacher: Teacher, module: StudentModule, batch: Batch, texts: Sequence[Text]) -> Tensor:
    """KL(teacher || student) less the teacher's entropy, which moves no student.

    The head's own way with V kept entries comes to the same, at three times the time of a whole step.
    """
    hidden_NH = _hidden(module, batch)
    p_NV = teacher.logprobs(torch.cat([text.hidden_NH for text in texts])).exp_()
    return cross_entropy(hidden_NH @ module.head().weight_VH.T, p_NV)


def _module(model: Any, objective: Objective, settings: Settings) -> StudentModule:
    """The student as the project trains it, with one loss and another learning rate."""
    optimizer = _conf("optim/adamw.yaml")["optimizer"]
    given = {name: value for name, value in optimizer.items() if not name.startswith("_")}
    given["lr"] = settings.learning_rate
    return StudentModule(
        model,
        objectives={"loss": objective},
        vocabulary_size=model.config.vocab_size,
        retemper=lambda logprobs_MK, _: logprobs_MK,
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, **given),
        make_schedule=partial(
            get_linear_schedule_with_warmup,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.num_steps,
        ),
    )


def _train(module: StudentModule, arm: Arm, train: Sequence[Text], seed: int, settings: Settings) -> None:
    """One pass over the texts in an order that the seed decides."""
    torch.manual_seed(seed)
    module.train()
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    sampler = StepSampler(
        [_lesson(text, None) for text in train],
        batch_size=settings.batch_size,
        batch_unit="examples",
        num_microbatches=1,
        num_steps=settings.num_steps,
        seed=seed,
    )
    for indices in itertools.islice(sampler.steps(), settings.num_steps):
        soft = {} if arm.cache is None else {train[index].id: arm.cache[index] for index in indices}
        lessons = [_lesson(train[index], soft.get(train[index].id)) for index in indices]
        counts = sum((lesson.counts() for lesson in lessons), Counter[Any]())
        batch = collate(lessons, counts, 0, partial(_joined, soft))
        arm.loss(module, batch, [train[index] for index in indices]).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _lesson(text: Text, soft: SoftTargets | None) -> Lesson:
    places: dict[Span, SoftPlace] = {} if soft is None else {"rationale": SoftPlace((text.id, "rationale"), len(soft))}
    return Lesson(text.id, (TrainingSequence(text.prompt, frozenset({"rationale"}), places),))


def _joined(soft: Mapping[str, SoftTargets], places: Sequence[Place]) -> SoftTargets:
    return SoftTargets.join([soft[key] for key, _ in places])


@torch.no_grad()
def _figures(
    module: StudentModule, held_out: Sequence[Text], whole: Sequence[Float[Tensor, "N V"]], settings: Settings
) -> dict[str, float]:
    """Means over all positions of the texts that the student did not see."""
    module.eval()
    weight_VH = module.head().weight_VH
    kl: list[Tensor] = []
    agrees: list[Tensor] = []
    confidence: list[Tensor] = []
    is_right: list[Tensor] = []
    for first in range(0, len(held_out), settings.batch_size):
        texts = held_out[first : first + settings.batch_size]
        batch = collate([_lesson(text, None) for text in texts], {}, 0, partial(_joined, {}))
        hidden_NH = _hidden(module, batch)
        log_q_NV = (hidden_NH @ weight_VH.T).log_softmax(-1)
        log_p_NV = torch.cat(list(whole[first : first + settings.batch_size]))
        kl.append((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1))
        top_N, said_N = log_q_NV.max(-1)
        agrees.append(said_N == log_p_NV.argmax(-1))
        confidence.append(top_N.exp())
        is_right.append(said_N == batch.label_N)
    return {
        "kl": float(torch.cat(kl).double().mean()),
        "agreement": float(torch.cat(agrees).double().mean()),
        "accuracy": float(torch.cat(is_right).double().mean()),
        "ece": calibration_error(torch.cat(confidence).tolist(), torch.cat(is_right).tolist()),
    }


def _hidden(module: StudentModule, batch: Batch) -> Float[Tensor, "N H"]:
    with _precision():
        return module.hidden(batch).float()


def _precision() -> torch.autocast:
    """Bodies compute in what the machine is fast in, heads in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=loading.native_dtype() == torch.bfloat16)


def _noted(notes: Path, settings: Settings) -> dict[tuple[str, int], Run]:
    """Runs that were finished before with the same settings."""
    lines = notes.read_text().splitlines() if notes.is_file() else []
    found = [note for line in lines if (note := _whole(line))]
    runs = [Run(**note) for note in found if note.pop("settings") == asdict(settings)]
    return {(run.arm, run.seed): run for run in runs}


def _whole(line: str) -> dict[str, Any] | None:
    """What a line says, if it was not broken off."""
    try:
        note: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return note


def _report(runs: Sequence[Run]) -> None:
    """Keep the figures with their bars, and print a table."""
    by_arm = {name: [run for run in runs if run.arm == name] for name in ARMS}
    kl = {(run.arm, run.seed): run.kl for run in runs}
    shares = {name: [_share(kl, run) for run in found] for name, found in by_arm.items()}
    share = {name: statistics.mean(found) for name, found in shares.items()}
    ece = {name: statistics.mean(run.ece for run in found) for name, found in by_arm.items()}
    rows = []
    for name in (*CODECS, RS_KD):
        is_judged = name == SAMPLED
        rows += [
            Row(f"{name}: bytes per position", by_arm[name][0].num_bytes, None, "lower"),
            Row(f"{name}: share of the gap kept", share[name], 0.95 if is_judged else None, "higher"),
            Row(f"{name}: |ECE - ECE of dense|", abs(ece[name] - ece["dense"]), 0.003 if is_judged else None, "lower"),
        ]
    rows += [Row(f"share of {SAMPLED} - {name}", share[SAMPLED] - share[name], 0, "higher") for name in (RS_KD, TOP_50)]
    keep("students", rows)
    print(f"\n{'arm':24} {'bytes':>8} {'KL':>17} {'share of gap':>17} {'agreement':>10} {'accuracy':>9} {'ECE':>7}")
    for name, found in by_arm.items():
        means = [statistics.mean(getattr(run, figure) for run in found) for figure in ("agreement", "accuracy", "ece")]
        spread = f"{_spread([run.kl for run in found])} {_spread(shares[name])}"
        print(f"{name:24} {found[0].num_bytes:8.1f} {spread} {means[0]:10.4f} {means[1]:9.4f} {means[2]:7.4f}")


def _share(kl: Mapping[tuple[str, int], float], run: Run) -> float:
    """Of the gap of the run's own seed."""
    worst, best = kl["answers", run.seed], kl["dense", run.seed]
    return (worst - run.kl) / (worst - best)


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):8.4f} ± {deviation:6.4f}"


def _say(text: str) -> None:
    print(f"students: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
