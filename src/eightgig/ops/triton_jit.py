"""Triton kernels as this package launches them: typed, and with little Python per launch.

Triton's own launch looks at every argument and at several environment variables, which takes 25 to
45 us with the kernels here [H100 machine, 2026-11-24]: on small models longer than the kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

Grid = tuple[int, int, int]
# How Triton calls compiled code: 3.6, and 3.7 to 3.9.
_CALL = ("gridX", "gridY", "gridZ", "stream", "function")
_HOOKS = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")
_KNOWN_CALLS = ((*_CALL, "args"), (*_CALL, *_HOOKS, "args"))


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
        self._varies = [name in varying for name in inspect.signature(function).parameters]
        self._compiled: dict[tuple[object, ...], Callable[..., None]] = {}

    def launch(
        self, grid: Grid, *arguments: Any, constants: tuple[int, ...], **options: int
    ) -> None:
        """Run on `grid`, with all parameters in their order.

        Args:
            grid: Programs.
            arguments: Parameters that are no constants.
            constants: The others.
            options: `num_warps`, `num_stages` and `enable_fp_fusion`, where they are not 4, 1, 1.
        """
        key, passed = self._read(arguments, constants, options)
        self._run(key, grid, passed, (arguments, constants, options))

    def bind(
        self, grid: Grid, *arguments: Any, constants: tuple[int, ...], **options: int
    ) -> Callable[[], None]:
        """What launches with just these arguments, read once: for tensors that stay in place."""
        key, passed = self._read(arguments, constants, options)

        return partial(self._run, key, grid, passed, (arguments, constants, options))

    def _read(
        self, arguments: Sequence[Any], constants: tuple[int, ...], options: dict[str, int]
    ) -> tuple[tuple[object, ...], list[Any]]:
        """What compiled code depends on, and the arguments with addresses in place of tensors.

        Triton assumes aligned addresses, so whether they are is among the former; the device, for
        which code is loaded, is that of the tensors.
        """
        key: list[object] = [constants, *options.items()]
        passed: list[Any] = []
        keep, hand_on = key.append, passed.append
        device = None
        for argument, varies in zip(arguments, self._varies, strict=False):
            kind = type(argument)
            if kind is Tensor:
                address = argument.data_ptr()
                keep(argument.dtype)
                keep(address & 15)
                hand_on(address)
                if device is None:
                    device = argument.device
                    keep(device)
                continue
            hand_on(argument)
            if not varies:
                if kind is int or argument is None:
                    keep(argument)
                else:  # a descriptor of tiles, whose shape is among the constants
                    keep(kind)
                    keep(argument.base.dtype)
        return tuple(key), passed

    def _run(
        self,
        key: tuple[object, ...],
        grid: Grid,
        passed: Sequence[Any],
        given: tuple[tuple[Any, ...], tuple[int, ...], dict[str, int]],
    ) -> None:
        """Launch what was compiled for `key`; else run through Triton and keep what it compiles.

        Args:
            key, passed: From `_read`.
            grid: Programs.
            given: Arguments, constants and options that they were read from.
        """
        arguments, constants, options = given
        launch = self._compiled.get(key)
        if launch is not None:
            launch(*grid, *passed, *constants)
            return
        options = {"num_warps": 4, "num_stages": 1, **options}
        compiled = self.jit[grid](*arguments, *constants, **options)
        if isinstance(compiled, CompiledKernel):  # the interpreter returns nothing
            self._compiled[key] = _launcher(compiled)


def kernel(*, varying: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a `Kernel` of a function."""

    def make(function: Callable[..., Any]) -> Kernel:
        return Kernel(function, varying)

    return make


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def _launcher(compiled: CompiledKernel) -> Callable[..., None]:
    """Runs compiled code, called with three numbers of the grid and all parameters.

    Where Triton's inner call is the known one it is called at once, without hooks.
    """
    run = compiled.run
    if tuple(inspect.signature(run).parameters) not in _KNOWN_CALLS:
        return lambda x, y, z, *parameters: compiled[x, y, z](*parameters)
    function, metadata = compiled.function, compiled.packed_metadata
    stream_of, device = driver.active.get_current_stream, driver.active.get_current_device()

    def launch(x: int, y: int, z: int, *parameters: Any) -> None:
        run(x, y, z, stream_of(device), function, metadata, None, None, None, *parameters)

    return launch
