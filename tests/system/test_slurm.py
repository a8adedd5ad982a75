"""The cluster scripts and the Slurm launcher on a real one-node Slurm, started and stopped by a fixture."""

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

from distill.annotation.annotation_job import open_annotation_job
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
    """A running Slurm and its commands."""

    folder: Path
    env: Mapping[str, str]

    def call(self, *command: str, **variables: str) -> str:
        process = subprocess.run(
            command, env=self.env | variables, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False
        )
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()

    def submit(self, *line: str) -> str:
        """Submit options, script and arguments; return the number of the job."""
        return self.call("sbatch", "--parsable", f"--output={self.folder}/%x-%j.log", *line)

    def jobs(self, number: str) -> list[dict[str, str]]:
        """The properties of a job, or of all jobs of an array."""
        lines = self.call("scontrol", "--oneliner", "show", "job", number).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def states(self, number: str) -> set[str]:
        return {job["JobState"] for job in self.jobs(number)}

    def restarts(self, number: str) -> dict[str, str]:
        """The number of restarts of each job of an array, by array index."""
        return {job["ArrayTaskId"]: job["Restarts"] for job in self.jobs(number)}

    def steps(self) -> list[str]:
        """The ids of the running job steps."""
        return self.call("squeue", "--steps", "--noheader", "--format=%i").split()

    def ended(self, number: str) -> set[str]:
        """Wait for a job, or all jobs of an array, to end; return the final states."""
        open_states = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"}
        self.wait(lambda: not self.states(number) & open_states, f"the end of job {number}", number)
        return self.states(number)

    def output(self, number: str) -> str:
        """The output of the jobs so far."""
        paths = {job.get("StdOut", "") for job in self.jobs(number)}
        return "\n".join(Path(path).read_text() for path in sorted(paths) if Path(path).is_file())

    def wait(
        self, condition: Callable[[], bool], description: str, number: str | None = None, *, seconds: float = 240
    ) -> None:
        """Wait for a condition; on timeout fail with the output of the job, or with the logs of Slurm."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = (path.read_text() for path in sorted(self.folder.glob("*.log")))
                pytest.fail(f"timed out waiting for {description}\n{self.output(number) if number else ''.join(logs)}")
            time.sleep(0.05)


def signal_until_it_stops(cluster: Cluster, number: str) -> None:
    """Send signals before Python starts, while it imports, and while it works."""

    def is_stopping() -> bool:
        subprocess.run(["scancel", "--signal=USR1", number], env=cluster.env, capture_output=True, check=False)
        return "stopped on request" in cluster.output(number)

    cluster.wait(is_stopping, "the effect of a signal", number)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm of one node that claims to have four processors."""
    missing_tools = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name)]
    if missing_tools or os.geteuid():
        missing_text = ", ".join(missing_tools) or "root"
        pytest.skip(f"NO SLURM IS TESTED: it needs root and the packages slurm-wlm and munge; missing: {missing_text}")
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
    running = Cluster(folder, env)
    try:
        for name, line in lines.items():
            with (folder / f"{name}.log").open("wb") as log:
                started.append(subprocess.Popen(line, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
            if name == "munged":
                running.wait((folder / "munge.socket").exists, "munged", seconds=30)
        running.wait(lambda: is_idle(env), "an idle node", seconds=60)
        yield running
        running.call("scancel", "--user=root")
        running.wait(lambda: not running.call("squeue", "--noheader"), "an empty queue", seconds=60)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(30)


def free_ports(number: int) -> list[int]:
    """Ports on which no process listens."""
    sockets = [socket.socket() for _ in range(number)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def is_idle(env: Mapping[str, str]) -> bool:
    process = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=env, capture_output=True, text=True, check=False
    )
    return set(process.stdout.split()) == {"idle"}


@dataclass(frozen=True)
class TrainingSetup:
    """Common overrides of all trainings, and the final weights of one uninterrupted process."""

    root: Path
    overrides: list[str]
    weights: bytes


@pytest.fixture(scope="session")
def training_setup(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path
) -> TrainingSetup:
    root = tmp_path_factory.mktemp("taught")
    overrides = [*tiny_overrides(root, teacher_folder, student_folder), "loss=[answer,kl]", "batch_size=4"]
    overrides += [f"trainer.max_steps={NUM_STEPS}", "microbatch_size=2", "checkpoint_every=5", "max_new_tokens=4"]
    overrides += ["validate_every=50", "num_samples=0", "evaluate_before=false", "preflight=false"]
    process = run(root, *overrides, f"hydra.run.dir={root}/runs/alone")
    assert process.returncode == 0, process.stderr
    return TrainingSetup(root, overrides, weights(root / "runs/alone").read_bytes())


@pytest.fixture(scope="session")
def two_task_weights(cluster: Cluster, training_setup: TrainingSetup) -> bytes:
    """The final weights of two uninterrupted tasks, which also filled a separate cache."""
    number = train(cluster, training_setup, f"cache.dir={training_setup.root}/by-two")
    assert cluster.ended(number) == {"COMPLETED"}, cluster.output(number)
    return weights(folder_of(training_setup, number)).read_bytes()


def train(cluster: Cluster, training_setup: TrainingSetup, *overrides: str, partition: str = "patient") -> str:
    """Submit a training with two tasks; return the job number."""
    options = ["--ntasks-per-node=2", f"--partition={partition}"]
    return cluster.submit(*options, "scripts/slurm/train.sbatch", *training_setup.overrides, *overrides)


def folder_of(training_setup: TrainingSetup, number: str) -> Path:
    return training_setup.root / "runs" / f"slurm-{number}"


def weights(folder: Path) -> Path:
    return folder / "student" / "model.safetensors"


def wait_for_steps(cluster: Cluster, number: str, folder: Path) -> None:
    """Wait until the training has made some of its steps."""
    cluster.wait(lambda: any(folder.glob("checkpoints/step-*.json")), "the first checkpoint", number)


def suspend_processes(cluster: Cluster, number: str, folder: Path, num_tasks: int = 2) -> list[int]:
    """Suspend a training's processes after some steps, so that it cannot end before it is interrupted.

    Slurm continues the processes before it ends a job; for other signals use `signal_and_continue`.
    """
    old_checkpoints = set(folder.glob("checkpoints/step-*.json"))
    cluster.wait(lambda: len(processes(number)) == num_tasks, "the processes", number)
    pids = list(processes(number).values())
    cluster.wait(lambda: bool({*folder.glob("checkpoints/step-*.json")} - old_checkpoints), "a checkpoint", number)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


def signal_and_continue(cluster: Cluster, number: str, pids: list[int]) -> None:
    """Send a signal to a job whose processes are suspended, then continue them."""
    cluster.call("scancel", "--signal=USR1", number)
    cluster.wait(lambda: all(has_pending_signal(pid) for pid in pids), "the signal", number)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def has_pending_signal(pid: int) -> bool:
    """Whether the signal is pending for a suspended process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    pending = int(lines["ShdPnd"], 16) | int(lines["SigPnd"], 16)
    return bool(pending >> (signal.SIGUSR1 - 1) & 1)


def assert_resumed(cluster: Cluster, number: str) -> None:
    """Assert that the job was stopped midway, resumed, and completed."""
    assert cluster.ended(number) == {"COMPLETED"}, cluster.output(number)
    assert "the state is saved" in cluster.output(number)
    assert "resuming from" in cluster.output(number)


def test_array_jobs_make_each_record_once_and_only_the_signalled_job_requeues(
    cluster: Cluster, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    train_only = ("student", "trainer", "tracking")
    tiny = [o for o in tiny_overrides(tmp_path, teacher_folder, student_folder) if not o.startswith(train_only)]
    tiny += ["task.examples.num_unlabelled=234", "teacher.num_rationales=240", "teacher.group_size=4"]
    number = cluster.submit("--array=1-3", "scripts/slurm/annotate.sbatch", *tiny)
    last = f"{number}_3"  # its job number is that of the array
    cluster.wait(lambda: f"{last}.0" in cluster.steps(), "the last job", number)
    signal_until_it_stops(cluster, last)
    assert cluster.ended(number) == {"COMPLETED"}, cluster.output(number)
    restarts = cluster.restarts(number)
    assert restarts["1"] == restarts["2"] == "0" < restarts["3"]
    assert "annotated records are kept" in cluster.output(last)
    source = open_annotation_job(compose(*tiny, name="annotate"))
    records_per_job = [cost["records"] for cost in source.store.costs]
    # 240 train examples with answer and rationale, 4 of validation and 4 of test with an answer
    assert sum(records_per_job) == len(source.store) == 2 * 240 + 4 + 4
    assert len(records_per_job) > 1, "one job made all records: increase the work"
    assert source.store.check() == []


def test_two_tasks_train_the_same_weights_as_one(
    training_setup: TrainingSetup, two_task_weights: bytes, tmp_path: Path
) -> None:
    assert next((training_setup.root / "by-two").glob("*.safetensors"))
    (tmp_path / "two").write_bytes(two_task_weights)
    (tmp_path / "one").write_bytes(training_setup.weights)
    by_one, by_two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    start = load_file(Path(training_setup.overrides[11].partition("=")[2]) / "model.safetensors")
    largest_change = max((by_one[name] - start[name]).abs().max().item() for name in by_one)
    assert largest_change > 1e-2
    for name in by_one:
        torch.testing.assert_close(by_two[name], by_one[name], rtol=0, atol=largest_change / 100)


@pytest.mark.parametrize("partition", ["patient", "hasty"])
def test_a_preempted_run_ends_with_the_uninterrupted_weights(
    cluster: Cluster, training_setup: TrainingSetup, two_task_weights: bytes, partition: str
) -> None:
    # The partition "patient" gives jobs a minute to stop by themselves; "hasty" requeues them immediately.
    number = train(cluster, training_setup, partition=partition)
    suspend_processes(cluster, number, folder_of(training_setup, number))
    urgent = cluster.submit("--partition=urgent", "--exclusive", "--wrap=true")
    assert cluster.ended(urgent) == {"COMPLETED"}
    assert_resumed(cluster, number)
    assert cluster.jobs(number)[0]["Restarts"] == "1"  # not both by Slurm and by the script
    assert weights(folder_of(training_setup, number)).read_bytes() == two_task_weights


def test_a_run_signalled_at_start_and_midway_ends_with_the_uninterrupted_weights(
    cluster: Cluster, training_setup: TrainingSetup, two_task_weights: bytes
) -> None:
    number = train(cluster, training_setup)
    cluster.wait(lambda: f"{number}.0" in cluster.steps(), "the job step", number)
    signal_until_it_stops(cluster, number)
    cluster.wait(lambda: cluster.jobs(number)[0]["Restarts"] != "0", "the restart", number)
    signal_and_continue(cluster, number, suspend_processes(cluster, number, folder_of(training_setup, number)))
    assert_resumed(cluster, number)
    assert int(cluster.jobs(number)[0]["Restarts"]) >= 2  # scancel repeats the signal while a job is ending
    assert weights(folder_of(training_setup, number)).read_bytes() == two_task_weights


def test_a_cancelled_run_is_not_requeued_and_leaves_no_process(cluster: Cluster, training_setup: TrainingSetup) -> None:
    number = train(cluster, training_setup, ENDLESS)
    wait_for_steps(cluster, number, folder_of(training_setup, number))
    assert len(processes(number)) == 2
    cluster.call("scancel", number)
    assert cluster.ended(number) == {"CANCELLED"}
    cluster.wait(lambda: not processes(number), "the end of all processes", number, seconds=60)
    assert cluster.jobs(number)[0]["Restarts"] == "0"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_if_one_task_dies_the_job_ends_and_leaves_no_process(
    cluster: Cluster, training_setup: TrainingSetup, rank: str
) -> None:
    number = train(cluster, training_setup, ENDLESS)
    wait_for_steps(cluster, number, folder_of(training_setup, number))
    os.kill(processes(number)[rank], signal.SIGKILL)
    assert cluster.ended(number) == {"FAILED"}
    cluster.wait(lambda: not processes(number), "the end of all processes", number, seconds=60)
    assert cluster.jobs(number)[0]["Restarts"] == "0"


def processes(number: str) -> dict[str, int]:
    """The running Python processes of a job by their rank."""
    pid_by_rank = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            is_python = re.search(rb"distill\.train|submitit", (folder / "cmdline").read_bytes())
        except OSError:  # the process has ended
            continue
        variables = dict(word.split("=", 1) for word in words if "=" in word)
        if is_python and variables.get("SLURM_JOB_ID") == number and "SLURM_STEP_ID" in variables:
            pid_by_rank[variables["SLURM_PROCID"]] = int(folder.name)
    return pid_by_rank


def test_sweep_jobs_are_slurm_jobs_and_a_signalled_one_resumes(cluster: Cluster, training_setup: TrainingSetup) -> None:
    sweep = training_setup.root / "sweeps" / "here"
    line = [sys.executable, "-m", "distill.train", "-m", "hydra/launcher=slurm", "seed=1,0", *training_setup.overrides]
    with (training_setup.root / "sweep.log").open("w") as log:
        process = subprocess.Popen(
            [*line, f"hydra.sweep.dir={sweep}"], env=cluster.env, cwd=training_setup.root, stdout=log, stderr=log
        )
    try:
        cluster.wait(lambda: any(sweep.glob(".submitit/*_1/*.out")), "the last job")
        (name,) = (path.name for path in sweep.glob(".submitit/*_1"))
        number = cluster.jobs(name)[0]["JobId"]  # SLURM_JOB_ID of its processes, which may also be that of the array
        signal_and_continue(cluster, name, suspend_processes(cluster, number, sweep / "1", num_tasks=1))
        cluster.wait(lambda: process.poll() is not None, f"the end of the sweep: {training_setup.root}/sweep.log")
    finally:
        process.kill()
    assert process.returncode == 0, (training_setup.root / "sweep.log").read_text()
    assert cluster.restarts(name.partition("_")[0]) == {"0": "0", "1": "1"}
    output = "".join(path.read_text() for path in sweep.glob(".submitit/*_1/*.out"))
    assert "the state is saved" in output
    assert "resuming from" in output
    assert weights(sweep / "0").read_bytes() != training_setup.weights
    assert weights(sweep / "1").read_bytes() == training_setup.weights
    assert (sweep / "report.html").is_file()


def test_the_pipeline_annotates_trains_evaluates_and_exports(
    cluster: Cluster, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    numbers, folder = submit_pipeline(cluster, tmp_path, teacher_folder, student_folder)
    dependency = cluster.jobs(numbers["train"])[0]["Dependency"]
    assert dependency.startswith(f"afterok:{numbers['annotate']}")
    assert cluster.ended(numbers["evaluate"]) == {"COMPLETED"}, cluster.output(numbers["evaluate"])
    assert cluster.states(numbers["annotate"]) == cluster.states(numbers["train"]) == {"COMPLETED"}
    assert "the teacher is not loaded (0 calls)" in cluster.output(numbers["train"])
    assert "accuracy" in cluster.output(numbers["evaluate"])
    assert weights(folder).read_bytes() == (folder / "export" / "model.safetensors").read_bytes()


def test_if_a_pipeline_job_fails_no_job_waits_for_it(
    cluster: Cluster, tmp_path: Path, teacher_folder: Path, student_folder: Path
) -> None:
    numbers, folder = submit_pipeline(cluster, tmp_path, teacher_folder, student_folder, "rebuild=nothing")
    assert cluster.ended(numbers["annotate"]) == {"FAILED"}
    assert cluster.ended(numbers["train"]) == cluster.ended(numbers["evaluate"]) == {"CANCELLED"}
    assert not folder.exists()


def submit_pipeline(
    cluster: Cluster, root: Path, teacher: Path, student: Path, *overrides: str
) -> tuple[dict[str, str], Path]:
    """Submit the pipeline; return its job numbers and the folder of its run."""
    tiny = tiny_overrides(root, teacher, student)
    train_only = [o for o in tiny if o.startswith(("student", "trainer", "tracking"))]
    shared = [*(o for o in tiny if o not in train_only), *overrides]
    train_only += ["trainer.max_steps=2", "batch_size=4", "max_new_tokens=4", "num_samples=0"]
    options = {"DISTILL_ROOT": str(root), "ANNOTATE": "--array=1-2", "SBATCH_PARTITION": "hasty"}
    job_lines = cluster.call("scripts/slurm/pipeline", *shared, "--", *train_only, **options)
    numbers = dict(line.split() for line in job_lines.splitlines())
    return numbers, Path(numbers["run"])
