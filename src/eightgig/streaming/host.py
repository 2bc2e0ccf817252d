"""Host memory that copies to the device start from: pinned arenas, or memory mapped from disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

HostPlace = Literal["pinned", "pageable", "mapped"]

# The allocator of pinned memory rounds up to a power of two: arenas of exactly that size waste
# nothing, and several of them succeed where one large one is refused (Windows, WSL).
_ARENA_BYTES = 512 << 20
_ALIGNMENT_BYTES = 256
_logger = logging.getLogger(__name__)


class PinnedArenas:
    """Bump allocation of pinned host memory, freed as a whole.

    Raises:
        RuntimeError: From `take`, when the system refuses to pin more.
    """

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._arenas: list[Tensor] = []
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, size_bytes: int, *, expected_bytes: int = 0) -> Tensor:
        """A (size_bytes,) uint8 run, aligned to 256 bytes.

        Args:
            size_bytes: Size of the run.
            expected_bytes: What will still be taken, this run included: the last arena is made
                no larger than that.
        """
        rounded = -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if rounded > self._left.numel():
            wanted = min(max(expected_bytes, rounded), _ARENA_BYTES)
            arena_bytes = max(1 << (wanted - 1).bit_length(), rounded)
            arena = torch.empty(arena_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
            self._arenas.append(arena)
            self._left = arena
        taken, self._left = self._left[:size_bytes], self._left[rounded:]
        return taken


def place_on_host(
    sources: Sequence[Tensor], place: HostPlace, *, check: Callable[[int], None] | None = None
) -> list[Tensor]:
    """`sources` (flat uint8, maybe mapped from disk) where copies to the device start from.

    Sources that share their memory share the copy. Memory that cannot be pinned stays mapped,
    and says so.

    Args:
        sources: Flat uint8 tensors.
        place: Where they go; mapped ones stay as they are.
        check: Called with the number of each distinct source before it is copied, in several
            threads at a time; raises if its bytes are damaged.
    """
    if place == "mapped":
        return list(sources)
    distinct = {source.data_ptr(): number for number, source in enumerate(sources)}
    left_bytes = sum(sources[number].numel() for number in distinct.values())
    arenas = PinnedArenas(is_pinned=place == "pinned")
    placed: dict[int, Tensor] = {}
    for pointer, number in distinct.items():
        size_bytes = sources[number].numel()
        try:
            placed[pointer] = arenas.take(size_bytes, expected_bytes=left_bytes)
        except RuntimeError as error:
            _logger.warning("Pinning stopped with %d bytes left: %s", left_bytes, error)
            placed[pointer] = sources[number]
        left_bytes -= size_bytes

    def fill(pointer: int) -> None:
        number = distinct[pointer]
        if check is not None:
            check(number)
        if placed[pointer] is not sources[number]:
            placed[pointer].copy_(sources[number])

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(fill, distinct))
    return [placed[source.data_ptr()] for source in sources]
