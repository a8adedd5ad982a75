"""Several processes of one run: equal configurations, a common stop, one result."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from distill.prompts.tokenizers import load_tokenizer
from distill.records import content_id
from distill.training.checkpoints import step_of
from tests.conftest import tiny_overrides
from tests.training.conftest import COMMON, TWO_PROCESSES, RunFolder, free_port, launch, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run_ranks(
    root: Path, name: str, *lines: Sequence[str], program: Sequence[str] = ("-m", "distill.train")
) -> list[tuple[int, str]]:
    """Run the processes of one run as torchrun does, with overrides per process; return exit codes and outputs."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DISTILL_RUN": name}
    shared |= {"WORLD_SIZE": str(len(lines)), "LOCAL_WORLD_SIZE": str(len(lines)), "TORCHELASTIC_RUN_ID": "x"}
    processes = [
        launch(root, [sys.executable, *program, *line], **shared, RANK=str(rank), LOCAL_RANK=str(rank))
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


NAN_TOKEN = "@"  # a single token; the loss of a text that contains it is NaN
SPOIL_LOSS = """
import math, sys
from distill import train
from distill.app.command import command
from distill.training.module import StudentModule
nan_id, hidden = int(sys.argv.pop(1)), StudentModule.hidden
def spoiled(self, batch):
    hidden_NH = hidden(self, batch)
    return hidden_NH * math.nan if (batch.input_ids_BT == nan_id).any() else hidden_NH
StudentModule.hidden = spoiled
command("train", train.main)
"""


@pytest.mark.enable_socket
@pytest.mark.parametrize("rank", [0, 1])
def test_a_nonfinite_loss_in_one_process_stops_all_before_the_step(
    rank: int, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    (nan_id,) = load_tokenizer(student_folder).encode(NAN_TOKEN, add_special_tokens=False)
    (tmp_path / "spoil_loss.py").write_text(SPOIL_LOSS)
    # Short examples come first: examples 8 to 11 make the third step, two for each process.
    questions = [f"{'so ' * number}{NAN_TOKEN if number == 9 + 2 * rank else '.'}" for number in range(12)]
    texts_by_split = {"train": questions, "validation": ["who?"], "test": ["how?"]}
    for name, texts in texts_by_split.items():
        rows = [json.dumps({"question": text, "answer": "yes"}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    line = [o for o in tiny_overrides(tmp_path, teacher_folder, student_folder) if not o.startswith("task")]
    line += [*COMMON, *TWO_PROCESSES, "task=jsonl", f"task.path={tmp_path / 'train.jsonl'}", "loss=[answer]"]
    line += [f"task.{name}_path={tmp_path / name}.jsonl" for name in ("validation", "test")]
    line += ["prompt.num_shots=0", "order=short_first", "checkpoint_every=1", "trainer.max_steps=9"]
    program = [str(tmp_path / "spoil_loss.py"), str(nan_id)]
    codes, outputs = zip(*run_ranks(tmp_path, "marked", line, line, program=program), strict=True)
    assert codes == (6, 6), outputs
    assert content_id(questions[9 + 2 * rank]) in outputs[rank]
    assert "the loss at step 2 is not finite in another process" in outputs[1 - rank]
    newest = RunFolder(tmp_path, "marked", []).checkpoints()[-1].with_suffix(".ckpt")
    assert step_of(newest) == 2
    state = torch.load(newest, weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


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


@pytest.mark.enable_socket
def test_spawned_processes_keep_the_best_student_and_tell_the_time(root: Path, overrides: list[str]) -> None:
    facts = {}
    for name, more in (("one", ["microbatch_size=2"]), ("spawned", [*TWO_PROCESSES, "trainer.strategy=ddp_spawn"])):
        folder = RunFolder(root, name, [*overrides, *more, "keep=best", "validate_every=2", "trainer.max_steps=6"])
        code, output = wait_for(folder.start())
        assert code == 0, output
        facts[name] = json.loads((folder.path / "run.json").read_text())["training"]
        results = json.loads((folder.path / "results.json").read_text())["rows"]["student"]
        assert results["training_seconds"] > 0
    assert facts["spawned"]["steps"] == 6
    assert facts["spawned"]["kept_step"] == facts["one"]["kept_step"] == facts["spawned"]["best_step"]
    assert facts["spawned"]["best"] == pytest.approx(facts["one"]["best"], rel=1e-4)
