"""One optimizer step: which rows, their loss and gradients, and what is reported of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from eightgig.adapters.lora import named_views
from eightgig.config import Config
from eightgig.data.batches import Batch, Dataset, pack_rows, step_rows

if TYPE_CHECKING:
    from eightgig.engine.assemble import Engine
    from eightgig.engine.embedding import HostInputs


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one optimizer step did; one line of metrics.jsonl.

    Attributes:
        step: 1-based optimizer step.
        epoch: Passes over the data so far, in fractions.
        loss: Mean cross-entropy of the step's loss tokens, in nats.
        grad_norm: Norm of the whole adapter gradient before clipping.
        learning_rate: Used in this step.
        loss_tokens: Tokens that carried loss.
        tokens: All tokens of the step's rows.
        tokens_per_second: `tokens` over `seconds`.
        vram_peak_bytes: Most bytes the allocator reserved so far; 0 on a CPU.
        seconds: Wall-clock time of the step.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    loss_tokens: int
    tokens: int
    tokens_per_second: float
    vram_peak_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSchedule:
    """Which rows make which optimizer step.

    Attributes:
        dataset: The rows.
        rows_per_step: Batch size times accumulation.
        total_steps: Of the whole run.
        seed: Of the order.
        micro_batch_tokens: Tokens a micro-batch may hold.
        packing: Whether rows share a micro-batch.
        epoch_steps: The rows of every step of a 0-based epoch; keeps what it was asked last, since
            the order of a million rows takes a while.
    """

    dataset: Dataset
    rows_per_step: int
    total_steps: int
    seed: int
    micro_batch_tokens: int
    packing: bool
    epoch_steps: Callable[[int], tuple[NDArray[np.int64], ...]]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""
        return math.ceil(self.dataset.num_rows / self.rows_per_step)

    def epoch_after(self, step: int) -> float:
        """Passes over the data when `step` steps are done."""
        return step / self.steps_per_epoch

    def is_epoch_end(self, step: int) -> bool:
        """Whether a pass ends with `step`."""
        return step % self.steps_per_epoch == 0

    def rows_after(self, step: int) -> int:
        """Rows trained on when `step` steps are done, all passes."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.dataset.num_rows + steps * self.rows_per_step

    def batches(self, step: int) -> tuple[Batch, ...]:
        """The micro-batches of a 1-based step."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        return self.pack(self.epoch_steps(epoch)[place])

    def longest_rows(self) -> NDArray[np.int64]:
        """The longest rows, as many as a step has."""
        return np.argsort(-self.dataset.lengths, kind="stable")[: self.rows_per_step]

    def pack(self, rows: NDArray[np.int64]) -> tuple[Batch, ...]:
        """The micro-batches of `rows`."""
        return pack_rows(
            self.dataset,
            rows,
            micro_batch_tokens=self.micro_batch_tokens,
            packing=self.packing,
        )


def make_schedule(config: Config, dataset: Dataset, micro_batch_tokens: int) -> StepSchedule:
    """The steps of a run: `max_steps`, or as many as `num_train_epochs` passes take."""
    train = config.train
    steps_per_epoch = math.ceil(dataset.num_rows / train.rows_per_step)
    total_steps = math.ceil(train.num_train_epochs * steps_per_epoch)
    return StepSchedule(
        dataset=dataset,
        rows_per_step=train.rows_per_step,
        total_steps=train.max_steps if train.max_steps > 0 else total_steps,
        seed=train.seed,
        micro_batch_tokens=micro_batch_tokens,
        packing=config.data.packing,
        epoch_steps=lru_cache(maxsize=1)(
            lambda epoch: step_rows(
                dataset, epoch=epoch, seed=train.seed, rows_per_step=train.rows_per_step
            )
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedStep:
    """A step's micro-batches, being gathered in the background."""

    step: int
    batches: tuple[Batch, ...]
    inputs: tuple[Future[HostInputs], ...]

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(batch.num_loss_tokens for batch in self.batches)

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(batch.num_tokens for batch in self.batches)


def prepare_step(
    engine: Engine, batches: Sequence[Batch], *, step: int, seed: int | None
) -> PreparedStep:
    """Begin to gather a step's inputs; `seed` is None without dropout."""
    embedding = engine.model.embedding
    inputs = tuple(embedding.prepare(batch, seed=seed, step=step) for batch in batches)
    return PreparedStep(step=step, batches=tuple(batches), inputs=inputs)


def run_step(
    engine: Engine, prepared: PreparedStep, between: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """Sum the gradients of a step's mean loss; that loss and the gradient's norm.

    Waits for the device, not for an optimizer that still moves the adapter from the step before:
    layers wait for it one by one.

    Args:
        engine: The model and its adapter.
        prepared: The step.
        between: Called before each visit of micro-batches; what it raises ends the step, and
            nothing but gradients has changed.
    """
    assert engine.gradients is not None
    engine.gradients.begin_step()
    inputs = [future.result() for future in prepared.inputs]
    # A step without loss tokens has loss and gradient 0; the guards speak of it.
    loss_tokens = max(prepared.loss_tokens, 1)
    # Those of the mean would be too small for float16: it has the sum's, divided in float32.
    divisor = loss_tokens if engine.model.dtype == torch.float16 else 1
    size = engine.model.micro_batches_per_visit
    losses = []
    for start in range(0, len(inputs), size):
        between()
        visit = inputs[start : start + size]
        result = engine.model.gradients(visit, loss_tokens // divisor, engine.gradients)
        losses.append(result.values)
    if divisor > 1:
        engine.gradients.divide(divisor)
    return float(torch.cat(losses).sum()) / loss_tokens, engine.gradients.norm()


def clip_scale(grad_norm: float, max_grad_norm: float) -> float:
    """What a gradient is multiplied by, as in torch; 1 where nothing is clipped."""
    return min(1.0, max_grad_norm / (grad_norm + 1e-6)) if max_grad_norm else 1.0


def linear_norms(engine: Engine) -> dict[str, float]:
    """Norm of the gradients of A and B together, by adapted linear, of the step just run."""
    assert engine.gradients is not None
    squares: dict[str, float] = {}
    for layer, groups in enumerate(engine.gradients.layers):
        for name, grad in named_views(engine.gradients.wait(layer), groups, layer):
            linear = name.rsplit(".", 1)[0]
            norm = float(torch.linalg.vector_norm(grad))
            squares[linear] = squares.get(linear, 0.0) + norm * norm
    return {linear: math.sqrt(square) for linear, square in squares.items()}
