"""When a kernel is compiled anew, and when what was compiled is launched again."""

import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.compiler import CompiledKernel

from eightgig.ops import triton_jit
from eightgig.ops.triton_jit import kernel

MATRIX = torch.zeros(4, 16)


class _Compiled(CompiledKernel):
    """Stands for compiled code; it keeps what it was launched with."""

    function, packed_metadata = "handle", "metadata"

    def __init__(self) -> None:
        self.launches: list[tuple[object, ...]] = []

    @property
    def run(self):
        def launch(gridX, gridY, gridZ, stream, function, *args):  # noqa: N803 - Triton's names
            self.launches.append((gridX, gridY, gridZ, stream, function, *args))

        return launch


class _Unknown(_Compiled):
    """The same, of a Triton that is called in another way."""

    @property
    def run(self):
        return lambda *arguments: None

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, *arguments))


class _Compiler:
    """Stands for Triton; every launch through it makes new code."""

    def __init__(self, kind: type[_Compiled]) -> None:
        self.made: list[_Compiled] = []
        self._kind = kind

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **options):
            self.made.append(self._kind())
            return self.made[-1]

        return compile_and_run


@pytest.fixture(params=[_Compiled, _Unknown])
def launched(request, monkeypatch):
    active = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: f"stream {device}"
    )
    monkeypatch.setattr(triton_jit, "driver", SimpleNamespace(active=active))

    @kernel(varying=("tokens",))
    def copy(source, weight, stride, tokens, WIDTH):  # noqa: N803 - a constant
        pass

    copy.jit = _Compiler(request.param)
    copy.launch((4, 1, 1), MATRIX, None, 16, 4, constants=(16,))
    return copy


def test_the_same_kinds_of_arguments_run_what_was_compiled(launched) -> None:
    other = torch.ones(4, 16)
    launched.launch((9, 1, 1), other, None, 16, 5, constants=(16,))
    (compiled,) = launched.jit.made
    parameters = (other.data_ptr(), None, 16, 5, 16)
    if isinstance(compiled, _Unknown):
        assert compiled.launches == [((9, 1, 1), *parameters)]
    else:
        before = ("stream 0", "handle", "metadata", None, None, None)
        assert compiled.launches == [(9, 1, 1, *before, *parameters)]


def test_the_installed_triton_is_called_in_a_known_way() -> None:
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    parameters = tuple(inspect.signature(driver.CudaLauncher.__call__).parameters)
    assert parameters[1:] in triton_jit._KNOWN_CALLS


def test_bound_arguments_are_launched_again_and_again(launched) -> None:
    again = launched.bind((4, 1, 1), MATRIX.half(), None, 16, 4, constants=(16,))
    again()
    again()
    again()
    assert len(launched.jit.made) == 2
    first, second = launched.jit.made
    assert not first.launches
    assert len(second.launches) == 2


def test_options_are_told_apart_by_their_names(launched) -> None:
    for options in ({"num_warps": 8}, {"num_stages": 8}, {"num_stages": 8, "num_warps": 4}):
        launched.launch((4, 1, 1), MATRIX, None, 16, 4, constants=(16,), **options)
    assert len(launched.jit.made) == 4


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
