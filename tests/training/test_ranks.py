"""What may happen to a run from outside: signals, kills, lost processes, full memory and disks, no tracker."""

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
from tests.training.conftest import ALIKE, TOGETHER, Folder, finished, free_port, launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run_ranks(root: Path, name: str, *lines: Sequence[str]) -> list[tuple[int, str]]:
    """Run the processes of one run as torchrun would, each with overrides of its own; how each ended."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DISTILL_RUN": name}
    shared |= {"WORLD_SIZE": str(len(lines)), "LOCAL_WORLD_SIZE": str(len(lines)), "TORCHELASTIC_RUN_ID": "x"}
    processes = [
        launch(root, [sys.executable, "-m", "distill.train", *line], **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, line in enumerate(lines)
    ]
    try:
        return [finished(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.enable_socket
def test_processes_with_different_configurations_stop_immediately(root: Path, overrides: list[str]) -> None:
    line = [*overrides, *TOGETHER, "trainer.max_steps=5"]
    for code, said in run_ranks(root, "unlike", *([*line, f"optim.optimizer.lr={rate}"] for rate in (0.001, 0.002))):
        assert code == 2, said
        assert "different configurations" in said
        assert "process 0" in said
        assert "process 1" in said


MARK = "@"  # a token of its own, of which the student's embedding is not a number


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory, student_folder: Path) -> Path:
    """A student that makes numbers of all texts but those with a mark."""
    folder = tmp_path_factory.mktemp("marked") / "student"
    shutil.copytree(student_folder, folder)
    (mark,) = load_tokenizer(folder).encode(MARK, add_special_tokens=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][mark] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.enable_socket
@pytest.mark.parametrize("rank", [0, 1])
def test_a_nonfinite_loss_in_one_process_stops_all_before_the_step(
    rank: int, tmp_path: Path, teacher_folder: Path, marked: Path
) -> None:
    # Short ones come first: the examples 8 to 11 make the third step, of which each process has two.
    questions = [f"{'so ' * number}{MARK if number == 9 + 2 * rank else '.'}" for number in range(12)]
    asked = {"train": questions, "validation": ["who?"], "test": ["how?"]}
    for name, texts in asked.items():
        rows = [json.dumps({"question": text, "answer": "yes"}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    line = [o for o in tiny_overrides(tmp_path, teacher_folder, marked) if not o.startswith("task")]
    line += [*ALIKE, *TOGETHER, "task=jsonl", f"task.path={tmp_path / 'train.jsonl'}", "loss=[answer]"]
    line += [f"task.{name}_path={tmp_path / name}.jsonl" for name in ("validation", "test")]
    line += ["prompt.num_shots=0", "order=short_first", "checkpoint_every=1", "trainer.max_steps=9"]
    codes, told = zip(*run_ranks(tmp_path, "marked", line, line), strict=True)
    assert codes == (6, 6), told
    assert content_id(questions[9 + 2 * rank]) in told[rank]
    assert "is nan at step 2 on the examples those of another process" in told[1 - rank]
    newest = Folder(tmp_path, "marked", []).checkpoints()[-1].with_suffix(".ckpt")
    assert step_of(newest) == 2
    state = torch.load(newest, weights_only=True)["state_dict"]
    mark = load_file(marked / "model.safetensors")["model.embed_tokens.weight"].isnan()
    assert mark.any()
    for name, value in state.items():
        assert torch.equal(value.isnan(), mark if "embed_tokens" in name else torch.zeros_like(value).bool()), name


TOLD = """
from distill import train
from distill.app.command import command
work = train.main
def main(given):
    accuracy = work(given)
    print(f"GAVE {accuracy}\\n", end="")  # in one piece, beside the other process
    return accuracy
train.main = main
command("train", main)
"""


@pytest.mark.enable_socket
def test_torchrun_gives_every_process_the_same_accuracy_and_one_folder(root: Path, overrides: list[str]) -> None:
    (root / "told.py").write_text(TOLD)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(free_port())]
    line = [*torchrun, str(root / "told.py"), *overrides, *TOGETHER, "trainer.max_steps=3"]
    code, said = finished(launch(root, line))
    assert code != 0
    assert "DISTILL_RUN" in said
    code, said = finished(launch(root, line, DISTILL_RUN="by-torchrun"))
    assert code == 0, said
    gave = [text.split()[-1] for text in said.splitlines() if text.startswith("GAVE")]
    assert len(gave) == 2
    assert len(set(gave)) == 1
    assert (root / "runs" / "by-torchrun" / "report.html").is_file()
