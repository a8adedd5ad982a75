"""The image, built from the Dockerfile and run as a cluster runs it: not root, read-only, one volume."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from distill.app.config import CONF
from distill.app.files import sha256, whole_file

ROOT = CONF.parent
CANARY = f"canary-{secrets.token_hex(16)}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = "localhost/bookworm"
IMAGE = "localhost/distill"
GIGABYTES = 8  # at most, while the image is made; all is removed afterwards

_NEEDED = ("buildah", "debootstrap", "podman", "unshare", "tar")
_MISSING = [tool for tool in _NEEDED if shutil.which(tool) is None] + ["to be root"] * (os.geteuid() != 0)
pytestmark = [
    pytest.mark.container,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(_MISSING), reason=f"a real image needs {', '.join(_MISSING)}; .ci/run installs the tools"),
]

# The embedded default on a few examples.
FEW = (
    "task.examples.num_labelled=8",
    "task.examples.num_unlabelled=8",
    "task.examples.num_validation=4",
    "task.examples.num_test=4",
    "teacher.calibrate=4",
    "teacher.num_rationales=2",
    "teacher.kind.max_new_tokens=8",
    "num_samples=1",
    "max_new_tokens=8",
)


@dataclass(frozen=True)
class Pip:
    """This machine's pip settings as one file, and what of its file system they name, as mounts."""

    file: Path
    mounts: tuple[str, ...]


