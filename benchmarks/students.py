"""What a student learns from each codec, as a fraction of what it learns from whole distributions.

Students with the same initial weights, data order and number of steps train on gold tokens alone (`answers`), on the
teacher's whole distributions (`dense`), and on the soft targets that each codec keeps. On held-out texts,

    fraction = (KL of answers - KL of codec) / (KL of answers - KL of dense),    KL = KL(teacher || student)

with KL over the whole vocabulary, per seed; a seed determines the order of the data. Teacher and student are those of
conf/teacher/smollm2_135m.yaml and conf/student/smollm2_6_layers.yaml, the texts are short problems of GSM8K with their
human solutions. The caches are made once; students train on targets that were packed and unpacked by the codec.

    scripts/benchmark students data=gsm8k_train.jsonl [num_steps=100 batch_size=4 num_held_out=80 num_seeds=3]

Every finished run is appended to $DISTILL_ROOT/benchmarks/students.jsonl. Runs recorded there with the same settings
are not repeated, so an interrupted benchmark continues.
"""

from __future__ import annotations

import itertools
import json
import os
import re
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

from benchmarks.student_runs import ARMS, RS_KD, SAMPLED, TOP_13, TOP_50, Run, finished_runs, report
from distill.annotation.codec_probe import round_trip
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
from distill.models import loading, naming, placement
from distill.prompts.tokenizers import load_tokenizer
from distill.records import Batch, Prompt, SoftTargets, SoftTargetsKey, Span, Target, content_id
from distill.reports.statistics import calibration_error
from distill.students.causal_lm import TokenSeam, open_student
from distill.training.module import StudentModule

CONF = Path(__file__).parent.parent / "conf"
LABELS = Objective(CrossEntropy(), "rationale", "labels", 1.0, 1.0)
SOFT = Objective(ForwardKL(), "rationale", "soft", 1.0, 1.0)
CODECS: dict[str, Codec] = {
    SAMPLED: Sampled(n=64, k_min=1, seed=0, temperature=1.0),
    TOP_13: TopK(k=13, temperature=1.0),
    TOP_50: TopK(k=50, temperature=1.0),
}
NUM_MEASURED = 24  # texts on which sizes are compared
OPTIONS = {"num_steps", "batch_size", "num_held_out", "max_length"}


@dataclass(frozen=True)
class Settings:
    """Everything that determines a run ignored_sections code, arm and seed; `sha256` is the hash of the data."""

    sha256: str
    num_steps: int = 100
    batch_size: int = 4
    num_held_out: int = 80
    max_length: int = 112
    warmup_steps: int = 10
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Text:
    """A question with its solution; the teacher predicts token n of the solution from `hidden_NH[n]`."""

    id: str
    prompt: Prompt
    hidden_NH: Float[Tensor, "N H"]

    @property
    def solution(self) -> tuple[int, ...]:
        """The tokens of the solution."""
        start, stop = self.prompt.spans["rationale"]
        return self.prompt.ids[start:stop]


Loss = Callable[[StudentModule, Batch, Sequence[Text]], Tensor]


@dataclass(frozen=True)
class Arm:
    """One way to train: its losses, and for a codec its cache and the bytes per position."""

    objectives: Sequence[Objective]
    loss: Loss
    num_bytes: float = 0.0
    codec: Mapping[str, Any] = field(default_factory=dict)
    cache: Sequence[Target] | None = None


