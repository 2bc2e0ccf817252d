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

import torch

from eightgig.config import AUTO, Config
from eightgig.data.batches import Dataset
from eightgig.engine.assemble import Engine
from eightgig.errors import DoesNotFitError
from eightgig.evaluation.loss import HeldOutLoss, measure_loss
from eightgig.memory.calibration import compare_with_plan
from eightgig.memory.ladder import next_rung
from eightgig.memory.plan import Plan
from eightgig.models.spec import ModelSpec
from eightgig.quant.store import Store
from eightgig.run import Event, EventKind, Run, to_json, write_json
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
from eightgig.training.memory import OutOfMemory, attempt
from eightgig.training.monitor import Monitor
from eightgig.training.resume import Start
from eightgig.training.rotation import step_name
from eightgig.training.save import SaveFailure, save_checkpoint
from eightgig.training.schedule import learning_rate, warmup_steps
from eightgig.training.signals import StopRequest, catch_stop_signals
from eightgig.training.step import (
    PreparedStep,
    StepReport,
    linear_norms,
    make_schedule,
    prepare_step,
    run_step,
)

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
        TrainingStopped: A guard stopped the run, after saving it.
        KeyboardInterrupt: A signal stopped the run, after saving it.
        RunError: The last checkpoint could not be written.
    """
    with (
        Monitor(
            job.run, report_to=job.config.run.report_to, done_steps=job.start.state.step
        ) as monitor,
        catch_stop_signals() as stop,
    ):
        session = _Session(job, observe, monitor)
        session.begin()
        for step in session.remaining_steps():
            report = session.take(step)
            yield report
            session.judge(report)
            if session.is_evaluation_due(step):
                session.evaluate(step)
            session.save_if_due(step, stop)
            if session.is_over(stop):
                break
        session.finish(stop)
        session.close()


class _Session:
    """The state of a running training."""

    def __init__(self, job: Job, observe: Observe, monitor: Monitor) -> None:
        self._job = job
        self._observe = observe
        self._monitor = monitor
        self._state = job.start.state
        self._engine, self._plan = job.engine, job.plan
        self._schedule = make_schedule(job.config, job.rows, job.plan.micro_batch_tokens)
        self._next: PreparedStep | None = None
        self._stopping: Judgement | None = None
        self._saved_step = job.start.state.step
        self._saved_at = time.monotonic()
        self._evaluated_step = -1
        self._has_ended_early = False
        self._speeds: list[float] = []

    def begin(self) -> None:
        """Measure the untouched model, or say where the run goes on."""
        if self._state.step == 0:
            if self._wants_trial():
                self._try_longest_rows()
            self.evaluate(0)
        else:
            self._say(self._state.step, "resume", {"rows_seen": self._state.rows_seen})

    def remaining_steps(self) -> range:
        """The steps still to do, 1-based."""
        if self._state.is_finished:
            return range(0)
        return range(self._state.step + 1, self._schedule.total_steps + 1)

    def take(self, step: int) -> StepReport:
        """Do one optimizer step."""
        start_seconds = time.perf_counter()
        job, train = self._job, self._job.config.train
        prepared = self._prepared(step)
        self._next = None
        # The next step's rows are gathered while this one computes.
        if step < self._schedule.total_steps:
            self._next = self._prepare(step + 1)
        rate = learning_rate(step, self._schedule.total_steps, train)
        loss, norm = self._run(prepared, again=self._prepare)
        judgement = judge_gradient(self._state.guards, step=step, loss=loss, grad_norm=norm)
        if judgement.action is None and wants_layers(judgement.memory):
            norms = linear_norms(self._engine)
            judgement = judge_layers(judgement.memory, step=step, norms=norms)
        if judgement.action is None:
            scale = min(1.0, train.max_grad_norm / (norm + 1e-6)) if train.max_grad_norm else 1.0
            job.start.optimizer.start_step(rate, scale)
            self._engine.model.ring.invalidate_changing()
        self._hear(judgement, step)
        seconds = time.perf_counter() - start_seconds
        self._state = replace(
            self._state,
            step=step,
            rows_seen=self._schedule.rows_after(step),
            seconds=self._state.seconds + seconds,
        )
        return StepReport(
            step=step,
            epoch=self._schedule.epoch_after(step),
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            loss_tokens=prepared.loss_tokens,
            tokens=prepared.tokens,
            tokens_per_second=prepared.tokens / seconds,
            vram_peak_bytes=_reserved_peak_bytes(self._plan),
            seconds=seconds,
        )

    def _run(
        self, prepared: PreparedStep, *, again: Callable[[int], PreparedStep]
    ) -> tuple[float, float]:
        """Loss and gradient norm of a step; out of memory, the same step a rung further down.

        Nothing but gradients has changed when memory runs out, and they start from zero again.

        Args:
            prepared: The step.
            again: Prepares the step of a number anew, as the layout is then.
        """
        while True:
            result = attempt(partial(run_step, self._engine, prepared))
            if not isinstance(result, OutOfMemory):
                return result
            self._step_down(prepared.step, result)
            prepared = again(prepared.step)

    def _step_down(self, step: int, trouble: OutOfMemory) -> None:
        """Lay the engine out anew with less memory.

        Raises:
            DoesNotFitError: There is nothing left to give up.
        """
        job, lower = self._job, next_rung(self._plan)
        if lower is None:
            raise DoesNotFitError(
                f"Memory ran out in step {step}, with everything given up that can be.",
                why=trouble.message,
                fix=f"Set data.max_length below {self._plan.max_length:,}, close other programs, "
                "or choose a smaller model; then run the same command with --resume.",
            )
        self._plan, choice = lower
        self._next = None
        job.start.optimizer.finish()
        self._engine.close()
        self._engine = self._engine.replanned(job.store, self._plan)
        self._schedule = make_schedule(job.config, job.rows, self._plan.micro_batch_tokens)
        self._state = replace(self._state, rung=self._state.rung + 1)
        write_json(job.run.plan_path, self._plan)
        values = {"cause": trouble.message, choice.name: choice.value, "before": choice.rejected}
        self._say(step, "oom", values)

    def _wants_trial(self) -> bool:
        setting = self._job.config.train.trial
        if setting == AUTO:
            return (self._plan.run_seconds or 0.0) > _TRIAL_RUN_SECONDS
        return setting

    def _try_longest_rows(self) -> None:
        """Forward and backward of the longest rows that a step could have, and nothing moves.

        What would end a run for want of memory in the night is met, and given way to, now.
        """
        start_seconds = time.perf_counter()
        prepared = self._prepare_longest(0)
        loss, norm = self._run(prepared, again=self._prepare_longest)
        seconds = time.perf_counter() - start_seconds
        values = {"loss": loss, "grad_norm": norm, "tokens": prepared.tokens, "seconds": seconds}
        peak_bytes = _reserved_peak_bytes(self._plan)
        self._say(0, "trial", {**values, "vram_peak_bytes": peak_bytes})

    def _prepare_longest(self, step: int) -> PreparedStep:
        return prepare_step(self._engine, self._schedule.longest(), step=step, seed=None)

    def close(self) -> None:
        """Give the device's memory back."""
        self._engine.close()

    def judge(self, report: StepReport) -> None:
        """Write a step down and let the guards look at it."""
        self._monitor.report(report)
        self._monitor.beat(report.step, "train")
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
                self._plan,
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
        if job.held_out is None or self._evaluated_step == step:
            return
        job.start.optimizer.finish()
        measured = self._measure(job.held_out, step)
        self._evaluated_step = step
        self._say(step, "eval", _evaluation_values(measured))
        if step == 0:
            return
        progress, alarms = judge_evaluation(
            HeldOut(
                best_loss=self._state.best_held_out_loss,
                best_step=self._state.best_step,
                evaluations_without_gain=self._state.evaluations_without_gain,
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
        )
        self._hear(Judgement(memory=self._state.guards, alarms=alarms), step)
        if progress.best_step == step and job.config.train.early_stopping_patience:
            self._save(step)

    def _measure(self, rows: Dataset, step: int) -> HeldOutLoss:
        while True:
            packing = self._job.config.data.packing
            result = attempt(partial(measure_loss, self._engine.model, rows, self._plan, packing))
            if not isinstance(result, OutOfMemory):
                return result
            self._step_down(step, result)

    def save_if_due(self, step: int, stop: StopRequest) -> None:
        """Save by steps, minutes and epoch, and when the run is about to stop."""
        run = self._job.config.run
        minutes = (time.monotonic() - self._saved_at) / 60
        is_due = (
            (run.save_steps > 0 and step % run.save_steps == 0)
            or (run.save_minutes > 0 and minutes >= run.save_minutes)
            or (run.save_epochs and self._schedule.is_epoch_end(step))
            or stop.is_requested
            or self._stopping is not None
        )
        # The last step is saved by `finish`, a new best evaluation by `evaluate`.
        is_open = step < self._schedule.total_steps and step != self._saved_step
        if is_due and is_open:
            self._save(step)

    def is_over(self, stop: StopRequest) -> bool:
        """Whether someone or a guard ends the run before its last step."""
        return stop.is_requested or self._stopping is not None or self._has_ended_early

    def finish(self, stop: StopRequest) -> None:
        """Save the end of the run, or say why it stopped before."""
        self._job.start.optimizer.finish()
        if self._stopping is not None:
            if self._saved_step != self._state.step:
                self._save(self._state.step)
            raise self._stopping.alarms[0].error
        if self._state.is_finished:
            self._take_best()
            return
        if self._state.step < self._schedule.total_steps and not self._has_ended_early:
            self._say(self._state.step, "stop", {"signal": stop.signal_name})
            raise KeyboardInterrupt
        self._state = replace(self._state, is_finished=True)
        failure = self._save(self._state.step)
        if failure is not None:
            raise failure.error
        self._take_best()

    def _take_best(self) -> None:
        """With early stopping, deliver the adapter of the best evaluation."""
        job, best_step = self._job, self._state.best_step
        if not job.config.train.early_stopping_patience or best_step == self._state.step:
            return
        path = job.run.checkpoints_path / step_name(best_step)
        assert job.engine.adapter is not None
        job.engine.adapter.load(read_checkpoint(path).adapter)
        self._say(self._state.step, "stop", {"delivered_step": best_step})

    def _prepared(self, step: int) -> PreparedStep:
        if self._next is not None and self._next.step == step:
            return self._next
        return self._prepare(step)

    def _prepare(self, step: int) -> PreparedStep:
        has_dropout = self._job.config.lora.lora_dropout > 0
        return prepare_step(
            self._engine,
            self._schedule.batches(step),
            step=step,
            seed=self._schedule.seed if has_dropout else None,
        )

    def _save(self, step: int) -> SaveFailure | None:
        job = self._job
        assert job.engine.adapter is not None
        job.start.optimizer.finish()
        self._monitor.sync()
        checkpoint = Checkpoint(
            adapter=dict(job.engine.adapter.named_tensors()),
            optimizer=job.start.optimizer.state_tensors(),
            state=self._state,
            identity=job.start.identity,
        )
        result = save_checkpoint(job.run, checkpoint, keep=job.config.run.save_total_limit)
        self._saved_at = time.monotonic()
        if isinstance(result, SaveFailure):
            self._observe(result.finding)
            self._say(step, "save", {"failed": result.message})
            return result
        self._saved_step = step
        if result.rotation_problem:
            self._say(step, "save", {"not_deleted": result.rotation_problem})
        values = {"path": result.path.name, "seconds": result.seconds}
        self._say(step, "save", {**values, "size_bytes": result.size_bytes})
        return None

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


def _reserved_peak_bytes(plan: Plan) -> int:
    return torch.cuda.max_memory_reserved() if plan.device == "cuda" else 0
