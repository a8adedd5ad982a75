"""Models of the hub: known without their weights, which are downloaded when a teacher has something to annotate."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM

from distill.app.files import sha256
from distill.errors import ConfigError
from distill.lessons.curriculum import build_curriculum, prepare
from distill.models import hub, identity, loading, naming
from tests.conftest import make_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/some.tiny-model"
pytestmark = pytest.mark.enable_socket  # to a server on this machine


@dataclass
class Hub:
    """A server with the endpoints of the hub from which a model is downloaded."""

    folder: Path
    lfs_suffixes: tuple[str, ...] = (".safetensors",)
    is_down: bool = False
    paths: list[str] = field(default_factory=list)

    @property
    def weights(self) -> list[str]:
        """The weight files that were downloaded since."""
        return [path.rpartition("/")[2] for path in self.paths if path.endswith(".safetensors")]

    def listing(self) -> list[dict[str, object]]:
        entries = []
        for path in sorted(self.folder.iterdir()):
            entry = {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid(path)}
            if path.name.endswith(self.lfs_suffixes):
                entry["lfs"] = {"oid": sha256(path), "size": path.stat().st_size, "pointerSize": 134}
            entries.append(entry)
        return entries

    def etag(self, path: Path) -> str:
        return sha256(path) if path.name.endswith(self.lfs_suffixes) else oid(path)


def oid(path: Path) -> str:
    """The name that git gives to the content of a file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, from a `Hub`."""

    protocol_version = "HTTP/1.1"

    def __init__(self, served: Hub, *arguments: object) -> None:
        self._hub = served
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def _answer(self, *, is_head: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if self._hub.is_down:
            return self._send(503, b"", {}, is_head)
        if path.startswith(f"/api/models/{NAME}/revision/"):
            siblings = [{"rfilename": entry["path"]} for entry in self._hub.listing()]
            return self._send_json({"id": NAME, "sha": COMMIT, "siblings": siblings}, is_head)
        if path.startswith(f"/api/models/{NAME}/tree/"):
            return self._send_json(self._hub.listing(), is_head)
        file = self._hub.folder / path.rpartition("/")[2]
        if path != f"/{NAME}/resolve/{COMMIT}/{file.name}" or not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, is_head)
        if not is_head:
            self._hub.paths.append(path)
        headers = {"ETag": f'"{self._hub.etag(file)}"', "X-Repo-Commit": COMMIT}
        return self._send(200, file.read_bytes(), headers, is_head)

    def _send_json(self, value: object, is_head: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, is_head)

    def _send(self, status: int, body: bytes, headers: dict[str, str], is_head: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(body)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model in two weight files, and an empty local cache of the hub."""
    plain = make_model(tmp_path / "plain", seed=1)
    AutoModelForCausalLM.from_pretrained(plain).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    (plain / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "sharded", plain, dirs_exist_ok=True)
    served = Hub(plain)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, served))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_model_is_identified_without_its_weights_as_with_them(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = identity.fingerprint(served.folder, tmp_path / "hashes")
    folder = naming.resolve(NAME, tmp_path, with_weights=False)
    assert served.weights == []
    assert hub.lacks_weights(folder)
    loading.check_weights(folder)
    assert identity.fingerprint(folder, tmp_path / "other") == local
    hub.download_weights(folder)
    assert len(served.weights) >= 2
    assert not hub.lacks_weights(folder)
    assert identity.fingerprint(folder, tmp_path / "other") == local
    shutil.rmtree(folder.parents[1] / "trees")  # as an earlier version of the client left it
    assert identity.fingerprint(folder, tmp_path / "another") == local
    disconnect(monkeypatch)
    assert naming.resolve(NAME, tmp_path, with_weights=False) == naming.resolve(f"{NAME}@{COMMIT}", tmp_path) == folder


def test_an_interrupted_download_does_not_change_the_identity(served: Hub, tmp_path: Path) -> None:
    expected = identity.fingerprint(served.folder, tmp_path / "hashes")
    folder = naming.resolve(NAME, tmp_path)
    next(folder.glob("*.safetensors")).unlink()
    assert naming.resolve(NAME, tmp_path, with_weights=False) == folder
    assert identity.fingerprint(folder, tmp_path / "hashes") == expected
    loading.check_weights(folder)


def test_weights_that_the_hub_lists_without_a_hash_are_downloaded(served: Hub, tmp_path: Path) -> None:
    served.lfs_suffixes = (".bin",)
    expected = identity.fingerprint(served.folder, tmp_path / "hashes")
    folder = naming.resolve(NAME, tmp_path, with_weights=False)
    assert len(served.weights) >= 2
    assert identity.fingerprint(folder, tmp_path / "hashes") == expected


def test_a_student_and_a_measured_model_are_downloaded_whole(served: Hub, tmp_path: Path) -> None:
    folder = naming.resolve(f"{NAME}@main", tmp_path)
    assert sorted(served.weights) == sorted(path.name for path in served.folder.glob("*.safetensors"))
    loading.check_weights(folder)


@pytest.mark.parametrize("role", ["teacher", pytest.param("soft_teacher", marks=pytest.mark.slow)])
def test_a_full_cache_is_used_without_downloading_the_teacher(
    role: str,
    served: Hub,
    configured: Callable[..., DictConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = [] if role == "teacher" else ["teacher@soft_teacher=causal_lm", "soft_teacher.kind.dtype=float32"]

    def run(name: str, *more: str) -> int:
        options = [*group, f"{role}.model={name}", f"root={tmp_path / 'root'}", *more]
        curriculum = build_curriculum(prepare(configured(*options), tmp_path / "run"))
        filled = curriculum.filled if role == "teacher" else curriculum.soft_filled
        assert filled is not None
        return filled.num_annotated

    assert run(str(served.folder)) > 0
    assert run(NAME) == 0  # the cache of the same files in a local folder
    disconnect(monkeypatch)
    assert run(NAME) == run(f"{NAME}@{COMMIT}") == 0
    assert served.weights == []
    with pytest.raises(ConfigError, match=f"weights of {NAME} are needed and could not be downloaded"):
        run(NAME, "task.examples.num_labelled=9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert run(NAME, "task.examples.num_labelled=9") > 0
    assert len(set(served.weights)) == len(served.weights) >= 2


def test_a_hub_that_is_down_or_has_no_such_model_is_one_clear_error(served: Hub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model 'someone/nothing' is not a local folder, and could not be downloaded"):
        naming.resolve("someone/nothing", tmp_path, with_weights=False)
    served.is_down = True
    with pytest.raises(ConfigError, match=f"model '{NAME}' is not a local folder, and could not be downloaded"):
        naming.resolve(NAME, tmp_path, with_weights=False)
    served.is_down = False
    folder = naming.resolve(NAME, tmp_path, with_weights=False)
    served.is_down = True
    assert naming.resolve(NAME, tmp_path, with_weights=False) == folder
