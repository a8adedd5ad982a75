"""The cluster scripts and the launcher on a real Slurm of one node, which is started and stopped here."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.annotation.fill import open_source
from tests.conftest import compose, environment, run, tiny_overrides

pytestmark = [pytest.mark.slurm, pytest.mark.enable_socket, pytest.mark.timeout(600)]

PROJECT = Path(__file__).parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")
NUM_STEPS = 150
ENDLESS = "trainer.max_steps=1000000"
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=20
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000
PartitionName=patient Nodes={host} Default=YES PriorityTier=1 GraceTime=60
PartitionName=hasty Nodes={host} PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes={host} PriorityTier=10 PreemptMode=OFF
"""
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"


@dataclass(frozen=True)
class Cluster:
    """A Slurm that is running, and how to speak with it."""

    folder: Path
    env: Mapping[str, str]

    def call(self, *command: str, **more: str) -> str:
        done = subprocess.run(
            command, env=self.env | more, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, *line: str) -> str:
        """Submit options, script and arguments; return the number of the job."""
        return self.call("sbatch", "--parsable", f"--output={self.folder}/%x-%j.log", *line)

    def jobs(self, number: str) -> list[dict[str, str]]:
        """What is known of a job, or of all jobs of an array."""
        lines = self.call("scontrol", "--oneliner", "show", "job", number).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def states(self, number: str) -> set[str]:
        return {job["JobState"] for job in self.jobs(number)}

    def restarts(self, number: str) -> dict[str, str]:
        """How often each job of an array came back."""
        return {job["ArrayTaskId"]: job["Restarts"] for job in self.jobs(number)}

    def steps(self) -> list[str]:
        """What is running now."""
        return self.call("squeue", "--steps", "--noheader", "--format=%i").split()

    def ended(self, number: str) -> set[str]:
        """The states in which a job, or the jobs of an array, have ended."""
        open_states = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"}
        self.wait(lambda: not self.states(number) & open_states, f"the end of job {number}", number)
        return self.states(number)

    def said(self, number: str) -> str:
        """What the jobs have written until now."""
        paths = {job.get("StdOut", "") for job in self.jobs(number)}
        return "\n".join(Path(path).read_text() for path in sorted(paths) if Path(path).is_file())

    def wait(self, is_so: Callable[[], bool], what: str, number: str | None = None, *, seconds: float = 240) -> None:
        """Wait until something is so; where it does not come, tell what the job has written, or Slurm."""
        end = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > end:
                logs = (path.read_text() for path in sorted(self.folder.glob("*.log")))
                pytest.fail(f"waited in vain for {what}\n{self.said(number) if number else ''.join(logs)}")
            time.sleep(0.05)


