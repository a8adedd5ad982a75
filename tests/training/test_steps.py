"""Laws 2, 3, 5, 6: the student's loss through the real trainer, however a step is cut, padded or shared out.

Run as a script, this file is one process of a training run: `test_modules.py <folder> <overrides>`.
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
from distill.lessons.curriculum import prepare, teach
from distill.prompts.cues import Prompts
from distill.records import SPANS
from distill.training import module as modules
from distill.training.fit import arrange, fit
from distill.training.module import NonFiniteLossError, StudentModule
from tests.conftest import compose, conf_names, environment, lessons, read, tiny_overrides
from tests.training.conftest import BATCH, RATE, STEPS, Values, assert_same, opened, plain_loss


def trained(config: DictConfig, folder: Path, *, codec: Any = None) -> Values:
    """Fit the student that `config` names on uneven lessons, in float64; return its weights."""
    OmegaConf.update(
        config, "optim.optimizer", {"_target_": "torch.optim.SGD", "_partial_": True, "lr": RATE}, merge=False
    )
    job = prepare(config, folder)
    train, validation = (lessons(job.prompts, number, codec=codec) for number in (11, 4))
    curriculum = replace(teach(job), train=train, validation=validation, read=read)
    student = opened(job.student_folder)
    fit(job, arrange(job, curriculum, student, []))
    return {name: value.detach().clone() for name, value in student.state_dict().items()}


def logged(folder: Path) -> list[dict[str, float]]:
    """What was logged in each step, in order."""
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [{k: float(v) for k, v in row.items() if v and k.startswith(("train/", "val/"))} for row in rows]


ALL_LOSSES = f"loss=[{','.join(conf_names('loss'))}]"


CUT = [ALL_LOSSES, f"batch_size={BATCH}", f"trainer.max_steps={STEPS}", "trainer.gradient_clip_val=null"]
CUT += [
    "trainer.log_every_n_steps=1",
    f"validate_every={STEPS}",
    "teacher.num_rationales=0",
    "num_samples=0",
    "optim.schedule.num_warmup_steps=0",
]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> tuple[Path, Values]:
    """A folder with a filled cache, and the weights after training with one microbatch per step."""
    root = tmp_path_factory.mktemp("root")
    config = compose(*tiny_overrides(root, teacher_folder, student_folder), *CUT, f"microbatch_size={BATCH}")
    return root, trained(config, root / "uncut")


@pytest.mark.parametrize("microbatch_size", [4, 3, 1])
def test_microbatches_do_not_change_the_student(
    microbatch_size: int, uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path
) -> None:
    root, weights = uncut
    config = compose(*tiny_overrides(root, teacher_folder, student_folder), *CUT, f"microbatch_size={microbatch_size}")
    folder = root / f"cut-{microbatch_size}"
    assert_same(trained(config, folder), weights)
    assert any((weights[n] - v).abs().max() > 1e-3 for n, v in opened(student_folder).state_dict().items())
    for found, wanted in zip(logged(folder), logged(root / "uncut"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_one_step_is_plain_gradient_descent_on_the_plain_loss(
    uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path, prompts: Prompts
) -> None:
    root, _ = uncut
    overrides = [
        *tiny_overrides(root, teacher_folder, student_folder),
        *CUT,
        "trainer.max_steps=1",
        "batch_size=11",
        "microbatch_size=2",
    ]
    after = trained(compose(*overrides), root / "one-step")
    given = lessons(prepare(compose(*overrides), root).prompts, 11)
    model = opened(student_folder)
    loss = plain_loss(model, given, prompts.vocabulary_size)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    wanted = {n: (p - RATE * g).detach() for (n, p), g in zip(model.named_parameters(), gradients, strict=True)}
    assert_same(after, wanted, 1e-7)


def test_a_shared_prompt_does_not_change_the_student(
    uncut: tuple[Path, Values],
    teacher_folder: Path,
    student_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, weights = uncut
    rows: list[int] = []
    collated = data.collate
    monkeypatch.setattr(data, "collate", lambda *a: rows.append(len((b := collated(*a)).input_ids_BT)) or b)
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *CUT, f"microbatch_size={BATCH}"]
    assert_same(trained(compose(*overrides), root / "shared"), weights)
    assert max(rows) == BATCH
    # A Llama's norms and angles are in float32 also where its weights are in float64.
    assert_same(trained(compose(*overrides, "share_prompt=false"), root / "apart"), weights, 1e-7)
    assert max(rows) > BATCH
    monkeypatch.setattr(modules, "branch_mask", lambda *_: None)  # as a model that looks at no mask
    rows.clear()
    assert_same(trained(compose(*overrides), root / "refused"), weights, 1e-7)
    assert max(rows) > BATCH
    assert "separate sequences" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_divides_both_sides_and_its_square_is_in_the_step_but_not_in_the_log(
    temperature: float, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    tiny = [o for o in (*tiny_overrides(tmp_path, teacher_folder, student_folder), *CUT) if "cache" not in o]
    tiny = [o for o in tiny if not o.startswith("loss")] + [
        "cache=dense",
        "trainer.max_steps=1",
        "batch_size=11",
        "microbatch_size=3",
    ]
    config = compose(*tiny, "loss=[kl]", f"loss.kl.temperature={temperature}")
    after = trained(config, tmp_path / "run", codec=Dense())
    prompts = prepare(config, tmp_path).prompts
    given = lessons(prompts, 11, codec=Dense())
    batch, model = collate(given, {}, 0, read), opened(student_folder)
    is_used_N = batch.is_soft_N & (batch.span_N == SPANS.index("answer"))
    logits_BTV = model(batch.input_ids_BT, attention_mask=batch.mask_BT).logits[..., : prompts.vocabulary_size]
    logits_NV = logits_BTV[batch.sequence_N, batch.before_N][is_used_N]
    assert batch.soft is not None
    log_t_NV = batch.soft.logprobs_E.double().view(-1, prompts.vocabulary_size)[is_used_N[batch.is_soft_N]]
    both_NV = ((x_NV / temperature).log_softmax(-1) for x_NV in (logits_NV, log_t_NV))
    mean = kl_div(*both_NV, log_target=True, reduction="sum") / is_used_N.sum()
    gradients = torch.autograd.grad(temperature**2 * mean, list(model.parameters()))
    wanted = {n: (p - RATE * g).detach() for (n, p), g in zip(model.named_parameters(), gradients, strict=True)}
    assert_same(after, wanted, 1e-7)
    assert logged(tmp_path / "run")[0]["train/kl"] == pytest.approx(mean.item(), rel=1e-5)


def run_together(command: list[str], seconds: float) -> None:
    """Run a command that starts processes of its own; none of them outlives the time limit."""
    with tempfile.TemporaryFile("w+") as told:
        started = subprocess.Popen(command, env=environment(), stdout=told, stderr=told, start_new_session=True)
        try:
            code: int | str = started.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"none after {seconds} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        told.seek(0)
        assert code == 0, f"exit code {code}\n{told.read()[-3000:]}"


@pytest.mark.slow
def test_two_processes_make_the_same_student_as_one(
    uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path
) -> None:
    root, weights = uncut
    folder = root / "processes"
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *CUT, "microbatch_size=2"]
    overrides += ["trainer.devices=2", "trainer.strategy=ddp"]
    run_together([sys.executable, __file__, str(folder), *overrides], seconds=60)
    assert_same(load_file(folder / "weights.safetensors"), weights)
    for found, wanted in zip(logged(folder), logged(root / "uncut"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_a_nonfinite_loss_stops_before_the_optimizer_step(
    uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path
) -> None:
    root, _ = uncut
    config = compose(*tiny_overrides(root, teacher_folder, student_folder), *CUT)
    job = prepare(config, root / "broken")
    student = opened(student_folder)
    student.lm_head.weight.data[5, 0] = torch.nan
    before = {name: value.clone() for name, value in student.state_dict().items()}
    curriculum = replace(teach(job), train=lessons(job.prompts, BATCH), validation=[], read=read)
    with pytest.raises(NonFiniteLossError) as raised:
        fit(job, arrange(job, curriculum, student, []))
    assert all(lesson.example_id in str(raised.value) for lesson in curriculum.train)
    assert all(torch.equal(value, before[name]) or "lm_head" in name for name, value in student.state_dict().items())


def test_the_averaged_student_is_the_average_of_its_steps(
    uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = uncut
    passed: list[Values] = []
    finish = StudentModule.on_train_batch_end

    def noted(module: StudentModule, *arguments: Any) -> None:
        passed.append({name: value.clone() for name, value in module.model.state_dict().items()})
        finish(module, *arguments)

    monkeypatch.setattr(StudentModule, "on_train_batch_end", noted)
    steps = ["trainer.max_steps=4", "validate_every=2", "callback=[ema]", "callback.ema.decay=0.75"]
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *CUT, *steps]
    found = trained(compose(*overrides, "callback.ema.update_starting_at_step=1"), root / "averaged")
    assert len(passed) == 4
    for name, value in found.items():
        first, second, third = (weights[name] for weights in passed[1:])
        assert torch.allclose(value, 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third, rtol=0, atol=1e-12)
    assert any((found[name] - value).abs().max() > 1e-4 for name, value in passed[-1].items())


def test_early_stopping_stops_when_validation_stops_improving(
    uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path
) -> None:
    root, _ = uncut
    still = [
        "trainer.max_steps=9",
        "validate_every=1",
        "callback=[early_stopping]",
        "callback.early_stopping.patience=2",
    ]
    for delta, steps in ((100.0, 3), (0.0, 9)):
        more = [*still, f"callback.early_stopping.min_delta={delta}", "loss=[answer]"]
        folder = root / f"stopped-{delta}"
        trained(compose(*tiny_overrides(root, teacher_folder, student_folder), *CUT[1:], *more), folder)
        assert sum("val/answer" in row for row in logged(folder)) == steps


@pytest.mark.parametrize("every", [1, 3])
def test_losses_are_logged_every_n_steps(
    every: int, uncut: tuple[Path, Values], teacher_folder: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = uncut
    calls: list[Any] = []
    log = StudentModule.log_dict
    monkeypatch.setattr(StudentModule, "log_dict", lambda *a, **k: calls.append(a[1]) or log(*a, **k))
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), *CUT, "trainer.max_steps=6", "validate_every=6"]
    trained(compose(*overrides, f"trainer.log_every_n_steps={every}"), root / f"logged-{every}")
    assert sum("train/answer" in values for values in calls) == 6 // every
    assert sum("train/answer" in row for row in logged(root / f"logged-{every}")) == 6 // every


if __name__ == "__main__":
    weights = trained(compose(*sys.argv[2:]), Path(sys.argv[1]))
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        save_file(weights, Path(sys.argv[1]) / "weights.safetensors")