@dataclass(frozen=True)
class Images:
    """A store of images that lives in one folder and leaves with it."""

    folder: Path

    def call(self, tool: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run buildah or podman on this store."""
        line = self.line(tool, *arguments)
        return subprocess.run(
            line, env=os.environ | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )

    def line(self, tool: str, *arguments: str) -> list[str]:
        """In a mount namespace of its own, without the second of two cgroup hierarchies, for crun refuses two."""
        alone = ["unshare", "--mount", "sh", "-c", 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"', "sh"]
        store = ["--root", f"{self.folder}/store", "--runroot", f"{self.folder}/run"]
        return [*alone, tool, *store, *arguments]

    def import_base(self, archive: Path) -> None:
        """Take an archive of a root file system as the image to build upon."""
        done = self.call("podman", "import", str(archive), BASE)
        assert done.returncode == 0, done.stderr

    def build(self, context: Path, pip: Pip, *, lock: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Build the image of a folder with a Dockerfile; what pip reads is there for the build alone."""
        values = {"BASE": BASE, "COMMIT": COMMIT, "LOCK": lock}
        settings = [word for name, value in values.items() for word in ("--build-arg", f"{name}={value}")]
        settings += ["--isolation", "chroot", "--secret", f"id=pip,src={pip.file}", *pip.mounts, "--tag", IMAGE]
        return self.call("buildah", "build", *settings, str(context), **environment)

    def run(self, *arguments: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run the image to its end."""
        return self.call("podman", *_run(options), IMAGE, *arguments)


def _run(options: Sequence[str]) -> list[str]:
    # Without limits given podman asks for some above this process's own, which a container may not.
    limits = ["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]
    return ["run", "--rm", "--cgroups", "disabled", "--network", "host", "--log-driver", "none", *limits, *options]


def read_only(data: Path) -> list[str]:
    """Nothing can be written but the data folder and a temporary one in memory."""
    return ["--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--volume", f"{data}:/data"]


def served(pip: Pip) -> list[str]:
    """What the image's own pip needs, with which it fetches the teacher and the examples."""
    return [*pip.mounts, "--volume", f"{pip.file}:/etc/pip.conf:ro"]


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Pip:
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = ast.literal_eval(value)
    file = tmp_path_factory.mktemp("pip") / "pip.conf"
    lines = [f"{name} = {' '.join(value.split())}" for name, value in settings.items()]
    file.write_text("\n".join(["[global]", *lines, f"# {CANARY}", ""]))
    named = [Path(word.removeprefix("file://")) for value in settings.values() for word in value.split()]
    there = {path.parent if path.is_dir() else path for path in named if path.is_absolute() and path.exists()}
    outermost = sorted(path for path in there if not there & set(path.parents))
    return Pip(file, tuple(word for path in outermost for word in ("--volume", f"{path}:{path}:ro")))


@pytest.fixture(scope="module")
def base() -> Path:
    """The root file system of a small Debian with Python, made once for all runs of the tests."""
    archive = Path(tempfile.gettempdir()) / "distill-test-bookworm.tar"
    if not archive.is_file():
        with tempfile.TemporaryDirectory() as folder, whole_file(archive) as temporary:
            packages = "--include=python3,python3-venv,ca-certificates"
            made = subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", folder], check=False)
            if made.returncode:
                pytest.skip("NO IMAGE IS TESTED: debootstrap could not fetch Debian")
            subprocess.run(["tar", "--directory", folder, "--create", "--file", temporary, "."], check=True)
    return archive


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as people have it: with secrets lying about."""
    folder = tmp_path_factory.mktemp("context") / "distill"
    left_out = shutil.ignore_patterns(".*", "distill-data", "wandb", "__pycache__", "shared")
    shutil.copytree(ROOT, folder, ignore=left_out)
    shutil.copy(ROOT / ".dockerignore", folder)
    littered = (".env", ".git/config", "wandb/run.wandb", "distill-data/notes", "tests/left.txt", "shared/notes.md")
    for name in (*littered, ".netrc", "distill/.env", "conf/.env", "conf/task/.secret", "distill/__pycache__/x.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"KEY={CANARY}\n")
    return folder


@pytest.fixture(scope="module")
def images(base: Path) -> Iterator[Images]:
    if shutil.disk_usage(tempfile.gettempdir()).free < GIGABYTES << 30:
        pytest.skip(f"an image needs up to {GIGABYTES} GB free in {tempfile.gettempdir()}")
    with tempfile.TemporaryDirectory(prefix="distill-images-") as folder:
        images = Images(Path(folder))
        images.import_base(base)
        done = images.call("podman", *_run([]), BASE, "true")
        if done.returncode:
            pytest.skip(f"NO IMAGE IS TESTED: no container runs on this machine: {done.stderr.strip()[-300:]}")
        yield images


@pytest.fixture(scope="module")
def image(images: Images, context: Path, pip: Pip) -> Images:
    """The image, built with secrets in the environment, in the folder and in what pip reads."""
    keys = {"WANDB_API_KEY": CANARY, "HF_TOKEN": CANARY, "OPENAI_API_KEY": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY}
    done = images.build(context, pip, lock=sha256(ROOT / "requirements.txt"), **keys)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return images


@pytest.fixture(scope="module")
def kept() -> Iterator[Path]:
    """A data folder that one job finds as another has left it, with the teacher in it."""
    with tempfile.TemporaryDirectory(prefix="distill-data-") as folder:
        os.chown(folder, 1000, 1000)
        yield Path(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An empty data folder of user 1000."""
    folder = tmp_path / "data"
    folder.mkdir()
    os.chown(folder, 1000, 1000)
    return folder


def inspected(images: Images) -> dict[str, object]:
    """What the image says of itself."""
    done = images.call("podman", "image", "inspect", IMAGE)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    return found


def blobs(images: Images, folder: Path) -> list[Path]:
    """The image as a registry would hold it, not compressed: layers, configuration with history, manifest."""
    done = images.call("buildah", "push", "--disable-compression", IMAGE, f"dir:{folder}")
    assert done.returncode == 0, done.stderr
    return sorted(path for path in folder.iterdir() if path.name != "version")


def holds(blob: Path, text: bytes) -> bool:
    """Whether these bytes stand anywhere in a layer, names and contents of files alike."""
    before = b""
    with blob.open("rb") as file:
        while piece := file.read(1 << 22):
            if text in before + piece:
                return True
            before = piece[-len(text) :]
    return False


def test_image_labels_name_the_commit_and_the_installed_requirements(image: Images) -> None:
    labels = inspected(image)["Labels"]
    written = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()
    assert labels["org.opencontainers.image.revision"] == COMMIT
    assert labels["distill.requirements.sha256"] == written
    inside = image.run("/app/requirements.txt", options=["--entrypoint", "sha256sum"])
    assert inside.stdout.split()[0] == written
    listed = image.run("pip", "freeze")
    pins = {line.split("+")[0] for line in listed.stdout.splitlines()}
    locked = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"}
    assert locked <= pins


def test_the_build_fails_if_the_label_names_other_requirements(images: Images, context: Path, pip: Pip) -> None:
    done = images.build(context, pip, lock="0" * 64)
    assert done.returncode != 0
    assert f"LOCK={'0' * 64} is not the SHA-256 of requirements.txt" in done.stdout + done.stderr
    assert "Collecting" not in done.stdout


def test_no_image_layer_holds_a_build_secret(image: Images, tmp_path: Path) -> None:
    found = blobs(image, tmp_path)
    known = (ROOT / "LICENSE").read_bytes()[:60]
    assert any(holds(blob, known) for blob in found)  # what is in a layer is found
    assert any(holds(blob, COMMIT.encode()) for blob in found)  # and what is in the configuration
    assert not [blob.name for blob in found if holds(blob, CANARY.encode())]
    for blob in found:
        blob.unlink()


def test_an_unprivileged_user_can_write_only_data_and_temporary_files(image: Images, data: Path) -> None:
    who = image.run("-c", "id -u; id -g; pwd; ls -A /data", options=["--entrypoint", "sh"])
    assert who.stdout.split() == ["1000", "1000", "/data"]  # and the image's own data folder is empty
    skipped = ["(", "-path", "/proc", "-o", "-path", "/sys", "-o", "-path", "/dev", ")", "-prune"]
    writable = ["/", *skipped, "-o", "-writable", "!", "-type", "l", "-print"]
    strict = image.run(*writable, options=[*read_only(data), "--entrypoint", "find"])
    assert set(strict.stdout.split()) == {"/data", "/tmp"}
    loose = image.run(*writable, options=["--entrypoint", "find"])
    assert set(loose.stdout.split()) - {"/var/tmp", "/run/lock"} == {"/data", "/tmp"}


def test_the_embedded_default_trains_on_a_read_only_root(image: Images, pip: Pip, kept: Path) -> None:
    done = image.run("distill.train", *FEW, "trainer.max_steps=2", options=[*read_only(kept), *served(pip)])
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Read-only file system" not in done.stderr
    (run,) = (kept / "runs").iterdir()
    assert (run / "report.html").stat().st_size > 1000
    assert (run / "student" / "model.safetensors").is_file()
    assert set(json.loads((run / "results.json").read_text())["rows"]) >= {"teacher", "before", "student"}
    assert COMMIT in (run / "run.json").read_text()
    assert {path.lstat().st_uid for path in kept.rglob("*")} == {1000}


def test_a_stopped_container_exits_with_85_and_the_next_resumes(image: Images, pip: Pip, kept: Path) -> None:
    name = f"distill-{CANARY[-8:]}"
    options = [*read_only(kept), *served(pip), "--env", "DISTILL_RUN=stopped", "--name", name]
    line = image.line("podman", *_run(options), IMAGE, "distill.train", *FEW, "trainer.max_steps=100000")
    done = []
    for _ in range(2):
        heard = []
        with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as container:
            for said in container.stderr or ():
                heard.append(said)
                if "of 100000 steps" in said:
                    image.call("podman", "stop", "--time", "200", name)
                    break
            heard += container.stderr or ()
        assert container.returncode == 85, heard
        going_on = [int(said.split("step-")[1][:8]) for said in heard if said.startswith("resuming from")]
        assert going_on == done[-1:], heard
        (last,) = (said for said in heard if "stopped on request after step" in said)
        done.append(int(last.split("after step ")[1].split(":")[0]))
    assert done[0] < done[1]
    end = [f"trainer.max_steps={done[1] + 2}", "optim.schedule.num_training_steps=100000"]
    again = image.run("distill.train", *FEW, *end, options=options)
    assert again.returncode == 0, again.stderr[-5000:]
    assert "resuming from" in again.stderr
    assert (kept / "runs" / "stopped" / "report.html").is_file()


def test_a_wrong_override_exits_the_container_with_code_2(image: Images, data: Path) -> None:
    done = image.run("distill.train", "trainer.max_stepz=2", options=read_only(data))
    assert done.returncode == 2, done.stderr
    assert "max_steps" in done.stderr
