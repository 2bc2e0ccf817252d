"""Inputs for the fast operations, and their comparison with the definitions in `ops.reference`.

Shared by the tests on a GPU and those under Triton's interpreter on the CPU. The measure: a fast
version is no further from float64 than the plain one in the same dtype, plus a small tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eightgig.ops import reference
from eightgig.ops.reference import HeadLayout, Placed

EPS = 1e-6


class Inputs:
    """Random tensors of one dtype on one device, reproducible."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self._generator)
        return values.to(self.device, dtype or self.dtype)

    def spaced(self, rows: int, columns: int, gap: int = 16) -> Tensor:
        """A matrix whose rows lie `gap` elements apart; NaN stands between them."""
        wide = torch.full((rows, columns + gap), float("nan"), device=self.device, dtype=self.dtype)
        wide[:, :columns] = self.normal(rows, columns)
        return wide[:, :columns]


def between_rows(matrix: Tensor) -> Tensor:
    """What lies between the rows of a matrix of `Inputs.spaced`."""
    assert matrix._base is not None
    return matrix._base[:, matrix.shape[1] :]


def assert_as_exact(
    fast: Callable[..., Any], plain: Callable[..., Any], *args: Any, extra: float, **options: Any
) -> None:
    """Compare both with the plain version in float64, by the relative error of every result."""
    results = _flat(fast(*args, **options))
    expected = _flat(plain(*map(_double, args), **{key: _double(x) for key, x in options.items()}))
    usual = _flat(plain(*args, **options))
    assert len(results) == len(expected)
    for place, (ours, exact, same_dtype) in enumerate(zip(results, expected, usual, strict=True)):
        allowed = relative_error(same_dtype, exact) + extra
        error = relative_error(ours, exact)
        assert ours.dtype == same_dtype.dtype
        assert error <= allowed, f"result {place}: {error:.3g} > {allowed:.3g}"


def relative_error(ours: Tensor, exact: Tensor) -> float:
    difference = (ours.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp_min(1e-30))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def _flat(results: Any) -> list[Tensor]:
    results = results if isinstance(results, tuple) else (results,)
    return [result for result in results if result is not None]


def packed_rows(lengths: Sequence[int], device: str) -> Tensor:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return bounds.to(device, torch.int32)


def check_attention(
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    inputs: Inputs,
    *,
    heads: tuple[int, int, int],
    lengths: Sequence[int],
    window: int | None,
    extra: float,
) -> None:
    """Outputs and gradients of packed rows, with gaps between the rows of every matrix."""
    num_heads, num_kv_heads, head_dim = heads
    tokens = sum(lengths)
    q, k, v, grad, out = (
        inputs.spaced(tokens, count * head_dim).unflatten(1, (count, head_dim))
        for count in (num_heads, num_kv_heads, num_kv_heads, num_heads, num_heads)
    )
    rows = (packed_rows(lengths, inputs.device), max(lengths), head_dim**-0.5, window)
    result, lse = forward(q, k, v, *rows, out=out)
    assert result.data_ptr() == out.data_ptr()
    results = (result, *backward(grad, q, k, v, result, lse, *rows))

    usual_out, usual_lse = reference.attention(q, k, v, *rows)
    usual = (
        usual_out,
        *reference.attention_backward(grad, q, k, v, usual_out, usual_lse, *rows),
    )
    q, k, v, grad = q.double(), k.double(), v.double(), grad.double()
    exact_out, exact_lse = reference.attention(q, k, v, *rows)
    exact = (
        exact_out,
        *reference.attention_backward(grad, q, k, v, exact_out, exact_lse, *rows),
    )
    if lse.shape == exact_lse.shape:
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)
    names = ("output", "grad_q", "grad_k", "grad_v")
    for name, ours, same_dtype, truth in zip(names, results, usual, exact, strict=True):
        allowed = relative_error(same_dtype, truth) + extra
        error = relative_error(ours, truth)
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


