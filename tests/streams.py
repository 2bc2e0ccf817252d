"""CUDA's streams and events on a CPU: whatever touches the same memory must be in an order.

Work runs at once, as it is queued, so that results are a CPU's. A vector clock for every stream and
thread says what a device could also do in another order: two accesses to the same bytes, one of
them a write, neither known to come first, are a race.

What the watching thread does runs on its current stream. What threads do that are given work in the
meantime is done by themselves, but for copies that need not be waited for. No memory is given back
while it is watched: a buffer that is freed too early is not seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

Clock = dict[str, int]
"""By stream or thread, how many of its operations are known to be done."""
_MOST_RACES = 100


@dataclass(frozen=True)
class _Access:
    actor: str
    number: int
    operation: str


@dataclass
class _Accesses:
    """The last read and the last write of every actor."""

    reads: dict[str, _Access] = field(default_factory=dict)
    writes: dict[str, _Access] = field(default_factory=dict)


class Watch:
    """What streams and threads did.

    Attributes:
        races: The first pairs of accesses that nothing orders.
        forgets: Whether to leave out that a stream (first) waits for an event of another: then
            there must be a race.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self.forgets: Callable[[str, str], bool] = lambda waiting, other: False
        self._compute = _Stream(self, "compute")
        self._num_streams = 0
        self._local = threading.local()
        self._lock = threading.Lock()
        self._accesses: dict[int, dict[tuple[int, int], _Accesses]] = {}
        self._kept: list[torch.UntypedStorage] = []

    @property
    def clock(self) -> Clock:
        """Of the calling thread."""
        if not hasattr(self._local, "clock"):
            self._local.clock = {}
        return self._local.clock

    @property
    def stream(self) -> _Stream:
        """The current stream of the calling thread."""
        return getattr(self._local, "stream", self._compute)

    def set_stream(self, stream: _Stream) -> None:
        self._local.stream = stream

    def new_stream(self, device: torch.device) -> _Stream:
        """They are called `side 1`, `side 2` ... in the order in which they are made."""
        self._num_streams += 1
        return _Stream(self, f"side {self._num_streams}")

    def touch(
        self, operation: str, reads: list[Tensor], writes: list[Tensor], *, is_queued: bool
    ) -> None:
        """The calling thread does something, or queues it."""
        with self._lock:
            clock, actor = self.clock, threading.current_thread().name
            if is_queued or not getattr(self._local, "is_worker", False):
                clock, actor = self.stream.clock, self.stream.name
                join(clock, self.clock)
            clock[actor] = clock.get(actor, 0) + 1
            access = _Access(actor, clock[actor], operation)
            for tensor in reads:
                self._touch(tensor, access, clock, is_write=False)
            for tensor in writes:
                self._touch(tensor, access, clock, is_write=True)

    @contextmanager
    def worker(self, begun: Clock) -> Iterator[None]:
        """The calling thread works on its own from when `begun` was known."""
        self._local.is_worker = True
        join(self.clock, begun)
        with _Mode(self):
            yield

    def _touch(self, tensor: Tensor, access: _Access, clock: Clock, *, is_write: bool) -> None:
        if not tensor.numel() or len(self.races) >= _MOST_RACES:
            return
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._accesses:
            self._accesses[storage.data_ptr()] = {}
            self._kept.append(storage)
        known = self._accesses[storage.data_ptr()]
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        size = sum((length - 1) * stride for length, stride in strides) + 1
        start, end = tensor.data_ptr(), tensor.data_ptr() + size * tensor.element_size()
        for (other_start, other_end), others in known.items():
            if other_start < end and start < other_end:
                before = [*others.writes.values(), *(others.reads.values() if is_write else ())]
                self.races += [
                    f"{other.operation} on {other.actor}, {access.operation} on {access.actor}"
                    for other in before
                    if other.number > clock.get(other.actor, 0)
                ]
        own = known.setdefault((start, end), _Accesses())
        (own.writes if is_write else own.reads)[access.actor] = access


