"""The supported families as data: what each adds to the plain decoder, and its config's defaults.

A family is one kind of text decoder, named by the `model_type` of its text config. A conditional
class wraps such a decoder together with vision or audio parts, which eightgig does not train. How
the settings become a `DecoderSpec` stands in `read.py`; here are only the facts.

Source: the config classes of Transformers 5.17 to 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SettingValue = bool | int | float | str | None

SLIDING = "sliding_attention"
FULL = "full_attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One kind of text decoder.

    Attributes:
        name: Our name.
        model_type: `model_type` of the text config.
        architecture: Class of a checkpoint that holds only this decoder.
        defaults: What Transformers assumes for keys that config.json leaves out.
        required_values: Settings that change the decoder in ways we do not build, with the values
            we do.
        activation_key: Name of the setting with the gate's function.
        window_rule: Which layers see a sliding window: none; all, if there is a window
            (Mistral); those from `max_window_layers` on, if `use_sliding_window` (Qwen); those
            that `layer_types` names (Gemma).
        layer_pattern: Every n-th layer is a full one where `layer_types` is left out; 0: none.
        rope_rule: One rotary embedding, or one per layer type with these default thetas.
        rope_defaults: Default rope parameters by layer type.
        attention_scale: Factor of the scores.
        norm_offset, has_sandwich_norms, has_qk_norm, has_v_norm, has_qkv_bias, has_layer_scalar:
            As in `DecoderSpec`.
        scales_embedding: Token embeddings are multiplied by sqrt(D).
        is_heterogeneous: Global layers have their own head_dim and K, V heads, later layers may
            share K and V, and there may be per-layer embeddings and experts (Gemma 4).
    """

    name: str
    model_type: str
    architecture: str
    defaults: Mapping[str, SettingValue]
    required_values: Mapping[str, tuple[SettingValue, ...]]
    activation_key: Literal["hidden_act", "hidden_activation"] = "hidden_act"
    window_rule: Literal["none", "all_layers", "max_window_layers", "layer_types"] = "none"
    layer_pattern: int = 0
    rope_defaults: Mapping[str, Mapping[str, SettingValue]] | None = None
    attention_scale: Literal["head_dim", "query_pre_attn_scalar", "one"] = "head_dim"
    norm_offset: float = 0.0
    has_sandwich_norms: bool = False
    has_qk_norm: bool = False
    has_v_norm: bool = False
    has_qkv_bias: bool = False
    has_layer_scalar: bool = False
    scales_embedding: bool = False
    is_heterogeneous: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditional:
    """A class that holds a text decoder and parts for images or sound.

    Attributes:
        model_type: `model_type` at the top of config.json.
        text_model_type: Family of `text_config`.
        architecture: Class of the checkpoint.
        tensor_prefixes: Starts of the decoder's tensor names, the usual one first.
        parts: Config keys of the other parts: key -> words.
        part_tensors: Starts of the other parts' tensor names -> words.
        has_softcap: A logit cap of the text config holds; Transformers' class of Gemma 3 has none.
    """

    model_type: str
    text_model_type: str
    architecture: str
    tensor_prefixes: tuple[str, ...]
    parts: Mapping[str, str]
    part_tensors: Mapping[str, str]
    has_softcap: bool = True


CONDITIONAL_MODULE_PREFIX = "model.language_model"
TEXT_MODULE_PREFIX = "model"
TEXT_TENSOR_PREFIXES = ("model.",)

