"""The student as a LightningModule: one exact optimizer step over all active losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import lightning
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.errors import DistillError
from distill.losses import Objective
from distill.losses.cross_entropy import CrossEntropy
from distill.losses.head import Head, Term, head_loss, predicted_ids
from distill.records import SPANS, Batch, Entries, Span
from distill.students import Seam
from distill.training.sharding import shard

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
_ROUNDING = 1e-4  # relative to the largest hidden state: float32 error of another order of summation

_NOT_SAVED = "No checkpoint contains this step."
SMALLER_STEPS = (
    "Lower optim.optimizer.lr, raise optim.schedule.num_warmup_steps, or clip more: trainer.gradient_clip_val=0.5"
)

Counts = Mapping[tuple[Span, str], int]
Retemper = Callable[[Entries, float], Entries]


class NonFiniteLossError(DistillError):
    """A loss, a gradient or a weight is NaN or infinite; nothing of it was saved."""

    exit_code = 6


def nonfinite_weights(model: nn.Module) -> list[str]:
    """Return the names of the parameters that hold NaN or infinity."""
    return [name for name, weight in model.named_parameters() if not _is_finite(weight)]


def _is_finite(tensor: Tensor) -> bool:
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(part.isfinite().all())


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@final
class StudentModule(lightning.LightningModule):
    """A student and its objective: the sum over losses of weight * sum of D / count in the step."""

    def __init__(
        self,
        model: nn.Module,
        *,
        objectives: Mapping[str, Objective],
        seam: Seam,
        retemper: Retemper,
        make_optimizer: MakeOptimizer,
        make_schedule: MakeSchedule,
        seed: int,
        measures_accuracy: bool = True,
    ) -> None:
        """`seam` says how losses see the model; `retemper` returns kept log-probabilities at T.

        `measures_accuracy`: validation counts the answers of which every token is the most probable one.
        """
        super().__init__()
        self.model: Any = model
        self._objectives = dict(objectives)
        self._seam = seam
        self._retemper = retemper
        self._make_optimizer, self._make_schedule, self._seed = make_optimizer, make_schedule, seed
        self._measures_accuracy = measures_accuracy
        self._step_sums: dict[str, Tensor] = {}
        self._counts: Counts = {}
        self.logged: dict[str, float] = {}  # the values that were logged last
        self._gradient_norm = torch.zeros(())
        self._totals: list[tuple[Tensor, tuple[str, ...]]] = []
        self._tallies: dict[str, list[Tensor]] = {}

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self)

    def forward(self, work: Callable[[], Any]) -> Any:
        # A sharded student has whole weights only within its forward pass, and the loss needs the whole head.
        return work()

    def hidden(self, batch: Batch) -> Float[Tensor, "N H"]:
        """Return the hidden state that predicts each supervised position."""
        return self._seam.hidden(self.model, batch)

    @torch.no_grad()
    def sees_alike(self, left: Batch, right: Batch) -> bool:
        """Return whether the model computes the same hidden states for two batches, up to float32 rounding."""
        was_training = self.model.training
        self.model.eval()
        try:
            left_NH, right_NH = self.hidden(left), self.hidden(right)
        except (TypeError, ValueError, IndexError, RuntimeError):  # the model does not take such a mask, or positions
            return False
        finally:
            self.model.train(was_training)
        return bool((left_NH - right_NH).abs().max() <= _ROUNDING * left_NH.abs().max())

    def head(self) -> Head:
        """Return the head without the rows of no outcome."""
        return self._seam.head(self.model)

    def terms(self, batch: Batch) -> dict[str, Term]:
        """Return the losses that have positions in this batch, each scaled by weight / count."""
        terms = {}
        for name, objective in self._objectives.items():
            if objective.source in ("labels", "teacher"):
                has_target_N, targets = batch.is_labelled_N == (objective.source == "labels"), _labels(batch)
            elif batch.soft is not None:
                has_target_N, targets = batch.is_soft_N, self._retemper(batch.soft, objective.temperature)
            else:
                continue
            is_used_N = has_target_N & (batch.span_N == SPANS.index(objective.span))
            scale = objective.weight / _count(batch, objective)
            terms[name] = Term(objective.divergence, targets, is_used_N, objective.temperature, scale)
        return terms

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def training_step(self, batch: Batch) -> Tensor:
        # The seed is a function of the position in the run, so a resumed run equals an uninterrupted one.
        torch.manual_seed(hash((self._seed, self.global_step, len(self._totals), self.global_rank)) % 2**63)
        terms = self.terms(batch)
        total: Tensor
        total, sums_L = self(lambda: head_loss(self.hidden(batch), self.head(), list(terms.values())))
        self._totals.append((total.detach(), batch.example_ids))
        self._counts = batch.counts
        for name, sum_ in zip(terms, sums_L, strict=True):
            self._step_sums[name] = self._step_sums.get(name, 0) + sum_ / _count(batch, self._objectives[name])
        # Undo Lightning's division by the number of microbatches and its average over processes: the counts are
        # already those of the whole step.
        return total * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip with fused optimizers under autocast; without a gradient scaler this is safe.
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.model.parameters(), gradient_clip_val)
        else:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), gradient_clip_val, self._gradient_norm)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        totals, self._totals = self._totals, []
        sums, self._step_sums = self._step_sums, {}
        counts, self._counts = self._counts, {}
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        self._gradient_norm = nn.utils.get_total_norm(gradients)
        norm = _whole(self._gradient_norm).to(self.device)
        # The only time in a step that the host waits for the device. A failure in one process stops all.
        is_finite = bool(torch.stack([*(total for total, _ in totals), norm]).isfinite().all())
        if not self.trainer.strategy.reduce_boolean_decision(is_finite):
            raise NonFiniteLossError(self._nonfinite(totals, norm))
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.global_step + 1) % every == 0:
            self._log(sums, counts, {"grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]})

    def _log(self, sums: Mapping[str, Tensor], counts: Counts, others: Mapping[str, Tensor | float]) -> None:
        """Write the losses that have positions in this step, and other values that are equal in all processes.

        Lightning's `self.log` would write the earlier value of a loss that this step does not have.
        """
        names = [name for name, objective in self._objectives.items() if counts.get(_place(objective))]
        zero = torch.zeros((), device=self.device)  # for a loss whose positions are in other processes
        losses = [sums.get(name, zero).float() for name in names]
        if losses and self.trainer.world_size > 1:
            losses = [*self.trainer.strategy.reduce(torch.stack(losses), reduce_op="sum")]
        values = dict(zip(names, losses, strict=True)) | dict(others)
        self.logged = {f"train/{name}": float(value) for name, value in values.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(self.logged, step=self.global_step)
            logger.save()

    def _nonfinite(self, totals: Sequence[tuple[Tensor, tuple[str, ...]]], norm: Tensor) -> str:
        """Say what is not finite, whether the examples are to blame, and what to do; called by all processes."""
        is_fine_everywhere = self.trainer.strategy.reduce_boolean_decision
        bad_weights, step = nonfinite_weights(self.model), self.global_step
        value, example_ids = next((pair for pair in totals if not pair[0].isfinite()), (None, ()))
        if not is_fine_everywhere(not bad_weights):
            names = ", ".join(bad_weights[:3]) or "of another process"
            return f"the weights are not finite at step {step}: {names}. {_NOT_SAVED} {SMALLER_STEPS}"
        if not is_fine_everywhere(value is None):
            problem = "not finite in another process"
            if value is not None:
                problem = f"{value.item()} on the examples {', '.join(example_ids)}"
            return (
                f"the loss at step {step} is {problem}, although the weights are finite. {_NOT_SAVED} Inspect these "
                "examples, or lower optim.optimizer.lr"
            )
        return (
            f"the norm of the gradient at step {step} is {norm.item()}, although the loss and the weights are finite. "
            f"{_NOT_SAVED} {SMALLER_STEPS}"
        )

    def validation_step(self, batch: Batch) -> None:
        is_text_N = batch.span_N == SPANS.index("answer")
        is_gold_N = is_text_N & batch.is_labelled_N
        is_answer_N = is_gold_N & self._measures_accuracy
        # Also without a loss on these answers, so that students with other losses can be compared. Free texts without
        # gold texts are compared with the teacher's.
        is_compared_N = is_gold_N if self._measures_accuracy else is_text_N
        terms = self.terms(batch) | {"cross_entropy": Term(CrossEntropy(), _labels(batch), is_compared_N, 1.0, 1.0)}
        sums_L, predicted_M = self(lambda: self._evaluate(batch, list(terms.values()), is_answer_N))
        for (name, term), sum_ in zip(terms.items(), sums_L, strict=True):
            if count := int(term.is_used_N.sum()):
                self._tally(f"val/{name}", sum_, count)
        is_wrong_M = predicted_M != batch.label_N[is_answer_N]
        answers_M = batch.target_N[is_answer_N]
        num_answers, wrong = len(answers_M.unique()), answers_M[is_wrong_M].unique()
        if num_answers:
            self._tally("val/accuracy", torch.tensor(num_answers - len(wrong)), num_answers)

    def _evaluate(
        self, batch: Batch, terms: Sequence[Term], is_answer_N: Bool[Tensor, "N"]
    ) -> tuple[Float[Tensor, "L"], Int[Tensor, "M"]]:
        """Return the sum of each loss, and the most probable token at each answer position."""
        hidden_NH, head = self.hidden(batch), self.head()
        return head_loss(hidden_NH, head, terms)[1], predicted_ids(hidden_NH[is_answer_N], head)

    def validation_means(self) -> dict[str, Tensor]:
        """Return what this validation has measured so far; `val/loss` is the weighted sum, as it is trained."""
        means = {name: total / count for name, (total, count) in self._tallies.items()}
        losses = {
            name: o.weight * means[f"val/{name}"] for name, o in self._objectives.items() if f"val/{name}" in means
        }
        return means | ({"val/loss": torch.stack([*losses.values()]).sum()} if losses else {})

    def on_validation_epoch_end(self) -> None:
        means = self.validation_means()
        means["step"] = torch.tensor(float(self.global_step - 1))
        self.log_dict(means, prog_bar=True, sync_dist=self.trainer.world_size > 1)
        self._tallies = {}

    def configure_optimizers(self) -> Any:
        groups = self._seam.rates(self.model)
        trained = [([p for p in parameters if p.requires_grad], factor) for parameters, factor in groups]
        present = [(parameters, factor) for parameters, factor in trained if parameters]
        optimizer = self._make_optimizer([{"params": parameters} for parameters, _ in present])
        for group, (_, factor) in zip(optimizer.param_groups, present, strict=True):
            group["lr"] *= factor
        schedule = self._make_schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _tally(self, name: str, value: Tensor, count: int) -> None:
        total, total_count = self._tallies.get(name, [torch.zeros(()), torch.zeros(())])
        self._tallies[name] = [total + value.detach().cpu(), total_count + count]


def _labels(batch: Batch) -> Entries:
    """Return one-hot targets: the next token has probability 1."""
    num_positions, device = len(batch.label_N), batch.label_N.device
    position_N = torch.arange(num_positions, device=device)
    logprob_N = torch.zeros(num_positions, device=device)
    return Entries(np.arange(1, num_positions + 1), position_N, batch.label_N, logprob_N, None)


def _count(batch: Batch, objective: Objective) -> int:
    """Return the number of positions of a loss in the whole optimizer step."""
    return max(1, batch.counts.get(_place(objective), 1))


def _place(objective: Objective) -> tuple[Span, str]:
    return objective.span, objective.source
