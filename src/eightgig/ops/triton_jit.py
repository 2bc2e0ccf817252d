"""Triton kernels as this package launches them: typed, and with little Python per launch.

Triton's own launch looks at every argument and at several environment variables, which takes 25 to
45 us with the kernels here [H100 machine, 2026-11-24]: on small models longer than the kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import triton
from triton.compiler import CompiledKernel


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that kernels call."""
    return cast("Callable[..., Any]", triton.jit(function))


class Kernel:
    """A function compiled for the GPU when it is first launched with new kinds of arguments.

    Args:
        function: In Triton's language; its constants come last.
        varying: Numbers that change from batch to batch. For others a variant is compiled for each
            value that is 1 or a multiple of 16.

    Attributes:
        jit: Triton's own object, to compile for another GPU.
    """

    def __init__(self, function: Callable[..., Any], varying: Sequence[str]) -> None:
        self.jit = triton.jit(function, do_not_specialize=list(varying))
        names = inspect.signature(function).parameters
        self._varying = frozenset(place for place, name in enumerate(names) if name in varying)
        self._compiled: dict[tuple[object, ...], CompiledKernel] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        *arguments: Any,
        constants: tuple[int, ...],
        num_warps: int = 4,
        num_stages: int = 1,
        enable_fp_fusion: bool = True,
    ) -> None:
        """Run on `grid`, with all parameters in their order."""
        varying = self._varying
        key = (
            constants,
            num_warps,
            num_stages,
            torch.cuda.current_device() if torch.cuda.is_initialized() else -1,
            *[_kind(item) for place, item in enumerate(arguments) if place not in varying],
        )
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *constants)
            return
        compiled = self.jit[grid](
            *arguments,
            *constants,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=enable_fp_fusion,
        )
        if isinstance(compiled, CompiledKernel):  # the interpreter returns nothing
            self._compiled[key] = compiled


def kernel(*, varying: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a `Kernel` of a function."""

    def make(function: Callable[..., Any]) -> Kernel:
        return Kernel(function, varying)

    return make


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def _kind(argument: Any) -> object:
    """What of an argument the compiled code depends on: Triton assumes aligned addresses."""
    kind = type(argument)
    if kind is int or argument is None:
        return argument
    if kind is not torch.Tensor and hasattr(argument, "block_shape"):
        return argument.base.dtype  # a descriptor of tiles, whose shape is among the constants
    return argument.dtype, argument.data_ptr() & 15
