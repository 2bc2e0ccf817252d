"""The training loop: optimizer steps one after another, read top to bottom.

What happens beside the steps (held-out loss, checkpoints, guards) is said through `observe` and
written to the run folder; each step is yielded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from eightgig.config import AUTO, Config
from eightgig.data.batches import Dataset
from eightgig.engine.assemble import Engine
from eightgig.errors import DoesNotFitError, Finding, RunError
from eightgig.evaluation.loss import HeldOutLoss
from eightgig.memory.calibration import compare_with_plan
from eightgig.memory.plan import Plan
from eightgig.models.spec import ModelSpec
from eightgig.quant.store import Store
from eightgig.run import Event, EventKind, Run, to_json
from eightgig.training.checkpoint import Checkpoint, read_checkpoint
from eightgig.training.guards import (
    HeldOut,
    Judgement,
    judge_evaluation,
    judge_gradient,
    judge_layers,
    judge_step,
    wants_layers,
)
from eightgig.training.heat import HeatGuard
from eightgig.training.monitor import Monitor
from eightgig.training.resume import Start
from eightgig.training.rotation import step_name
from eightgig.training.save import SavedCheckpoint, SaveFailure, save_checkpoint
from eightgig.training.schedule import learning_rate, warmup_steps
from eightgig.training.signals import Interrupted, StopRequest, catch_stop_signals
from eightgig.training.step import StepReport, clip_scale, linear_norms
from eightgig.training.trial import remove_trial, reserved_peak_bytes, run_trial
from eightgig.training.worker import Worker

Observe = Callable[[object], None]
_EVALUATIONS_PER_RUN = 10
_COMPARED_STEPS = 6
_TRIAL_RUN_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Job:
    """What a training works on.

    Attributes:
        run: Where it is written.
        config: The settings.
        spec: The base model.
        plan: What lies where.
        rows: The training rows.
        held_out: Rows for evaluation, None where there are none.
        store: The model's prepared weights.
        engine: The model and its adapter.
        start: Optimizer, identity and state to begin with.
    """

    run: Run
    config: Config
    spec: ModelSpec
    plan: Plan
    rows: Dataset
    held_out: Dataset | None
    store: Store
    engine: Engine
    start: Start


def train(job: Job, observe: Observe) -> Iterator[StepReport]:
    """Train to the end, or until someone or a guard stops it.

    Args:
        job: What to work on.
        observe: Called with an `Event` or `Finding` whenever something else than a step happens.

    Raises:
        TrainingStopped: A guard stopped the run, after saving it; or the trial found it wanting.
        KeyboardInterrupt: A signal stopped the run, after saving it.
        ConfigError: `run.pause_above_celsius` is set, and no temperature can be read.
        DoesNotFitError: Memory ran out, with everything given up that can be.
        RunError: The last checkpoint could not be written.
    """
    with (
        Monitor(
            job.run, report_to=job.config.run.report_to, done_steps=job.start.state.step
        ) as monitor,
        catch_stop_signals() as stop,
    ):
        session = _Session(job, observe, monitor, stop)
        try:
            session.begin()
            for step in session.remaining_steps():
                report = session.take(step)
                yield report
                session.judge(report)
                if session.is_evaluation_due(step):
                    session.evaluate(step)
                session.save_if_due(step)
                if session.is_over():
                    break
        except Interrupted:
            session.leave()
        session.finish()
        session.close()


class _Session:
    """The state of a running training."""

    def __init__(self, job: Job, observe: Observe, monitor: Monitor, stop: StopRequest) -> None:
        self._job = job
        self._observe = observe
        self._monitor = monitor
        self._stop = stop
        self._state = job.start.state
        self._heat = HeatGuard(
            job.config.run.pause_above_celsius,
            stop,
            lambda kind, values: self._say(self._state.step, kind, values),
        )
        self._phase = "train"
        self._worker = Worker(job, say=self._say, between=self._between)
        self._schedule = self._worker.schedule
        self._stopping: Judgement | None = None
        self._saved_step = job.start.state.step
        self._saved_at = time.monotonic()
        self._has_ended_early = self._has_left = self._has_lost_folder = False
        self._speeds: list[float] = []
        # Loss and step of the best evaluation before one that is not saved yet.
        self._best_before: tuple[float | None, int] | None = None

    def begin(self) -> None:
        """Try what is to come and measure the untouched model, or say where the run goes on."""
        step = self._state.step
        remove_trial(self._job.run)
        if step == 0:
            if self._wants_trial():
                self._try()
            self.evaluate(0)
            return
        self._say(step, "resume", {"rows_seen": self._state.rows_seen})
        # The evaluation of this step was interrupted, and its result counts.
        if not self._state.is_finished and self.is_evaluation_due(step):
            self.evaluate(step)

    def remaining_steps(self) -> range:
        """The steps still to do, 1-based."""
        if self._state.is_finished:
            return range(0)
        return range(self._state.step + 1, self._schedule.total_steps + 1)

    def take(self, step: int) -> StepReport:
        """Do one optimizer step.

        Raises:
            Interrupted: Somebody asked for a stop; the step has not been done.
        """
        start_seconds = time.perf_counter()
        paused_seconds = self._heat.paused_seconds
        train, worker = self._job.config.train, self._worker
        self._phase = "train"
        result = worker.step_gradients(step)
        loss, norm = result.loss, result.grad_norm
        rate = learning_rate(step, self._schedule.total_steps, train)
        judgement = judge_gradient(self._state.guards, step=step, loss=loss, grad_norm=norm)
        if judgement.action is None and wants_layers(judgement.memory):
            norms = linear_norms(worker.engine)
            judgement = judge_layers(judgement.memory, step=step, norms=norms)
        if judgement.action is None:
            worker.move(step, rate, clip_scale(norm, train.max_grad_norm))
        self._hear(judgement, step)
        seconds = time.perf_counter() - start_seconds
        # A pause says nothing about speed.
        seconds = max(seconds - (self._heat.paused_seconds - paused_seconds), 1e-9)
        self._forget_unsaved_best()
        self._state = replace(
            self._state,
            step=step,
            rows_seen=self._schedule.rows_after(step),
            seconds=self._state.seconds + seconds,
            rung=worker.num_rungs,
        )
        return StepReport(
            step=step,
            epoch=self._schedule.epoch_after(step),
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            loss_tokens=result.loss_tokens,
            tokens=result.tokens,
            tokens_per_second=result.tokens / seconds,
            vram_peak_bytes=reserved_peak_bytes(worker.plan.device),
            seconds=seconds,
        )

    def _between(self) -> None:
        """Between visits of micro-batches: a stop is obeyed, a hot GPU waited for."""
        self._monitor.beat(self._state.step, self._phase)
        self._heat.wait(partial(self._monitor.beat, self._state.step))
        self._stop.check()

    def _wants_trial(self) -> bool:
        setting = self._job.config.train.trial
        if setting == AUTO:
            return (self._worker.plan.run_seconds or 0.0) > _TRIAL_RUN_SECONDS
        return setting

    def _try(self) -> None:
        """Run the trial and say what it saw."""
        self._phase = "trial"
        total = self._schedule.total_steps
        count = 1 + sum(self.is_evaluation_due(step) for step in range(1, total + 1))
        result, findings = run_trial(self._job, self._worker, num_evaluations=count)
        for finding in findings:
            self._observe(finding)
        self._say(0, "trial", to_json(result))

    def leave(self) -> None:
        """What was under way is left as if it had not begun; it is not the end of the run."""
        self._has_left = True

    def close(self) -> None:
        """Give the device's memory back."""
        self._worker.close()

    def judge(self, report: StepReport) -> None:
        """Write a step down and let the guards look at it."""
        self._monitor.report(report)
        train = self._job.config.train
        judgement = judge_step(
            self._state.guards,
            report,
            vocab_size=self._job.spec.decoder.vocab_size,
            warmup_steps=warmup_steps(self._schedule.total_steps, train),
        )
        self._hear(judgement, report.step)
        self._speeds.append(report.tokens_per_second)
        if len(self._speeds) == _COMPARED_STEPS:
            # The first step pays for compiling kernels and filling buffers.
            correction = compare_with_plan(
                self._worker.plan,
                peak_bytes=report.vram_peak_bytes,
                tokens_per_second=self._speeds[1:],
            )
            self._say(report.step, "plan", to_json(correction))

    def is_evaluation_due(self, step: int) -> bool:
        """Whether the held-out loss is measured after `step`."""
        setting = self._job.config.run.eval_steps
        total = self._schedule.total_steps
        every = max(1, total // _EVALUATIONS_PER_RUN) if setting == AUTO else int(setting)
        return step == total or (every > 0 and step % every == 0)

    def evaluate(self, step: int) -> None:
        """Measure the held-out loss, where there are held-out rows."""
        job = self._job
        if job.held_out is None or (step > 0 and self._state.evaluated_step == step):
            return
        self._phase = "eval"
        measured = self._worker.loss(step, job.held_out)
        self._say(step, "eval", _evaluation_values(measured))
        if step == 0:
            return
        before = self._state
        progress, alarms = judge_evaluation(
            HeldOut(
                best_loss=before.best_held_out_loss,
                best_step=before.best_step,
                evaluations_without_gain=before.evaluations_without_gain,
            ),
            step=step,
            loss=measured.loss,
            patience=job.config.train.early_stopping_patience,
        )
        self._state = replace(
            self._state,
            best_held_out_loss=progress.best_loss,
            best_step=progress.best_step,
            evaluations_without_gain=progress.evaluations_without_gain,
            evaluated_step=step,
        )
        self._hear(Judgement(memory=self._state.guards, alarms=alarms), step)
        if progress.best_step == step and job.config.train.early_stopping_patience:
            self._best_before = (before.best_held_out_loss, before.best_step)
            self._save(step)

    def _forget_unsaved_best(self) -> None:
        """What was not saved cannot be delivered: the best is the best of those that are."""
        if self._best_before is not None:
            loss, step = self._best_before
            self._state = replace(self._state, best_held_out_loss=loss, best_step=step)
            self._best_before = None

    def save_if_due(self, step: int) -> None:
        """Save by steps, minutes and epoch, and when the run is about to stop."""
        run = self._job.config.run
        minutes = (time.monotonic() - self._saved_at) / 60
        is_due = (
            (run.save_steps > 0 and step % run.save_steps == 0)
            or (run.save_minutes > 0 and minutes >= run.save_minutes)
            or (run.save_epochs and self._schedule.is_epoch_end(step))
            or self._stop.is_requested
            or self._stopping is not None
        )
        # The last step is saved by `finish`, a new best evaluation by `evaluate`.
        is_open = step < self._schedule.total_steps and step != self._saved_step
        if is_due and is_open:
            self._save(step)

    def is_over(self) -> bool:
        """Whether someone or a guard ends the run before its last step."""
        return self._stop.is_requested or self._stopping is not None or self._has_ended_early

    def finish(self) -> None:
        """Save the end of the run, or say why it stopped before."""
        step = self._state.step
        self._worker.finish(step)
        if self._stopping is not None:
            self._save_open(step)
            raise self._stopping.alarms[0].error
        if self._state.is_finished:
            self._take_best()
            return
        is_last = step == self._schedule.total_steps or self._has_ended_early
        if self._has_left or not is_last:
            self._save_open(step)
            self._say(step, "stop", {"signal": self._stop.signal_name})
            raise KeyboardInterrupt
        self._state = replace(self._state, is_finished=True)
        failure = self._save(step)
        if failure is not None:
            raise failure.error
        self._take_best()

    def _save_open(self, step: int) -> None:
        """Save what is done and not saved."""
        if self._saved_step != step:
            self._save(step)

    def _take_best(self) -> None:
        """With early stopping, deliver the adapter of the best evaluation, if it is still there."""
        job, best_step, step = self._job, self._state.best_step, self._state.step
        if not job.config.train.early_stopping_patience or best_step in (0, step):
            return
        path = job.run.checkpoints_path / step_name(best_step)
        assert job.engine.adapter is not None
        try:
            job.engine.adapter.load(read_checkpoint(path).adapter)
        except RunError as error:
            self._observe(
                Finding(
                    severity="warning",
                    code="checkpoint.best_lost",
                    message=f"The adapter of the best evaluation, after step {best_step}, is lost. "
                    f"{error.message}",
                    why="It was to be delivered; the numbers are not those that were saved.",
                    fix=f"The adapter of step {step} is delivered instead.",
                    file=str(path),
                )
            )
            best_step = step
        self._say(step, "stop", {"delivered_step": best_step})

    def _save(self, step: int) -> SaveFailure | None:
        job = self._job
        self._worker.finish(step)
        self._warn_of_lost_folder()
        self._monitor.sync()
        try:
            result = self._worker.attempt(step, self._write_checkpoint)
        except DoesNotFitError as error:
            # A save that fails ends no training.
            result = SaveFailure.of_memory(job.run, step, error.why)
        self._saved_at = time.monotonic()
        if isinstance(result, SaveFailure):
            self._observe(result.finding)
            self._say(step, "save", {"failed": result.message})
            return result
        self._saved_step = step
        self._best_before = None
        if result.rotation_problem:
            self._say(step, "save", {"not_deleted": result.rotation_problem})
        values = {"path": result.path.name, "seconds": result.seconds}
        self._say(step, "save", {**values, "size_bytes": result.size_bytes})
        return None

    def _warn_of_lost_folder(self) -> None:
        """Say once that what was written so far is no longer where it was."""
        run = self._job.run
        if self._has_lost_folder or run.config_path.exists():
            return
        self._has_lost_folder = True
        self._observe(
            Finding(
                severity="warning",
                code="run.folder_lost",
                message="The run folder was deleted or moved: "
                f"{run.config_path.name}, metrics and log so far are no longer there.",
                why="Checkpoints and adapter are written to a new folder of that name.",
                fix="Training goes on; afterwards the same command with --resume writes "
                f"{run.config_path.name} again, which eval, chat and export need.",
                file=str(run.folder),
            )
        )

    def _write_checkpoint(self) -> SavedCheckpoint | SaveFailure:
        job = self._job
        assert job.engine.adapter is not None
        checkpoint = Checkpoint(
            adapter=dict(job.engine.adapter.named_tensors()),
            optimizer=job.start.optimizer.state_tensors(),
            state=replace(self._state, rung=self._worker.num_rungs),
            identity=job.start.identity,
        )
        return save_checkpoint(job.run, checkpoint, keep=job.config.run.save_total_limit)

    def _hear(self, judgement: Judgement, step: int) -> None:
        """Remember what guards remember, say their alarms, obey them."""
        self._state = replace(self._state, guards=judgement.memory)
        for alarm in judgement.alarms:
            self._observe(alarm.finding)
            values = {"guard": alarm.guard, "action": alarm.action}
            self._say(step, "guard", {**values, "message": alarm.finding.message})
            if alarm.action == "finish":
                self._has_ended_early = True
        if judgement.action == "stop":
            self._stopping = judgement

    def _say(self, step: int, kind: EventKind, values: Mapping[str, Any]) -> None:
        event = Event(step=step, kind=kind, values=values)
        self._monitor.event(event)
        self._observe(event)


def _evaluation_values(measured: HeldOutLoss) -> dict[str, Any]:
    return {
        "held_out_loss": measured.loss,
        "loss_tokens": measured.loss_tokens,
        "seconds": measured.seconds,
    }