def signal_until_it_stops(cluster: Cluster, number: str) -> None:
    """Send signals before Python is there, while it imports, and at last while it works."""

    def is_stopping() -> bool:
        subprocess.run(["scancel", "--signal=USR1", number], env=cluster.env, capture_output=True, check=False)
        return "stopped on request" in cluster.said(number)

    cluster.wait(is_stopping, "what follows a signal", number)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A node that says it has four processors."""
    missing = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name)]
    if missing or os.geteuid():
        lacking = ", ".join(missing) or "only to be root"
        pytest.skip(f"NO SLURM IS TESTED: it needs root and the packages slurm-wlm and munge; lacking {lacking}")
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, ports=free_ports(2)))
    (folder / "cgroup.conf").write_text(CGROUP)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "state").mkdir()
    env = environment(SLURM_CONF=str(folder / "slurm.conf"), DISTILL_VENV=sys.prefix)
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "log-file", "pid-file", "seed-file")]
    lines = {
        "munged": ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *munge],
        "slurmctld": ["slurmctld", "-D"],
        "slurmd": ["slurmd", "-D"],
    }
    started: list[subprocess.Popen[bytes]] = []
    there = Cluster(folder, env)
    try:
        for name, line in lines.items():
            with (folder / f"{name}.log").open("wb") as log:
                started.append(subprocess.Popen(line, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
            if name == "munged":
                there.wait((folder / "munge.socket").exists, "munged", seconds=30)
        there.wait(lambda: is_idle(env), "an idle node", seconds=60)
        yield there
        there.call("scancel", "--user=root")
        there.wait(lambda: not there.call("squeue", "--noheader"), "an empty queue", seconds=60)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(30)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def is_idle(env: Mapping[str, str]) -> bool:
    done = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=env, capture_output=True, text=True, check=False)
    return set(done.stdout.split()) == {"idle"}


@dataclass(frozen=True)
class Taught:
    """What all trainings here have in common, and the weights that one undisturbed process ends with."""

    root: Path
    overrides: list[str]
    weights: bytes


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> Taught:
    root = tmp_path_factory.mktemp("taught")
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), "loss=[answer,kl]", "batch_size=4"]
    overrides += [f"trainer.max_steps={NUM_STEPS}", "microbatch_size=2", "checkpoint_every=5", "max_new_tokens=4"]
    overrides += ["validate_every=50", "num_samples=0", "evaluate_before=false", "preflight=false"]
    done = run(root, *overrides, f"hydra.run.dir={root}/runs/alone")
    assert done.returncode == 0, done.stderr
    return Taught(root, overrides, weights(root / "runs/alone").read_bytes())


@pytest.fixture(scope="session")
def by_two(cluster: Cluster, taught: Taught) -> bytes:
    """The weights that two undisturbed tasks end with, which also filled a cache of their own."""
    number = train(cluster, taught, f"cache.dir={taught.root}/by-two")
    assert cluster.ended(number) == {"COMPLETED"}, cluster.said(number)
    return weights(folder_of(taught, number)).read_bytes()


def train(cluster: Cluster, taught: Taught, *overrides: str, partition: str = "patient") -> str:
    """Submit a training by two tasks."""
    options = ["--ntasks-per-node=2", f"--partition={partition}"]
    return cluster.submit(*options, "scripts/slurm/train.sbatch", *taught.overrides, *overrides)


def folder_of(taught: Taught, number: str) -> Path:
    return taught.root / "runs" / f"slurm-{number}"


def weights(folder: Path) -> Path:
    return folder / "student" / "model.safetensors"


def wait_for_steps(cluster: Cluster, number: str, folder: Path) -> None:
    """Until the training has made some of its steps."""
    cluster.wait(lambda: any(folder.glob("checkpoints/step-*.json")), "the first checkpoint", number)


def stand_still(cluster: Cluster, number: str, folder: Path, num_tasks: int = 2) -> list[int]:
    """Stop a training's processes after some of its steps, so that it does not end before it is struck.

    Where Slurm ends a job it first lets its processes go on; after another signal `signal_and_go_on` does.
    """
    before = set(folder.glob("checkpoints/step-*.json"))
    cluster.wait(lambda: len(processes(number)) == num_tasks, "its processes", number)
    pids = list(processes(number).values())
    cluster.wait(lambda: bool({*folder.glob("checkpoints/step-*.json")} - before), "a checkpoint", number)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


def signal_and_go_on(cluster: Cluster, number: str, pids: list[int]) -> None:
    """Send a signal to a job whose processes stand still; they find it when they go on."""
    cluster.call("scancel", "--signal=USR1", number)
    cluster.wait(lambda: all(is_told(pid) for pid in pids), "the signal", number)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def is_told(pid: int) -> bool:
    """Whether a signal waits for a process that stands still."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    waiting = int(lines["ShdPnd"], 16) | int(lines["SigPnd"], 16)
    return bool(waiting >> (signal.SIGUSR1 - 1) & 1)


def check_it_went_on(cluster: Cluster, number: str) -> None:
    """It was stopped between its first step and its last, came back, and ended well."""
    assert cluster.ended(number) == {"COMPLETED"}, cluster.said(number)
    assert "its state is saved" in cluster.said(number)
    assert "resuming from" in cluster.said(number)


