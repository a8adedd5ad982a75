"""The files for Kubernetes and SkyPilot: of the right form, and saying of distill what is so."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter

from distill.app import config as configuration
from distill.errors import CacheError, ConfigError, DistillError, OutOfMemoryError, PreemptedError
from distill.training.module import NonFiniteLossError
from tests.conftest import compose

SCRIPTS = configuration.CONF.parent / "scripts"
FILES = sorted((SCRIPTS / "kubernetes").glob("*.yaml"))
JOBS = ("annotate", "train")
AGAIN_IS_THE_SAME = (ConfigError, CacheError, NonFiniteLossError, OutOfMemoryError)
MAY_BE_WELL_NEXT_TIME = {4, 5}  # files; the teacher's server


def objects(path: Path) -> list[dict[str, Any]]:
    """Every object of a manifest."""
    return list(yaml.safe_load_all(path.read_text()))


def job(name: str) -> dict[str, Any]:
    (found,) = objects(SCRIPTS / "kubernetes" / f"{name}.yaml")
    return found


def shared(kind: str) -> dict[str, Any]:
    (found,) = [each for each in objects(SCRIPTS / "kubernetes" / "setup.yaml") if each["kind"] == kind]
    return found


def container(name: str) -> dict[str, Any]:
    (found,) = job(name)["spec"]["template"]["spec"]["containers"]
    return found


def actions(name: str) -> dict[int, str]:
    """What is done about a pod of each exit code; the first rule that fits is the one that holds."""
    found: dict[int, str] = {}
    for rule in job(name)["spec"]["podFailurePolicy"]["rules"]:
        for code in rule.get("onExitCodes", {}).get("values", []):
            found.setdefault(code, rule["action"])
    return found


def errors(kind: type[DistillError] = DistillError) -> Iterator[type[DistillError]]:
    """Every error of distill that ends a command."""
    for each in kind.__subclasses__():
        yield each
        yield from errors(each)


def started(name: str, folder: Path, **environment: str) -> list[str]:
    """The words with which the container's command starts Python, after its own shell has read them."""
    overrides = folder / "overrides"
    overrides.mkdir()
    for key, text in shared("ConfigMap")["data"].items():
        (overrides / key).write_text(text)
    python = folder / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    (folder / "task=x").touch()  # what a pattern in an override could be taken for
    (folder / "loss=a").touch()
    line = [*container(name)["command"], *container(name)["args"]]
    line = [word.replace("/overrides/", f"{overrides}/") for word in line]
    given = {each["name"]: each["value"] for each in container(name)["env"] if "value" in each} | environment
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(line, env=given | {"PATH": path}, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_manifests_are_valid_for_kubernetes(path: Path) -> None:
    for each in objects(path):
        kubernetes_validate.validate(each, "1.33", strict=True)


def test_a_misspelt_key_in_a_manifest_is_detected() -> None:
    wrong = job("train")
    wrong["spec"]["podFailurePolicies"] = wrong["spec"].pop("podFailurePolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.33", strict=True)


@pytest.mark.parametrize("name", JOBS)
def test_each_exit_code_has_the_intended_pod_failure_action(name: str) -> None:
    decided = {each.exit_code: "FailJob" for each in AGAIN_IS_THE_SAME} | {PreemptedError.exit_code: "Ignore"}
    assert actions(name) == decided | dict.fromkeys(MAY_BE_WELL_NEXT_TIME, "Count")
    assert {each.exit_code for each in errors() if each.exit_code != 1} <= set(actions(name))


@pytest.mark.parametrize("name", JOBS)
def test_an_evicted_pod_is_replaced_and_not_counted_as_a_failure(name: str) -> None:
    spec = job(name)["spec"]
    conditions = [rule for rule in spec["podFailurePolicy"]["rules"] if "onPodConditions" in rule]
    assert [(rule["action"], rule["onPodConditions"][0]["type"]) for rule in conditions] == [
        ("Ignore", "DisruptionTarget")
    ]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # the policy holds for no other
    assert spec["podReplacementPolicy"] == "Failed"  # and not beside one that still writes
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > 30  # Kubernetes' own, too short for a group


@pytest.mark.parametrize("name", JOBS)
def test_a_pod_is_unprivileged_and_writes_only_to_mounts(name: str) -> None:
    pod = job(name)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    rights = container(name)["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert {each["mountPath"] for each in container(name)["volumeMounts"] if not each.get("readOnly")} == {
        "/data",
        "/tmp",
    }


@pytest.mark.parametrize("name", JOBS)
def test_objects_referenced_by_a_job_exist(name: str) -> None:
    pod = job(name)["spec"]["template"]["spec"]
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert set(volumes) == {each["name"] for each in container(name)["volumeMounts"]}
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == shared("PersistentVolumeClaim")["metadata"]["name"]
    assert volumes["overrides"]["configMap"]["name"] == shared("ConfigMap")["metadata"]["name"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_suspended_in_its_queue(name: str) -> None:
    assert job(name)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert job(name)["spec"]["suspend"] is True
    assert set(container(name)["resources"]["requests"]) >= {"cpu", "memory"}  # Kueue counts these


@pytest.mark.parametrize("name", JOBS)
def test_no_manifest_holds_a_secret(name: str) -> None:
    assert container(name)["envFrom"] == [{"secretRef": {"name": "distill-keys", "optional": True}}]
    plain = {each["name"] for each in container(name)["env"] if "value" in each}
    assert not [word for word in plain if any(part in word for part in ("KEY", "TOKEN", "SECRET", "PASSWORD"))]


@pytest.mark.parametrize("name", JOBS)
def test_the_command_lines_of_manifests_compose(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_ROOT", str(tmp_path))
    words = started(name, tmp_path, JOB_COMPLETION_INDEX="0")
    assert words[:2] == ["-m", f"distill.{name}"]
    lines = [line for key in ("both", name) for line in shared("ConfigMap")["data"][key].splitlines()]
    assert words[-len(lines) :] == lines
    configuration.check(compose(*words[2:], name=name))


def test_annotation_pods_cover_each_part_once(tmp_path: Path) -> None:
    spec = job("annotate")["spec"]
    assert spec["completionMode"] == "Indexed"
    number = spec["completions"]
    found = set()
    for index in range(number):
        (tmp_path / str(index)).mkdir()
        words = started("annotate", tmp_path / str(index), JOB_COMPLETION_INDEX=str(index))
        found |= {word for word in words if word.startswith("part=")}
    assert found == {f"part={part}/{number}" for part in range(1, number + 1)}
    assert spec["parallelism"] <= number


def test_annotation_and_training_manifests_use_one_cache(tmp_path: Path) -> None:
    both = shared("ConfigMap")["data"]["both"].splitlines()
    assert {line.partition("=")[0] for line in both} >= {"task", "teacher"}
    for name in JOBS:
        own = {line.partition("=")[0] for line in shared("ConfigMap")["data"][name].splitlines()}
        assert not own & {"task", "teacher", "prompt", "cache", "rationales", "root"}


def test_a_replacement_pod_finds_the_run_of_its_predecessor() -> None:
    (run,) = [each for each in container("train")["env"] if each["name"] == "DISTILL_RUN"]
    assert run["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"


class Part(BaseModel):
    """What SkyPilot reads, as far as it is used here; it refuses words that it does not know, and so does this."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Recovery(Part):
    strategy: str
    max_restarts_on_errors: int
    recover_on_exit_codes: list[int]


class Resources(Part):
    accelerators: str
    cpus: str
    memory: str
    use_spot: bool
    job_recovery: Recovery


class Bucket(Part):
    name: str
    mode: str


class SkyTask(Part):
    name: str
    workdir: str
    resources: Resources
    file_mounts: dict[str, Bucket]
    envs: dict[str, str]
    secrets: dict[str, str]
    setup: str
    run: str


def test_the_sky_task_is_valid_and_recovers_from_preemption() -> None:
    task = TypeAdapter(SkyTask).validate_python(yaml.safe_load((SCRIPTS / "sky.yaml").read_text()))
    assert task.resources.job_recovery.recover_on_exit_codes == [PreemptedError.exit_code]
    assert task.file_mounts["/data"].mode in {"MOUNT", "MOUNT_CACHED"}
    assert not any(task.secrets.values())
    assert (SCRIPTS.parent / task.workdir / task.setup).is_file()


def test_the_command_line_of_the_sky_task_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = yaml.safe_load((SCRIPTS / "sky.yaml").read_text())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$DISTILL_RUN" "$DISTILL_ROOT" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "loss=a").touch()
    given = task["envs"] | {"SKYPILOT_TASK_ID": "sky-managed-7_distill_7-0", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "-c", task["run"]], env=given, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    run, root, *words = done.stdout.splitlines()
    assert run == "sky-managed-7_distill_7-0"
    assert root in task["file_mounts"]
    assert words[:2] == ["-m", "distill.train"]
    monkeypatch.setenv("DISTILL_ROOT", str(tmp_path))
    configuration.check(compose(*words[2:]))
