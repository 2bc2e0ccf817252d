"""AdamW over the adapter: in float32 on the host, or bitsandbytes' 8-bit on the device.

On the host, a thread updates layer after layer while the next step's forward pass already runs:
a layer's copy to the device waits for that layer alone. Numerically nothing changes by that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from eightgig.adapters.lora import Adapter, named_views
from eightgig.config import TrainConfig
from eightgig.engine.gradients import Gradients
from eightgig.errors import HardwareError

_HOST_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer(Protocol):
    """What the loop asks of an optimizer."""

    def start_step(self, learning_rate: float, grad_scale: float) -> None:
        """Move the adapter by the gradient times `grad_scale`."""

    def finish(self) -> None:
        """Wait until the adapter has moved."""

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
    """torch's fused AdamW, one per layer, stepped by a thread behind the next forward pass."""

    def __init__(self, adapter: Adapter, gradients: Gradients, config: TrainConfig) -> None:
        self._adapter = adapter
        self._gradients = gradients
        self._optimizers = [_adamw(master, config) for master in adapter.masters]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="eightgig-adamw")
        self._running: Future[None] | None = None

    def start_step(self, learning_rate: float, grad_scale: float) -> None:
        """Queue the update of every layer, in the order the next forward pass needs them."""
        self.finish()
        for fresh in self._adapter.fresh:
            fresh.clear()
        self._running = self._thread.submit(self._update, learning_rate, grad_scale)
        self._gradients.hand_to(self._running)

    def finish(self) -> None:
        """Wait for the thread."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Both moments of every adapter tensor, and the count of steps."""
        self.finish()
        tensors = dict(self._named_moments())
        tensors["step"] = torch.tensor(float(self._steps()))
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take moments and the count of steps."""
        self.finish()
        steps = float(tensors["step"])
        for optimizer, master in zip(self._optimizers, self._adapter.masters, strict=True):
            state: dict[str, Any] = {name: torch.zeros_like(master) for name in _HOST_MOMENTS}
            optimizer.state[master] = {**state, "step": torch.tensor(steps)}
        for name, view in self._named_moments():
            view.copy_(tensors[name])

    def _update(self, learning_rate: float, grad_scale: float) -> None:
        try:
            for layer, optimizer in enumerate(self._optimizers):
                master = self._adapter.masters[layer]
                grad = self._gradients.wait(layer)
                if grad_scale != 1.0:
                    grad.mul_(grad_scale)
                master.grad = grad
                optimizer.param_groups[0]["lr"] = learning_rate
                optimizer.step()
                self._adapter.refresh(layer)
        finally:
            # A reader must not wait for ever; `finish` raises what went wrong here.
            for fresh in self._adapter.fresh:
                fresh.set()

    def _steps(self) -> float:
        state = self._optimizers[0].state.get(self._adapter.masters[0])
        return float(state["step"]) if state else 0.0

    def _named_moments(self) -> Iterator[tuple[str, Tensor]]:
        for layer, optimizer in enumerate(self._optimizers):
            state = optimizer.state.get(self._adapter.masters[layer], {})
            for moment in _HOST_MOMENTS:
                if moment in state:
                    views = named_views(state[moment], self._adapter.layers[layer], layer)
                    yield from ((f"{name}.{moment}", view) for name, view in views)


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

    def start_step(self, learning_rate: float, grad_scale: float) -> None:
        """Move the adapter on the device."""
        for layer in self._trained:
            grad = self._gradients.sums[layer]
            if grad_scale != 1.0:
                grad.mul_(grad_scale)
            self._adapter.masters[layer].grad = grad
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._adapter.refresh_all()

    def finish(self) -> None:
        """Nothing runs behind our back."""

    def state_tensors(self) -> dict[str, Tensor]:
        """bitsandbytes' state of every layer, by its own names."""
        tensors: dict[str, Tensor] = {}
        for layer in self._trained:
            for name, value in self._optimizer.state.get(self._adapter.masters[layer], {}).items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
                tensors[f"layers.{layer}.{name}"] = tensor.detach().cpu()
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state of every layer, in the memory that a fresh optimizer would use."""
        for number, layer in enumerate(self._trained):
            master = self._adapter.masters[layer]
            master.grad = torch.zeros_like(master)
            self._optimizer.init_state(self._optimizer.param_groups[0], master, 0, number)
            state = self._optimizer.state[master]
            for name in list(state):
                saved = tensors[f"layers.{layer}.{name}"]
                if isinstance(state[name], Tensor):
                    state[name].copy_(saved)
                else:
                    state[name] = int(saved)
        self._optimizer.initialized = True


def _adamw(master: Tensor, config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [master],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


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
