"""Gradients compared with finite differences of the loss, on the model as it stands.

A wrong gradient trains, and the loss even falls; it only ends where it should not. Here one tensor
is moved along its own gradient g, both ways, and the loss must change as g says: the slope
(L(+e) - L(-e)) / 2e along g / |g| is |g|. A wrong factor shows, and so does what is missing or too
much: then g does not point where the loss rises most, and the slope is less than |g|.

The losses come from the forward pass alone, divided by the loss tokens of all micro-batches: the
normaliser of an optimizer step and its recomputation are tested, too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eightgig.adapters.lora import Adapter, named_views
from eightgig.models.spec import DecoderSpec, LayerSpec
from eightgig.training.worker import BatchesOf, Worker

TOLERANCES = {"float32": 0.01, "bfloat16": 0.15, "float16": 0.15}
"""Allowed |slope / |g| - 1| by compute dtype; measured on healthy models: docs/reliability.md."""

# Changes of the loss aimed at, in nats: well above what rounding does to a mean of some tokens.
# The last ones are for a loss that is no straight line over the first.
_LOSS_CHANGES = {
    "float32": (0.001, 0.002, 0.004, 0.0005, 0.00025),
    "bfloat16": (0.02, 0.04, 0.08, 0.01, 0.005),
    "float16": (0.02, 0.04, 0.08, 0.01, 0.005),
}
_AGREEING_MOVES = 3
# What rounding may do to a mean loss.
_NOISE = {"float32": 1e-4, "bfloat16": 0.01, "float16": 0.01}
# Root mean square by which elements of B may be moved; of A, its share of A's own.
_LARGEST_B_MOVE = 0.1
_LARGEST_A_MOVE_RATIO = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientCheck:
    """One tensor's gradient beside the slope of the loss.

    Attributes:
        name: `layers.{i}.{module}.lora_A` or `.lora_B`.
        ratio: Slope over |g|, as near to 1 as it was measured; None where rounding hides it.
        is_wrong: Moves of three sizes agree with each other and not with the gradient.
    """

    name: str
    ratio: float | None
    is_wrong: bool


def check_gradients(
    worker: Worker,
    decoder: DecoderSpec,
    batches: BatchesOf,
    *,
    step: int,
    deadline_seconds: float,
) -> tuple[GradientCheck, ...]:
    """Check one tensor of each kind of layer, and while there is time the other tensors there.

    The adapter and the optimizer are afterwards as before.

    Args:
        worker: Computes.
        decoder: The stack.
        batches: Micro-batches to take gradients and losses of; several, of unequal loss tokens.
        step: Number of the step, which dropout masks depend on.
        deadline_seconds: `time.monotonic()` after which no further tensor is begun.
    """
    worker.gradients(step, batches)
    adapter, gradients = worker.engine.adapter, worker.engine.gradients
    assert adapter is not None and gradients is not None
    kinds = layer_kinds(decoder)
    grads: dict[str, Tensor] = {}
    for layer in kinds:
        views = named_views(gradients.wait(layer), adapter.layers[layer], layer)
        grads |= {name: view.to(adapter.whole.device, copy=True) for name, view in views}
    masters = dict(adapter.named_tensors())
    probe = _Probe(worker, adapter, batches, step)
    checks = []
    for number, name in enumerate(_in_turn(list(grads), kinds)):
        if number >= len(kinds) and time.monotonic() > deadline_seconds:
            break
        checks.append(probe.check(name, masters[name], grads[name]))
    return tuple(checks)


def layer_kinds(decoder: DecoderSpec) -> tuple[int, ...]:
    """One layer of each kind: the middle one of those that differ in nothing but their place."""
    kinds: list[tuple[LayerSpec, bool, list[int]]] = []
    for layer in decoder.layers:
        is_source = any(other.kv_source == layer.index for other in decoder.layers)
        kind = replace(layer, index=0, kv_source=None if layer.kv_source is None else 0)
        for known, known_source, members in kinds:
            if known == kind and known_source == is_source:
                members.append(layer.index)
                break
        else:
            kinds.append((kind, is_source, [layer.index]))
    return tuple(members[len(members) // 2] for _, _, members in kinds)


def _in_turn(names: Sequence[str], layers: Sequence[int]) -> Iterator[str]:
    """All names: first one of each layer, each time of another linear; every B before any A."""
    for end in ("lora_B", "lora_A"):
        by_layer = [
            [name for name in names if name.startswith(f"layers.{layer}.") and name.endswith(end)]
            for layer in layers
        ]
        for turn in range(max(map(len, by_layer), default=0)):
            for place, own in enumerate(by_layer):
                if turn < len(own):
                    yield own[(turn + place) % len(own)]


class _Probe:
    """Moves one tensor and looks at the loss."""

    def __init__(self, worker: Worker, adapter: Adapter, batches: BatchesOf, step: int) -> None:
        self._worker = worker
        self._adapter = adapter
        self._batches = batches
        self._step = step
        dtype = worker.plan.compute_dtype
        self._tolerance = TOLERANCES[dtype]
        self._changes = _LOSS_CHANGES[dtype]
        self._noise = _NOISE[dtype]

    def check(self, name: str, master: Tensor, grad: Tensor) -> GradientCheck:
        norm = float(torch.linalg.vector_norm(grad))
        largest = self._largest_move(name, master)
        if norm * largest < self._changes[0] / 4:
            return self._check_silent(name, master, largest)
        ratios: dict[float, float] = {}
        for change in self._changes:
            ratio = self._slope(master, grad / norm, min(change / norm, largest)) / norm
            if abs(ratio - 1) <= self._tolerance:
                return GradientCheck(name=name, ratio=ratio, is_wrong=False)
            ratios[change] = ratio
            smallest = [ratios[each] for each in sorted(ratios)[:_AGREEING_MOVES]]
            if self._agree(smallest):
                nearest = min(smallest, key=lambda each: abs(each - 1))
                return GradientCheck(name=name, ratio=nearest, is_wrong=True)
        return GradientCheck(name=name, ratio=None, is_wrong=False)

    def _check_silent(self, name: str, master: Tensor, largest: float) -> GradientCheck:
        """A gradient of nearly nothing: then the loss must not care where the tensor is."""
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(master.shape, generator=generator).to(master.device)
        direction /= torch.linalg.vector_norm(direction)
        if not largest:
            return GradientCheck(name=name, ratio=None, is_wrong=False)
        slopes = [self._slope(master, direction, move) for move in (largest / 2, largest)]
        is_seen = abs(slopes[0]) * largest / 2 > self._noise
        is_wrong = is_seen and 0.5 < slopes[1] / slopes[0] < 2
        return GradientCheck(name=name, ratio=0.0 if is_wrong else None, is_wrong=is_wrong)

    def _slope(self, master: Tensor, direction: Tensor, move: float) -> float:
        """Central difference of the loss along a unit vector."""
        before = master.clone()
        losses = []
        try:
            for sign in (1, -1):
                master.copy_(before).add_(direction, alpha=sign * move)
                self._worker.adapter_has_changed()
                losses.append(self._worker.batch_loss(self._step, self._batches))
        finally:
            master.copy_(before)
            self._worker.adapter_has_changed()
        return (losses[0] - losses[1]) / (2 * move)

    def _agree(self, ratios: Sequence[float]) -> bool:
        """Whether the loss is a straight line over the moves that these slopes were taken over.

        Where it bends, slopes differ with the size of the move, and none is the gradient.
        """
        if len(ratios) < _AGREEING_MOVES or not all(map(math.isfinite, ratios)):
            return False
        return max(ratios) - min(ratios) <= self._tolerance * max(*map(abs, ratios), 1.0)

    @staticmethod
    def _largest_move(name: str, master: Tensor) -> float:
        """Norm of the largest move of a tensor that still is a small one."""
        if name.endswith("lora_B"):
            return _LARGEST_B_MOVE * math.sqrt(master.numel())
        return _LARGEST_A_MOVE_RATIO * float(torch.linalg.vector_norm(master))
