"""From the settings in config.json to a `ModelSpec`: pure Python, no weights, no Transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NoReturn

from eightgig.errors import ModelError
from eightgig.models.families import (
    CONDITIONAL_MODULE_PREFIX,
    SUPPORTED,
    TEXT_MODULE_PREFIX,
    TEXT_TENSOR_PREFIXES,
    Conditional,
    Family,
    find_conditional,
    find_family,
)
from eightgig.models.layers import read_layers
from eightgig.models.settings import MAX_POSITIONS, MAX_VOCAB, Settings
from eightgig.models.spec import DecoderSpec, LayerSpec, ModelSpec, TensorSpec

WEIGHT_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Dtypes of the safetensors header that weights may have, and torch's names for them."""

_ACTIVATIONS: Mapping[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_NO_TENSORS: Mapping[str, TensorSpec] = MappingProxyType({})


def parse_model_spec(
    config: Mapping[str, Any], *, name: str, tensors: Mapping[str, TensorSpec] = _NO_TENSORS
) -> ModelSpec:
    """The model that a config.json describes.

    Args:
        config: Content of config.json, as on the hub or as saved by Transformers.
        name: Hub id or folder, for messages and the record.
        tensors: Tensors of the checkpoint where it is at hand: they decide the dtype, the prefix
            of their names and whether the head is tied.

    Raises:
        ModelError: Another family, a feature we do not build, or values that make no model.
    """
    family, conditional = _find_family(config, name=name)
    text = _text_settings(config, family, conditional, name=name)
    prefixes = conditional.tensor_prefixes if conditional else TEXT_TENSOR_PREFIXES
    tensor_prefix = _tensor_prefix(prefixes, tensors)
    return ModelSpec(
        name=name,
        family=family.name,
        model_type=str(config["model_type"]),
        architecture=conditional.architecture if conditional else family.architecture,
        decoder=_read_decoder(
            text,
            family,
            tie_word_embeddings=_is_tied(config, text, conditional, tensors),
            has_softcap=conditional.has_softcap if conditional else family.scales_embedding,
        ),
        dtype=_weight_dtype(config, text, tensors.get(tensor_prefix + "embed_tokens.weight")),
        module_prefix=CONDITIONAL_MODULE_PREFIX if conditional else TEXT_MODULE_PREFIX,
        tensor_prefix=tensor_prefix,
        tensors=tensors,
        skipped_parts=_configured_parts(config, conditional),
        eos_token_ids=_eos_token_ids(config, text),
        quantization=_quantization(config, name=name),
    )


def require_trainable(spec: ModelSpec) -> None:
    """Check that eightgig can train what it could read.

    Raises:
        ModelError: A mixture of experts.
    """
    if spec.decoder.has_experts:
        raise ModelError(
            f"{spec.name} cannot be trained yet: it is a mixture of experts.",
            why=f"Its layers route tokens to {spec.decoder.num_experts} experts, which the "
            "engine does not build yet.",
            fix="Choose a dense model, for example google/gemma-4-12B-it.",
        )


def _find_family(config: Mapping[str, Any], *, name: str) -> tuple[Family, Conditional | None]:
    model_type = config.get("model_type")
    conditional = find_conditional(str(model_type))
    family = find_family(conditional.text_model_type if conditional else str(model_type))
    if family is None:
        said = "its config has no `model_type`"
        if model_type is not None:
            said = f'its config says `model_type: "{str(model_type)[:60]}"`'
        raise ModelError(
            f"The family of {name} is not supported: {said}.",
            why="The decoder is built by eightgig itself, one family at a time.",
            fix=f"Choose a model of one of these families: {SUPPORTED}.",
        )
    return family, conditional


def _text_settings(
    config: Mapping[str, Any], family: Family, conditional: Conditional | None, *, name: str
) -> Settings:
    whole = Settings(name=name, values=config, defaults={})
    values = whole.mapping("text_config") if conditional else config
    text_model_type = values.get("model_type", family.model_type)
    if text_model_type != family.model_type:
        whole.refuse("text_config", f"the config of a {family.model_type}")
    settings = Settings(name=name, values=values, defaults=family.defaults)
    for key, allowed in family.required_values.items():
        if settings.get(key) not in allowed:
            _refuse_feature(settings, key)
    if values.get("per_layer_config") and not family.is_heterogeneous:
        _refuse_feature(settings, "per_layer_config")
    return settings


def _refuse_feature(settings: Settings, key: str) -> NoReturn:
    raise ModelError(
        f"{settings.name} cannot be trained: its config sets `{key}` to "
        f"{str(settings.get(key))[:60]}.",
        why="The decoder of eightgig does not build this variant of the family.",
        fix=f"Choose another model; supported families: {SUPPORTED}.",
    )


def _tensor_prefix(prefixes: tuple[str, ...], tensors: Mapping[str, TensorSpec]) -> str:
    for prefix in prefixes:
        if prefix + "norm.weight" in tensors:
            return prefix
    return prefixes[0]


def _is_tied(
    config: Mapping[str, Any],
    text: Settings,
    conditional: Conditional | None,
    tensors: Mapping[str, TensorSpec],
) -> bool:
    """Whether the head is the embedding.

    Transformers asks the whole config of a conditional class, not its text config. Where the
    checkpoint holds a head although the config ties it, Transformers compares the two; using
    the head that is there is right whether they are equal or not.
    """
    whole = Settings(name=text.name, values=config, defaults={"tie_word_embeddings": True})
    is_tied = (whole if conditional else text).boolean("tie_word_embeddings")
    has_head = any(name.endswith("lm_head.weight") for name in tensors)
    return is_tied and not has_head


def _weight_dtype(config: Mapping[str, Any], text: Settings, embedding: TensorSpec | None) -> str:
    """Dtype of the stored weights: that of the embedding, which no quantisation touches."""
    configured = [
        values.get(key) for values in (config, text.values) for key in ("dtype", "torch_dtype")
    ]
    if embedding is not None:
        dtype = WEIGHT_DTYPES.get(embedding.dtype, embedding.dtype)
    else:
        dtype = str(next((value for value in configured if value is not None), "float32"))
    if dtype not in WEIGHT_DTYPES.values():
        raise ModelError(
            f"The weights of {text.name} are stored as {dtype[:60]}.",
            why=f"Only {', '.join(WEIGHT_DTYPES.values())} can be read.",
            fix="Choose the unquantised model, or one quantised by bitsandbytes in 4 bit.",
        )
    return dtype


def _eos_token_ids(config: Mapping[str, Any], text: Settings) -> tuple[int, ...]:
    whole = Settings(name=text.name, values=config, defaults={})
    return whole.token_ids("eos_token_id") or text.token_ids("eos_token_id")


def _configured_parts(
    config: Mapping[str, Any], conditional: Conditional | None
) -> tuple[str, ...]:
    if conditional is None:
        return ()
    return tuple(words for key, words in conditional.parts.items() if config.get(key) is not None)


def _quantization(config: Mapping[str, Any], *, name: str) -> Literal["bnb_4bit"] | None:
    settings = Settings(name=name, values=config, defaults={})
    quantization = settings.mapping("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method", "bitsandbytes")
    if method == "bitsandbytes" and quantization.get("load_in_4bit") is True:
        return "bnb_4bit"
    kind = "bitsandbytes in 8 bit" if method == "bitsandbytes" else str(method)[:60]
    raise ModelError(
        f"The checkpoint of {name} is already quantised: {kind}.",
        why="Frozen weights are kept in NF4; they are read as bfloat16, float16 or float32, or "
        "as 4 bit of bitsandbytes.",
        fix="Give the unquantised model (often named in the model's card).",
    )


def _read_decoder(
    settings: Settings, family: Family, *, tie_word_embeddings: bool, has_softcap: bool
) -> DecoderSpec:
    hidden_size = settings.integer("hidden_size")
    layers = read_layers(settings, family, hidden_size=hidden_size)
    vocab_size = settings.integer("vocab_size", high=MAX_VOCAB)
    softcap_key = "final_logit_softcapping"
    has_softcap = has_softcap and settings.get(softcap_key) is not None
    return DecoderSpec(
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        layers=layers,
        rms_norm_eps=settings.number("rms_norm_eps", low=0.0, high=1.0),
        norm_offset=family.norm_offset,
        activation=_read_activation(settings, family),
        has_sandwich_norms=family.has_sandwich_norms,
        has_qk_norm=family.has_qk_norm,
        has_v_norm=family.has_v_norm,
        has_qkv_bias=family.has_qkv_bias,
        has_layer_scalar=family.has_layer_scalar,
        attention_scale=_read_attention_scale(settings, family, layers[0]),
        embedding_scale=hidden_size**0.5 if family.scales_embedding else 1.0,
        ple_size=_read_ple_size(settings, family, vocab_size=vocab_size),
        final_softcap=settings.number(softcap_key, low=0.0, high=1e6) if has_softcap else None,
        tie_word_embeddings=tie_word_embeddings,
        max_positions=settings.integer("max_position_embeddings", high=MAX_POSITIONS),
        **_read_experts(settings, family),
    )


def _read_activation(settings: Settings, family: Family) -> Literal["silu", "gelu_tanh"]:
    value = settings.get(family.activation_key)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        settings.refuse(family.activation_key, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _read_attention_scale(settings: Settings, family: Family, layer: LayerSpec) -> float:
    if family.attention_scale == "one":
        return 1.0
    if family.attention_scale == "query_pre_attn_scalar":
        return math.pow(settings.number("query_pre_attn_scalar", low=0.0, high=1e6), -0.5)
    return math.pow(layer.head_dim, -0.5)


def _read_ple_size(settings: Settings, family: Family, *, vocab_size: int) -> int:
    if not family.is_heterogeneous:
        return 0
    ple_size = settings.integer("hidden_size_per_layer_input", low=0)
    if ple_size and settings.get("vocab_size_per_layer_input") != vocab_size:
        settings.refuse("vocab_size_per_layer_input", f"the vocabulary's size, {vocab_size}")
    return ple_size


def _read_experts(settings: Settings, family: Family) -> dict[str, Any]:
    if not family.is_heterogeneous or not settings.boolean("enable_moe_block"):
        return {}
    num_experts = settings.integer("num_experts", high=65_536)
    return {
        "has_experts": True,
        "num_experts": num_experts,
        "num_active_experts": settings.integer("top_k_experts", high=num_experts),
        "expert_size": settings.integer("moe_intermediate_size"),
    }
