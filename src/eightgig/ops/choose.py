"""Which version of every operation runs on a device, and why."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from eightgig.config import Choice
from eightgig.errors import HardwareError
from eightgig.ops import flash, reference

Kernels = Literal["auto", "triton", "plain"]

_HEAD_DIMS = (64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ops:
    """The operations of a decoder layer and the head, with the signatures of `ops.reference`.

    Attributes:
        attention, attention_backward: Belong together: what the first returns beside its output
            has a form that only the second needs to know.
        dequantizer: Of `ops.triton_dequant`; None where `quant.nf4.dequantize` has to do.
    """

    rms_norm: Callable[..., Tensor]
    rms_norm_backward: Callable[..., Tensor]
    residual_norm: Callable[..., Tensor]
    residual_norm_backward: Callable[..., tuple[Tensor, Tensor]]
    qkv_norm_rope: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    qkv_norm_rope_backward: Callable[..., Tensor]
    glu: Callable[..., Tensor]
    glu_backward: Callable[..., tuple[Tensor, Tensor]]
    attention: Callable[..., tuple[Tensor, Tensor]]
    attention_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    cross_entropy_chunk: Callable[..., Tensor | None]
    dropout: Callable[..., Tensor]
    dequantizer: Callable[..., Callable[[], None]] | None
    placer: Callable[..., Callable[[], None]]


@dataclass(frozen=True, slots=True)
class _Attention:
    """One way to do attention, or why it cannot be used."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    reason: str
    lacking: str = ""


_PLAIN = Ops(
    rms_norm=reference.rms_norm,
    rms_norm_backward=reference.rms_norm_backward,
    residual_norm=reference.residual_norm,
    residual_norm_backward=reference.residual_norm_backward,
    qkv_norm_rope=reference.qkv_norm_rope,
    qkv_norm_rope_backward=reference.qkv_norm_rope_backward,
    glu=reference.glu,
    glu_backward=reference.glu_backward,
    attention=reference.attention,
    attention_backward=reference.attention_backward,
    cross_entropy_chunk=reference.cross_entropy_chunk,
    dropout=reference.dropout,
    dequantizer=None,
    placer=reference.placer,
)


