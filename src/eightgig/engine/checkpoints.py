"""Tensors that wait between forward and backward: on the device, or in pinned host memory.

Each is written once in the forward pass and read once in the backward pass, in an order known
beforehand. On the host, writing and reading run on streams of their own beside the computation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from eightgig.streaming.host import PinnedArenas
from eightgig.streaming.meter import WaitMeter

_WRITES_IN_FLIGHT = 3
_READS_AHEAD = 2


class Waiting(Protocol):
    """Where tensors wait."""

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep `tensor`; the caller must not change it."""

    def read(self, keys: Sequence[Hashable]) -> Iterator[Tensor]:
        """The tensors of `keys`, one at a time; each is valid until the next is asked for."""

    def clear(self) -> None:
        """Forget everything."""


class DeviceWaiting:
    """Tensors wait where they are."""

    def __init__(self) -> None:
        self._tensors: dict[Hashable, Tensor] = {}

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a reference."""
        self._tensors[key] = tensor

    def read(self, keys: Sequence[Hashable]) -> Iterator[Tensor]:
        """Give the references up one by one."""
        for key in keys:
            yield self._tensors.pop(key)

    def clear(self) -> None:
        """Forget everything."""
        self._tensors.clear()


class HostWaiting:
    """Tensors wait in pinned host memory.

    Runs are reused from step to step; a key's run grows when a longer tensor comes.

    Args:
        device: Where tensors come from and go to.
        meter: Times the waits for copies.
    """

    def __init__(self, device: torch.device, meter: WaitMeter) -> None:
        self._device = device
        self._meter = meter
        self._arenas = PinnedArenas(is_pinned=True)
        self._runs: dict[Hashable, Tensor] = {}
        self._views: dict[Hashable, Tensor] = {}
        self._out_stream = torch.cuda.Stream(device)
        self._in_stream = torch.cuda.Stream(device)
        self._writing: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._buffers: list[Tensor] = []
        self._last_write: torch.cuda.Event | None = None

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Start the copy to the host once the work queued so far is done."""
        size_bytes = tensor.numel() * tensor.element_size()
        run = self._runs.get(key)
        if run is None or run.numel() < size_bytes:
            run = self._runs[key] = self._arenas.take(size_bytes, expected_bytes=1 << 30)
        view = run[:size_bytes].view(tensor.dtype).view(tensor.shape)
        self._views[key] = view
        self._out_stream.wait_stream(torch.cuda.current_stream(self._device))
        event = torch.cuda.Event()
        with torch.cuda.stream(self._out_stream):
            view.copy_(tensor, non_blocking=True)
            event.record(self._out_stream)
        self._last_write = event
        self._writing.append((tensor, event))
        while len(self._writing) > _WRITES_IN_FLIGHT:
            # The memory is reused by this stream only, behind the copy.
            self._writing.popleft()[1].wait()

    def read(self, keys: Sequence[Hashable]) -> Iterator[Tensor]:
        """Copy ahead of the reader, into buffers that are used in turn."""
        self._finish_writes()
        views = [self._views[key] for key in keys]
        buffers = self._buffers_for(max(view.numel() * view.element_size() for view in views))
        free: list[torch.cuda.Event | None] = [None] * len(buffers)
        arrived: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._in_stream.wait_stream(torch.cuda.current_stream(self._device))
        if self._last_write is not None:
            self._in_stream.wait_event(self._last_write)

        def start(number: int) -> None:
            which = number % len(buffers)
            event = torch.cuda.Event()
            view = views[number]
            size_bytes = view.numel() * view.element_size()
            target = buffers[which][:size_bytes].view(view.dtype).view(view.shape)
            with torch.cuda.stream(self._in_stream):
                before = free[which]
                if before is not None:
                    self._in_stream.wait_event(before)
                target.copy_(view, non_blocking=True)
                event.record(self._in_stream)
            arrived.append((target, event))

        for number in range(min(_READS_AHEAD, len(views))):
            start(number)
        for number in range(len(views)):
            target, event = arrived.popleft()
            self._meter.wait(event.wait)
            yield target
            done = torch.cuda.Event()
            done.record()
            free[number % len(buffers)] = done
            if number + _READS_AHEAD < len(views):
                start(number + _READS_AHEAD)

    def clear(self) -> None:
        """Forget what waits; the host memory is kept for the next step."""
        self._finish_writes()
        self._views.clear()

    def _finish_writes(self) -> None:
        while self._writing:
            self._writing.popleft()[1].wait()

    def _buffers_for(self, size_bytes: int) -> list[Tensor]:
        if not self._buffers or self._buffers[0].numel() < size_bytes:
            self._buffers = []
            self._buffers = [
                torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
                for _ in range(_READS_AHEAD + 1)
            ]
        return self._buffers
