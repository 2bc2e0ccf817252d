"""The plain definitions against autograd, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from eightgig.ops import reference as ops

EPS = 1e-6


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("has_weight", [True, False])
def test_rms_norm_and_its_gradient(tokens: int, has_weight: bool) -> None:
    x = _random(tokens, 48).requires_grad_()
    weight = _random(48, seed=1) if has_weight else None
    expected = F.rms_norm(x, (48,), weight, EPS)
    _assert_close(ops.rms_norm(x, weight, EPS), expected)
    grad, add = _random(tokens, 48, seed=2), _random(tokens, 48, seed=3)
    (dx,) = torch.autograd.grad(expected, x, grad)
    _assert_close(ops.rms_norm_backward(grad, x.detach(), weight, EPS, add=add), dx + add)


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_scalar", [True, False])
def test_residual_norm_and_its_gradient(has_weight: bool, has_scalar: bool) -> None:
    residual, branch = _random(5, 32).requires_grad_(), _random(5, 32, seed=1).requires_grad_()
    weight = _random(32, seed=2) if has_weight else None
    scalar = torch.tensor(0.7, dtype=torch.float64) if has_scalar else None
    result = ops.residual_norm(residual, branch, weight, EPS, scalar=scalar)
    grad = _random(5, 32, seed=3)
    expected = torch.autograd.grad(result, (residual, branch), grad)
    wide_rows = torch.zeros(5, 40, dtype=torch.float64)
    d_residual, d_branch = ops.residual_norm_backward(
        grad, branch.detach(), weight, EPS, scalar=scalar, out=wide_rows[:, :32]
    )
    _assert_close(d_residual, expected[0])
    _assert_close(d_branch, expected[1])
    assert wide_rows[:, 32:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("has_k", "has_v", "norms"),
    [(True, True, True), (True, True, False), (True, False, True), (False, False, True)],
)
def test_qkv_norm_rope_and_its_gradient(has_k: bool, has_v: bool, norms: bool) -> None:
    heads = ops.HeadLayout(
        num_heads=4, num_kv_heads=2, head_dim=8, has_k=has_k, has_v=has_v, norms_v=norms
    )
    qkv = _random(6, heads.width).requires_grad_()
    q_weight, k_weight = (_random(8, seed=1), _random(8, seed=2)) if norms else (None, None)
    angles = _random(6, 4, seed=3)
    cos, sin = angles.cos(), angles.sin()
    parts = ops.qkv_norm_rope(qkv, heads, q_weight, k_weight, cos, sin, EPS)
    present = [part for part in parts if part is not None]
    grads = [_random(*part.shape, seed=9) for part in present]
    (expected,) = torch.autograd.grad(present, qkv, grads)
    padded = grads + [None] * (3 - len(grads))
    ours = ops.qkv_norm_rope_backward(
        *padded, qkv.detach(), heads, q_weight, k_weight, cos, sin, EPS
    )
    _assert_close(ours, expected)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_glu_and_its_gradient(activation: ops.Activation) -> None:
    gate, up = _random(3, 16).requires_grad_(), _random(3, 16, seed=1).requires_grad_()
    result = ops.glu(gate, up, activation)
    function = F.silu if activation == "silu" else lambda x: F.gelu(x, approximate="tanh")
    _assert_close(result, function(gate) * up)
    grad = _random(3, 16, seed=2)
    expected = torch.autograd.grad(result, (gate, up), grad)
    for ours, theirs in zip(
        ops.glu_backward(gate.detach(), up.detach(), grad, activation), expected, strict=True
    ):
        _assert_close(ours, theirs)


def _dense_attention(q, k, v, bounds, scale, window):  # type: ignore[no-untyped-def]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    at = torch.arange(len(q))
    row = torch.bucketize(at, torch.tensor(bounds[1:]), right=True)
    sees = (at[:, None] >= at[None]) & (row[:, None] == row[None])
    if window is not None:
        sees &= at[None] > at[:, None] - window
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale)[0].transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize("bounds", [[0, 1], [0, 7, 9], [0, 300, 611, 612]])
def test_attention_and_its_gradient(window: int | None, bounds: list[int]) -> None:
    n = bounds[-1]
    q, k, v = (_random(n, heads, 8, seed=heads).requires_grad_() for heads in (4, 2, 2))
    expected = _dense_attention(q, k, v, bounds, 0.3, window)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    raw = [part.detach() for part in (q, k, v)]
    out, lse = ops.attention(*raw, cu_seqlens, longest, 0.3, window)
    _assert_close(out, expected)
    grad = _random(n, 4, 8, seed=5)
    theirs = torch.autograd.grad(expected, (q, k, v), grad)
    ours = ops.attention_backward(grad, *raw, out, lse, cu_seqlens, longest, 0.3, window)
    for mine, other in zip(ours, theirs, strict=True):
        _assert_close(mine, other)


def test_dropout_has_the_rate_and_scale_asked_for() -> None:
    keys = torch.randint(0, 2**32, (512,), generator=torch.Generator().manual_seed(0))
    result = ops.dropout(torch.ones(512, 1024), keys, 77, 0.05)
    kept = result != 0
    assert (~kept).float().mean().item() == pytest.approx(0.05, abs=0.002)
    assert torch.equal(result[kept], torch.full_like(result[kept], 1 / 0.95))


def test_dropout_masks_of_two_modules_are_independent() -> None:
    keys = torch.randint(0, 2**32, (512,), generator=torch.Generator().manual_seed(0))
    first, second = (ops.dropout(torch.ones(512, 1024), keys, m, 0.5) == 0 for m in (1, 2))
    assert (first & second).float().mean().item() == pytest.approx(0.25, abs=0.003)


def test_dropout_does_not_depend_on_where_a_token_stands() -> None:
    keys = torch.randint(0, 2**32, (64,), generator=torch.Generator().manual_seed(0))
    x = _random(64, 32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        ops.dropout(x, keys, 5, 0.3)[order], ops.dropout(x[order], keys[order], 5, 0.3)
    )
