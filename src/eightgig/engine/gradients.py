"""Where the adapter's gradients are summed, layer by layer.

With the optimizer on the device, or on a CPU, they are summed in place. With the optimizer on the
host, a layer's gradients are summed in one of two device buffers during its visit and then copied
to pinned memory beside the computation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from eightgig.adapters.lora import GroupMasters, LinearGroup, split_masters
from eightgig.streaming.side import SideStream


class Gradients:
    """float32 sums of the adapter's gradients, one flat run per layer, laid out as the masters.

    Args:
        layers: Groups of every layer.
        device: Where layers compute.
        place: Where the optimizer reads the sums.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[LinearGroup]],
        *,
        device: torch.device,
        place: torch.device,
    ) -> None:
        self.device = device
        self.layers = tuple(tuple(groups) for groups in layers)
        sizes = [sum(group.master_size for group in groups) for groups in self.layers]
        is_pinned = place.type == "cpu" and device.type == "cuda"
        whole = torch.zeros(sum(sizes), dtype=torch.float32, device=place, pin_memory=is_pinned)
        self.sums: list[Tensor] = list(whole.split(sizes))
        self.whole = whole
        self._lane = _CopyLane(device, max(sizes)) if is_pinned else None
        self._arrived: list[torch.cuda.Event | None] = [None] * len(sizes)
        self._views = [
            split_masters(run, groups) for run, groups in zip(self.sums, self.layers, strict=True)
        ]
        self._lane_views: dict[tuple[int, int], Mapping[str, GroupMasters]] = {}
        self._is_empty = True
        self._norms = torch.zeros(len(sizes), device=device)
        self._norm_places = self._norms.unbind()
        self._reader: Future[None] | None = None

    def begin_step(self) -> None:
        """Start from zero."""
        self._is_empty = True
        if self._lane is None:
            self.wait_for_reader()
            self.whole.zero_()

    def end_group(self) -> None:
        """Say that every layer has been visited once; further visits add."""
        self._is_empty = False

    def hand_to(self, reader: Future[None]) -> None:
        """Let `reader` use the sums in the background; `open` waits until it is done."""
        self._reader = reader

    def divide(self, divisor: float) -> None:
        """Divide all sums of a step that has no more groups; blocks the calling thread."""
        for layer in range(len(self.sums)):
            self.wait(layer)
        self.whole.div_(divisor)
        self._norms.div_(divisor)

    def norm(self) -> float:
        """Norm of the whole gradient; waits for the device."""
        return float(torch.linalg.vector_norm(self._norms))

    def open(self, layer: int) -> Mapping[str, GroupMasters]:
        """Views to add the gradients of `layer` to, by group name."""
        self.wait_for_reader()
        if self._lane is None:
            return self._views[layer]
        earlier, arrived = None, self._arrived[layer]
        if not self._is_empty and arrived is not None:
            arrived.wait(self._lane.compute)
            earlier = self.sums[layer]
        run = self._lane.take(self.sums[layer].numel(), earlier)
        key = (run.data_ptr(), layer)
        if key not in self._lane_views:
            self._lane_views[key] = split_masters(run, self.layers[layer])
        return self._lane_views[key]

    def close(self, layer: int) -> None:
        """End the visit of `layer`: its sums start on their way to the optimizer."""
        run = self.sums[layer]
        run = run if self._lane is None else self._lane.current[: run.numel()]
        torch.linalg.vector_norm(run, out=self._norm_places[layer])
        if self._lane is not None:
            self._arrived[layer] = self._lane.send(self.sums[layer])

    def wait_for_reader(self) -> None:
        """Return when the reader is done; what went wrong there is raised here, once."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.result()

    def wait(self, layer: int) -> Tensor:
        """The sums of `layer`, once they have arrived; blocks the calling thread."""
        event = self._arrived[layer]
        if event is not None:
            event.synchronize()
        return self.sums[layer]


class _CopyLane:
    """Two device buffers in turn, emptied by a stream of their own."""

    def __init__(self, device: torch.device, size: int) -> None:
        self._buffers = [torch.zeros(size, device=device) for _ in "ab"]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._side = SideStream(device)
        self._current = 0

    @property
    def compute(self) -> torch.cuda.Stream:
        """The stream that computes."""
        return self._side.compute

    @property
    def current(self) -> Tensor:
        """The buffer that is being filled."""
        return self._buffers[self._current]

    def take(self, size: int, earlier: Tensor | None) -> Tensor:
        sent = self._sent[self._current]
        if sent is not None:
            sent.wait(self._side.compute)
        run = self.current[:size]
        if earlier is None:
            return run.zero_()
        return run.copy_(earlier, non_blocking=True)

    def send(self, target: Tensor) -> torch.cuda.Event:
        self._side.follow()
        with self._side:
            source = self.current[: target.numel()]
            target.copy_(source, non_blocking=True)
            event = self._side.mark()
        self._sent[self._current] = event
        self._current = 1 - self._current
        return event