def join(clock: Clock, other: Clock) -> None:
    """Know what `other` knows, too."""
    for actor, number in other.items():
        clock[actor] = max(clock.get(actor, 0), number)


class _Stream:
    """In place of `torch.cuda.Stream`."""

    def __init__(self, watch: Watch, name: str) -> None:
        self._watch = watch
        self.name = name
        self.clock: Clock = {}

    def wait_stream(self, other: _Stream) -> None:
        event = _Event(self._watch)
        event.record(other)
        event.wait(self)

    def synchronize(self) -> None:
        join(self._watch.clock, self.clock)


class _Event:
    """In place of `torch.cuda.Event`."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._clock: Clock = {}
        self._of = ""

    def record(self, stream: _Stream | None = None) -> None:
        stream = stream or self._watch.stream
        self._clock, self._of = dict(stream.clock), stream.name

    def wait(self, stream: _Stream | None = None) -> None:
        stream = stream or self._watch.stream
        if not self._watch.forgets(stream.name, self._of):
            join(stream.clock, self._clock)

    def synchronize(self) -> None:
        join(self._watch.clock, self._clock)


class _Flag(threading.Event):
    """Hands on what the thread that sets it knows."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch
        self._clock: Clock = {}

    def set(self) -> None:
        join(self._clock, self._watch.clock)
        super().set()

    def wait(self, timeout: float | None = None) -> bool:
        is_set = super().wait(timeout)
        join(self._watch.clock, self._clock)
        return is_set


class _Mode(TorchDispatchMode):
    """Tells of every operation of a thread."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        options = kwargs or {}
        result = func(*args, **options)
        aliases = [each.alias_info for each in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return result  # a view touches nothing
        by_name = {each.name: each for each in func._schema.arguments}
        given = dict(zip(by_name, args, strict=False)) | options
        reads: list[Tensor] = []
        writes = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for name, value in given.items():
            alias = by_name[name].alias_info
            side = writes if alias is not None and alias.is_write else reads
            side += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        is_queued = bool(given.get("non_blocking", False))
        self._watch.touch(str(func), reads, writes, is_queued=is_queued)
        if func is torch.ops.aten._local_scalar_dense.default:
            self._watch.stream.synchronize()
        return result


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, *, is_pinned: bool = True) -> Iterator[Watch]:
    """Streams, events and threads are watched.

    Args:
        monkeypatch: The test's.
        is_pinned: What host memory says of itself.
    """
    watch = Watch()
    submit, result, empty = ThreadPoolExecutor.submit, Future.result, torch.empty

    def watched_submit(self, function, /, *args, **options):  # type: ignore[no-untyped-def]
        begun, done = dict(watch.clock), Clock()

        def work() -> Any:
            with watch.worker(begun):
                try:
                    return function(*args, **options)
                finally:
                    join(done, watch.clock)

        future = submit(self, work)
        future.clock = done
        return future

    def watched_result(self, timeout=None):  # type: ignore[no-untyped-def]
        value = result(self, timeout)
        join(watch.clock, getattr(self, "clock", {}))
        return value

    def unpinned_empty(*size, pin_memory=False, **options):  # type: ignore[no-untyped-def]
        if not pin_memory:
            return empty(*size, **options)
        with _disable_current_modes():  # no stream of the device is asked for host memory
            return empty(*size, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", watched_submit)
        patch.setattr(Future, "result", watched_result)
        patch.setattr(threading, "Event", lambda: _Flag(watch))
        patch.setattr(torch, "empty", unpinned_empty)
        patch.setattr(Tensor, "is_pinned", lambda self: is_pinned)
        patch.setattr(torch.cuda, "Stream", watch.new_stream)
        patch.setattr(torch.cuda, "Event", lambda: _Event(watch))
        patch.setattr(torch.cuda, "current_stream", lambda device: watch.stream)
        patch.setattr(torch.cuda, "set_stream", watch.set_stream)
        with _Mode(watch):
            yield watch
