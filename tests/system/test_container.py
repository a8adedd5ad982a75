"""The image built from the Dockerfile, run as on a cluster: as a plain user, read-only, with one volume."""

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
from distill.app.files import atomic_write, sha256

ROOT = CONF.parent
CANARY = f"canary-{secrets.token_hex(16)}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = "localhost/bookworm"
IMAGE = "localhost/distill"
MAX_GIGABYTES = 8  # peak while the image is built; removed afterwards

_NEEDED = ("buildah", "debootstrap", "podman", "unshare", "tar")
_MISSING = [tool for tool in _NEEDED if shutil.which(tool) is None] + ["root"] * (os.geteuid() != 0)
pytestmark = [
    pytest.mark.container,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(_MISSING), reason=f"a real image needs {', '.join(_MISSING)}; .ci/run installs the tools"),
]

# The embedded default on few examples.
FEW_EXAMPLES = (
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
    """This machine's pip settings as one file, and mounts of the local paths that they name."""

    file: Path
    mounts: tuple[str, ...]


@dataclass(frozen=True)
class Images:
    """An image store in one folder, removed with the folder."""

    folder: Path

    def call(self, tool: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run buildah or podman on this store."""
        line = self.line(tool, *arguments)
        return subprocess.run(
            line, env=os.environ | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )

    def line(self, tool: str, *arguments: str) -> list[str]:
        """A command line in a new mount namespace with one cgroup hierarchy, because crun refuses two."""
        alone = ["unshare", "--mount", "sh", "-c", 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"', "sh"]
        store = ["--root", f"{self.folder}/store", "--runroot", f"{self.folder}/run"]
        return [*alone, tool, *store, *arguments]

    def import_base(self, archive: Path) -> None:
        """Import an archive of a root file system as the base image."""
        process = self.call("podman", "import", str(archive), BASE)
        assert process.returncode == 0, process.stderr

    def build(
        self, build_context: Path, pip: Pip, *, lock: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Build the image of a folder with a Dockerfile; pip's settings are mounted for the build only."""
        values = {"BASE": BASE, "COMMIT": COMMIT, "LOCK": lock}
        settings = [word for name, value in values.items() for word in ("--build-arg", f"{name}={value}")]
        settings += ["--isolation", "chroot", "--secret", f"id=pip,src={pip.file}", *pip.mounts, "--tag", IMAGE]
        return self.call("buildah", "build", *settings, str(build_context), **environment)

    def run(self, *arguments: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run the image and wait for its exit."""
        return self.call("podman", *_run_arguments(options), IMAGE, *arguments)


def _run_arguments(options: Sequence[str]) -> list[str]:
    # Podman's default limits exceed those of this process, which a container may not do.
    limits = ["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]
    return ["run", "--rm", "--cgroups", "disabled", "--network", "host", "--log-driver", "none", *limits, *options]


def read_only_options(data: Path) -> list[str]:
    """Podman options: only the data folder and a temporary folder in memory are writable."""
    return ["--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--volume", f"{data}:/data"]


def pip_options(pip: Pip) -> list[str]:
    """Podman options for pip inside the container, which fetches the teacher and the examples."""
    return [*pip.mounts, "--volume", f"{pip.file}:/etc/pip.conf:ro"]


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Pip:
    process = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    settings = {}
    for line in process.stdout.splitlines():
        name, _, value = line.partition("=")
        settings[name.rpartition(".")[2]] = ast.literal_eval(value)
    file = tmp_path_factory.mktemp("pip") / "pip.conf"
    lines = [f"{name} = {' '.join(value.split())}" for name, value in settings.items()]
    file.write_text("\n".join(["[global]", *lines, f"# {CANARY}", ""]))
    paths = [Path(word.removeprefix("file://")) for value in settings.values() for word in value.split()]
    existing = {path.parent if path.is_dir() else path for path in paths if path.is_absolute() and path.exists()}
    outermost = sorted(path for path in existing if not existing & set(path.parents))
    return Pip(file, tuple(word for path in outermost for word in ("--volume", f"{path}:{path}:ro")))


@pytest.fixture(scope="module")
def base() -> Path:
    """An archive of a minimal Debian root file system with Python, kept between test runs."""
    archive = Path(tempfile.gettempdir()) / "distill-test-bookworm.tar"
    if not archive.is_file():
        with tempfile.TemporaryDirectory() as folder, atomic_write(archive) as temporary:
            packages = "--include=python3,python3-venv,ca-certificates"
            process = subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", folder], check=False)
            if process.returncode:
                pytest.skip("NO IMAGE IS TESTED: debootstrap could not fetch Debian")
            subprocess.run(["tar", "--directory", folder, "--create", "--file", temporary, "."], check=True)
    return archive


@pytest.fixture(scope="module")
def build_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with secrets in ignored files, as in practice."""
    folder = tmp_path_factory.mktemp("context") / "distill"
    ignored = shutil.ignore_patterns(".*", "distill-data", "wandb", "__pycache__", "shared")
    shutil.copytree(ROOT, folder, ignore=ignored)
    shutil.copy(ROOT / ".dockerignore", folder)
    secret_files = (".env", ".git/config", "wandb/run.wandb", "distill-data/notes", "tests/left.txt", "shared/notes.md")
    for name in (
        *secret_files,
        ".netrc",
        "distill/.env",
        "conf/.env",
        "conf/task/.secret",
        "distill/__pycache__/x.pyc",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"KEY={CANARY}\n")
    return folder


@pytest.fixture(scope="module")
def images(base: Path) -> Iterator[Images]:
    if shutil.disk_usage(tempfile.gettempdir()).free < MAX_GIGABYTES << 30:
        pytest.skip(f"an image needs up to {MAX_GIGABYTES} GB free in {tempfile.gettempdir()}")
    with tempfile.TemporaryDirectory(prefix="distill-images-") as folder:
        images = Images(Path(folder))
        images.import_base(base)
        process = images.call("podman", *_run_arguments([]), BASE, "true")
        if process.returncode:
            pytest.skip(f"NO IMAGE IS TESTED: no container runs on this machine: {process.stderr.strip()[-300:]}")
        yield images


@pytest.fixture(scope="module")
def image(images: Images, build_context: Path, pip: Pip) -> Images:
    """The image, built with secrets in the environment, in the folder and in pip's settings."""
    keys = {"WANDB_API_KEY": CANARY, "HF_TOKEN": CANARY, "OPENAI_API_KEY": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY}
    process = images.build(build_context, pip, lock=sha256(ROOT / "requirements.txt"), **keys)
    assert process.returncode == 0, (process.stdout + process.stderr)[-5000:]
    return images


@pytest.fixture(scope="module")
def shared_data() -> Iterator[Path]:
    """A data folder that several jobs use one after the other; it keeps the teacher."""
    with tempfile.TemporaryDirectory(prefix="distill-data-") as folder:
        os.chown(folder, 1000, 1000)
        yield Path(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An empty data folder owned by user 1000."""
    folder = tmp_path / "data"
    folder.mkdir()
    os.chown(folder, 1000, 1000)
    return folder


def image_metadata(images: Images) -> dict[str, object]:
    """The metadata of the image."""
    process = images.call("podman", "image", "inspect", IMAGE)
    assert process.returncode == 0, process.stderr
    (metadata,) = json.loads(process.stdout)
    return metadata


def blobs(images: Images, folder: Path) -> list[Path]:
    """The uncompressed files of the image as in a registry: layers, configuration with history, manifest."""
    process = images.call("buildah", "push", "--disable-compression", IMAGE, f"dir:{folder}")
    assert process.returncode == 0, process.stderr
    return sorted(path for path in folder.iterdir() if path.name != "version")


def contains(blob: Path, text: bytes) -> bool:
    """Whether a layer contains these bytes, in file names or contents."""
    previous = b""
    with blob.open("rb") as file:
        while chunk := file.read(1 << 22):
            if text in previous + chunk:
                return True
            previous = chunk[-len(text) :]
    return False


def test_image_labels_name_the_commit_and_the_installed_requirements(image: Images) -> None:
    labels = image_metadata(image)["Labels"]
    expected_hash = hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()
    assert labels["org.opencontainers.image.revision"] == COMMIT
    assert labels["distill.requirements.sha256"] == expected_hash
    hash_in_image = image.run("/app/requirements.txt", options=["--entrypoint", "sha256sum"])
    assert hash_in_image.stdout.split()[0] == expected_hash
    frozen = image.run("pip", "freeze")
    pins = {line.split("+")[0] for line in frozen.stdout.splitlines()}
    locked = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#"}
    assert locked <= pins


def test_the_build_fails_if_the_label_names_other_requirements(images: Images, build_context: Path, pip: Pip) -> None:
    process = images.build(build_context, pip, lock="0" * 64)
    assert process.returncode != 0
    assert f"LOCK={'0' * 64} is not the SHA-256 of requirements.txt" in process.stdout + process.stderr
    assert "Collecting" not in process.stdout


def test_no_image_layer_holds_a_build_secret(image: Images, tmp_path: Path) -> None:
    image_blobs = blobs(image, tmp_path)
    license_text = (ROOT / "LICENSE").read_bytes()[:60]
    assert any(contains(blob, license_text) for blob in image_blobs)  # the search finds texts in layers
    assert any(contains(blob, COMMIT.encode()) for blob in image_blobs)  # and in the configuration
    assert not [blob.name for blob in image_blobs if contains(blob, CANARY.encode())]
    for blob in image_blobs:
        blob.unlink()


def test_an_unprivileged_user_can_write_only_data_and_temporary_files(image: Images, data: Path) -> None:
    identity = image.run("-c", "id -u; id -g; pwd; ls -A /data", options=["--entrypoint", "sh"])
    assert identity.stdout.split() == ["1000", "1000", "/data"]  # the data folder of the image is empty
    skipped = ["(", "-path", "/proc", "-o", "-path", "/sys", "-o", "-path", "/dev", ")", "-prune"]
    writable = ["/", *skipped, "-o", "-writable", "!", "-type", "l", "-print"]
    with_options = image.run(*writable, options=[*read_only_options(data), "--entrypoint", "find"])
    assert set(with_options.stdout.split()) == {"/data", "/tmp"}
    without_options = image.run(*writable, options=["--entrypoint", "find"])
    assert set(without_options.stdout.split()) - {"/var/tmp", "/run/lock"} == {"/data", "/tmp"}


def test_the_embedded_default_trains_on_a_read_only_root(image: Images, pip: Pip, shared_data: Path) -> None:
    process = image.run(
        "distill.train",
        *FEW_EXAMPLES,
        "trainer.max_steps=2",
        options=[*read_only_options(shared_data), *pip_options(pip)],
    )
    assert process.returncode == 0, process.stderr[-5000:]
    assert "Read-only file system" not in process.stderr
    (run,) = (shared_data / "runs").iterdir()
    assert (run / "report.html").stat().st_size > 1000
    assert (run / "student" / "model.safetensors").is_file()
    assert set(json.loads((run / "results.json").read_text())["rows"]) >= {"teacher", "before", "student"}
    assert COMMIT in (run / "run.json").read_text()
    assert {path.lstat().st_uid for path in shared_data.rglob("*")} == {1000}


def test_a_stopped_container_exits_with_85_and_the_next_resumes(image: Images, pip: Pip, shared_data: Path) -> None:
    name = f"distill-{CANARY[-8:]}"
    options = [*read_only_options(shared_data), *pip_options(pip), "--env", "DISTILL_RUN=stopped", "--name", name]
    line = image.line(
        "podman", *_run_arguments(options), IMAGE, "distill.train", *FEW_EXAMPLES, "trainer.max_steps=100000"
    )
    last_steps = []
    for _ in range(2):
        lines = []
        with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as container:
            for text in container.stderr or ():
                lines.append(text)
                if "of 100000 steps" in text:
                    image.call("podman", "stop", "--time", "200", name)
                    break
            lines += container.stderr or ()
        assert container.returncode == 85, lines
        resumed_from = [int(text.split("step-")[1][:8]) for text in lines if text.startswith("resuming from")]
        assert resumed_from == last_steps[-1:], lines
        (stop_line,) = (text for text in lines if "stopped on request after step" in text)
        last_steps.append(int(stop_line.split("after step ")[1].split(";")[0]))
    assert last_steps[0] < last_steps[1]
    end = [f"trainer.max_steps={last_steps[1] + 2}", "optim.schedule.num_training_steps=100000"]
    resumed = image.run("distill.train", *FEW_EXAMPLES, *end, options=options)
    assert resumed.returncode == 0, resumed.stderr[-5000:]
    assert "resuming from" in resumed.stderr
    assert (shared_data / "runs" / "stopped" / "report.html").is_file()


def test_a_wrong_override_exits_the_container_with_code_2(image: Images, data: Path) -> None:
    process = image.run("distill.train", "trainer.max_stepz=2", options=read_only_options(data))
    assert process.returncode == 2, process.stderr
    assert "max_steps" in process.stderr