def choose_ops(
    *,
    device: str,
    dtype: torch.dtype,
    kernels: Kernels,
    head_dims: Sequence[int] = _HEAD_DIMS,
) -> tuple[Ops, tuple[Choice, ...]]:
    """The fastest version of every operation that works here.

    What may fail on a machine is tried first, on a few numbers: Triton, which needs a C compiler,
    and torch's private attention operators, which need not be built in.

    Args:
        device: `cpu`, `cuda` or `cuda:1`.
        dtype: That the layers compute in.
        kernels: `plain` for the definitions in PyTorch alone, `triton` to insist on Triton.
        head_dims: Of the model's layers. With any other, attention is the plain definition.

    Returns:
        The operations, and for every decision the reason and what was rejected.

    Raises:
        HardwareError: `kernels` is `triton` and Triton does not work here.
    """
    if kernels == "plain":
        return _PLAIN, (_kernels_choice("plain", "asked for by `kernels: plain`"),)
    lacking = _why_no_triton(device, dtype)
    if lacking and kernels == "triton":
        raise HardwareError(
            "Triton kernels were asked for and do not work here.",
            why=lacking,
            fix="Set `memory.kernels: auto` to use what works, or install Triton for this GPU.",
        )
    if not device.startswith("cuda") or dtype == torch.float32:
        return _PLAIN, (_kernels_choice("plain", lacking),)
    if lacking:
        ops, choice = _PLAIN, _kernels_choice("plain", lacking, "triton")
    else:
        ops = _triton_ops(head_dims)
        choice = _kernels_choice("triton", "one launch per operation, tried on this GPU", "plain")
    ways, choices = _choose_attention(device, dtype, head_dims, lacking)
    forward = {size: way.forward for size, way in ways.items()}
    backward = {size: way.backward for size, way in ways.items()}

    def attention(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return forward.get(q.shape[-1], reference.attention)(q, *args, **options)

    def attention_backward(grad_out: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return backward.get(grad_out.shape[-1], reference.attention_backward)(grad_out, *args)

    ops = replace(ops, attention=attention, attention_backward=attention_backward)
    return ops, (choice, *choices)


def _kernels_choice(value: str, reason: str, rejected: str = "") -> Choice:
    return Choice(name="kernels", value=value, reason=reason, rejected=rejected)


def _why_no_triton(device: str, dtype: torch.dtype) -> str:
    """Why Triton cannot be used; empty where it can."""
    if not device.startswith("cuda"):
        return f"Triton needs a GPU, and the device is {device}"
    if dtype == torch.float32:
        return "the kernels compute in bfloat16 or float16, and the layers in float32"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from eightgig.ops.triton_norm import rms_norm

        ones = torch.ones(1, 64, dtype=dtype, device=device)
        result = float(rms_norm(ones, None, 0.0).float().mean())
    except _triton_failures() as error:
        return f"Triton does not work: {_first_line(error)}"
    return "" if result == 1.0 else f"Triton computes wrongly: {result} instead of 1"


def _triton_failures() -> tuple[type[Exception], ...]:
    """What importing, compiling and launching raise on a machine where Triton does not work."""
    usual = (RuntimeError, ImportError, OSError, subprocess.SubprocessError)
    try:
        from triton.errors import TritonError
    except (ImportError, OSError):
        return usual
    return (*usual, TritonError)  # such as that of a ptxas that does not know the GPU


def _triton_ops(head_dims: Sequence[int]) -> Ops:
    from eightgig.ops import (
        triton_cross_entropy,
        triton_dequant,
        triton_dropout,
        triton_glu,
        triton_norm,
        triton_place,
    )

    ops = replace(
        _PLAIN,
        rms_norm=triton_norm.rms_norm,
        rms_norm_backward=triton_norm.rms_norm_backward,
        residual_norm=triton_norm.residual_norm,
        residual_norm_backward=triton_norm.residual_norm_backward,
        glu=triton_glu.glu,
        glu_backward=triton_glu.glu_backward,
        cross_entropy_chunk=triton_cross_entropy.cross_entropy_chunk,
        dropout=triton_dropout.dropout,
        dequantizer=triton_dequant.dequantizer,
        placer=triton_place.placer,
    )
    if any(size & (size - 1) for size in head_dims):  # the kernel holds a head as a power of two
        return ops
    return replace(
        ops,
        qkv_norm_rope=triton_norm.qkv_norm_rope,
        qkv_norm_rope_backward=triton_norm.qkv_norm_rope_backward,
    )


def _choose_attention(
    device: str, dtype: torch.dtype, head_dims: Sequence[int], lacking: str
) -> tuple[dict[int, _Attention], list[Choice]]:
    """For each head_dim the first way that works, and why."""
    ways: dict[int, _Attention] = {}
    choices = []
    for size in head_dims:
        rejected = []
        for way in _ways_of_attention(device, dtype, size, lacking):
            if not way.lacking:
                ways[size] = way
                break
            rejected.append(f"{way.name}: {way.lacking}")
        choices.append(
            Choice(
                name=f"attention_head_dim_{size}",
                value=ways[size].name,
                reason=ways[size].reason,
                rejected="; ".join(rejected),
            )
        )
    return ways, choices


def _ways_of_attention(
    device: str, dtype: torch.dtype, head_dim: int, lacking: str
) -> Iterator[_Attention]:
    """The ways, fastest first; the last always works. Each is tried when it is reached."""
    probe = partial(flash.probe_attention, head_dim=head_dim, device=device, dtype=dtype)
    on_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    # Measured on an H100 for head_dim 128 and 256: torch's flash takes 1.2 to 1.4 times as long.
    # Where that was not measured, torch's comes first.
    beats_flash = on_hopper and head_dim >= 128
    if beats_flash:
        yield _triton_attention(device, head_dim, lacking)
    if head_dim <= flash.LARGEST_HEAD_DIM:
        way = (flash.flash_attention, flash.flash_attention_backward)
        yield _Attention("flash", *way, "torch's own, with windows and packed rows", probe(*way))
    if not beats_flash:
        yield _triton_attention(device, head_dim, lacking)
    way = (flash.efficient_attention, flash.efficient_attention_backward)
    yield _Attention("memory-efficient", *way, "torch's own, a few heads at a time", probe(*way))
    plain = (reference.attention, reference.attention_backward)
    yield _Attention("plain", *plain, "blocks of queries in PyTorch")


def _triton_attention(device: str, head_dim: int, lacking: str) -> _Attention:
    plain = (reference.attention, reference.attention_backward)
    if lacking:
        return _Attention("triton", *plain, "", lacking)
    from eightgig.ops import triton_attention

    properties = torch.cuda.get_device_properties(device)
    tiles = triton_attention.attention_tiles(
        head_dim, (properties.major, properties.minor), properties.multi_processor_count
    )
    if tiles is None:
        return _Attention("triton", *plain, "", f"no tiles for head_dim {head_dim} on this GPU")
    return _Attention(
        "triton",
        partial(triton_attention.attention, tiles=tiles),
        partial(triton_attention.attention_backward, tiles=tiles),
        "own kernel: no copies of K and V, no score leaves the chip",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
