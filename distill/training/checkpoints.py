"""Checkpoints to resume from: complete files of the same run, saved between two steps."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, final

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from distill.app import preemption
from distill.app.files import atomic_write, sha256
from distill.errors import ConfigError, PreemptedError
from distill.training.module import SMALLER_STEPS, NonFiniteLossError, nonfinite_weights

Identity = Mapping[str, Any]
_STOPPED = "stopped_early"  # key in a checkpoint
NUM_KEPT = 2  # the newest one and a fallback


@final
class WholeFiles(TorchCheckpointIO):
    """Writes each checkpoint atomically: it gets its name only once it is complete and on disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save atomically. Lightning's own writer leaves a truncated file if the disk is full."""
        with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # on a full disk, torch raises another error after the OSError
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors, numbers and texts only; no code from a checkpoint is run."""
        try:
            content: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        except UnpicklingError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{path} holds objects other than tensors, numbers and texts, and is not loaded: {reason}"
            ) from None
        return content


@final
class Checkpoints(Callback):
    """Saves every `every` steps and at the end; stops all processes together when a stop is requested."""

    def __init__(self, folder: Path, *, every: int, identity: Identity) -> None:
        """`identity` holds what must be equal in a run that resumes from here, in JSON types."""
        self._folder, self._every, self._identity = folder, every, identity
        self._step, self._seconds, self._start = -1, 0.0, time.monotonic()
        self.has_run = False  # in this process; False where spawned processes train

    @property
    def seconds(self) -> float:
        """Training time of the completed steps, over all parts of an interrupted run."""
        return self._seconds

    def state_dict(self) -> dict[str, Any]:
        """Return the training time so far."""
        now = time.monotonic()
        self._seconds, self._start = self._seconds + now - self._start, now
        return {"seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the training time of the earlier parts."""
        self._seconds = state_dict["seconds"]

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Raise ConfigError if processes have different identities: their gradients would be averaged silently."""
        self.has_run = True
        digests = [digest(self._identity)]
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            digests = [""] * trainer.world_size
            torch.distributed.all_gather_object(digests, digest(self._identity))
        if len(set(digests)) > 1:
            listed = ", ".join(f"process {rank} {value[:8]}" for rank, value in enumerate(digests))
            raise ConfigError(
                f"the processes of this run have different configurations or data: {listed}. Start all with one command"
            )

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that training was stopped early, which Lightning forgets."""
        checkpoint[_STOPPED] = trainer.should_stop

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Do not go on with a training that was stopped early."""
        trainer.should_stop = checkpoint.get(_STOPPED, False)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Set Lightning's microbatch count for the present number of processes, which may have changed."""
        preemption.watch_again()
        done = trainer.global_step * trainer.accumulate_grad_batches
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.reset()
        progress.increment_by(done)
        self._step, self._start = -1, time.monotonic()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save, or stop, between two steps, where the state is complete."""
        step, before = trainer.global_step, self._step
        if step == before:
            return
        self._step = step
        is_stopping = trainer.strategy.reduce_boolean_decision(preemption.is_stop_requested(), all=False)
        if before >= 0 and (is_stopping or step % self._every == 0):
            self._save(trainer)
        if is_stopping:
            raise PreemptedError(
                f"stopped on request after step {step}; the state is saved, run the same command to resume"
            )

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the final state: what follows training may be interrupted too."""
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        bad_weights = nonfinite_weights(trainer.lightning_module)
        if not trainer.strategy.reduce_boolean_decision(not bad_weights):
            raise NonFiniteLossError(
                f"the weights are not finite after step {trainer.global_step}: "
                f"{', '.join(bad_weights[:3]) or 'of another process'}. Nothing of this step was saved. {SMALLER_STEPS}"
            )
        path = self._folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)  # the default too, but then Lightning prints that
        if trainer.is_global_zero:
            with atomic_write(_seal(path)) as temporary:
                temporary.write_text(json.dumps({"sha256": sha256(path), "identity": dict(self._identity)}, indent=1))
            for old in sorted(self._folder.glob("step-*.ckpt"))[:-NUM_KEPT]:
                _seal(old).unlink(missing_ok=True)
                old.unlink()


def newest(folder: Path, identity: Identity, warn: Any) -> Path | None:
    """Return the newest complete checkpoint of a folder; warn about damaged ones and skip them.

    Raises ConfigError if it belongs to a run with another configuration, data, cache or student.
    """
    for seal in sorted(folder.glob("step-*.json"), reverse=True):
        path = seal.with_suffix(".ckpt")
        if checked(path, identity):
            return path
        warn(f"{path} is damaged; using the checkpoint before it")
    return None


def checked(path: Path, identity: Identity) -> bool:
    """Return whether a checkpoint is complete; raise ConfigError with the differences if it is of another run."""
    try:
        seal = json.loads(_seal(path).read_text())
        is_whole = sha256(path) == seal["sha256"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    saved = seal["identity"]
    differences = [
        f"{key} was {_brief(saved.get(key))} and is now {_brief(identity.get(key))}"
        for key in sorted({*saved, *identity})
        if saved.get(key) != identity.get(key)
    ]
    if is_whole and differences:
        raise ConfigError(
            f"{path} belongs to another run: {'; '.join(differences)}. Run the original command, or start "
            "over with another hydra.run.dir or resume=never"
        )
    return bool(is_whole)


def last(folder: Path) -> Path:
    """Return the checkpoint of the most steps."""
    return max(folder.glob("step-*.ckpt"))


def restore_callbacks(path: Path, callbacks: Sequence[Callback]) -> None:
    """Restore the states of callbacks from a checkpoint."""
    states = WholeFiles().load_checkpoint(path, weights_only=True)["callbacks"]
    for callback in callbacks:
        callback.load_state_dict(states[callback.state_key])


def step_of(path: Path) -> int:
    """Return the number of completed steps of a checkpoint."""
    return int(path.stem.removeprefix("step-"))


def digest(identity: Identity) -> str:
    """Return a hash of the identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _seal(path: Path) -> Path:
    return path.with_suffix(".json")


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
