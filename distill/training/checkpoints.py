"""Checkpoints that a run goes on from: whole files, of the same run, saved between two steps and never within one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, final

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from distill.app import preemption
from distill.app.files import sha256, whole_file
from distill.errors import ConfigError, PreemptedError

Identity = Mapping[str, Any]
_NUM_KEPT = 2  # the newest, and one to fall back on


@final
class WholeFiles(TorchCheckpointIO):
    """A checkpoint has its name only once it is whole and on disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Lightning's own writes beside another file system's files, and leaves a part where the disk is full."""
        with whole_file(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # where the disk is full, torch says something else after it
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors, numbers, texts and what holds them: nothing in a checkpoint is run."""
        try:
            content: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        except UnpicklingError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"{path} holds more than numbers and texts, so it is not read: {reason}") from None
        return content


@final
class Checkpoints(Callback):
    """Saves every so many steps and at the end, and stops the run where it was asked to, on all processes at once."""

    def __init__(self, folder: Path, *, every: int, identity: Identity) -> None:
        """`identity` is what must be the same in a run that goes on from here, in JSON's types."""
        self._folder, self._every, self._identity = folder, every, identity
        self._step, self._seconds, self._start = -1, 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """What the steps that count have taken, over all parts of a run that broke off."""
        return self._seconds

    def state_dict(self) -> dict[str, Any]:
        """The time until now goes with the state."""
        now = time.monotonic()
        self._seconds, self._start = self._seconds + now - self._start, now
        return {"seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Time that was spent before."""
        self._seconds = state_dict["seconds"]

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse processes that train different things; they would be averaged without a word."""
        digests = [digest(self._identity)]
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            digests = [""] * trainer.world_size
            torch.distributed.all_gather_object(digests, digest(self._identity))
        if len(set(digests)) > 1:
            told = ", ".join(f"process {rank} {each[:8]}" for rank, each in enumerate(digests))
            raise ConfigError(
                f"the processes of this run have different configurations or data: {told}. Start them all alike"
            )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count microbatches as this number of processes does, which need not be that of the run's beginning."""
        preemption.watch_on()
        done = trainer.global_step * trainer.accumulate_grad_batches
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.reset()
        progress.increment_by(done)
        self._step, self._start = -1, time.monotonic()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps nothing is half done: what is saved here is all that there is."""
        step, before = trainer.global_step, self._step
        if step == before:
            return
        self._step = step
        is_asked = trainer.strategy.reduce_boolean_decision(preemption.is_asked(), all=False)
        if before >= 0 and (is_asked or step % self._every == 0):
            self._save(trainer)
        if is_asked:
            raise PreemptedError(
                f"asked to stop after step {step}: its state is saved, the same command goes on from there"
            )

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """What comes after training may be broken off too."""
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        path = self._folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            with whole_file(_seal(path)) as temporary:
                temporary.write_text(json.dumps({"sha256": sha256(path), "identity": dict(self._identity)}, indent=1))
            for old in sorted(self._folder.glob("step-*.ckpt"))[:-_NUM_KEPT]:
                _seal(old).unlink(missing_ok=True)
                old.unlink()


def newest(folder: Path, identity: Identity, warn: Any) -> Path | None:
    """The last whole checkpoint of a folder; damaged ones are passed over with a word.

    Raises ConfigError where it is of a run on other data, another cache or another student.
    """
    for seal in sorted(folder.glob("step-*.json"), reverse=True):
        path = seal.with_suffix(".ckpt")
        if checked(path, identity):
            return path
        warn(f"{path} is damaged; the checkpoint before it is taken")
    return None


def checked(path: Path, identity: Identity) -> bool:
    """Whether a checkpoint is whole; raises ConfigError where it is of another run, with the differences."""
    try:
        known = json.loads(_seal(path).read_text())
        is_whole = sha256(path) == known["sha256"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    theirs = known["identity"]
    differing = [
        f"{key} was {_brief(theirs.get(key))} and is now {_brief(identity.get(key))}"
        for key in sorted({*theirs, *identity})
        if theirs.get(key) != identity.get(key)
    ]
    if is_whole and differing:
        told = "; ".join(differing)
        raise ConfigError(
            f"{path} is of another run: {told}. Run the command as it was, or begin anew: another hydra.run.dir, "
            "or resume=never"
        )
    return bool(is_whole)


def step_of(path: Path) -> int:
    """The number of steps that were done when a checkpoint was saved."""
    return int(path.stem.removeprefix("step-"))


def digest(identity: Identity) -> str:
    """One hash of it all."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _seal(path: Path) -> Path:
    return path.with_suffix(".json")


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