_PLAIN_DEFAULTS: Mapping[str, SettingValue] = {
    "vocab_size": 32_000,
    "hidden_size": 4_096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2_048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
_QWEN_DEFAULTS: Mapping[str, SettingValue] = {
    **_PLAIN_DEFAULTS,
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4_096,
    "max_window_layers": 28,
    "eos_token_id": None,
}
_GEMMA_DEFAULTS: Mapping[str, SettingValue] = {
    "vocab_size": 262_144,
    "hidden_size": 2_304,
    "intermediate_size": 9_216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "final_logit_softcapping": None,
    "eos_token_id": 1,
}
_GEMMA4_DEFAULTS: Mapping[str, SettingValue] = {
    **_GEMMA_DEFAULTS,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
    "enable_moe_block": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}
_NO_BIAS: Mapping[str, tuple[SettingValue, ...]] = {"attention_bias": (False, None)}
_GEMMA4_ROPE: Mapping[str, Mapping[str, SettingValue]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
}


def _gemma4(model_type: str, architecture: str, changes: Mapping[str, SettingValue]) -> Family:
    return Family(
        name="gemma4",
        model_type=model_type,
        architecture=architecture,
        defaults={**_GEMMA4_DEFAULTS, **changes},
        # "vision" concerns image tokens only; "all" would let text look ahead.
        required_values={**_NO_BIAS, "use_bidirectional_attention": (None, "vision")},
        activation_key="hidden_activation",
        window_rule="layer_types",
        layer_pattern=6,
        rope_defaults=_GEMMA4_ROPE,
        attention_scale="one",
        has_sandwich_norms=True,
        has_qk_norm=True,
        has_v_norm=True,
        has_layer_scalar=True,
        scales_embedding=True,
        is_heterogeneous=True,
    )


FAMILIES = (
    Family(
        name="llama",
        model_type="llama",
        architecture="LlamaForCausalLM",
        defaults=_PLAIN_DEFAULTS,
        required_values={**_NO_BIAS, "mlp_bias": (False, None)},
    ),
    Family(
        name="mistral",
        model_type="mistral",
        architecture="MistralForCausalLM",
        defaults={
            **_PLAIN_DEFAULTS,
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4_096,
        },
        required_values={},
        window_rule="all_layers",
    ),
    Family(
        name="qwen2",
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN_DEFAULTS,
        required_values={},
        window_rule="max_window_layers",
        has_qkv_bias=True,
    ),
    Family(
        name="qwen3",
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        required_values=_NO_BIAS,
        window_rule="max_window_layers",
        has_qk_norm=True,
    ),
    Family(
        name="gemma3",
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 262_208,
            "num_hidden_layers": 26,
            "sliding_window": 4_096,
            "query_pre_attn_scalar": 256,
        },
        required_values={
            **_NO_BIAS,
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        activation_key="hidden_activation",
        window_rule="layer_types",
        layer_pattern=6,
        rope_defaults={
            SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL: {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        attention_scale="query_pre_attn_scalar",
        norm_offset=1.0,
        has_sandwich_norms=True,
        has_qk_norm=True,
        scales_embedding=True,
    ),
    _gemma4("gemma4_text", "Gemma4ForCausalLM", {}),
    _gemma4(
        "gemma4_unified_text",
        "Gemma4UnifiedForCausalLM",
        # This class knows neither per-layer embeddings nor experts.
        {
            "max_position_embeddings": 262_144,
            "sliding_window": 1_024,
            "hidden_size_per_layer_input": 0,
        },
    ),
)

CONDITIONALS = (
    Conditional(
        model_type="gemma3",
        text_model_type="gemma3_text",
        architecture="Gemma3ForConditionalGeneration",
        # Google's files start with the second one; Transformers renames while loading.
        tensor_prefixes=("model.language_model.", "language_model.model."),
        parts={"vision_config": "vision tower"},
        part_tensors={
            "model.vision_tower.": "vision tower",
            "vision_tower.": "vision tower",
            "model.multi_modal_projector.": "vision tower",
            "multi_modal_projector.": "vision tower",
        },
        has_softcap=False,
    ),
    Conditional(
        model_type="gemma4",
        text_model_type="gemma4_text",
        architecture="Gemma4ForConditionalGeneration",
        tensor_prefixes=("model.language_model.",),
        parts={"vision_config": "vision tower", "audio_config": "audio tower"},
        part_tensors={
            "model.vision_tower.": "vision tower",
            "model.embed_vision.": "vision tower",
            "model.audio_tower.": "audio tower",
            "model.embed_audio.": "audio tower",
        },
    ),
    Conditional(
        model_type="gemma4_unified",
        text_model_type="gemma4_unified_text",
        architecture="Gemma4UnifiedForConditionalGeneration",
        tensor_prefixes=("model.language_model.",),
        parts={"vision_config": "vision embedder", "audio_config": "audio embedder"},
        part_tensors={
            "model.vision_embedder.": "vision embedder",
            "model.embed_vision.": "vision embedder",
            "model.embed_audio.": "audio embedder",
        },
    ),
)

SUPPORTED = (
    "Gemma 4 (gemma4, gemma4_text, gemma4_unified, gemma4_unified_text), "
    "Gemma 3 (gemma3, gemma3_text), Llama (llama), Mistral (mistral), Qwen2 (qwen2), Qwen3 (qwen3)"
)


def find_family(text_model_type: str) -> Family | None:
    """The family of a text config, None if it is not supported."""
    return next((family for family in FAMILIES if family.model_type == text_model_type), None)


def find_conditional(model_type: str) -> Conditional | None:
    """The conditional class of a whole config, None where there is none."""
    return next((entry for entry in CONDITIONALS if entry.model_type == model_type), None)
