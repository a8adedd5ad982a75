"""Tiny real models, tokenizers, tasks and configurations; no downloads, no mocks."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import functools
import importlib
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
import yaml
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# OmegaConf's DictConfig derives from typing.MutableMapping, which beartype reports as deprecated.
_IGNORED = (
    "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",  # Lightning, with torch 2.13
    "ignore:The `srun` command is available on your system",
    "ignore:You have overridden .transfer_batch_to_device. in .LightningModule.:UserWarning",
)
warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)

from distill.annotation.annotation_job import AnnotationJob, open_annotation_job  # noqa: E402
from distill.app import config as configuration  # noqa: E402
from distill.app.config import CONF  # noqa: E402
from distill.app.moved import MOVED  # noqa: E402
from distill.cache import uniforms  # noqa: E402
from distill.cache.codecs.dense import Dense  # noqa: E402
from distill.cache.codecs.topk import TopK  # noqa: E402
from distill.lessons.join import Lesson, PlacedTarget, SoftPlace, TrainingSequence  # noqa: E402
from distill.losses import Objective  # noqa: E402
from distill.prompts.rendering import Prompts  # noqa: E402
from distill.prompts.tokenizers import load_tokenizer  # noqa: E402
from distill.records import Annotation, Example, Request, SoftTargets, SoftTargetsKey  # noqa: E402
from distill.students import Seam  # noqa: E402
from distill.students.causal_lm import TokenSeam  # noqa: E402
from distill.tasks.arithmetic import Arithmetic  # noqa: E402
from distill.training.module import StudentModule  # noqa: E402
from tests.cases import KINDS, Case, make_case  # noqa: E402
from tests.cases import LAYOUT as LAYOUT  # noqa: E402
from tests.cases import examples as examples  # noqa: E402

PADDED_ROWS = 32
_SETTING = re.compile(r"\w+(\.\w+)*")  # the key of an override that neither adds nor removes one
_BEFORE = {present: before for before, present in MOVED.items()}
WHOLE_STUDENT = {
    "keep_layers": None,
    "freeze": [],
    "from_scratch": False,
    "lora": None,
    "dropout": None,
    "gradient_checkpointing": False,
}


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the models are too small for several threads
    for warning_filter in _IGNORED:
        config.addinivalue_line("filterwarnings", warning_filter)


def compose(*overrides: str, name: str = "train") -> DictConfig:
    """Compose the configuration of a command line with these overrides.

    Overrides that only set a value are applied to a copy of what the others compose, as Hydra does itself after
    composing: many tests differ in nothing else, and composing takes a tenth of a second.
    """
    configuration.register()
    settings = () if any(override[0] in "+~" for override in overrides) else tuple(filter(_is_setting, overrides))
    config = deepcopy(_composed(name, *(override for override in overrides if override not in settings)))
    try:
        for setting in map(OverridesParser.create().parse_override, settings):
            OmegaConf.update(config, setting.key_or_group, setting.value())
    except (HydraException, OmegaConfBaseException):  # one that Hydra refuses too, with a message of its own
        return deepcopy(_composed(name, *overrides))
    return config


def _is_setting(override: str) -> bool:
    """Whether an override chooses no option of a group."""
    key = override.partition("=")[0]
    return _SETTING.fullmatch(key) is not None and not (CONF / key).is_dir()


@functools.cache
def _composed(name: str, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(name, list(overrides))


def as_before(value: Any) -> Any:
    """A configuration under the names that its parts had before they moved."""
    if isinstance(value, dict):
        return {key: _BEFORE.get(v, v) if key == "_target_" else as_before(v) for key, v in value.items()}
    return [as_before(item) for item in value] if isinstance(value, list) else value


def conf_names(group: str) -> list[str]:
    """All options of a configuration group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def divergences(*sources: str) -> dict[str, Any]:
    """Build the divergences of conf/loss/ for these sources, by class name."""
    built = {}
    for name in conf_names("loss"):
        objective = yaml.safe_load((CONF / "loss" / f"{name}.yaml").read_text())[name]
        module, _, attribute = objective["divergence"]["_target_"].rpartition(".")
        if objective["source"] in sources:
            arguments = {key: value for key, value in objective["divergence"].items() if key[0] != "_"}
            built[attribute] = getattr(importlib.import_module(module), attribute)(**arguments)
    return built


def codec(name: str, **settings: Any) -> Any:
    """Build the codec of a file in conf/cache/, with changed settings."""
    node = yaml.safe_load((CONF / "cache" / f"{name}.yaml").read_text())["codec"]
    module, _, attribute = node.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), attribute)(**node | settings)


