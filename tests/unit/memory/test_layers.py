import dataclasses

import pytest

from eightgig.config import LoraConfig
from eightgig.errors import ModelError
from eightgig.memory.layers import (
    adapted_linears,
    blob_bytes,
    check_targets,
    layer_sizes,
    nf4_bytes,
)
from eightgig.models.spec import ATTENTION_LINEARS, MLP_LINEARS, ModelSpec, TensorSpec
from eightgig.quant.layout import layer_layout
from eightgig.units import MIB
from tests.unit.memory import cases

LORA = LoraConfig()


def test_nf4_bytes_are_half_a_byte_and_a_maximum_per_64() -> None:
    assert nf4_bytes(64 * 256 * 256) == 2_097_152 + 65_536 + 1024
    assert nf4_bytes(64 * 256 * 256, is_nested=False) == 2_097_152 + 4 * 65_536
    assert nf4_bytes(7) == 3 * 256  # every part begins at a multiple of 256


@pytest.mark.parametrize("size", ["E2B", "E4B", "12B", "31B"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_blobs_are_as_large_as_the_store_writes_them(size: str, quantization: str) -> None:
    spec = cases.gemma(size)
    for layer in spec.decoder.layers:
        _, written = layer_layout(spec.decoder, layer, dtype=spec.dtype, quantization=quantization)
        assert blob_bytes(spec, layer, quantization) == written


def test_blobs_with_biases_and_without_sandwich_norms_are_as_the_store_writes_them() -> None:
    decoder = cases.small_decoder(has_qkv_bias=True, has_qk_norm=True)
    _, written = layer_layout(decoder, decoder.layers[0], dtype="bfloat16")
    assert blob_bytes(decoder, decoder.layers[0], "nf4") == written


def test_a_checkpoint_with_plain_maxima_takes_more() -> None:
    spec = cases.gemma("E2B")
    tensor = TensorSpec(file="f", dtype="U8", shape=(1,), offset_bytes=0, size_bytes=1)
    foreign = dataclasses.replace(
        spec, quantization="bnb_4bit", tensors={"layers.0.q_proj.weight.absmax": tensor}
    )
    nested = dataclasses.replace(foreign, tensors={"layers.0.q_proj.weight.nested_absmax": tensor})
    layer = spec.decoder.layers[0]
    assert blob_bytes(nested, layer, "nf4") == blob_bytes(spec, layer, "nf4")
    assert blob_bytes(foreign, layer, "nf4") > 1.08 * blob_bytes(spec, layer, "nf4")


@pytest.mark.parametrize(
    ("size", "body_mib"),
    [("E2B", 923), ("E4B", 1955), ("12B", 5363), ("26B-A4B", 12051), ("31B", 14409)],
)
def test_bodies_are_as_large_as_the_parameter_counts_say(size: str, body_mib: int) -> None:
    layers = layer_sizes(cases.gemma(size), LORA, "nf4")
    total = sum(layer.count * layer.blob_bytes for layer in layers) / MIB
    # Per-layer embedding's linears and the router are kept in bfloat16.
    assert body_mib <= total <= body_mib * 1.04


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("E2B", 24_158_208), ("E4B", 34_881_536), ("12B", 65_568_768), ("31B", 122_425_344)],
)
def test_trainable_parameters_are_peft_s_count(size: str, parameters: int) -> None:
    layers = layer_sizes(cases.gemma(size), LORA, "nf4")
    counted = sum(layer.count * group.lora_elements for layer in layers for group in layer.groups)
    assert abs(counted - parameters) <= 0.001 * parameters


def test_every_layer_is_of_one_kind() -> None:
    spec = cases.gemma("E2B")
    layers = layer_sizes(spec, LORA, "nf4")
    assert sum(layer.count for layer in layers) == spec.decoder.num_layers
    # Sliding and global; with own keys, as a source of keys, and on shared keys with a wide MLP.
    assert len(layers) == 6
    assert sum(layer.count for layer in layers if layer.is_kv_source) == 2


def test_ranks_of_a_group_add_up_and_are_rounded() -> None:
    (layer,) = layer_sizes(cases.small_decoder(), LoraConfig(r=12), "nf4")
    assert (layer.qkv.rank, layer.o.rank, layer.gate_up.rank, layer.down.rank) == (40, 16, 24, 16)
    assert layer.qkv.out_size == 256 + 2 * 128
    assert layer.o.scratch_elements == (512 + 16) * (256 + 16)
    # A (R, in) and B (out, r) of each linear.
    assert layer.qkv.master_elements == 40 * 512 + (256 + 128 + 128) * 12
    assert layer.qkv.lora_elements == 36 * 512 + (256 + 128 + 128) * 12


def test_k_equals_v_layers_have_no_v_projection() -> None:
    layers = layer_sizes(cases.gemma("12B"), LORA, "nf4")
    sliding, full = sorted(layers, key=lambda layer: -layer.count)
    assert sliding.qkv.out_size == 4096 + 2 * 2048
    assert full.qkv.out_size == 8192 + 512
    assert full.qkv.rank == 32


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj", "down_proj"), {"q_proj", "down_proj"}),
        (r".*layers\.0\.self_attn\.(q|v)_proj", {"q_proj", "v_proj"}),
        (r".*layers\.1\..*", set()),
        ("all-linear", {*ATTENTION_LINEARS, *MLP_LINEARS}),
    ],
)
def test_targets_follow_peft_s_rule(targets: str | tuple[str, ...], expected: set[str]) -> None:
    decoder = cases.small_decoder()
    assert adapted_linears(decoder, decoder.layers[0], targets, "model") == expected


def test_the_default_targets_suit_a_model_whose_every_layer_takes_k_for_v() -> None:
    layer = dataclasses.replace(cases.small_decoder().layers[0], has_v_proj=False)
    decoder = cases.small_decoder(layers=(layer,))
    check_targets(decoder, LORA.target_modules, "model")
    with pytest.raises(ModelError, match="target_modules: v_proj matches no linear"):
        check_targets(decoder, ("v_proj",), "model")
    with pytest.raises(ModelError, match="target_modules: v_prj matches no linear"):
        check_targets(decoder, ("q_proj", "v_prj"), "model")


def test_a_pattern_that_names_some_layers_makes_two_kinds() -> None:
    lora = LoraConfig(target_modules=r"model\.layers\.[01]\..*")
    layers = layer_sizes(cases.small_decoder(), lora, "nf4")
    assert [(layer.count, layer.down.rank) for layer in layers] == [(2, 16), (2, 0)]


def test_the_prefix_of_the_checkpoint_is_part_of_the_path() -> None:
    spec: ModelSpec = cases.gemma("E2B")
    lora = LoraConfig(target_modules=rf"{spec.module_prefix}\.layers\.\d+\.mlp\.up_proj")
    assert all(layer.gate_up.rank == 16 for layer in layer_sizes(spec, lora, "nf4"))
