"""config.json is read as data that nobody vouches for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eightgig.errors import ModelError
from eightgig.models.families import FAMILIES
from eightgig.models.read import parse_model_spec
from eightgig.models.spec import DecoderSpec, RopeSpec

LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
GEMMA3: Mapping[str, Any] = {
    **LLAMA,
    "model_type": "gemma3_text",
    "num_hidden_layers": 6,
    "head_dim": 32,
    "sliding_window": 8,
}
GEMMA4: Mapping[str, Any] = {
    **LLAMA,
    "model_type": "gemma4_text",
    "num_hidden_layers": 6,
    "head_dim": 32,
    "global_head_dim": 64,
    "vocab_size_per_layer_input": 300,
}


def _decoder(config: Mapping[str, Any], **changes: Any) -> DecoderSpec:
    return parse_model_spec({**config, **changes}, name="tiny").decoder


def _refusal(config: Mapping[str, Any], **changes: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        _decoder(config, **changes)
    assert caught.value.why
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("model_type", ["mamba", "", None, 3, ["llama"], "gemma2", "gemma4_vision"])
def test_other_families_are_refused_with_the_list_of_ours(model_type: object) -> None:
    error = _refusal({"model_type": model_type})
    for family in FAMILIES:
        assert family.model_type in error.fix


def test_a_config_without_family_is_refused() -> None:
    assert _refusal({}).message.endswith("is not supported: its config has no `model_type`.")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("hidden_size", 0),
        ("hidden_size", 10**12),
        ("hidden_size", None),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 100_000),
        ("num_attention_heads", 64.0),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("vocab_size", 1 << 40),
        ("intermediate_size", [96]),
        ("head_dim", 15),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", "1e-6"),
        ("hidden_act", "relu"),
        ("hidden_act", {}),
        ("max_position_embeddings", {}),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", -1),
        ("eos_token_id", ["</s>"]),
        ("rope_parameters", [1]),
        ("rope_parameters", {"rope_type": "linear"}),
        ("rope_parameters", {"rope_type": "linear", "factor": "8"}),
        ("rope_parameters", {"rope_type": "linear", "factor": math.inf}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_theta", 0),
        ("quantization_config", "int4"),
    ],
)
def test_values_that_make_no_model_are_refused_by_name(key: str, value: object) -> None:
    named = "rope_parameters" if key.startswith("rope") else key
    message = _refusal(LLAMA, **{key: value}).message
    assert f"`{named}`" in message
    assert value is None or "to None" not in message


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA, {"attention_bias": True}),
        (LLAMA, {"mlp_bias": True}),
        (LLAMA, {"per_layer_config": {"0": {"head_dim": 8}}}),
        (GEMMA3, {"attn_logit_softcapping": 50.0}),
        (GEMMA3, {"use_bidirectional_attention": True}),
        (GEMMA4, {"use_bidirectional_attention": "all"}),
        (GEMMA4, {"attention_bias": True}),
    ],
)
def test_variants_we_do_not_build_are_refused_by_name(
    config: Mapping[str, Any], changes: dict[str, Any]
) -> None:
    assert f"`{next(iter(changes))}`" in _refusal(config, **changes).message


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "mrope", 7, None, ["yarn"]])
def test_kinds_of_rotary_embedding_we_do_not_build_are_refused(kind: object) -> None:
    error = _refusal(LLAMA, rope_parameters={"rope_type": kind, "factor": 2.0})
    assert "rotary" in error.message


def test_rotating_a_part_of_the_head_is_refused_outside_gemma_4() -> None:
    assert "0.5" in _refusal(LLAMA, partial_rotary_factor=0.5).message


@pytest.mark.parametrize(
    ("quantization", "word"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bit"),
    ],
)
def test_other_quantisations_are_refused_by_name(quantization: dict[str, Any], word: str) -> None:
    assert word in _refusal(LLAMA, quantization_config=quantization).message


def test_four_bit_of_bitsandbytes_is_accepted() -> None:
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    spec = parse_model_spec({**LLAMA, "quantization_config": quantization}, name="tiny")
    assert spec.quantization == "bnb_4bit"


def test_weights_of_other_dtypes_are_refused() -> None:
    assert "float8" in _refusal(LLAMA, dtype="float8_e4m3fn").message


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_spellings_of_the_dtype_are_read(key: str) -> None:
    assert parse_model_spec({**LLAMA, key: "bfloat16"}, name="tiny").dtype == "bfloat16"


def test_settings_that_could_run_code_are_left_alone() -> None:
    hostile = {
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        "attn_implementation": "evil",
        "_attn_implementation_internal": "evil",
        "architectures": ["EvilForCausalLM"],
    }
    spec = parse_model_spec({**LLAMA, **hostile}, name="tiny")
    assert spec == parse_model_spec(LLAMA, name="tiny")


def test_heads_divide_the_hidden_size_where_their_size_is_not_given() -> None:
    assert {layer.head_dim for layer in _decoder(LLAMA).layers} == {16}
    assert {layer.head_dim for layer in _decoder(LLAMA, head_dim=None).layers} == {16}
    assert _decoder(LLAMA).attention_scale == 0.25


def test_missing_kv_heads_are_as_many_as_heads() -> None:
    assert _decoder(LLAMA, num_key_value_heads=None).layers[0].num_kv_heads == 4


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({}, RopeSpec(theta=10_000.0, parameters={})),
        ({"rope_theta": 5e5}, RopeSpec(theta=5e5, parameters={})),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
            RopeSpec(theta=5e5, kind="linear", parameters={"factor": 4}),
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            RopeSpec(theta=1e6, parameters={}),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            RopeSpec(
                theta=1e6,
                kind="yarn",
                parameters={"factor": 4.0, "original_max_position_embeddings": 512},
            ),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False,
                              "original_max_position_embeddings": 128, "unknown": [1]}},
            RopeSpec(
                theta=10_000.0,
                kind="yarn",
                parameters={
                    "factor": 4.0, "original_max_position_embeddings": 128, "truncate": False,
                },
            ),
        ),
    ],
)  # fmt: skip
def test_old_and_new_spellings_of_the_rotary_embedding_are_read(
    settings_: dict[str, Any], expected: RopeSpec
) -> None:
    assert _decoder(LLAMA, **settings_).layers[0].rope == expected


def test_gemma_3_reads_the_keys_from_before_transformers_5() -> None:
    layers = _decoder(
        GEMMA3,
        rope_theta=2e6,
        rope_local_base_freq=3e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=3,
    ).layers
    sliding, full = layers[0], layers[2]
    assert [layer.sliding_window for layer in layers] == [8, 8, None, 8, 8, None]
    assert sliding.rope == RopeSpec(theta=3e4, parameters={})
    assert full.rope == RopeSpec(theta=2e6, kind="linear", parameters={"factor": 8.0})


@pytest.mark.parametrize("pattern", [0, -1, "6", True, 1.5])
def test_a_layer_pattern_that_is_none_is_refused(pattern: object) -> None:
    assert "sliding_window_pattern" in _refusal(GEMMA3, sliding_window_pattern=pattern).message


@pytest.mark.parametrize(
    "layer_types", [["full_attention"], ["chunked_attention"] * 6, "full_attention", [None] * 6]
)
def test_layer_types_that_are_none_are_refused(layer_types: object) -> None:
    assert "layer_types" in _refusal(GEMMA3, layer_types=layer_types).message


def test_mistral_windows_are_on_all_layers_or_none() -> None:
    mistral = {**LLAMA, "model_type": "mistral"}
    assert {layer.sliding_window for layer in _decoder(mistral).layers} == {4_096}
    assert {layer.sliding_window for layer in _decoder(mistral, sliding_window=7).layers} == {7}
    assert {layer.sliding_window for layer in _decoder(mistral, sliding_window=None).layers} == {
        None
    }


def test_a_window_means_nothing_to_llama() -> None:
    assert _decoder(LLAMA, sliding_window=8).layers[0].sliding_window is None


def test_sliding_layers_need_a_window() -> None:
    assert "sliding_window" in _refusal(GEMMA3, sliding_window=None).message


def test_the_last_layer_of_gemma_4_is_global() -> None:
    layers = _decoder(GEMMA4, layer_types=["sliding_attention"] * 6).layers
    assert [layer.head_dim for layer in layers] == [32] * 5 + [64]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        {"9": {"head_dim": 32}},
        {"-1": {"head_dim": 32}},
        {"x": {"head_dim": 32}},
        {"٣": {"head_dim": 32}},
        {"1" * 5_000: {"head_dim": 32}},
        {"0": 7},
        {"0": {"hidden_size": 32}},
        {"0": {"head_dim": "32"}},
        {"0": {"num_key_value_heads": 0}},
        {"0": {"skip": ["mlp"]}},
    ],
)
def test_per_layer_settings_that_are_none_are_refused(overrides: object) -> None:
    _refusal(GEMMA4, per_layer_config=overrides)


def test_padded_layer_numbers_are_read() -> None:
    layers = _decoder(GEMMA4, per_layer_config={"02": {"head_dim": 48}, "5": {"skip": []}}).layers
    assert [layer.head_dim for layer in layers] == [32, 32, 48, 32, 32, 32]


@pytest.mark.parametrize("shared", [6, -1, 1.0, True])
def test_a_number_of_shared_layers_that_is_none_is_refused(shared: object) -> None:
    assert "num_kv_shared_layers" in _refusal(GEMMA4, num_kv_shared_layers=shared).message


def test_shared_layers_need_an_earlier_layer_of_their_kind() -> None:
    # Layers 0 to 2 are sliding, and the last one, which shares, is global.
    assert "num_kv_shared_layers" in _refusal(GEMMA4, num_kv_shared_layers=3).message


def test_shared_layers_need_the_heads_of_their_source() -> None:
    types = ["sliding_attention", "full_attention"] * 3
    overrides = {"1": {"head_dim": 64}, "3": {"head_dim": 64}, "5": {"head_dim": 48}}
    error = _refusal(GEMMA4, layer_types=types, num_kv_shared_layers=2, per_layer_config=overrides)
    assert "Layer 5" in error.message


def test_a_per_layer_table_of_another_height_is_refused() -> None:
    changes = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 200}
    assert "vocab_size_per_layer_input" in _refusal(GEMMA4, **changes).message


def test_global_kv_heads_count_only_where_k_and_v_are_one() -> None:
    apart = _decoder(GEMMA4, num_global_key_value_heads=1).layers[-1]
    one = _decoder(GEMMA4, num_global_key_value_heads=1, attention_k_eq_v=True).layers[-1]
    assert (apart.num_kv_heads, apart.has_v_proj) == (2, True)
    assert (one.num_kv_heads, one.has_v_proj) == (1, False)


def test_the_whole_config_of_a_conditional_class_decides_about_the_head() -> None:
    config = {"model_type": "gemma4", "text_config": {**GEMMA4, "tie_word_embeddings": False}}
    assert _decoder(config).tie_word_embeddings
    assert not _decoder(config, tie_word_embeddings=False).tie_word_embeddings


def test_a_text_config_of_another_family_is_refused() -> None:
    assert "text_config" in _refusal({"model_type": "gemma4", "text_config": LLAMA}).message


@pytest.mark.parametrize(("value", "ids"), [(2, (2,)), ([1, 106], (1, 106)), (None, ())])
def test_one_or_more_tokens_end_a_generation(value: object, ids: tuple[int, ...]) -> None:
    assert parse_model_spec({**LLAMA, "eos_token_id": value}, name="x").eos_token_ids == ids


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
_KEYS = [
    *sorted({key for family in FAMILIES for key in family.defaults}),
    "rope_parameters", "rope_scaling", "rope_theta", "layer_types", "per_layer_config",
    "quantization_config", "dtype", "text_config", "vision_config", "tie_word_embeddings",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    model_type=st.sampled_from([*(family.model_type for family in FAMILIES), "gemma4", "gemma3"]),
    changes=st.dictionaries(st.sampled_from(_KEYS), _JSON, max_size=4),
)
def test_any_config_gives_a_spec_or_a_model_error(model_type: str, changes: dict[str, Any]) -> None:
    small = {**GEMMA4, "model_type": model_type}
    config = {**small, **changes}
    if model_type in ("gemma3", "gemma4"):
        text = {key: value for key, value in config.items() if key != "text_config"}
        config = {**config, "text_config": {**text, "model_type": f"{model_type}_text"}, **changes}
    try:
        spec = parse_model_spec(config, name="any")
    except ModelError as error:
        assert all((error.message, error.why, error.fix))
    else:
        assert spec.decoder.num_layers == len(spec.decoder.layers) > 0
