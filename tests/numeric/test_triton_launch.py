"""When a kernel is compiled anew, and when what was compiled is launched again."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.compiler import CompiledKernel

from eightgig.ops.triton_jit import kernel

MATRIX = torch.zeros(4, 16)


class _Compiled(CompiledKernel):
    """Stands for compiled code; it keeps what it was launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[object, ...]] = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, *arguments))


class _Compiler:
    """Stands for Triton; every launch through it makes new code."""

    def __init__(self) -> None:
        self.made: list[_Compiled] = []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **options):
            self.made.append(_Compiled())
            return self.made[-1]

        return compile_and_run


@pytest.fixture
def launched():
    @kernel(varying=("tokens",))
    def copy(source, weight, stride, tokens, WIDTH):  # noqa: N803 - a constant
        pass

    copy.jit = _Compiler()
    copy.launch((4, 1, 1), MATRIX, None, 16, 4, constants=(16,))
    return copy


def test_the_same_kinds_of_arguments_run_what_was_compiled(launched) -> None:
    other = torch.ones(4, 16)
    launched.launch((9, 1, 1), other, None, 16, 5, constants=(16,))
    (compiled,) = launched.jit.made
    assert compiled.launches == [((9, 1, 1), other, None, 16, 5, 16)]


@pytest.mark.parametrize(
    ("source", "weight", "stride", "width"),
    [
        (MATRIX.half(), None, 16, 16),
        (MATRIX.view(-1)[1:], None, 16, 16),
        (MATRIX, MATRIX, 16, 16),
        (MATRIX, None, 24, 16),
        (MATRIX, None, 16, 8),
    ],
    ids=["another dtype", "an unaligned address", "an optional tensor", "a stride", "a constant"],
)
def test_what_compiled_code_depends_on_compiles_it_anew(
    launched, source, weight, stride, width
) -> None:
    launched.launch((4, 1, 1), source, weight, stride, 4, constants=(width,))
    assert len(launched.jit.made) == 2
