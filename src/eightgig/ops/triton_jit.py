"""A typed `triton.jit`: what a kernel of this package is to the rest of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import triton


class Kernel(Protocol):
    """A compiled-on-demand kernel: `kernel[grid](*args)` launches it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        """The launch on `grid`."""
        ...

    def __call__(self, *args: Any) -> Any:
        """A call from inside another kernel."""
        ...


def kernel(*, varying: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a kernel of a function.

    Args:
        varying: Integer arguments that change from batch to batch. Triton compiles a variant for
            a 1 and one for multiples of 16 otherwise, in the middle of a run.
    """

    def make(function: Callable[..., Any]) -> Kernel:
        return cast("Kernel", triton.jit(function, do_not_specialize=list(varying)))

    return make


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()