def test_array_jobs_make_each_record_once_and_only_the_signalled_job_requeues(
    cluster: Cluster, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    foreign = ("student", "trainer", "tracking")
    tiny = [o for o in tiny_overrides(tmp_path, teacher_folder, student_folder) if not o.startswith(foreign)]
    tiny += ["task.examples.num_unlabelled=234", "teacher.num_rationales=240", "teacher.group_size=4"]
    number = cluster.submit("--array=1-3", "scripts/slurm/annotate.sbatch", *tiny)
    last = f"{number}_3"  # which has the number of the array as its own
    cluster.wait(lambda: f"{last}.0" in cluster.steps(), "the last job", number)
    signal_until_it_stops(cluster, last)
    assert cluster.ended(number) == {"COMPLETED"}, cluster.said(number)
    restarts = cluster.restarts(number)
    assert restarts["1"] == restarts["2"] == "0" < restarts["3"]
    assert "what was annotated is kept" in cluster.said(last)
    source = open_source(compose(*tiny, name="annotate"))
    num_made = [cost["records"] for cost in source.store.costs]
    # 240 train examples with answer and rationale, 4 of validation and 4 of test with an answer
    assert sum(num_made) == len(source.store) == 2 * 240 + 4 + 4
    assert len(num_made) > 1, "one job did it all: give them more to do"
    assert source.store.check() == []


def test_two_tasks_train_the_same_weights_as_one(taught: Taught, by_two: bytes, tmp_path: Path) -> None:
    assert next((taught.root / "by-two").glob("*.safetensors"))
    (tmp_path / "two").write_bytes(by_two)
    (tmp_path / "one").write_bytes(taught.weights)
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    start = load_file(Path(taught.overrides[11].partition("=")[2]) / "model.safetensors")
    moved = max((one[name] - start[name]).abs().max().item() for name in one)
    assert moved > 1e-2
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=moved / 100)


@pytest.mark.parametrize("partition", ["patient", "hasty"])
def test_a_preempted_run_ends_with_the_uninterrupted_weights(
    cluster: Cluster, taught: Taught, by_two: bytes, partition: str
) -> None:
    # A patient partition gives jobs a minute to leave by themselves; a hasty one puts them back into the queue at once.
    number = train(cluster, taught, partition=partition)
    stand_still(cluster, number, folder_of(taught, number))
    urgent = cluster.submit("--partition=urgent", "--exclusive", "--wrap=true")
    assert cluster.ended(urgent) == {"COMPLETED"}
    check_it_went_on(cluster, number)
    assert cluster.jobs(number)[0]["Restarts"] == "1"  # not once by Slurm and once by the script
    assert weights(folder_of(taught, number)).read_bytes() == by_two


def test_a_run_signalled_at_start_and_midway_ends_with_the_uninterrupted_weights(
    cluster: Cluster, taught: Taught, by_two: bytes
) -> None:
    number = train(cluster, taught)
    cluster.wait(lambda: f"{number}.0" in cluster.steps(), "its step", number)
    signal_until_it_stops(cluster, number)
    cluster.wait(lambda: cluster.jobs(number)[0]["Restarts"] != "0", "its return", number)
    signal_and_go_on(cluster, number, stand_still(cluster, number, folder_of(taught, number)))
    check_it_went_on(cluster, number)
    assert int(cluster.jobs(number)[0]["Restarts"]) >= 2  # scancel repeats itself where a job is on its way out
    assert weights(folder_of(taught, number)).read_bytes() == by_two


def test_a_cancelled_run_is_not_requeued_and_leaves_no_process(cluster: Cluster, taught: Taught) -> None:
    number = train(cluster, taught, ENDLESS)
    wait_for_steps(cluster, number, folder_of(taught, number))
    assert len(processes(number)) == 2
    cluster.call("scancel", number)
    assert cluster.ended(number) == {"CANCELLED"}
    cluster.wait(lambda: not processes(number), "the end of its processes", number, seconds=60)
    assert cluster.jobs(number)[0]["Restarts"] == "0"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_if_one_task_dies_the_job_ends_and_leaves_no_process(cluster: Cluster, taught: Taught, rank: str) -> None:
    number = train(cluster, taught, ENDLESS)
    wait_for_steps(cluster, number, folder_of(taught, number))
    os.kill(processes(number)[rank], signal.SIGKILL)
    assert cluster.ended(number) == {"FAILED"}
    cluster.wait(lambda: not processes(number), "the end of its processes", number, seconds=60)
    assert cluster.jobs(number)[0]["Restarts"] == "0"


