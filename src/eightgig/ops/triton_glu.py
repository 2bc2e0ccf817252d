"""Gated activations in Triton, forward and backward: silu(gate) * up and gelu_tanh(gate) * up.

Both are x * sigmoid(z(x)), with z = x for silu and z = 2 sqrt(2/pi) (x + 0.044715 x^3) for gelu:
0.5 (1 + tanh(u)) is sigmoid(2 u), and that keeps its digits for very negative x.
"""

# ruff: noqa: N803 - constants of a kernel are written in capitals

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from eightgig.ops.reference import Activation
from eightgig.ops.triton_jit import device_function, kernel

_BLOCK = 1024
_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)


@device_function
def _sigmoid_of(x: tl.tensor, SILU: tl.constexpr) -> tl.tensor:
    z = x if SILU else _ROOT * (x + _CUBIC * x * x * x)
    return 1.0 / (1.0 + tl.exp(-z))


@device_function
def _load_row(
    base: tl.tensor, stride: tl.tensor, columns: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    at = base + tl.multiple_of(tl.program_id(0).to(tl.int64) * stride, 8) + columns
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@device_function
def _store_row(
    base: tl.tensor, stride: tl.tensor, columns: tl.tensor, inside: tl.tensor, value: tl.tensor
) -> None:
    at = base + tl.multiple_of(tl.program_id(0).to(tl.int64) * stride, 8) + columns
    tl.store(at, value.to(base.dtype.element_ty), mask=inside)


@kernel()
def _glu(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    out_stride: tl.tensor,
    F: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    x = _load_row(gate, gate_stride, columns, inside)
    value = x * _sigmoid_of(x, SILU) * _load_row(up, up_stride, columns, inside)
    _store_row(out, out_stride, columns, inside, value)


@kernel()
def _glu_backward(
    gate: tl.tensor,
    up: tl.tensor,
    grad: tl.tensor,
    grad_gate: tl.tensor,
    grad_up: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    grad_stride: tl.tensor,
    grad_gate_stride: tl.tensor,
    grad_up_stride: tl.tensor,
    F: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    x = _load_row(gate, gate_stride, columns, inside)
    g = _load_row(grad, grad_stride, columns, inside)
    sigmoid = _sigmoid_of(x, SILU)
    slope_of_z = 1.0 if SILU else _ROOT * (1.0 + 3.0 * _CUBIC * x * x)
    slope = sigmoid + x * sigmoid * (1.0 - sigmoid) * slope_of_z
    slope_up = g * _load_row(up, up_stride, columns, inside)
    _store_row(grad_gate, grad_gate_stride, columns, inside, slope_up * slope)
    _store_row(grad_up, grad_up_stride, columns, inside, g * x * sigmoid)


def glu(gate: Tensor, up: Tensor, activation: Activation, *, out: Tensor | None = None) -> Tensor:
    """`reference.glu`."""
    tokens, F = gate.shape
    if out is None:
        out = torch.empty_like(gate)
    _glu.launch(
        (tokens, -(-F // _BLOCK), 1),
        gate, up, out, gate.stride(0), up.stride(0), out.stride(0),
        constants=(F, activation == "silu", _BLOCK),
    )  # fmt: skip
    return out


def glu_backward(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    activation: Activation,
    *,
    out_gate: Tensor | None = None,
    out_up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.glu_backward`; the results may take the place of the inputs."""
    tokens, F = gate.shape
    if out_gate is None:
        out_gate = torch.empty_like(gate)
    if out_up is None:
        out_up = torch.empty_like(gate)
    _glu_backward.launch(
        (tokens, -(-F // _BLOCK), 1),
        gate, up, grad, out_gate, out_up, gate.stride(0), up.stride(0), grad.stride(0),
        out_gate.stride(0), out_up.stride(0),
        constants=(F, activation == "silu", _BLOCK),
    )  # fmt: skip
    return out_gate, out_up