def check_norms(kernels: Any, inputs: Inputs, tokens: int, columns: int, extra: float) -> None:
    """Every norm with and without its optional arguments."""
    hidden, other = inputs.spaced(tokens, columns), inputs.spaced(tokens, columns)
    grad = inputs.spaced(tokens, columns)
    weight = inputs.normal(columns, dtype=torch.float32)
    scalar = torch.tensor(0.7, device=inputs.device)
    for w in (weight, None):
        compare = {"extra": extra}
        assert_as_exact(kernels.rms_norm, reference.rms_norm, hidden, w, EPS, **compare)
        for add in (other, None):
            assert_as_exact(
                kernels.rms_norm_backward, reference.rms_norm_backward, grad, hidden, w, EPS,
                add=add, **compare,
            )  # fmt: skip
        for s in (scalar, None):
            assert_as_exact(
                kernels.residual_norm, reference.residual_norm, other, hidden, w, EPS,
                scalar=s, **compare,
            )  # fmt: skip
            assert_as_exact(
                kernels.residual_norm_backward, reference.residual_norm_backward, grad, hidden, w,
                EPS, scalar=s, **compare,
            )  # fmt: skip
    out = inputs.spaced(tokens, columns)
    expected = kernels.rms_norm(hidden, weight, EPS)
    assert kernels.rms_norm(hidden, weight, EPS, out=out) is out
    assert torch.equal(out, expected)
    expected = kernels.residual_norm(other, hidden, weight, EPS, scalar=scalar)
    assert kernels.residual_norm(other, hidden, weight, EPS, scalar=scalar, out=out) is out
    assert torch.equal(out, expected)
    expected = kernels.rms_norm_backward(grad, hidden, weight, EPS, add=other)
    assert kernels.rms_norm_backward(grad, hidden, weight, EPS, add=other, out=out) is out
    assert torch.equal(out, expected)
    # The result may take the place of an input.
    own = hidden.clone()
    assert torch.equal(
        kernels.rms_norm_backward(grad, own, weight, EPS, add=other, out=own), expected
    )
    expected = kernels.residual_norm(other, hidden, weight, EPS, scalar=scalar)
    own = other.clone()
    assert torch.equal(
        kernels.residual_norm(own, hidden, weight, EPS, scalar=scalar, out=own), expected
    )
    _, written = kernels.residual_norm_backward(grad, hidden, weight, EPS, scalar=scalar, out=out)
    assert written is out
    assert between_rows(out).isnan().all()


