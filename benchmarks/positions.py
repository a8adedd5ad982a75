"""What a student learns if only a share of the positions keeps soft targets, chosen by entropy or at random.

Students with the same initial weights, data order and number of steps train on gold tokens alone (`answers`), and on
the teacher's soft targets at all or some positions, without a loss on words and with one (`words + …`). Models, texts,
codec and settings are those of `benchmarks.students`; the held-out KL(teacher || student) is of whole distributions, at
all positions.

    scripts/benchmark positions data=gsm8k_train.jsonl [num_steps=100 batch_size=4 num_held_out=80 num_seeds=3]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.student_runs import SAMPLED
from benchmarks.students import (
    CODECS,
    LABELS,
    SOFT,
    Arm,
    Teacher,
    Text,
    cached_loss,
    held_out_figures,
    model_folder,
    parse_arguments,
    read_teacher,
    trained,
)
from distill.annotation.inspection import TOKEN_BYTES
from distill.annotation.positions import ALL_POSITIONS, Positions
from distill.cache import uniforms
from distill.cache.shard import pack_annotation
from distill.models import loading
from distill.records import Annotation, Example, Request, Target

ARMS: Mapping[str, Positions] = {"all positions": ALL_POSITIONS} | {
    f"{share:g} {by}": Positions(share=share, by=by) for share in (0.5, 0.25, 0.1) for by in ("entropy", "random")
}


@dataclass(frozen=True)
class Cache:
    """The targets of all texts, as a cache gives them back, and its bytes per token, with the tokens themselves."""

    targets: Sequence[Target]
    num_bytes: float

    @classmethod
    def of(cls, teacher: Teacher, texts: Sequence[Text], positions: Positions) -> Cache:
        """Cut, choose, pack and unpack."""
        codec, num_bytes, targets = CODECS[SAMPLED], 0.0, list[Target]()
        for text in texts:
            uniform_N = torch.from_numpy(uniforms(text.id, len(text.solution), codec.seed or 0))
            soft = positions.cut(codec).cut(teacher.logprobs(text.hidden_NH), uniform_N)
            whole = Annotation(text.id, {"rationale": Target(text.solution, soft)}, None)
            (kept,) = positions.reduced([Request(text.id, "rationale", Example(""), ())], [whole])
            arrays = pack_annotation(kept, codec)
            num_bytes += sum(array.nbytes for array in arrays.values()) + TOKEN_BYTES * len(text.solution)
            targets.append(Target(text.solution, codec.unpack(arrays).for_training(), kept.targets["rationale"].chosen))
        return cls(targets, num_bytes / sum(len(text.solution) for text in texts))


def main(arguments: Sequence[str]) -> None:
    """Train all arms, and print a line for each as soon as it is measured."""
    data, num_seeds, settings = parse_arguments(arguments)
    loading.flush_denormals()
    folder = model_folder(Path(os.environ["DISTILL_ROOT"]))
    teacher = read_teacher(folder, data, settings)
    num_train = settings.num_steps * settings.batch_size
    train, held_out = teacher.texts[:num_train], teacher.texts[num_train:]
    teacher_logprobs = [teacher.logprobs(text.hidden_NH) for text in held_out]
    print(f"{'':21} {'seed':>5} {'bytes per token':>16} {'KL':>7} {'agreement':>10}")
    for seed in range(num_seeds):
        for name, arm in _arms(teacher, train):
            module = trained(folder, arm, train, seed, settings)
            figures = held_out_figures(module, held_out, teacher_logprobs, settings)
            line = f"{arm.num_bytes:16.1f} {figures['kl']:7.3f} {figures['agreement']:10.3f}"
            print(f"{name:21} {seed:5} {line}", flush=True)


def _arms(teacher: Teacher, train: Sequence[Text]) -> Iterator[tuple[str, Arm]]:
    yield "answers", Arm([LABELS], cached_loss)
    for name, positions in ARMS.items():
        cache = Cache.of(teacher, train, positions)
        for prefix, objectives in (("", [SOFT]), ("words + ", [LABELS, SOFT])):
            yield prefix + name, Arm(objectives, cached_loss, cache.num_bytes, cache=cache.targets)


if __name__ == "__main__":
    main(sys.argv[1:])
