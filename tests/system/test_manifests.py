"""The files for Kubernetes and SkyPilot: valid, and consistent with the commands and exit codes of distill."""

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
PERMANENT_ERRORS = (ConfigError, CacheError, NonFiniteLossError, OutOfMemoryError)
RETRIED_EXIT_CODES = {4, 5}  # file errors; errors of the teacher's server


def load_objects(path: Path) -> list[dict[str, Any]]:
    """All objects of a manifest."""
    return list(yaml.safe_load_all(path.read_text()))


def load_job(name: str) -> dict[str, Any]:
    (job_object,) = load_objects(SCRIPTS / "kubernetes" / f"{name}.yaml")
    return job_object


def setup_object(kind: str) -> dict[str, Any]:
    (setup,) = [item for item in load_objects(SCRIPTS / "kubernetes" / "setup.yaml") if item["kind"] == kind]
    return setup


def container(name: str) -> dict[str, Any]:
    (container_object,) = load_job(name)["spec"]["template"]["spec"]["containers"]
    return container_object


def action_by_exit_code(name: str) -> dict[int, str]:
    """The action of the pod failure policy for each exit code: that of the first matching rule."""
    by_exit_code: dict[int, str] = {}
    for rule in load_job(name)["spec"]["podFailurePolicy"]["rules"]:
        for code in rule.get("onExitCodes", {}).get("values", []):
            by_exit_code.setdefault(code, rule["action"])
    return by_exit_code


def error_classes(kind: type[DistillError] = DistillError) -> Iterator[type[DistillError]]:
    """All error classes of distill."""
    for error_class in kind.__subclasses__():
        yield error_class
        yield from error_classes(error_class)


def python_arguments(name: str, folder: Path, **environment: str) -> list[str]:
    """The arguments with which the container's shell command starts Python."""
    overrides = folder / "overrides"
    overrides.mkdir()
    for key, text in setup_object("ConfigMap")["data"].items():
        (overrides / key).write_text(text)
    python = folder / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    (folder / "task=x").touch()  # a shell pattern in an override would match this file
    (folder / "loss=a").touch()
    line = [*container(name)["command"], *container(name)["args"]]
    line = [word.replace("/overrides/", f"{overrides}/") for word in line]
    variables = {
        variable["name"]: variable["value"] for variable in container(name)["env"] if "value" in variable
    } | environment
    path = f"{folder}:{os.environ['PATH']}"
    process = subprocess.run(
        line, env=variables | {"PATH": path}, cwd=folder, capture_output=True, text=True, check=True
    )
    return process.stdout.splitlines()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_manifests_are_valid_for_kubernetes(path: Path) -> None:
    for item in load_objects(path):
        kubernetes_validate.validate(item, "1.33", strict=True)