@dataclass(frozen=True)
class Teacher:
    """The teacher's hidden states of all texts, and its head; the model itself is not kept."""

    texts: Sequence[Text]
    weight_VH: Float[Tensor, "V H"]

    def logprobs(self, hidden_NH: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """Whole distributions."""
        return (hidden_NH @ self.weight_VH.T).log_softmax(-1)


def main(arguments: Sequence[str]) -> None:
    """Train the runs that are not recorded yet, and report all."""
    data, num_seeds, settings = parse_arguments(arguments)
    root = Path(os.environ["DISTILL_ROOT"])
    notes = root / "benchmarks" / "students.jsonl"
    notes.parent.mkdir(parents=True, exist_ok=True)
    finished = finished_runs(notes, asdict(settings))
    arm_seeds = [(name, seed) for seed in range(num_seeds) for name in ARMS]
    runs = [finished[arm_seed] for arm_seed in arm_seeds if arm_seed in finished]
    missing = [arm_seed for arm_seed in arm_seeds if arm_seed not in finished]
    for run in _new_runs(missing, data, root, settings) if missing else ():
        with notes.open("a") as file:
            file.write("\n" + json.dumps({"settings": asdict(settings), **asdict(run)}))
        _log(json.dumps(asdict(run)))
        runs.append(run)
    report(runs)


def _new_runs(arm_seeds: Sequence[tuple[str, int]], data: Path, root: Path, settings: Settings) -> Iterator[Run]:
    """Train and measure a student for each arm and seed."""
    loading.flush_denormals()
    folder = model_folder(root)
    teacher = read_teacher(folder, data, settings)
    num_train = settings.num_steps * settings.batch_size
    train, held_out = teacher.texts[:num_train], teacher.texts[num_train:]
    arms = _arms(teacher, train)
    teacher_logprobs = [teacher.logprobs(text.hidden_NH) for text in held_out]
    for name, seed in arm_seeds:
        start, arm = time.perf_counter(), arms[name]
        module = trained(folder, arm, train, seed, settings)
        figures = held_out_figures(module, held_out, teacher_logprobs, settings)
        seconds = round(time.perf_counter() - start, 1)
        yield Run(name, seed, num_bytes=arm.num_bytes, codec=arm.codec, seconds=seconds, **figures)


def model_folder(root: Path) -> Path:
    """The weights of the teacher, of which the student is a part."""
    return naming.resolve(_conf("weights/smollm2_135m_instruct.yaml")["model"], root)


def _arms(teacher: Teacher, train: Sequence[Text]) -> dict[str, Arm]:
    codecs = CODECS | {RS_KD: _equally_large_sampling(teacher, train[:NUM_MEASURED])}
    caches, num_bytes = _caches(teacher, train, codecs)
    _log(f"{len(codecs)} caches of {sum(len(text.hidden_NH) for text in train)} positions filled")
    without_codec = {
        "answers": Arm([LABELS], cached_loss),
        "dense": Arm([SOFT], partial(_dense_loss, teacher), 4.0 * len(teacher.weight_VH)),
    }
    return without_codec | {
        name: Arm([SOFT], cached_loss, num_bytes[name], codec.fingerprint(), caches[name])
        for name, codec in codecs.items()
    }


def parse_arguments(arguments: Sequence[str]) -> tuple[Path, int, Settings]:
    """Return the file with the texts, the number of seeds, and the other settings."""
    options = dict(argument.partition("=")[::2] for argument in arguments)
    data, num_seeds = Path(options.pop("data", "")), int(options.pop("num_seeds", 3))
    if not data.is_file() or not set(options) <= OPTIONS:
        raise SystemExit(
            "benchmarks.students: data=<file> must name an existing file: GSM8K's train split, JSON lines "
            "with question and answer, or question and human_rationale. It is available, under the MIT licence, as "
            "grade_school_math/data/train.jsonl of https://github.com/openai/grade-school-math. "
            f"Other arguments: num_seeds, {', '.join(sorted(OPTIONS))}; got: {' '.join(arguments)}"
        )
    return data, num_seeds, Settings(sha256(data), **{name: int(value) for name, value in options.items()})


def _conf(name: str) -> Any:
    return yaml.safe_load((CONF / name).read_text())


@torch.no_grad()
def read_teacher(folder: Path, data: Path, settings: Settings) -> Teacher:
    """Compute the teacher's hidden states on the texts of training and evaluation."""
    tokenizer = load_tokenizer(folder)
    number = settings.num_steps * settings.batch_size + settings.num_held_out
    with data.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    prompt_by_row = [(content_id(row["question"]), _prompt(tokenizer, row["question"], _solution(row))) for row in rows]
    short = {id_: prompt for id_, prompt in prompt_by_row if len(prompt.ids) <= settings.max_length}
    if len(short) < number:
        raise SystemExit(
            f"benchmarks.students: {data} has {len(short)} texts of at most {settings.max_length} tokens, "
            f"expected {number}; lower num_steps or num_held_out"
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
            span_start, span_end = prompts[index].spans["rationale"]
            hidden[index] = hidden_TH[span_start - 1 : span_end - 1].clone()
    _log(f"the teacher read {number} texts in {time.perf_counter() - start:.0f} s")
    texts = [Text(id_, prompts[index], hidden[index]) for index, id_ in enumerate(ids)]
    return Teacher(texts, model.get_output_embeddings().weight.detach().clone())


def _prompt(tokenizer: Any, question: str, solution: str) -> Prompt:
    """The question as the prompt; the solution and its end token are supervised."""
    question_ids = tokenizer(f"Q: {question.strip()}\nA:", add_special_tokens=False).input_ids
    solution_ids = [*tokenizer(f" {solution.strip()}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    start = len(question_ids)
    return Prompt((*question_ids, *solution_ids), {"rationale": (start, start + len(solution_ids))})


def _solution(row: Mapping[str, str]) -> str:
    """The solution; the published file has it as the answer, with calculator marks and a final number."""
    return row.get("human_rationale") or re.sub(r"<<.*?>>|\n####.*", "", row["answer"])


def _caches(
    teacher: Teacher, texts: Sequence[Text], codecs: Mapping[str, Codec]
) -> tuple[dict[str, list[Target]], dict[str, float]]:
    """Soft targets of each text after packing and unpacking by each codec, and the bytes per position."""
    caches: dict[str, list[Target]] = {name: [] for name in codecs}
    sizes: Counter[str] = Counter()
    for text in texts:
        logprobs_NV = teacher.logprobs(text.hidden_NH)
        for name, codec in codecs.items():
            trip = round_trip(logprobs_NV, codec, text.id)
            sizes[name] += trip.num_bytes
            caches[name].append(Target(text.solution, trip.back.for_training()))
    num_positions = sum(len(text.hidden_NH) for text in texts)
    return caches, {name: sizes[name] / num_positions for name in codecs}


def _equally_large_sampling(teacher: Teacher, texts: Sequence[Text]) -> RandomSampling:
    """Random sampling with the most draws that fit into the bytes of `SAMPLED`."""

    def size(codec: Codec) -> float:
        return _caches(teacher, texts, {"codec": codec})[1]["codec"]

    max_bytes, low, high = size(CODECS[SAMPLED]), 8, 255
    while high - low > 1:
        middle = (low + high) // 2
        fits = size(RandomSampling(n=middle, seed=0, temperature=1.0)) <= max_bytes
        low, high = (middle, high) if fits else (low, middle)
    _log(f"{SAMPLED} takes {max_bytes:.2f} B per position on {NUM_MEASURED} texts; rs_kd n={low} fits in the same")
    return RandomSampling(n=low, seed=0, temperature=1.0)


def cached_loss(module: StudentModule, batch: Batch, texts: Sequence[Text]) -> Tensor:  # noqa: ARG001
    """The loss as training computes it."""
    total, _ = head_loss(_hidden(module, batch), module.head(), list(module.terms(batch).values()))
    return total


def _dense_loss(teacher: Teacher, module: StudentModule, batch: Batch, texts: Sequence[Text]) -> Tensor:
    """KL(teacher || student) without the teacher's entropy, which has no gradient.

    `head_loss` with V kept entries gives the same gradient, but takes three times as long as a whole step here.
    """
    hidden_NH = _hidden(module, batch)
    p_NV = teacher.logprobs(torch.cat([text.hidden_NH for text in texts])).exp_()
    return cross_entropy(hidden_NH @ module.head().weight_VH.T, p_NV)


def _module(model: Any, objectives: Sequence[Objective], settings: Settings, seed: int) -> StudentModule:
    """The training module of a student with these losses and the learning rate of `settings`."""
    node = _conf("optim/adamw.yaml")["optimizer"]
    optimizer_settings = {name: value for name, value in node.items() if not name.startswith("_")}
    optimizer_settings["lr"] = settings.learning_rate
    return StudentModule(
        model,
        objectives={objective.source: objective for objective in objectives},
        seam=TokenSeam(model.config.vocab_size),
        retemper=lambda logprobs_MK, _: logprobs_MK,
        make_optimizer=lambda parameters: torch.optim.AdamW(parameters, **optimizer_settings),
        make_schedule=partial(
            get_linear_schedule_with_warmup,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.num_steps,
        ),
        seed=seed,
    )


def trained(folder: Path, arm: Arm, train: Sequence[Text], seed: int, settings: Settings) -> StudentModule:
    """Train a student for one pass over the texts, in the order of the seed."""
    cut = {name: _conf("student/smollm2_6_layers.yaml")[name] for name in ("keep_layers", "freeze")}
    model = open_student(folder, **cut, from_scratch=False, lora=None, dropout=None, gradient_checkpointing=False)
    module = _module(model, arm.objectives, settings, seed)
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
        targets = {} if arm.cache is None else {train[index].id: arm.cache[index] for index in indices}
        lessons = [_lesson(train[index], targets.get(train[index].id)) for index in indices]
        counts = sum((lesson.counts() for lesson in lessons), Counter[Any]())
        batch = collate(lessons, counts, 0, partial(_joined, targets))
        arm.loss(module, batch, [train[index] for index in indices]).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return module


def _lesson(text: Text, target: Target | None) -> Lesson:
    soft_by_span: dict[Span, SoftPlace] = {}
    if target is not None:
        soft_by_span["rationale"] = SoftPlace((text.id, "rationale"), target.scored.num_positions, target.chosen)
    return Lesson((TrainingSequence.of(text.prompt, text.id, {"rationale"}, soft_by_span),))


def _joined(targets: Mapping[str, Target], keys: Sequence[SoftTargetsKey]) -> SoftTargets:
    return SoftTargets.join([soft for key, _ in keys if (soft := targets[key].soft)])


@torch.no_grad()
def held_out_figures(
    module: StudentModule,
    held_out: Sequence[Text],
    teacher_logprobs: Sequence[Float[Tensor, "N V"]],
    settings: Settings,
) -> dict[str, float]:
    """Means over all positions of the held-out texts."""
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
        log_p_NV = torch.cat(list(teacher_logprobs[first : first + settings.batch_size]))
        kl.append((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1))
        top_N, predicted_N = log_q_NV.max(-1)
        agrees.append(predicted_N == log_p_NV.argmax(-1))
        confidence.append(top_N.exp())
        is_right.append(predicted_N == batch.label_N)
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
    """Autocast to bfloat16 where the machine is fast in it; heads compute in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=placement.native_dtype() == torch.bfloat16)


def _log(text: str) -> None:
    print(f"students: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
