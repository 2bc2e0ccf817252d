"""The Triton kernels without a GPU: under Triton's interpreter, and cross-compiled."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402 - only where Triton is
from triton.compiler import ASTSource  # noqa: E402

from eightgig.ops import triton_attention  # noqa: E402
from eightgig.ops.triton_attention import Tile  # noqa: E402
from eightgig.ops.triton_jit import Kernel  # noqa: E402

SHARED_BYTES = {(8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448, (12, 0): 101_376}
"""What a block may use of shared memory, by compute capability (CUDA's programming guide)."""


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


@pytest.mark.skipif(
    _release("triton") < (3, 7) and _release("numpy") >= (2, 4),
    reason="the interpreter of Triton before 3.7 breaks on NumPy 2.4",
)
def test_kernels_agree_with_the_definitions_under_the_interpreter() -> None:
    cases = Path(__file__).with_name("interpreted_kernels.py")
    # Triton reads the variable when it is first imported, so this takes another process. NumPy
    # warns where a masked lane divides by zero, which a GPU does without a word.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("capability", "head_dim"),
    [((8, 6), 512), ((8, 9), 512), ((12, 0), 512), ((9, 0), 512), ((8, 6), 256)],
)
def test_attention_tiles_fit_the_shared_memory_of_their_gpus(capability, head_dim) -> None:
    tiles = triton_attention.attention_tiles(head_dim, capability, processors=24)
    assert tiles is not None
    kernels: list[tuple[Kernel, Tile, dict[str, bool]]] = [
        (triton_attention._forward, tiles.forward, {}),
        (triton_attention._backward_q, tiles.grad_q, {}),
        (
            triton_attention._backward_kv,
            tiles.grad_k,
            {"WANTS_K": True, "WANTS_V": tiles.grad_v is None},
        ),
    ]
    if tiles.grad_v is not None:
        flags = {"WANTS_K": False, "WANTS_V": True}
        kernels.append((triton_attention._backward_kv, tiles.grad_v, flags))
    for kernel, tile, flags in kernels:
        used = _shared_bytes(kernel, tile, capability, D=head_dim, TMA=tiles.uses_tma, **flags)
        assert used <= SHARED_BYTES[capability], f"{tile}: {used}"


def _shared_bytes(kernel: Kernel, tile: Tile, capability: tuple[int, int], **flags: Any) -> int:
    """Shared memory of a kernel of `triton_attention`, compiled without the GPU."""
    constants = flags | {
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "STAGES": tile.stages,
        "APART": tile.apart,
        "LAZY": tile.lazy,
        "GROUP": 16,
        "HEADS": 16,
        "KV_HEADS": 1,
    }
    signature: dict[str, str] = {}
    for name in kernel.jit.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("lse", "delta"):
            signature[name] = "*fp32"
        elif name == "cu_seqlens":
            signature[name] = "*i32"
        elif name == "scale":
            signature[name] = "fp32"
        elif name.endswith("_stride") or name in ("num_tokens", "window", "splits"):
            signature[name] = "i32"
        elif flags["TMA"] and _is_loaded(kernel, name):
            rows = tile.keys if name in ("k", "v") else tile.queries
            signature[name] = f"tensordesc<bf16[{rows}, {flags['D']}]>"
        else:
            signature[name] = "*bf16"
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (place,): aligned
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith("_stride")
    }
    compiled = triton.compile(
        ASTSource(
            kernel.jit,
            signature,
            constexprs={name: constants[name] for name in signature if name in constants},
            attrs=attributes,
        ),
        target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    return int(compiled.metadata.shared)


def _is_loaded(kernel: Kernel, name: str) -> bool:
    """Whether the kernel loads this matrix in tiles; the others it writes."""
    if name == "out":
        return kernel is triton_attention._backward_q
    return name in ("q", "k", "v", "grad_out")
