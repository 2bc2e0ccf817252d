"""The fast operations on a GPU, against the definitions."""

from functools import partial

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from eightgig.ops import (  # noqa: E402 - they import Triton
    flash,
    triton_attention,
    triton_cross_entropy,
    triton_dequant,
    triton_dropout,
    triton_glu,
    triton_norm,
    triton_place,
)
from eightgig.ops.choose import choose_ops  # noqa: E402
from eightgig.ops.reference import HeadLayout  # noqa: E402
from tests import kernel_cases as cases  # noqa: E402

CAPABILITY = torch.cuda.get_device_capability()
DTYPE = torch.bfloat16 if CAPABILITY >= (8, 0) else torch.float16
TOKENS = (1, 7, 2051)
# Probabilities and their gradients enter the matrix products in half precision, as in every flash
# attention; the plain version keeps them in float32.
ATTENTION_EXTRA = 4e-3


@pytest.fixture
def inputs() -> cases.Inputs:
    return cases.Inputs("cuda", DTYPE)


def _check_attention(way, inputs, head_dim: int, window: int | None) -> None:
    forward, backward = way
    heads = (4, 1, 512) if head_dim == 512 else (4, 2, head_dim)
    cases.check_attention(
        forward,
        backward,
        inputs,
        heads=heads,
        lengths=[1, 7, 300, 1031],
        window=window,
        extra=ATTENTION_EXTRA,
    )


def _triton_way(head_dim: int, capability: tuple[int, int], processors: int):
    tiles = triton_attention.attention_tiles(head_dim, capability, processors)
    assert tiles is not None
    return (
        partial(triton_attention.attention, tiles=tiles),
        partial(triton_attention.attention_backward, tiles=tiles),
    )


@pytest.mark.skipif(CAPABILITY < (8, 0), reason="no tiles before sm_80")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("capability", sorted({CAPABILITY, (8, 6)}))
def test_triton_attention_and_its_gradients(inputs, capability, head_dim, window) -> None:
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    _check_attention(_triton_way(head_dim, capability, processors), inputs, head_dim, window)


@pytest.mark.skipif(CAPABILITY < (8, 0), reason="no tiles before sm_80")
def test_triton_attention_repeats_itself_bit_for_bit(inputs) -> None:
    forward, backward = _triton_way(512, (8, 6), 100)
    q, k, v, grad = (inputs.normal(700, heads, 512) for heads in (4, 1, 1, 4))
    rows = (cases.packed_rows([200, 500], "cuda"), 500, 1.0, None)
    out, lse = forward(q, k, v, *rows)
    first = backward(grad, q, k, v, out, lse, *rows)
    for _ in range(3):
        again = backward(grad, q, k, v, out, lse, *rows)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_flash_attention_and_its_gradients(inputs, head_dim, window) -> None:
    way = (flash.flash_attention, flash.flash_attention_backward)
    lacking = flash.probe_attention(*way, head_dim=head_dim, device="cuda", dtype=DTYPE)
    if lacking:
        pytest.skip(lacking)
    _check_attention(way, inputs, head_dim, window)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("head_dim", [64, 512])
def test_memory_efficient_attention_and_its_gradients(inputs, head_dim, window) -> None:
    way = (flash.efficient_attention, flash.efficient_attention_backward)
    lacking = flash.probe_attention(*way, head_dim=head_dim, device="cuda", dtype=DTYPE)
    if lacking:
        pytest.skip(lacking)
    _check_attention(way, inputs, head_dim, window)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("columns", [1536, 3840, 5376])
def test_norms_and_their_gradients(inputs, tokens, columns) -> None:
    cases.check_norms(triton_norm, inputs, tokens, columns, extra=1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("layout", cases.HEAD_LAYOUTS.values(), ids=cases.HEAD_LAYOUTS)
def test_norm_and_rotation_of_heads_and_their_gradient(inputs, layout, tokens) -> None:
    for num_kv_heads, head_dim, norms in ((1, 512, True), (4, 256, True), (2, 64, False)):
        heads = HeadLayout(num_heads=8, num_kv_heads=num_kv_heads, head_dim=head_dim, **layout)
        cases.check_norm_rope(triton_norm, inputs, tokens, heads, norms=norms, extra=1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("columns", [2112, 15360])
def test_gated_activations_and_their_gradients(inputs, tokens, columns) -> None:
    cases.check_glu(triton_glu, inputs, tokens, columns, extra=1e-5)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("columns", [1, 16384, 8001])
def test_cross_entropy_of_two_chunks(inputs, columns, softcap) -> None:
    if columns == 1:
        cases.check_first_chunk_of_the_label_alone(triton_cross_entropy, inputs)
    else:
        cases.check_cross_entropy(triton_cross_entropy, inputs, columns, softcap)


@pytest.mark.parametrize("tokens", TOKENS)
def test_dropout_has_the_mask_of_the_definition(inputs, tokens) -> None:
    cases.check_dropout(triton_dropout, inputs, tokens, 3840)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (37, 264), (4096, 3840)])
def test_dequantisation_is_exact(inputs, rows, columns, nested) -> None:
    cases.check_dequantize(triton_dequant, inputs, rows, columns, nested=nested)


def test_dequantisation_has_the_bits_of_bitsandbytes(inputs) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes").functional
    weight = inputs.normal(512, 1536)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    out = inputs.spaced(512, 1536)
    triton_dequant.dequantizer(
        codes.view(-1), state.absmax, state.state2.absmax, float(state.offset), 64, 256,
        state.code, state.state2.code, out=out,
    )()  # fmt: skip
    assert torch.equal(out, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("sizes", [[(1, 8, 8)], [(48, 3840, 3840), (8192, 48, 16), (37, 48, 0)]])
def test_matrices_come_to_their_places(inputs, sizes) -> None:
    cases.check_placer(triton_place, inputs, sizes)


def test_every_choice_has_a_reason_and_works(inputs) -> None:
    ops, choices = choose_ops(device="cuda", dtype=DTYPE, kernels="auto")
    assert all(choice.value and choice.reason for choice in choices)
    for head_dim in (64, 80, 128, 256, 512):
        _check_attention((ops.attention, ops.attention_backward), inputs, head_dim, 100)