def test_a_misspelt_key_in_a_manifest_is_detected() -> None:
    misspelt = load_job("train")
    misspelt["spec"]["podFailurePolicies"] = misspelt["spec"].pop("podFailurePolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, "1.33", strict=True)


@pytest.mark.parametrize("name", JOBS)
def test_each_exit_code_has_the_intended_pod_failure_action(name: str) -> None:
    expected = {error_class.exit_code: "FailJob" for error_class in PERMANENT_ERRORS} | {
        PreemptedError.exit_code: "Ignore"
    }
    assert action_by_exit_code(name) == expected | dict.fromkeys(RETRIED_EXIT_CODES, "Count")
    assert {error_class.exit_code for error_class in error_classes() if error_class.exit_code != 1} <= set(
        action_by_exit_code(name)
    )


@pytest.mark.parametrize("name", JOBS)
def test_an_evicted_pod_is_replaced_and_not_counted_as_a_failure(name: str) -> None:
    spec = load_job(name)["spec"]
    conditions = [rule for rule in spec["podFailurePolicy"]["rules"] if "onPodConditions" in rule]
    assert [(rule["action"], rule["onPodConditions"][0]["type"]) for rule in conditions] == [
        ("Ignore", "DisruptionTarget")
    ]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # the policy requires it
    assert spec["podReplacementPolicy"] == "Failed"  # no replacement while the old pod still writes
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > 30  # the default is too short to finish a group


@pytest.mark.parametrize("name", JOBS)
def test_a_pod_is_unprivileged_and_writes_only_to_mounts(name: str) -> None:
    pod = load_job(name)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    security = container(name)["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert {mount["mountPath"] for mount in container(name)["volumeMounts"] if not mount.get("readOnly")} == {
        "/data",
        "/tmp",
    }


@pytest.mark.parametrize("name", JOBS)
def test_objects_referenced_by_a_job_exist(name: str) -> None:
    pod = load_job(name)["spec"]["template"]["spec"]
    volumes = {item["name"]: item for item in pod["volumes"]}
    assert set(volumes) == {item["name"] for item in container(name)["volumeMounts"]}
    assert (
        volumes["data"]["persistentVolumeClaim"]["claimName"]
        == setup_object("PersistentVolumeClaim")["metadata"]["name"]
    )
    assert volumes["overrides"]["configMap"]["name"] == setup_object("ConfigMap")["metadata"]["name"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_suspended_in_its_queue(name: str) -> None:
    assert load_job(name)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert load_job(name)["spec"]["suspend"] is True
    assert set(container(name)["resources"]["requests"]) >= {"cpu", "memory"}  # Kueue reads these


@pytest.mark.parametrize("name", JOBS)
def test_no_manifest_holds_a_secret(name: str) -> None:
    assert container(name)["envFrom"] == [{"secretRef": {"name": "distill-keys", "optional": True}}]
    plain_names = {variable["name"] for variable in container(name)["env"] if "value" in variable}
    assert not [
        variable_name
        for variable_name in plain_names
        if any(part in variable_name for part in ("KEY", "TOKEN", "SECRET", "PASSWORD"))
    ]


@pytest.mark.parametrize("name", JOBS)
def test_the_command_lines_of_manifests_compose(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_ROOT", str(tmp_path))
    words = python_arguments(name, tmp_path, JOB_COMPLETION_INDEX="0")
    assert words[:2] == ["-m", f"distill.{name}"]
    lines = [line for key in ("both", name) for line in setup_object("ConfigMap")["data"][key].splitlines()]
    assert words[-len(lines) :] == lines
    configuration.check(compose(*words[2:], name=name))


def test_annotation_pods_cover_each_part_once(tmp_path: Path) -> None:
    spec = load_job("annotate")["spec"]
    assert spec["completionMode"] == "Indexed"
    num_pods = spec["completions"]
    part_overrides = set()
    for index in range(num_pods):
        (tmp_path / str(index)).mkdir()
        words = python_arguments("annotate", tmp_path / str(index), JOB_COMPLETION_INDEX=str(index))
        part_overrides |= {word for word in words if word.startswith("part=")}
    assert part_overrides == {f"part={part}/{num_pods}" for part in range(1, num_pods + 1)}
    assert spec["parallelism"] <= num_pods


def test_annotation_and_training_manifests_use_one_cache(tmp_path: Path) -> None:
    common = setup_object("ConfigMap")["data"]["both"].splitlines()
    assert {line.partition("=")[0] for line in common} >= {"task", "teacher"}
    for name in JOBS:
        own_groups = {line.partition("=")[0] for line in setup_object("ConfigMap")["data"][name].splitlines()}
        assert not own_groups & {"task", "teacher", "prompt", "cache", "rationales", "root"}


def test_a_replacement_pod_finds_the_run_of_its_predecessor() -> None:
    (run,) = [variable for variable in container("train")["env"] if variable["name"] == "DISTILL_RUN"]
    assert run["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"


class StrictModel(BaseModel):
    """The part of SkyPilot's schema that is used here; unknown keys are refused, as SkyPilot does."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Recovery(StrictModel):
    strategy: str
    max_restarts_on_errors: int
    recover_on_exit_codes: list[int]


class Resources(StrictModel):
    accelerators: str
    cpus: str
    memory: str
    use_spot: bool
    job_recovery: Recovery


class Bucket(StrictModel):
    name: str
    mode: str


class SkyTask(StrictModel):
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
    variables = task["envs"] | {"SKYPILOT_TASK_ID": "sky-managed-7_distill_7-0", "PATH": os.environ["PATH"]}
    process = subprocess.run(
        ["bash", "-c", task["run"]], env=variables, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    run, root, *words = process.stdout.splitlines()
    assert run == "sky-managed-7_distill_7-0"
    assert root in task["file_mounts"]
    assert words[:2] == ["-m", "distill.train"]
    monkeypatch.setenv("DISTILL_ROOT", str(tmp_path))
    configuration.check(compose(*words[2:]))
