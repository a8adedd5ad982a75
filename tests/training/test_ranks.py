"""Several processes of one run: equal configurations, a common stop, one result."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.prompts.tokenizers import load_tokenizer
from distill.records import content_id
from distill.training.checkpoints import step_of
from tests.conftest import tiny_overrides
from tests.training.conftest import COMMON, TWO_PROCESSES, RunFolder, free_port, launch, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run_ranks(root: Path, name: str, *lines: Sequence[str]) -> list[tuple[int, str]]:
    """Run the processes of one run as torchrun does, with overrides per process; return exit codes and outputs."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DISTILL_RUN": name}
    shared |= {"WORLD_SIZE": str(len(lines)), "LOCAL_WORLD_SIZE": str(len(lines)), "TORCHELASTIC_RUN_ID": "x"}
    processes = [
        launch(root, [sys.executable, "-m", "distill.train", *line], **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, line in enumerate(lines)
    ]
    try:
        return [wait_for(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.enable_socket
def test_processes_with_different_configurations_stop_immediately(root: Path, overrides: list[str]) -> None:
    line = [*overrides, *TWO_PROCESSES, "trainer.max_steps=5"]
    for code, output in run_ranks(root, "unlike", *([*line, f"optim.optimizer.lr={rate}"] for rate in (0.001, 0.002))):
        assert code == 2, output
        assert "different configurations" in output
        assert "process 0" in output
        assert "process 1" in output


NAN_TOKEN = "@"  # a single token; the student's embedding of it is NaN


@pytest.fixture(scope="module")
def student_with_nan(tmp_path_factory: pytest.TempPathFactory, student_folder: Path) -> Path:
    """A student whose loss is NaN on texts with `NAN_TOKEN`."""
    folder = tmp_path_factory.mktemp("marked") / "student"
    shutil.copytree(student_folder, folder)
    (nan_id,) = load_tokenizer(folder).encode(NAN_TOKEN, add_special_tokens=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][nan_id] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.enable_socket
@pytest.mark.parametrize("rank", [0, 1])
def test_a_nonfinite_loss_in_one_process_stops_all_before_the_step(
    rank: int, tmp_path: Path, teacher_folder: Path, student_with_nan: Path
) -> None:
    # Short examples come first: examples 8 to 11 make the third step, two for each process.
    questions = [f"{'so ' * number}{NAN_TOKEN if number == 9 + 2 * rank else '.'}" for number in range(12)]
    texts_by_split = {"train": questions, "validation": ["who?"], "test": ["how?"]}
    for name, texts in texts_by_split.items():
        rows = [json.dumps({"question": text, "answer": "yes"}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    line = [o for o in tiny_overrides(tmp_path, teacher_folder, student_with_nan) if not o.startswith("task")]
    line += [*COMMON, *TWO_PROCESSES, "task=jsonl", f"task.path={tmp_path / 'train.jsonl'}", "loss=[answer]"]
    line += [f"task.{name}_path={tmp_path / name}.jsonl" for name in ("validation", "test")]
    line += ["prompt.num_shots=0", "order=short_first", "checkpoint_every=1", "trainer.max_steps=9"]
    codes, outputs = zip(*run_ranks(tmp_path, "marked", line, line), strict=True)
    assert codes == (6, 6), outputs
    assert content_id(questions[9 + 2 * rank]) in outputs[rank]
    assert "is nan at step 2 on the examples those of another process" in outputs[1 - rank]
    newest = RunFolder(tmp_path, "marked", []).checkpoints()[-1].with_suffix(".ckpt")
    assert step_of(newest) == 2
    state = torch.load(newest, weights_only=True)["state_dict"]
    is_nan = load_file(student_with_nan / "model.safetensors")["model.embed_tokens.weight"].isnan()
    assert is_nan.any()
    for name, value in state.items():
        assert torch.equal(value.isnan(), is_nan if "embed_tokens" in name else torch.zeros_like(value).bool()), name


PRINT_ACCURACY = """
from distill import train
from distill.app.command import command
original_main = train.main
def main(config):
    accuracy = original_main(config)
    print(f"ACCURACY {accuracy}\\n", end="")  # a single write, so that lines of two processes do not mix
    return accuracy
train.main = main
command("train", main)
"""


@pytest.mark.enable_socket
def test_torchrun_gives_every_process_the_same_accuracy_and_one_folder(root: Path, overrides: list[str]) -> None:
    (root / "print_accuracy.py").write_text(PRINT_ACCURACY)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(free_port())]
    line = [*torchrun, str(root / "print_accuracy.py"), *overrides, *TWO_PROCESSES, "trainer.max_steps=3"]
    code, output = wait_for(launch(root, line))
    assert code != 0
    assert "DISTILL_RUN" in output
    code, output = wait_for(launch(root, line, DISTILL_RUN="by-torchrun"))
    assert code == 0, output
    accuracies = [output_line.split()[-1] for output_line in output.splitlines() if output_line.startswith("ACCURACY")]
    assert len(accuracies) == 2
    assert len(set(accuracies)) == 1
    assert (root / "runs" / "by-torchrun" / "report.html").is_file()