def check_norm_rope(
    kernels: Any, inputs: Inputs, tokens: int, heads: HeadLayout, *, norms: bool, extra: float
) -> None:
    """Norm and rotation of heads, and their gradient."""
    qkv = inputs.spaced(tokens, heads.width)
    weights = [inputs.normal(heads.head_dim, dtype=torch.float32) if norms else None] * 2
    angles = inputs.normal(tokens, heads.head_dim // 2, dtype=torch.float32)
    fixed = (qkv, heads, *weights, angles.cos(), angles.sin(), EPS)
    assert_as_exact(kernels.qkv_norm_rope, reference.qkv_norm_rope, *fixed, extra=extra)
    grad_q = inputs.normal(tokens, heads.num_heads, heads.head_dim)
    grad_kv: list[Tensor | None] = [None, None]
    if heads.has_k:
        grad_kv = [inputs.normal(tokens, heads.num_kv_heads, heads.head_dim) for _ in "kv"]
    backward = kernels.qkv_norm_rope_backward
    assert_as_exact(
        backward, reference.qkv_norm_rope_backward, grad_q, *grad_kv, *fixed, extra=extra
    )
    out = inputs.spaced(tokens, heads.width)
    assert backward(grad_q, *grad_kv, *fixed, out=out) is out
    assert torch.equal(out, backward(grad_q, *grad_kv, *fixed))
    assert between_rows(out).isnan().all()


HEAD_LAYOUTS = {
    "own k and v": {"has_k": True, "has_v": True, "norms_v": False},
    "normed v": {"has_k": True, "has_v": True, "norms_v": True},
    "v is raw k": {"has_k": True, "has_v": False, "norms_v": True},
    "k and v of another layer": {"has_k": False, "has_v": False, "norms_v": True},
}


def check_glu(kernels: Any, inputs: Inputs, tokens: int, columns: int, extra: float) -> None:
    """Both activations, over the range where they bend, from halves of one matrix."""
    both = inputs.spaced(tokens, 2 * columns)
    gate, up = both[:, :columns], both[:, columns:]
    gate *= 4
    grad = inputs.normal(tokens, columns)
    for activation in ("silu", "gelu_tanh"):
        assert_as_exact(kernels.glu, reference.glu, gate, up, activation, extra=extra)
        backward = kernels.glu_backward
        fixed = (gate, up, grad, activation)
        assert_as_exact(backward, reference.glu_backward, *fixed, extra=extra)
        out = inputs.spaced(tokens, 2 * columns)
        expected = backward(*fixed)
        backward(*fixed, out_gate=out[:, :columns], out_up=out[:, columns:])
        assert torch.equal(out, torch.cat(expected, 1))


def check_cross_entropy(kernels: Any, inputs: Inputs, columns: int, softcap: float | None) -> None:
    """Two chunks in a row; labels before, in, at the ends of and behind the chunk."""
    logits = 20 * inputs.normal(6, columns, dtype=torch.float32)
    labels = torch.tensor([-3, 0, 5, columns - 1, columns, columns // 2], device=inputs.device)
    outcomes = []
    for version in (kernels, reference):
        maxima = None
        if softcap is None:
            maxima = torch.full((6,), float("-inf"), device=inputs.device)
        sums = torch.zeros(6, device=inputs.device)
        out = torch.empty(6, columns, device=inputs.device, dtype=inputs.dtype)
        for chunk in (logits, logits.flip(1) * 1.2):
            factor = version.cross_entropy_chunk(chunk, labels, softcap, maxima, sums, out)
        outcomes.append([x for x in (out, sums, maxima, factor) if x is not None])
    for ours, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(
            ours, expected, rtol=1e-2 if ours is outcomes[0][0] else 1e-5, atol=1e-7
        )
    inside = [1, 2, 3, 5]
    assert (outcomes[0][0][inside, labels[inside]] == 0).all()


def check_first_chunk_of_the_label_alone(kernels: Any, inputs: Inputs) -> None:
    """Nothing was seen: the maximum stays at -inf and nothing is NaN."""
    maxima = torch.full((1,), float("-inf"), device=inputs.device)
    sums = torch.zeros(1, device=inputs.device)
    out = torch.ones(1, 1, device=inputs.device, dtype=inputs.dtype)
    label = torch.zeros(1, dtype=torch.int64, device=inputs.device)
    logit = torch.ones(1, 1, device=inputs.device)
    factor = kernels.cross_entropy_chunk(logit, label, None, maxima, sums, out)
    assert (factor.item(), sums.item(), out.item()) == (1, 0, 0)
    assert maxima.item() == float("-inf")


def check_dropout(kernels: Any, inputs: Inputs, tokens: int, columns: int) -> None:
    """The same mask as the definition's, bit for bit, at any share and key."""
    hidden = inputs.spaced(tokens, columns)
    keys = torch.randint(0, 2**32, (tokens,), generator=torch.Generator().manual_seed(0))
    keys = keys.to(inputs.device)
    for p, module_key in ((0.0, 1), (0.1, 0x7FFFFFFF), (0.6, 0xF2345678)):
        ours = kernels.dropout(hidden, keys, module_key, p)
        assert torch.equal(ours, reference.dropout(hidden, keys, module_key, p))


def check_dequantize(
    kernels: Any, inputs: Inputs, rows: int, columns: int, *, nested: bool
) -> None:
    """Against the sums written out: product in float32, one rounding to the dtype of `out`."""
    count = rows * columns
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (count // 2,), generator=generator, dtype=torch.uint8)
    blocks = -(-count // 64)
    code, nested_code = (
        inputs.normal(16, dtype=torch.float32),
        inputs.normal(256, dtype=torch.float32),
    )
    maxima = inputs.normal(blocks, dtype=torch.float32)
    stored, scales, mean = maxima, None, 0.0
    if nested:
        mean = 0.123456789
        stored = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        stored = stored.to(inputs.device)
        scales = inputs.normal(-(-blocks // 256), dtype=torch.float32)
        maxima = nested_code[stored.long()] * scales.repeat_interleave(256)[:blocks]
        maxima = maxima + torch.tensor(mean, dtype=torch.float32, device=inputs.device)
    codes = codes.to(inputs.device)
    halves = torch.stack([codes >> 4, codes & 15], 1).view(-1).long()
    expected = code[halves] * maxima.repeat_interleave(64)[:count]
    out = inputs.spaced(rows, columns)
    dequantize = kernels.dequantizer(
        codes, stored, scales, mean, 64, 256 if nested else 0, code,
        nested_code if nested else None, out=out,
    )  # fmt: skip
    for _ in range(2):  # compiled, and launched again
        out.zero_()
        dequantize()
        assert torch.equal(out, expected.view(rows, columns).to(inputs.dtype))
    assert between_rows(out).isnan().all()


def check_placer(kernels: Any, inputs: Inputs, sizes: Sequence[tuple[int, int, int]]) -> None:
    """Bit for bit; nothing beside the rectangles is touched, and what the source holds then counts.

    Args:
        kernels: Has the fast version.
        inputs: Dtype and device.
        sizes: Rows, columns and width of every rectangle.
    """
    gap = 8
    pieces = []
    source_size = target_size = 0
    for number, (rows, columns, width) in enumerate(sizes):
        pieces.append(
            Placed(
                source=source_size,
                target=target_size + gap,
                rows=rows,
                columns=columns,
                stride=columns + gap,
                start=(columns - width) // 2,
                width=width,
                is_scaled=number % 2 == 1,
            )
        )
        source_size += rows * width
        target_size += gap + rows * (columns + gap)
    source = inputs.normal(source_size)
    before = torch.full((target_size,), float("nan"), device=inputs.device, dtype=inputs.dtype)
    targets = [before.clone() for _ in "ab"]
    place, expect = (
        way.placer(source, target, pieces, 1.7)
        for way, target in zip((kernels, reference), targets, strict=True)
    )
    for _ in range(2):
        source.copy_(inputs.normal(source_size))
        place()
        expect()
        assert torch.equal(*(target.nan_to_num(nan=1e4) for target in targets))
    assert targets[0].isnan().sum() == gap * (len(sizes) + sum(rows for rows, _, _ in sizes))
