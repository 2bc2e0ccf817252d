"""The trial before a long run: everything that a run does, on up to 100 rows, and nothing stays.

Forward, backward, optimizer steps, a checkpoint, going on from it, evaluation; the largest packed
micro-batches first, so that what would end a run for want of memory in the night is met, and given
way to, now. Then gradients are compared with the loss itself. Afterwards adapter and optimizer are
bit for bit what they were.
"""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eightgig.data.batches import Batch, Dataset, pack_rows
from eightgig.data.select import select_rows
from eightgig.errors import Finding, TrainingStopped
from eightgig.run import Run
from eightgig.training import verdicts
from eightgig.training.checkpoint import Checkpoint, read_checkpoint
from eightgig.training.sample import largest, sample_steps, short_rows
from eightgig.training.save import SavedCheckpoint, save_checkpoint
from eightgig.training.selftest import GradientCheck, check_gradients
from eightgig.training.step import StepSchedule, clip_scale
from eightgig.training.worker import StepGradients, Worker

if TYPE_CHECKING:
    from eightgig.training.loop import Job

MAX_TIME_RATIO = 0.05
"""Of the predicted time of the run; the largest micro-batches are tried in any case."""

MIN_SECONDS = 5.0
"""What the trial of a short run may take, where one is asked for."""

# Shares of the trial's time: until no further step is begun, for each measurement of the loss,
# and until no further gradient is checked.
_STEPS_RATIO = 0.5
_LOSS_RATIO = 0.1
_CHECKS_RATIO = 0.9
_FOLDER = "trial"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """What the trial saw; one event.

    Attributes:
        rows: Rows it trained on.
        steps: Optimizer steps.
        longest_micro_batch_tokens: Tokens of the largest micro-batch.
        loss_before, loss_after: Mean loss of rows trained on, before and after the steps.
        gradients_checked: Tensors whose gradient was compared with the loss.
        gradient_error: Largest |slope / gradient - 1|, None where none could be measured.
        vram_peak_bytes: Most bytes the allocator reserved; 0 on a CPU.
        save_seconds: Time of a checkpoint.
        seconds: Time of the trial.
        predicted_run_seconds: As planned, None where nothing was.
        run_seconds: Of the whole run, as measured: steps, evaluations and saves.
    """

    rows: int
    steps: int
    longest_micro_batch_tokens: int
    loss_before: float
    loss_after: float
    gradients_checked: int
    gradient_error: float | None
    vram_peak_bytes: int
    save_seconds: float
    seconds: float
    predicted_run_seconds: float | None
    run_seconds: float


def run_trial(
    job: Job, worker: Worker, *, num_evaluations: int
) -> tuple[TrialResult, tuple[Finding, ...]]:
    """Try what the run will do, and put everything back.

    Args:
        job: The run, at its beginning.
        worker: Computes for it.
        num_evaluations: How often the run will measure the held-out loss.

    Returns:
        What was seen, and findings that do not stand in the way.

    Raises:
        TrainingStopped: The run would go wrong; nothing of it has begun.
        RunError: A checkpoint cannot be written.
    """
    adapter = job.engine.adapter
    assert adapter is not None
    untouched = adapter.whole.cpu().clone()
    trial = _Trial(job, worker)
    try:
        result = trial.run(num_evaluations)
    finally:
        worker.finish(0)
        adapter.whole.copy_(untouched)
        job.start.optimizer.reset()
        worker.adapter_has_changed()
        remove_trial(job.run)
    return result, tuple(trial.findings)


def remove_trial(run: Run) -> None:
    """Delete the checkpoint of a trial, also of one that was killed."""
    shutil.rmtree(run.folder / _FOLDER, ignore_errors=True)


