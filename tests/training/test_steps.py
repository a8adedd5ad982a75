"""Laws 3, 4 and 5: steps of the real trainer, for any division into microbatches and processes.

Run as a script, this file is one process of a training run: `test_steps.py <folder> <overrides>`.
"""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div

from distill.cache.codecs.dense import Dense
from distill.lessons import loader as data
from distill.lessons.collate import collate
from distill.lessons.curriculum import build_curriculum, prepare
from distill.prompts.rendering import Prompts
from distill.records import SPANS
from distill.students import causal_lm as modules
from distill.training.fit import build_training, fit
from distill.training.module import StudentModule
from tests.conftest import compose, conf_names, environment, lessons, read, tiny_overrides
from tests.training.conftest import (
    BATCH,
    RATE,
    STEPS,
    Values,
    assert_same,
    logged_losses,
    open_whole_student,
    plain_loss,
)


def trained(config: DictConfig, folder: Path, *, codec: Any = None) -> Values:
    """Fit the student that `config` names on uneven lessons, in float64; return its weights."""
    OmegaConf.update(
        config, "optim.optimizer", {"_target_": "torch.optim.SGD", "_partial_": True, "lr": RATE}, merge=False
    )
    job = prepare(config, folder)
    train, validation = (lessons(job.prompts, number, codec=codec) for number in (11, 4))
    curriculum = replace(build_curriculum(job), train=train, validation=validation, read=read)
    student = open_whole_student(job.student_folder)
    fit(job, build_training(job, curriculum, student, []))
    return {name: value.detach().clone() for name, value in student.state_dict().items()}


ALL_LOSSES = f"loss=[{','.join(conf_names('loss'))}]"


SHORT_RUN = [ALL_LOSSES, f"batch_size={BATCH}", f"trainer.max_steps={STEPS}", "trainer.gradient_clip_val=null"]
SHORT_RUN += [
    "trainer.log_every_n_steps=1",
    f"validate_every={STEPS}",
    "teacher.num_rationales=0",
    "num_samples=0",
    "optim.schedule.num_warmup_steps=0",
]


