"""The heavy work of a training: gradients, moves of the adapter, losses.

Where memory runs out, the engine is laid out anew one rung further down and the work done again:
same rows, same order, same masks. Nothing but gradients has changed until an optimizer step, which
moves each run of layers whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from eightgig.data.batches import Batch, Dataset
from eightgig.evaluation.loss import HeldOutLoss, RowLosses, measure_loss, measure_row_losses
from eightgig.memory.ladder import count_rungs
from eightgig.run import EventKind
from eightgig.training.memory import OutOfMemory, attempt, go_down
from eightgig.training.step import (
    PreparedStep,
    StepSchedule,
    make_schedule,
    prepare_step,
    run_step,
)

if TYPE_CHECKING:
    from eightgig.training.loop import Job

ResultT = TypeVar("ResultT")
BatchesOf = Callable[[StepSchedule], Sequence[Batch]]
Say = Callable[[int, EventKind, Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepGradients:
    """Loss and gradient norm of a step; its gradients wait for the optimizer.

    Attributes:
        loss: Mean cross-entropy of its loss tokens, in nats.
        grad_norm: Of the whole gradient, before clipping.
        loss_tokens: Tokens that carried loss.
        tokens: All tokens of its rows.
    """

    loss: float
    grad_norm: float
    loss_tokens: int
    tokens: int


class Worker:
    """Computes for a job, on whatever layout there is memory for.

    Args:
        job: What to work on.
        say: Called with step, kind and values of an event.
        between: Called between visits of micro-batches; may wait, or raise to leave the work.

    Attributes:
        engine: The engine as it is laid out now.
        plan: Its layout.
        schedule: Which rows make which step, cut as the plan says.
    """

    def __init__(self, job: Job, *, say: Say, between: Callable[[], None]) -> None:
        self.engine, self.plan = job.engine, job.plan
        self.schedule = make_schedule(job.config, job.rows, job.plan.micro_batch_tokens)
        self._job = job
        self._say = say
        self._between = between
        self._optimizer = job.start.optimizer
        self._next: PreparedStep | None = None

    @property
    def num_rungs(self) -> int:
        """Rungs given up so far, in earlier parts of the run, too."""
        return count_rungs(self.plan)

    def step_gradients(self, step: int) -> StepGradients:
        """Gradients of a step of the run; the rows of the next are gathered meanwhile."""
        return self.attempt(step, partial(self._step_gradients, step))

    def gradients(self, step: int, batches: BatchesOf) -> StepGradients:
        """Gradients of a step of other micro-batches."""
        return self.attempt(step, lambda: self._run(self._prepare(step, batches)))

    def move(self, step: int, learning_rate: float, scale: float) -> None:
        """Move the adapter by the gradients times `scale`."""
        work = partial(self._optimizer.start_step, learning_rate, scale)
        result = attempt(work)
        if isinstance(result, OutOfMemory):
            self._lay_out_anew(step, result)
            # What the interrupted step has left is done by finish.
            self.finish(step)
        self.engine.model.ring.invalidate_changing()

    def finish(self, step: int) -> None:
        """Wait until the adapter has moved."""
        while isinstance(result := attempt(self._optimizer.finish), OutOfMemory):
            self._lay_out_anew(step, result)

    def loss(self, step: int, rows: Dataset) -> HeldOutLoss:
        """Mean loss of `rows`."""
        return self._measure(step, rows, measure_loss, self._job.config.data.packing)

    def row_losses(self, step: int, rows: Dataset, *, packing: bool) -> RowLosses:
        """Loss of each of `rows`."""
        return self._measure(step, rows, measure_row_losses, packing)

    def batch_loss(self, step: int, batches: BatchesOf) -> float:
        """Mean loss of micro-batches, with the masks that their gradients had."""
        return self.attempt(step, partial(self._batch_loss, step, batches))

    def adapter_has_changed(self) -> None:
        """Say that somebody else than the optimizer wrote the adapter."""
        assert self.engine.adapter is not None
        self.engine.adapter.refresh_all()
        self.engine.model.ring.invalidate_changing()

    def attempt(self, step: int, work: Callable[[], ResultT]) -> ResultT:
        """The result of `work`, which may be called again on another layout.

        Raises:
            DoesNotFitError: There is nothing left to give up.
        """
        while True:
            result = attempt(work)
            if not isinstance(result, OutOfMemory):
                return result
            self._lay_out_anew(step, result)
            self.finish(step)

    def close(self) -> None:
        """Give the device's memory back."""
        self.engine.close()

    def _step_gradients(self, step: int) -> StepGradients:
        prepared, self._next = self._next, None
        if prepared is None or prepared.step != step:
            prepared = self._prepare(step, lambda schedule: schedule.batches(step))
        if step < self.schedule.total_steps:
            self._next = self._prepare(step + 1, lambda schedule: schedule.batches(step + 1))
        return self._run(prepared)

    def _batch_loss(self, step: int, batches: BatchesOf) -> float:
        self._between()
        prepared = self._prepare(step, batches)
        losses = self.engine.model.losses([future.result() for future in prepared.inputs])
        return float(losses.values.double().sum()) / max(prepared.loss_tokens, 1)

    def _run(self, prepared: PreparedStep) -> StepGradients:
        loss, norm = run_step(self.engine, prepared, self._between)
        return StepGradients(
            loss=loss,
            grad_norm=norm,
            loss_tokens=prepared.loss_tokens,
            tokens=prepared.tokens,
        )

    def _prepare(self, step: int, batches: BatchesOf) -> PreparedStep:
        has_dropout = self._job.config.lora.lora_dropout > 0
        return prepare_step(
            self.engine,
            batches(self.schedule),
            step=step,
            seed=self.schedule.seed if has_dropout else None,
        )

    def _measure(
        self, step: int, rows: Dataset, measure: Callable[..., ResultT], packing: bool
    ) -> ResultT:
        self.finish(step)
        return self.attempt(
            step,
            lambda: measure(self.engine.model, rows, self.plan, packing, self._between),
        )

    def _lay_out_anew(self, step: int, trouble: OutOfMemory) -> None:
        """Lay the engine out with less memory; the adapter and its gradients stay."""
        job, found = self._job, trouble
        while True:
            rung = go_down(job.run, self.plan, found, where=f"in step {step}")
            self.engine.close()
            self._next = None
            self.plan = rung.plan
            self._say(step, "oom", rung.values)
            result = attempt(partial(self.engine.replanned, job.store, self.plan))
            if not isinstance(result, OutOfMemory):
                break
            found = result
        self.engine = result
        self.schedule = make_schedule(job.config, job.rows, self.plan.micro_batch_tokens)