class _Trial:
    """A trial under way.

    Attributes:
        findings: What does not stand in the way of the run.
    """

    def __init__(self, job: Job, worker: Worker) -> None:
        self.findings: list[Finding] = []
        assert job.engine.adapter is not None
        self._job = job
        self._worker = worker
        self._adapter = job.engine.adapter
        self._optimizer = job.start.optimizer
        self._start_seconds = time.monotonic()
        predicted_seconds = job.plan.run_seconds or 0.0
        self._budget_seconds = max(MIN_SECONDS, MAX_TIME_RATIO * predicted_seconds)
        self._seconds_per_token: list[float] = []
        self._save_seconds = self._eval_seconds_per_token = 0.0

    def run(self, num_evaluations: int) -> TrialResult:
        worker, packing = self._worker, self._job.config.data.packing
        steps = list(sample_steps(worker.schedule))
        initial = [tensor.cpu().clone() for _, tensor in self._adapter.named_tensors()]
        first = self._gradients(1, steps[0])
        watched = self._watched_rows(steps)
        before = worker.row_losses(0, watched, packing=packing)
        self._move(1, first, len(steps))
        done = 1
        while done < len(steps) and self._has_time_for(steps[done]):
            done += 1
            self._move(done, self._gradients(done, steps[done - 1]), len(steps))
        worker.finish(done)
        self._check_numbers(initial, done)
        self._go_on_from_a_checkpoint(done)
        start_seconds = time.monotonic()
        after = worker.row_losses(done, watched, packing=packing)
        seconds = time.monotonic() - start_seconds
        self._eval_seconds_per_token = seconds / int(watched.offsets[-1])
        self._try_longest_held_out(done)
        loss_tokens = int(before.tokens.sum())
        means = [float(each.sums.sum()) / max(loss_tokens, 1) for each in (before, after)]
        self._hear(verdicts.judge_course(*means, steps=done, loss_tokens=loss_tokens))
        self._check_packing(watched, done)
        checks = self._check_gradients(watched, done + 1)
        peak_bytes = reserved_peak_bytes(worker.plan.device)
        self._hear(verdicts.judge_peak(worker.plan, peak_bytes))
        errors = [abs(check.ratio - 1) for check in checks if check.ratio is not None]
        return TrialResult(
            rows=sum(map(len, steps[:done])),
            steps=done,
            longest_micro_batch_tokens=max(largest(worker.schedule, step) for step in steps[:done]),
            loss_before=means[0],
            loss_after=means[1],
            gradients_checked=len(errors),
            gradient_error=max(errors, default=None),
            vram_peak_bytes=peak_bytes,
            save_seconds=self._save_seconds,
            seconds=time.monotonic() - self._start_seconds,
            predicted_run_seconds=self._job.plan.run_seconds,
            run_seconds=self._forecast(num_evaluations),
        )

    def _gradients(self, step: int, rows: NDArray[np.int64]) -> StepGradients:
        start_seconds = time.monotonic()
        result = self._worker.gradients(step, lambda schedule: schedule.pack(rows))
        seconds = time.monotonic() - start_seconds
        self._seconds_per_token.append(seconds / max(1, result.tokens))
        self._hear(verdicts.judge_finite(result.loss, result.grad_norm))
        return result

    def _move(self, step: int, result: StepGradients, num_steps: int) -> None:
        """Move the adapter; the learning rate rises over the trial up to the run's highest."""
        train = self._job.config.train
        rate = train.learning_rate * step / num_steps
        self._worker.move(step, rate, clip_scale(result.grad_norm, train.max_grad_norm))

    def _has_time_for(self, rows: NDArray[np.int64]) -> bool:
        tokens = int(self._job.rows.lengths[rows].sum())
        spent_seconds = time.monotonic() - self._start_seconds
        needed_seconds = tokens * self._seconds_per_token[-1]
        return spent_seconds + needed_seconds < _STEPS_RATIO * self._budget_seconds

    def _watched_rows(self, steps: list[NDArray[np.int64]]) -> Dataset:
        """Rows whose loss is measured before and after: as many as there is time for."""
        rows = np.concatenate([*steps[1:], steps[0]])
        tokens = _LOSS_RATIO * self._budget_seconds / self._seconds_per_token[0]
        count = int(np.searchsorted(np.cumsum(self._job.rows.lengths[rows]), tokens))
        return select_rows(self._job.rows, rows[: max(2, count)])

    def _check_numbers(self, initial: list[Tensor], steps: int) -> None:
        gradients = self._worker.engine.gradients
        assert gradients is not None
        kept = {"the adapter": self._adapter.whole, "its gradient": gradients.whole}
        self._hear(verdicts.judge_dtypes(kept, self._optimizer.state_tensors()))
        moved = (tensor.cpu() for _, tensor in self._adapter.named_tensors())
        self._hear(verdicts.judge_moved(initial, moved, steps))

    def _go_on_from_a_checkpoint(self, step: int) -> None:
        """Save, forget, read, and compare every number."""
        expected = self._numbers()
        saved = self._worker.attempt(step, partial(self._save, step))
        self._adapter.whole.zero_()
        self._optimizer.reset()
        checkpoint = read_checkpoint(saved.path)
        self._adapter.load(checkpoint.adapter)
        self._optimizer.load_state_tensors(checkpoint.optimizer)
        self._worker.adapter_has_changed()
        self._hear(verdicts.judge_restored(expected, self._numbers()))
        self._save_seconds = saved.seconds
        self._hear(verdicts.judge_save(saved.seconds, self._job.config.run.save_minutes))

    def _numbers(self) -> dict[str, Tensor]:
        """Everything that a later step depends on, copied."""
        tensors = {**dict(self._adapter.named_tensors()), **self._optimizer.state_tensors()}
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}

    def _save(self, step: int) -> SavedCheckpoint:
        start = self._job.start
        checkpoint = Checkpoint(
            adapter=dict(self._adapter.named_tensors()),
            optimizer=self._optimizer.state_tensors(),
            state=replace(start.state, step=step),
            identity=start.identity,
        )
        saved = save_checkpoint(Run(folder=self._job.run.folder / _FOLDER), checkpoint, keep=1)
        if isinstance(saved, SavedCheckpoint):
            return saved
        raise saved.error

    def _try_longest_held_out(self, step: int) -> None:
        held_out = self._job.held_out
        if held_out is not None:
            longest = np.array([np.argmax(held_out.lengths)], np.int64)
            self._worker.loss(step, select_rows(held_out, longest))

    def _check_packing(self, watched: Dataset, step: int) -> None:
        if self._job.config.data.packing:
            rows = select_rows(watched, short_rows(watched))
            together = self._worker.row_losses(step, rows, packing=True)
            alone = self._worker.row_losses(step, rows, packing=False)
            dtype = self._worker.plan.compute_dtype
            self._hear(verdicts.judge_packing(together, alone, dtype))

    def _check_gradients(self, watched: Dataset, step: int) -> tuple[GradientCheck, ...]:
        rows = short_rows(watched)
        # One row alone and the others together: unequal micro-batches test the normaliser.
        parts = [part for part in (rows[:1], rows[1:]) if len(part)]

        def batches(schedule: StepSchedule) -> tuple[Batch, ...]:
            size, packing = schedule.micro_batch_tokens, schedule.packing
            cut = (
                pack_rows(watched, part, micro_batch_tokens=size, packing=packing) for part in parts
            )
            return tuple(batch for group in cut for batch in group)

        checks = check_gradients(
            self._worker,
            self._job.spec.decoder,
            batches,
            step=step,
            deadline_seconds=self._start_seconds + _CHECKS_RATIO * self._budget_seconds,
        )
        self._hear(verdicts.judge_gradients(checks))
        return checks

    def _forecast(self, num_evaluations: int) -> float:
        """Seconds of the whole run: its steps, evaluations and saves."""
        job, schedule = self._job, self._worker.schedule
        # The first step pays for compiling kernels and filling buffers.
        pace = statistics.median(self._seconds_per_token[1:] or self._seconds_per_token)
        epochs = schedule.total_steps / schedule.steps_per_epoch
        seconds = pace * epochs * int(job.rows.offsets[-1])
        if job.held_out is not None:
            tokens = int(job.held_out.offsets[-1])
            seconds += num_evaluations * tokens * self._eval_seconds_per_token
        if job.config.run.save_minutes:
            seconds *= 1 + self._save_seconds / (60 * job.config.run.save_minutes)
        return seconds

    def _hear(self, finding: Finding | None) -> None:
        """Stop at an error, keep all else."""
        if finding is None:
            return
        if finding.severity == "error":
            fix = f"{finding.fix} Nothing of the run has begun: then run it with --resume."
            raise TrainingStopped(finding.message, why=finding.why, fix=fix, findings=(finding,))
        self.findings.append(finding)


def reserved_peak_bytes(device: str) -> int:
    """Most bytes the CUDA allocator reserved so far; 0 on a CPU, where nothing counts them."""
    return torch.cuda.max_memory_reserved() if device == "cuda" else 0
