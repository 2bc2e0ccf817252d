"""Where tensors lie in a layer's blob."""

from __future__ import annotations

import json

import pytest

from eightgig.memory.layers import blob_bytes
from eightgig.models.known import known_model_spec
from eightgig.models.layout import layer_tensor_shapes
from eightgig.models.read import parse_model_spec
from eightgig.models.spec import DecoderSpec, linear_shapes
from eightgig.quant.layout import FourBitFormat, layer_layout
from eightgig.quant.manifest import ALIGNMENT_BYTES, StoredTensor
from tests.tiny import TRAINABLE_FAMILIES, make_config


def make_decoder(family: str) -> DecoderSpec:
    config = json.loads(make_config(family).to_json_string())
    return parse_model_spec(config, name=family).decoder


def spans(tensors: dict[str, StoredTensor]) -> list[tuple[int, int, str]]:
    """(start, end, what) of every part, in the order of the tensors and their parts."""
    parts = []
    for name, tensor in tensors.items():
        parts.append((tensor.offset_bytes, tensor.size_bytes, name))
        if tensor.format == "nf4":
            item_bytes = 1 if tensor.nested else 4
            size_bytes = tensor.absmax_count * item_bytes
            parts.append((tensor.absmax_offset_bytes, size_bytes, f"{name} absmax"))
        if tensor.nested:
            parts.append((tensor.nested.offset_bytes, 4 * tensor.nested.count, f"{name} nested"))
    return [(start, start + size_bytes, name) for start, size_bytes, name in parts]


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", TRAINABLE_FAMILIES)
def test_parts_are_aligned_in_order_and_do_not_overlap(family: str, quantization: str) -> None:
    decoder = make_decoder(family)
    for layer in decoder.layers:
        tensors, size_bytes = layer_layout(
            decoder, layer, dtype="bfloat16", quantization=quantization
        )
        end = 0
        for start, stop, name in spans(tensors):
            assert start % ALIGNMENT_BYTES == 0, name
            assert start >= end, name
            end = stop
        assert end <= size_bytes < end + ALIGNMENT_BYTES
        assert size_bytes % ALIGNMENT_BYTES == 0


@pytest.mark.parametrize("family", TRAINABLE_FAMILIES)
def test_linears_come_first_and_everything_of_the_layer_is_there(family: str) -> None:
    decoder = make_decoder(family)
    for layer in decoder.layers:
        tensors, _ = layer_layout(decoder, layer, dtype="float32")
        linears = linear_shapes(decoder, layer)
        assert list(tensors)[: len(linears)] == list(linears)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        assert shapes == layer_tensor_shapes(decoder, layer)


def test_only_linears_are_quantised_and_norms_are_float32() -> None:
    decoder = make_decoder("gemma4_e2b")
    tensors, _ = layer_layout(decoder, decoder.layers[0], dtype="bfloat16")
    dense = {name: tensor.dtype for name, tensor in tensors.items() if tensor.format == "dense"}
    assert dense == {
        "input_norm": "float32",
        "post_attention_norm": "float32",
        "pre_mlp_norm": "float32",
        "post_mlp_norm": "float32",
        "q_norm": "float32",
        "k_norm": "float32",
        "layer_scalar": "float32",
        "ple_gate": "bfloat16",
        "ple_projection": "bfloat16",
        "ple_norm": "float32",
    }


@pytest.mark.parametrize("family", TRAINABLE_FAMILIES)
def test_layers_of_one_shape_have_one_layout(family: str) -> None:
    decoder = make_decoder(family)
    layouts: dict[str, object] = {}
    for layer in decoder.layers:
        layout = layer_layout(decoder, layer, dtype="bfloat16")
        shapes = str(layer_tensor_shapes(decoder, layer))
        assert layouts.setdefault(shapes, layout) == layout


def test_a_layer_of_gemma4_12b_takes_its_bytes() -> None:
    spec = known_model_spec("google/gemma-4-12B-it")
    assert spec is not None
    decoder = spec.decoder
    _, size_bytes = layer_layout(decoder, decoder.layers[0], dtype="bfloat16")
    linears = (4096 + 2048 + 2048) * 3840 + 3840 * 4096 + 3 * 15360 * 3840
    norms = 4 * (4 * 3840 + 2 * 256)
    exact = linears / 2 + linears / 64 + 4 * linears / (64 * 256) + norms
    assert exact <= size_bytes <= exact + 64 * ALIGNMENT_BYTES


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("size", ["E2B", "E4B", "12B", "31B"])
def test_the_planner_knows_the_size_of_every_layer(size: str, quantization: str) -> None:
    spec = known_model_spec(f"google/gemma-4-{size}-it")
    assert spec is not None
    for layer in spec.decoder.layers:
        _, size_bytes = layer_layout(
            spec.decoder, layer, dtype=spec.dtype, quantization=quantization
        )
        assert blob_bytes(spec, layer, quantization) == size_bytes


@pytest.mark.parametrize("family", TRAINABLE_FAMILIES)
def test_the_planner_knows_the_size_of_every_family(family: str) -> None:
    decoder = make_decoder(family)
    for layer in decoder.layers:
        _, size_bytes = layer_layout(decoder, layer, dtype="bfloat16")
        assert blob_bytes(decoder, layer, "nf4") == size_bytes


def test_a_format_of_a_checkpoint_is_kept_with_either_quantization() -> None:
    decoder = make_decoder("llama")
    formats = {"q_proj": FourBitFormat(block_size=128, nested_block_size=None, code_table="fp4")}
    for quantization in ("nf4", "none"):
        tensors, _ = layer_layout(
            decoder,
            decoder.layers[0],
            dtype="float32",
            quantization=quantization,
            formats=formats,
        )
        assert tensors["q_proj"].block_size == 128
        assert tensors["q_proj"].nested is None
        assert tensors["q_proj"].code_table == "fp4"
        assert tensors["k_proj"].format == ("nf4" if quantization == "nf4" else "dense")