def arithmetic(**sizes: int) -> Arithmetic:
    """A small task of arithmetic word problems."""
    settings = {"num_labelled": 6, "num_unlabelled": 6, "num_validation": 4, "num_test": 4, "num_shots": 2}
    return Arithmetic(**settings | {"max_number": 20, "max_steps": 2, "split_seed": 0} | sizes)


def make_tokenizer(folder: Path, *, has_start: bool = False, texts: Sequence[str] = ()) -> None:
    """Train a byte-level BPE tokenizer and save it; `has_start`: every encoded text begins with <s>."""
    task = arithmetic(num_unlabelled=200)
    lines = [*texts, *(f"Q: {e.question}\nReason: Answer:" for e in task.splits().train)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    if has_start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def make_model(folder: Path, *, seed: int, num_layers: int = 2, **settings: Any) -> Path:
    """Save a random Llama whose head has more rows than the tokenizer has tokens, and its tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320 + PADDED_ROWS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.25,
        bos_token_id=0,
        eos_token_id=1,
        **{"tie_word_embeddings": False, "max_position_embeddings": 1024} | settings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with dropout, which would show if it were ever in training mode."""
    return make_model(tmp_path_factory.mktemp("teacher"), seed=1, num_layers=3, attention_dropout=0.5)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer."""
    return make_model(tmp_path_factory.mktemp("student"), seed=2)


@pytest.fixture(scope="session")
def prompts(student_folder: Path) -> Prompts:
    """Zero-shot prompts."""
    return Prompts(load_tokenizer(student_folder), LAYOUT, (), max_length=256, too_long="drop")


@pytest.fixture(scope="session", params=KINDS)
def case(request: pytest.FixtureRequest, student_folder: Path) -> Case:
    """Prompts and examples of one of the kinds of work that people bring."""
    return make_case(request.param, student_folder)


@pytest.fixture
def configured(tmp_path: Path, teacher_folder: Path, student_folder: Path) -> Callable[..., DictConfig]:
    """Compose the train command for the tiny models on a small task, below `tmp_path`."""

    def configured(*overrides: str) -> DictConfig:
        return compose(*tiny_overrides(tmp_path, teacher_folder, student_folder), *overrides)

    return configured


def tiny_overrides(root: Path, teacher: Path, student: Path) -> list[str]:
    """Overrides with which the train command takes seconds."""
    return [
        "task=arithmetic",
        "task.examples.num_labelled=6",
        "task.examples.num_unlabelled=6",
        "task.examples.num_validation=4",
        "task.examples.num_test=4",
        "teacher=causal_lm",
        f"teacher.model={teacher}",
        "teacher.kind.dtype=float32",
        "teacher.kind.max_new_tokens=6",
        "teacher.batch_size=5",
        "student=causal_lm",
        f"student.model={student}",
        "prompt.num_shots=2",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "tracking=off",
        "cache=topk",
        "cache.codec.k=8",
        f"root={root}",
    ]


def reviews(root: Path) -> list[str]:
    """Overrides for a task with two choices, on generated sentences."""
    lines = [f"{i}\t{2.5 if i % 2 else -2.5}\tSentence number {i} is rated." for i in range(40)]
    (root / "ratings.tsv").write_text("\n".join(lines))
    return ["task=movie_reviews", f"task.examples.file={root / 'ratings.tsv'}"]


def environment(**more: str) -> dict[str, str]:
    """Environment of a subprocess that imports the tested code; without variables of W&B."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return variables | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def start(root: Path, *arguments: str, command: str = "train") -> subprocess.Popen[str]:
    """Start a command in a subprocess; it writes only below `root`."""
    line = [sys.executable, "-m", f"distill.{command}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(line, env=environment(DISTILL_ROOT=str(root)), cwd=root, text=True, **pipes)


def run(root: Path, *arguments: str, command: str = "train") -> subprocess.CompletedProcess[str]:
    """Run a command in a subprocess and wait for it."""
    process = start(root, *arguments, command=command)
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def shards(folder: Path) -> dict[str, bytes]:
    """Contents of all record files of a cache, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("[0-9a-f]*.[sp]*")}


class CountingTeacher:
    """A real teacher that counts its loads and keeps the requests it gets."""

    def __init__(self, teacher: Any) -> None:
        self._teacher = teacher
        self.gives_soft_targets = teacher.gives_soft_targets
        self.num_loads = 0
        self.asked: list[Request] = []

    def fingerprint(self) -> dict[str, Any]:
        return self._teacher.fingerprint()

    def backend(self) -> dict[str, str]:
        return self._teacher.backend()

    def load(self) -> nn.Module:
        self.num_loads += 1
        return self._teacher.load()

    def num_tokens(self, request: Request) -> int:
        return self._teacher.num_tokens(request)

    def annotate(self, requests: Sequence[Request]) -> list[Annotation]:
        self.asked += requests
        return self._teacher.annotate(requests)

    def close(self) -> None:
        self._teacher.close()


def counted(config: DictConfig) -> tuple[AnnotationJob, CountingTeacher]:
    """Open the annotation job of a configuration with a counting teacher."""
    source = open_annotation_job(config)
    teacher = CountingTeacher(source.teacher)
    return replace(source, teacher=teacher), teacher


def grid(soft: SoftTargets) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of rows with equally many entries, [N, K] each."""
    return soft.ids_E.reshape(len(soft), -1), soft.logprobs_E.reshape(len(soft), -1)


_SOFT_TARGETS: dict[SoftTargetsKey, SoftTargets] = {}


def keep(soft: SoftTargets, chosen: tuple[int, ...] | None = None) -> SoftPlace:
    """Keep soft targets, of all positions or of the chosen ones, in memory for `read`, like a cache."""
    key = (f"{len(_SOFT_TARGETS):032x}", "answer")
    _SOFT_TARGETS[key] = soft if chosen is None else soft[np.array(chosen)]
    return SoftPlace(key, len(_SOFT_TARGETS[key]), chosen)


def read(keys: Sequence[SoftTargetsKey]) -> SoftTargets:
    """Concatenate the soft targets of these keys, which `keep` stored."""
    return SoftTargets.join([_SOFT_TARGETS[key] for key in keys])


def lessons(
    prompts: Prompts,
    number: int,
    *,
    codec: Any = None,
    are_chosen: bool = False,
    of: Callable[[int], list[Example]] = examples,
) -> list[Lesson]:
    """Lessons of uneven lengths: all have soft targets, two thirds a gold answer, one third a rationale.

    `are_chosen`: only every second token of a span, counted from its last one, has soft targets.
    """
    generator = torch.Generator().manual_seed(0)

    def soft(span: Sequence[int]) -> SoftPlace:
        logits_NV = 3 * torch.randn(len(span), prompts.vocabulary_size, generator=generator)
        uniform_N = torch.from_numpy(uniforms(str(span), len(span), 0))
        cut = (codec or TopK(k=8, temperature=1.0)).cut(logits_NV.log_softmax(-1), uniform_N)
        return keep(cut, tuple(range(len(span) - 1, -1, -2))[::-1] if are_chosen else None)

    made = []
    for index, example in enumerate(of(number)):
        answer = TrainingSequence.of(
            prompts.answer_prompt(example, example.answer),
            example.id,
            {"answer"} if index % 3 else (),
            {"answer": soft(prompts.answer_ids(example.answer))},
        )
        sequences = [answer]
        if index % 3 == 2:
            ids = prompts.rationale_ids(example.rationale)
            prompt = prompts.rationale_prompt(example, example.rationale, None)
            sequences.append(TrainingSequence.of(prompt, example.id, {"rationale"}, {"rationale": soft(ids)}))
        made.append(Lesson(tuple(sequences)))
    return made


def by_span(sequence: TrainingSequence) -> dict[str, PlacedTarget]:
    """The targets of a sequence that has one of a kind."""
    assert len(sequence.spans) == len(sequence.targets)
    return {target.span: target for target in sequence.targets}


def with_targets(lesson: Lesson, **changes: Any) -> Lesson:
    """The lesson with changes to all its targets."""
    targets = [tuple(replace(target, **changes) for target in sequence.targets) for sequence in lesson.sequences]
    changed = (replace(s, targets=own) for s, own in zip(lesson.sequences, targets, strict=True))
    return replace(lesson, sequences=tuple(changed))


def case_lessons(case: Case, number: int, *, are_chosen: bool = False) -> list[Lesson]:
    """Lessons of one kind of work."""
    return lessons(case.prompts, number, are_chosen=are_chosen, of=case.examples)


@functools.cache
def objectives(*names: str) -> dict[str, Objective]:
    """Build the named losses of conf/loss/; without names, all of them."""
    nodes = compose("task=arithmetic", f"loss=[{','.join(names or conf_names('loss'))}]").loss
    return {name: configuration.build(node) for name, node in nodes.items()}


def student_module(model: Any, prompts: Any, *names: str, lr: float = 0.1, seam: Seam | None = None) -> StudentModule:
    """The training module of a student, with plain gradient descent."""
    return StudentModule(
        model,
        objectives=objectives(*names),
        seam=seam or TokenSeam(prompts.vocabulary_size),
        retemper=Dense().at_temperature,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        make_schedule=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        seed=0,
    )


@pytest.fixture(autouse=True)
def _reset_torch_state() -> None:
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # commands set it for their process
