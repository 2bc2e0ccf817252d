"""The Triton kernels on the CPU; `test_triton_kernels.py` runs this with TRITON_INTERPRET=1.

bfloat16 is for the GPU: Triton's interpreter cuts it off instead of rounding.
"""

from functools import partial

import pytest
import torch

from eightgig.ops import (
    triton_attention,
    triton_cross_entropy,
    triton_dequant,
    triton_dropout,
    triton_glu,
    triton_norm,
    triton_place,
)
from eightgig.ops.reference import HeadLayout
from eightgig.ops.triton_attention import AttentionTiles, Tile
from tests import kernel_cases as cases

SINGLE = cases.Inputs("cpu", torch.float32)
HALF = cases.Inputs("cpu", torch.float16)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(
    ("inputs", "heads", "lengths", "window", "fused", "processors", "extra"),
    [
        (SINGLE, (4, 2, 64), [1, 7, 45], None, True, 1, 1e-6),
        (SINGLE, (4, 2, 64), [1, 7, 45], 10, False, 1, 1e-6),
        (HALF, (4, 1, 64), [33, 40], 10, False, 100, 5e-4),
        (HALF, (2, 1, 512), [19], None, True, 1, 5e-4),
    ],
)
def test_attention_and_its_gradients(
    inputs, heads, lengths, window, fused, processors, extra, tma
) -> None:
    tiles = AttentionTiles(
        forward=Tile(32, 16, 4, 1),
        grad_q=Tile(16, 32, 4, 1),
        grad_k=Tile(16, 32, 4, 1),
        grad_v=None if fused else Tile(32, 16, 4, 1),
        uses_tma=tma,
        processors=processors,
    )
    cases.check_attention(
        partial(triton_attention.attention, tiles=tiles),
        partial(triton_attention.attention_backward, tiles=tiles),
        inputs,
        heads=heads,
        lengths=lengths,
        window=window,
        extra=extra,
    )


@pytest.mark.parametrize(("tokens", "columns"), [(1, 48), (7, 1536)])
def test_norms_and_their_gradients(tokens, columns) -> None:
    cases.check_norms(triton_norm, SINGLE, tokens, columns, extra=1e-6)
    cases.check_norms(triton_norm, HALF, tokens, columns, extra=1e-5)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("layout", cases.HEAD_LAYOUTS.values(), ids=cases.HEAD_LAYOUTS)
def test_norm_and_rotation_of_heads_and_their_gradient(layout, norms) -> None:
    heads = HeadLayout(num_heads=4, num_kv_heads=2, head_dim=64, **layout)
    cases.check_norm_rope(triton_norm, SINGLE, 67, heads, norms=norms, extra=1e-6)


@pytest.mark.parametrize(("tokens", "columns"), [(1, 8), (7, 1032)])
def test_gated_activations_and_their_gradients(tokens, columns) -> None:
    cases.check_glu(triton_glu, SINGLE, tokens, columns, extra=1e-6)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("columns", [8, 4100])
def test_cross_entropy_of_two_chunks(columns, softcap) -> None:
    cases.check_cross_entropy(triton_cross_entropy, SINGLE, columns, softcap)


def test_a_first_chunk_of_the_label_alone_changes_nothing() -> None:
    cases.check_first_chunk_of_the_label_alone(triton_cross_entropy, SINGLE)


def test_dropout_has_the_mask_of_the_definition() -> None:
    cases.check_dropout(triton_dropout, HALF, 7, 1032)


@pytest.mark.parametrize("nested", [False, True])
def test_dequantisation_is_exact(nested) -> None:
    for inputs in (SINGLE, HALF):
        cases.check_dequantize(triton_dequant, inputs, 37, 264, nested=nested)


@pytest.mark.parametrize("sizes", [[(3, 40, 40)], [(16, 72, 72), (5, 48, 16), (7, 48, 0)]])
def test_matrices_come_to_their_places(sizes) -> None:
    for inputs in (SINGLE, HALF):
        cases.check_placer(triton_place, inputs, sizes)