@pytest.fixture(scope="module")
def single_microbatch(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> tuple[Path, Values]:
    """A folder with a filled cache, and the weights after training with one microbatch per step."""
    root = tmp_path_factory.mktemp("root")
    config = compose(*tiny_overrides(root, teacher_folder, student_folder), *SHORT_RUN, f"microbatch_size={BATCH}")
    return root, trained(config, root / "uncut")


@pytest.mark.parametrize("microbatch_size", [4, 3, 1])
def test_microbatches_do_not_change_the_student(
    microbatch_size: int, single_microbatch: tuple[Path, Values], teacher_folder: Path, student_folder: Path
) -> None:
    root, weights = single_microbatch
    config = compose(
        *tiny_overrides(root, teacher_folder, student_folder), *SHORT_RUN, f"microbatch_size={microbatch_size}"
    )
    folder = root / f"cut-{microbatch_size}"
    assert_same(trained(config, folder), weights)
    assert any((weights[n] - v).abs().max() > 1e-3 for n, v in open_whole_student(student_folder).state_dict().items())
    for losses, expected in zip(logged_losses(folder), logged_losses(root / "uncut"), strict=True):
        assert losses == pytest.approx(expected, rel=1e-5)


def test_one_step_is_plain_gradient_descent_on_the_plain_loss(
    single_microbatch: tuple[Path, Values], teacher_folder: Path, student_folder: Path, prompts: Prompts
) -> None:
    root, _ = single_microbatch
    overrides = [
        *tiny_overrides(root, teacher_folder, student_folder),
        *SHORT_RUN,
        "trainer.max_steps=1",
        "batch_size=11",
        "microbatch_size=2",
    ]
    after = trained(compose(*overrides), root / "one-step")
    all_lessons = lessons(prepare(compose(*overrides), root).prompts, 11)
    model = open_whole_student(student_folder)
    loss = plain_loss(model, all_lessons, prompts.vocabulary_size)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = {n: (p - RATE * g).detach() for (n, p), g in zip(model.named_parameters(), gradients, strict=True)}
    assert_same(after, expected, 1e-7)


def test_a_shared_prompt_does_not_change_the_student(
    single_microbatch: tuple[Path, Values],
    teacher_folder: Path,
    student_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, weights = single_microbatch
    batch_sizes: list[int] = []
    original_collate = data.collate
    monkeypatch.setattr(
        data, "collate", lambda *a: batch_sizes.append(len((b := original_collate(*a)).input_ids_BT)) or b
    )
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *SHORT_RUN, f"microbatch_size={BATCH}"]
    assert_same(trained(compose(*overrides), root / "shared"), weights)
    assert max(batch_sizes) == BATCH
    # A Llama computes norms and rotary angles in float32, also with float64 weights.
    assert_same(trained(compose(*overrides, "share_prompt=false"), root / "apart"), weights, 1e-7)
    assert max(batch_sizes) > BATCH
    monkeypatch.setattr(modules, "branch_mask", lambda *_: None)  # like a model that ignores the mask
    batch_sizes.clear()
    assert_same(trained(compose(*overrides), root / "refused"), weights, 1e-7)
    assert max(batch_sizes) > BATCH
    assert "separate sequences" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_divides_both_sides_and_its_square_is_in_the_step_but_not_in_the_log(
    temperature: float, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    overrides = [o for o in (*tiny_overrides(tmp_path, teacher_folder, student_folder), *SHORT_RUN) if "cache" not in o]
    overrides = [o for o in overrides if not o.startswith("loss")] + [
        "cache=dense",
        "trainer.max_steps=1",
        "batch_size=11",
        "microbatch_size=3",
    ]
    config = compose(*overrides, "loss=[kl]", f"loss.kl.temperature={temperature}")
    after = trained(config, tmp_path / "run", codec=Dense())
    prompts = prepare(config, tmp_path).prompts
    all_lessons = lessons(prompts, 11, codec=Dense())
    batch, model = collate(all_lessons, {}, 0, read), open_whole_student(student_folder)
    is_used_N = batch.is_soft_N & (batch.span_N == SPANS.index("answer"))
    logits_BTV = model(batch.input_ids_BT, attention_mask=batch.mask_BT).logits[..., : prompts.vocabulary_size]
    logits_NV = logits_BTV[batch.sequence_N, batch.before_N][is_used_N]
    assert batch.soft is not None
    log_t_NV = batch.soft.logprobs_E.double().view(-1, prompts.vocabulary_size)[is_used_N[batch.is_soft_N]]
    both_NV = ((x_NV / temperature).log_softmax(-1) for x_NV in (logits_NV, log_t_NV))
    mean = kl_div(*both_NV, log_target=True, reduction="sum") / is_used_N.sum()
    gradients = torch.autograd.grad(temperature**2 * mean, list(model.parameters()))
    expected = {n: (p - RATE * g).detach() for (n, p), g in zip(model.named_parameters(), gradients, strict=True)}
    assert_same(after, expected, 1e-7)
    assert logged_losses(tmp_path / "run")[0]["train/kl"] == pytest.approx(mean.item(), rel=1e-5)


def run_process_group(command: list[str], seconds: float) -> None:
    """Run a command that starts subprocesses; all are killed at the time limit."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=output, start_new_session=True)
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"still running after {seconds} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        assert code == 0, f"exit code: {code}\n{output.read()[-3000:]}"


@pytest.mark.slow
def test_two_processes_make_the_same_student_as_one(
    single_microbatch: tuple[Path, Values], teacher_folder: Path, student_folder: Path
) -> None:
    root, weights = single_microbatch
    folder = root / "processes"
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *SHORT_RUN, "microbatch_size=2"]
    overrides += ["trainer.devices=2", "trainer.strategy=ddp"]
    run_process_group([sys.executable, __file__, str(folder), *overrides], seconds=60)
    assert_same(load_file(folder / "weights.safetensors"), weights)
    for losses, expected in zip(logged_losses(folder), logged_losses(root / "uncut"), strict=True):
        assert losses == pytest.approx(expected, rel=1e-5)


def test_the_averaged_student_is_the_average_of_its_steps(
    single_microbatch: tuple[Path, Values], teacher_folder: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = single_microbatch
    weights_by_step: list[Values] = []
    original_hook = StudentModule.on_train_batch_end

    def recording_hook(module: StudentModule, *arguments: Any) -> None:
        weights_by_step.append({name: value.clone() for name, value in module.model.state_dict().items()})
        original_hook(module, *arguments)

    monkeypatch.setattr(StudentModule, "on_train_batch_end", recording_hook)
    steps = ["trainer.max_steps=4", "validate_every=2", "callback=[ema]", "callback.ema.decay=0.75"]
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *SHORT_RUN, *steps]
    averaged = trained(compose(*overrides, "callback.ema.update_starting_at_step=1"), root / "averaged")
    assert len(weights_by_step) == 4
    for name, value in averaged.items():
        first, second, third = (weights[name] for weights in weights_by_step[1:])
        assert torch.allclose(value, 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third, rtol=0, atol=1e-12)
    assert any((averaged[name] - value).abs().max() > 1e-4 for name, value in weights_by_step[-1].items())


def test_early_stopping_stops_when_validation_stops_improving(
    single_microbatch: tuple[Path, Values], teacher_folder: Path, student_folder: Path
) -> None:
    root, _ = single_microbatch
    common = [
        "trainer.max_steps=9",
        "validate_every=1",
        "callback=[early_stopping]",
        "callback.early_stopping.patience=2",
    ]
    for delta, steps in ((100.0, 3), (0.0, 9)):
        stopping = [*common, f"callback.early_stopping.min_delta={delta}", "loss=[answer]", "loss.answer.weight=0.1"]
        folder = root / f"stopped-{delta}"
        trained(compose(*tiny_overrides(root, teacher_folder, student_folder), *SHORT_RUN[1:], *stopping), folder)
        assert sum("val/answer" in row for row in logged_losses(folder)) == steps


@pytest.mark.parametrize("every", [1, 3])
def test_losses_are_logged_every_n_steps(
    every: int,
    single_microbatch: tuple[Path, Values],
    teacher_folder: Path,
    student_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, _ = single_microbatch
    calls: list[Any] = []
    original_log = StudentModule._log
    monkeypatch.setattr(StudentModule, "_log", lambda *a, **k: calls.append(a[1]) or original_log(*a, **k))
    overrides = [
        *tiny_overrides(root, teacher_folder, student_folder),
        *SHORT_RUN,
        "trainer.max_steps=6",
        "validate_every=6",
    ]
    trained(compose(*overrides, f"trainer.log_every_n_steps={every}"), root / f"logged-{every}")
    assert sum("answer" in values for values in calls) == 6 // every
    assert sum("train/answer" in row for row in logged_losses(root / f"logged-{every}")) == 6 // every
    rows = csv.DictReader((root / f"logged-{every}" / "metrics.csv").read_text().splitlines())
    steps = [int(row["step"]) for row in rows if row["train/answer"]]
    assert steps == [step for step in range(6) if (step + 1) % every == 0]  # the last step of each `every`


if __name__ == "__main__":
    weights = trained(compose(*sys.argv[2:]), Path(sys.argv[1]))
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        save_file(weights, Path(sys.argv[1]) / "weights.safetensors")
