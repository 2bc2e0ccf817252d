"""AdamW over the adapter: in float32 on the host, or bitsandbytes' 8-bit on the device.

On the host, a thread updates layer after layer while the next step's forward pass already runs:
a layer's copy to the device waits for that layer alone. Numerically nothing changes by that.

A step is a transaction: moments exist before the first step, each run of layers moves whole or not
at all, and where memory runs out in between, `finish` moves the runs that are left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from eightgig.adapters.lora import Adapter, named_views
from eightgig.config import TrainConfig
from eightgig.engine.gradients import Gradients
from eightgig.errors import HardwareError
from eightgig.hardware.bench import optimizer_thread
from eightgig.hardware.probe import optimizer_threads

_HOST_MOMENTS = ("exp_avg", "exp_avg_sq")
_LAYERS_PER_RUN = 6


class Optimizer(Protocol):
    """What the loop asks of an optimizer."""

    def start_step(self, learning_rate: float, grad_scale: float) -> None:
        """Move the adapter by the gradient times `grad_scale`.

        Raises:
            torch.OutOfMemoryError: Memory ran out; `finish` does the rest of the step.
        """

    def finish(self) -> None:
        """Wait until the adapter has moved; move what an interrupted step has left.

        Raises:
            torch.OutOfMemoryError: Memory ran out; the next call does the rest.
        """

    def reset(self) -> None:
        """Be as before the first step."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything but the adapter that the next step depends on."""

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state_tensors` of an earlier run."""


def make_optimizer(adapter: Adapter, gradients: Gradients, config: TrainConfig) -> Optimizer:
    """The optimizer that `config.optim` names.

    Raises:
        HardwareError: bitsandbytes cannot be imported or has no library for this machine.
    """
    if config.optim == "adamw_torch":
        return HostAdamW(adapter, gradients, config)
    return EightBitAdamW(adapter, gradients, config)


class HostAdamW:
    """torch's fused AdamW over runs of layers, stepped by a thread behind the next forward pass.

    Runs of several layers, since the thread shares Python with the one that drives the GPU.
    """

    def __init__(self, adapter: Adapter, gradients: Gradients, config: TrainConfig) -> None:
        self._adapter = adapter
        self._gradients = gradients
        self._runs = _layer_runs(adapter)
        self._optimizer = torch.optim.AdamW(
            [run.masters for run in self._runs],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._rate = self._scale = 0.0
        self._left: deque[_LayerRun] = deque()
        self._is_scaled = self._is_interrupted = False
        self._make_moments()
        drives_gpu = gradients.device.type == "cuda"
        # The others are left to the thread that feeds the GPU; moving numbers needs only some.
        self._thread = optimizer_thread(optimizer_threads() if drives_gpu else None)

    def start_step(self, learning_rate: float, grad_scale: float) -> None:
        """Queue the update of every layer, in the order the next forward pass needs them."""
        self.finish()
        for fresh in self._adapter.fresh:
            fresh.clear()
        self._rate, self._scale = learning_rate, grad_scale
        self._left.extend(self._runs)
        self._gradients.hand_to(self._thread.submit(self._update))

    def finish(self) -> None:
        """Wait for the thread, or do here what it could not."""
        self._gradients.wait_for_reader()
        if self._is_interrupted:
            self._update()
            self._adapter.refresh_all()
            self._is_interrupted = False

    def reset(self) -> None:
        """Moments and the count of steps are zero."""
        self.finish()
        for run in self._runs:
            for value in self._optimizer.state[run.masters].values():
                value.zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        """Both moments of every adapter tensor, and the count of steps."""
        self.finish()
        step = self._optimizer.state[self._runs[0].masters]["step"]
        return {**dict(self._named_moments()), "step": step.clone()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take moments and the count of steps."""
        self.finish()
        for run in self._runs:
            self._optimizer.state[run.masters]["step"].copy_(tensors["step"])
        for name, view in self._named_moments():
            view.copy_(tensors[name])

    def _make_moments(self) -> None:
        """What torch would make in the first step, when it may be too late for want of memory."""
        for run in self._runs:
            self._optimizer.state[run.masters] = {
                "step": torch.zeros((), dtype=torch.float32),
                **{name: torch.zeros_like(run.masters) for name in _HOST_MOMENTS},
            }

    def _update(self) -> None:
        try:
            self._optimizer.param_groups[0]["lr"] = self._rate
            while self._left:
                run = self._left[0]
                self._move(run)
                self._left.popleft()
                self._is_scaled = False
                for layer in run.layers:
                    self._adapter.refresh(layer)
        except BaseException:
            self._is_interrupted = True
            raise
        finally:
            # A reader must not wait for ever; `finish` raises what went wrong here.
            for fresh in self._adapter.fresh:
                fresh.set()

    def _move(self, run: _LayerRun) -> None:
        """Move one run of layers; where that fails, it has not moved."""
        for layer in run.layers:
            self._gradients.wait(layer)
        grad = self._gradients.whole[run.place]
        if self._scale != 1.0 and not self._is_scaled:
            grad.mul_(self._scale)
        self._is_scaled = True
        done_steps = self._optimizer.state[run.masters]["step"]
        before = done_steps.clone()
        # Parameters without a gradient are passed over: one run moves at a time.
        run.masters.grad = grad
        try:
            self._optimizer.step()
        except BaseException:
            # torch counts first; its fused kernel allocates nothing and does all or nothing.
            done_steps.copy_(before)
            raise
        finally:
            run.masters.grad = None

    def _named_moments(self) -> Iterator[tuple[str, Tensor]]:
        for run in self._runs:
            state = self._optimizer.state[run.masters]
            sizes = [self._adapter.masters[layer].numel() for layer in run.layers]
            for moment in _HOST_MOMENTS:
                parts = state[moment].split(sizes)
                for layer, part in zip(run.layers, parts, strict=True):
                    for name, view in named_views(part, self._adapter.layers[layer], layer):
                        yield f"{name}.{moment}", view


@dataclass(frozen=True, slots=True)
class _LayerRun:
    """Some layers in a row: their indices, their place in the whole, and its masters."""

    layers: range
    place: slice
    masters: Tensor


def _layer_runs(adapter: Adapter) -> list[_LayerRun]:
    count = len(adapter.masters)
    starts = [run.storage_offset() for run in adapter.masters] + [adapter.whole.numel()]
    runs = []
    for first in range(0, count, _LAYERS_PER_RUN):
        layers = range(first, min(first + _LAYERS_PER_RUN, count))
        place = slice(starts[layers.start], starts[layers.stop])
        if place.stop > place.start:
            runs.append(_LayerRun(layers, place, adapter.whole[place]))
    return runs


class EightBitAdamW:
    """bitsandbytes' 8-bit AdamW, paged or not; adapter and moments live on the device."""

    def __init__(self, adapter: Adapter, gradients: Gradients, config: TrainConfig) -> None:
        self._adapter = adapter
        self._gradients = gradients
        # A layer without adapted linears has an empty run, which bitsandbytes cannot step.
        self._trained = [layer for layer, run in enumerate(adapter.masters) if run.numel()]
        # There is no managed memory on a CPU: bitsandbytes itself falls back there, and warns.
        is_paged = config.optim == "paged_adamw_8bit" and adapter.masters[0].is_cuda
        self._optimizer = _eight_bit_class(is_paged=is_paged)(
            [adapter.masters[layer] for layer in self._trained],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self._left: deque[int] = deque()
        self._is_interrupted = False
        self._make_moments()

    def start_step(self, learning_rate: float, grad_scale: float) -> None:
        """Move the adapter on the device."""
        self.finish()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if grad_scale != 1.0:
            self._gradients.whole.mul_(grad_scale)
        self._left.extend(self._trained)
        self._is_interrupted = True
        self.finish()

    def finish(self) -> None:
        """Move what an interrupted step has left; nothing runs behind our back."""
        if not self._is_interrupted:
            return
        while self._left:
            self._move(self._left[0])
            self._left.popleft()
        self._adapter.refresh_all()
        self._is_interrupted = False

    def reset(self) -> None:
        """Moments and the count of steps are zero."""
        self.finish()
        for layer in self._trained:
            state = self._optimizer.state[self._adapter.masters[layer]]
            state["step"] = 0
            for name, value in state.items():
                # The code tables are of all layers, and no state.
                if isinstance(value, Tensor) and not name.startswith("qmap"):
                    value.zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        """bitsandbytes' state of every layer, by its own names."""
        tensors: dict[str, Tensor] = {}
        for layer in self._trained:
            for name, value in self._optimizer.state.get(self._adapter.masters[layer], {}).items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
                tensors[f"layers.{layer}.{name}"] = tensor.detach().cpu()
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state of every layer, in the memory it already has."""
        self.finish()
        for layer in self._trained:
            state = self._optimizer.state[self._adapter.masters[layer]]
            for name in list(state):
                saved = tensors[f"layers.{layer}.{name}"]
                if isinstance(state[name], Tensor):
                    state[name].copy_(saved)
                else:
                    state[name] = int(saved)

    def _make_moments(self) -> None:
        """What bitsandbytes would make in the first step, when it may be too late."""
        self._optimizer.check_overrides()
        for number, layer in enumerate(self._trained):
            master = self._adapter.masters[layer]
            self._optimizer.init_state(self._optimizer.param_groups[0], master, 0, number)
        self._optimizer.initialized = True

    def _move(self, layer: int) -> None:
        """Move one layer; where that fails, it has not moved."""
        master = self._adapter.masters[layer]
        state = self._optimizer.state[master]
        before = state["step"]
        master.grad = self._gradients.sums[layer]
        try:
            self._optimizer.step()
        except BaseException:
            state["step"] = before
            raise
        finally:
            master.grad = None


def _eight_bit_class(*, is_paged: bool) -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise HardwareError(
            "bitsandbytes' 8-bit optimizer cannot be loaded.",
            why=str(error),
            fix="Run `eightgig doctor`, or set `train.optim: adamw_torch`.",
        ) from error
    return PagedAdamW8bit if is_paged else AdamW8bit
