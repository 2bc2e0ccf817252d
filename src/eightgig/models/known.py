"""The five Gemma 4 sizes, known without files or network, so that plans can be made for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eightgig.models.families import FULL, SLIDING
from eightgig.models.read import parse_model_spec
from eightgig.models.spec import ModelSpec

_VOCAB_SIZE = 262_144
_HEAD_DIM, _GLOBAL_HEAD_DIM = 256, 512
_EOS_TOKEN_IDS = [1, 106]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Size:
    """What differs between the sizes; `period` is the distance of the global layers."""

    model_type: str
    hidden_size: int
    num_layers: int
    period: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    sliding_window: int
    max_positions: int
    has_audio: bool
    text: Mapping[str, Any]


_E_SERIES: Mapping[str, Any] = {"hidden_size_per_layer_input": 256}
_SIZES: Mapping[str, _Size] = {
    "E2B": _Size(
        model_type="gemma4",
        hidden_size=1_536,
        num_layers=35,
        period=5,
        num_heads=8,
        num_kv_heads=1,
        intermediate_size=6_144,
        sliding_window=512,
        max_positions=131_072,
        has_audio=True,
        text={**_E_SERIES, "num_kv_shared_layers": 20, "use_double_wide_mlp": True},
    ),
    "E4B": _Size(
        model_type="gemma4",
        hidden_size=2_560,
        num_layers=42,
        period=6,
        num_heads=8,
        num_kv_heads=2,
        intermediate_size=10_240,
        sliding_window=512,
        max_positions=131_072,
        has_audio=True,
        text={**_E_SERIES, "num_kv_shared_layers": 18},
    ),
    "12B": _Size(
        model_type="gemma4_unified",
        hidden_size=3_840,
        num_layers=48,
        period=6,
        num_heads=16,
        num_kv_heads=8,
        intermediate_size=15_360,
        sliding_window=1_024,
        max_positions=262_144,
        has_audio=True,
        text={"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "26B-A4B": _Size(
        model_type="gemma4",
        hidden_size=2_816,
        num_layers=30,
        period=6,
        num_heads=16,
        num_kv_heads=8,
        intermediate_size=2_112,
        sliding_window=1_024,
        max_positions=262_144,
        has_audio=False,
        text={
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 2,
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
        },
    ),
    "31B": _Size(
        model_type="gemma4",
        hidden_size=5_376,
        num_layers=60,
        period=6,
        num_heads=32,
        num_kv_heads=16,
        intermediate_size=21_504,
        sliding_window=1_024,
        max_positions=262_144,
        has_audio=False,
        text={"attention_k_eq_v": True, "num_global_key_value_heads": 4},
    ),
}

KNOWN_MODELS = tuple(f"google/gemma-4-{size}{suffix}" for size in _SIZES for suffix in ("", "-it"))
"""Hub ids that `known_model_spec` answers."""


def known_model_spec(name: str) -> ModelSpec | None:
    """The spec of a Gemma 4 hub id (any case, `google/` optional), None for other names."""
    known = {model.lower(): model for model in KNOWN_MODELS}
    wanted = name.lower()
    model = known.get(wanted) or known.get(f"google/{wanted}")
    if model is None:
        return None
    size = model.removeprefix("google/gemma-4-").removesuffix("-it")
    spec = parse_model_spec(_config(_SIZES[size]), name=model)
    return dataclasses.replace(spec, license="apache-2.0")


def _config(size: _Size) -> dict[str, Any]:
    """The config.json of `size`, as far as the text decoder needs it."""
    text: dict[str, Any] = {
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": _HEAD_DIM,
        "global_head_dim": _GLOBAL_HEAD_DIM,
        "sliding_window": size.sliding_window,
        "layer_types": [
            SLIDING if (index + 1) % size.period else FULL for index in range(size.num_layers)
        ],
        "max_position_embeddings": size.max_positions,
        "vocab_size": _VOCAB_SIZE,
        "vocab_size_per_layer_input": _VOCAB_SIZE,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    return {
        "model_type": size.model_type,
        "dtype": "bfloat16",
        "eos_token_id": _EOS_TOKEN_IDS,
        "text_config": text | dict(size.text),
        "vision_config": {},
        "audio_config": {} if size.has_audio else None,
    }