def processes(number: str) -> dict[str, int]:
    """The running Python processes of a job by their rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            is_python = re.search(rb"distill\.train|submitit", (folder / "cmdline").read_bytes())
        except OSError:  # ended meanwhile
            continue
        known = dict(word.split("=", 1) for word in words if "=" in word)
        if is_python and known.get("SLURM_JOB_ID") == number and "SLURM_STEP_ID" in known:
            found[known["SLURM_PROCID"]] = int(folder.name)
    return found


def test_sweep_jobs_are_slurm_jobs_and_a_signalled_one_resumes(cluster: Cluster, taught: Taught) -> None:
    sweep = taught.root / "sweeps" / "here"
    line = [sys.executable, "-m", "distill.train", "-m", "hydra/launcher=slurm", "seed=1,0", *taught.overrides]
    with (taught.root / "sweep.log").open("w") as log:
        process = subprocess.Popen(
            [*line, f"hydra.sweep.dir={sweep}"], env=cluster.env, cwd=taught.root, stdout=log, stderr=log
        )
    try:
        cluster.wait(lambda: any(sweep.glob(".submitit/*_1/*.out")), "the last job")
        (name,) = (path.name for path in sweep.glob(".submitit/*_1"))
        number = cluster.jobs(name)[0]["JobId"]  # its processes know it by this, which may be the whole array's too
        signal_and_go_on(cluster, name, stand_still(cluster, number, sweep / "1", num_tasks=1))
        cluster.wait(lambda: process.poll() is not None, f"the end of the sweep: {taught.root}/sweep.log")
    finally:
        process.kill()
    assert process.returncode == 0, (taught.root / "sweep.log").read_text()
    assert cluster.restarts(name.partition("_")[0]) == {"0": "0", "1": "1"}
    said = "".join(path.read_text() for path in sweep.glob(".submitit/*_1/*.out"))
    assert "its state is saved" in said
    assert "resuming from" in said
    assert weights(sweep / "0").read_bytes() != taught.weights
    assert weights(sweep / "1").read_bytes() == taught.weights
    assert (sweep / "report.html").is_file()


def test_the_pipeline_annotates_trains_evaluates_and_exports(
    cluster: Cluster, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    numbers, folder = submit_pipeline(cluster, tmp_path, teacher_folder, student_folder)
    waiting = cluster.jobs(numbers["train"])[0]["Dependency"]
    assert waiting.startswith(f"afterok:{numbers['annotate']}")
    assert cluster.ended(numbers["evaluate"]) == {"COMPLETED"}, cluster.said(numbers["evaluate"])
    assert cluster.states(numbers["annotate"]) == cluster.states(numbers["train"]) == {"COMPLETED"}
    assert "the teacher is not loaded (0 calls)" in cluster.said(numbers["train"])
    assert "accuracy" in cluster.said(numbers["evaluate"])
    assert weights(folder).read_bytes() == (folder / "export" / "model.safetensors").read_bytes()


def test_if_a_pipeline_job_fails_no_job_waits_for_it(
    cluster: Cluster, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    numbers, folder = submit_pipeline(cluster, tmp_path, teacher_folder, student_folder, "rebuild=nothing")
    assert cluster.ended(numbers["annotate"]) == {"FAILED"}
    assert cluster.ended(numbers["train"]) == cluster.ended(numbers["evaluate"]) == {"CANCELLED"}
    assert not folder.exists()


def submit_pipeline(
    cluster: Cluster, root: Path, teacher: Path, student: Path, *more: str
) -> tuple[dict[str, str], Path]:
    """The numbers of its jobs, and the folder of its run."""
    tiny = tiny_overrides(root, teacher, student)
    alone = [o for o in tiny if o.startswith(("student", "trainer", "tracking"))]
    shared = [*(o for o in tiny if o not in alone), *more]
    alone += ["trainer.max_steps=2", "batch_size=4", "max_new_tokens=4", "num_samples=0"]
    options = {"DISTILL_ROOT": str(root), "ANNOTATE": "--array=1-2", "SBATCH_PARTITION": "hasty"}
    told = cluster.call("scripts/slurm/pipeline", *shared, "--", *alone, **options)
    numbers = dict(line.split() for line in told.splitlines())
    return numbers, Path(numbers["run"])
