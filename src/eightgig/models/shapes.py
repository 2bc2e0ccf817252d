"""A model's shape by the name that a person would use, without its weights: for plans and timings.

`eightgig plan` and `eightgig bench` need the sizes of a model alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from eightgig.config import DEMO_MODEL
from eightgig.demo import demo_model_path
from eightgig.errors import ModelError
from eightgig.models.checkpoint import read_config, read_model_spec
from eightgig.models.hub import find_local_model, look_up_hub_model
from eightgig.models.known import known_model_spec
from eightgig.models.read import parse_model_spec
from eightgig.models.spec import ModelSpec

# As on https://huggingface.co/meta-llama/Llama-3.1-8B and https://huggingface.co/Qwen/Qwen3-14B.
_OTHER_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "qwen14b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}

SHAPES: Mapping[str, str] = MappingProxyType(
    {
        "e2b": "google/gemma-4-E2B",
        "e4b": "google/gemma-4-E4B",
        "12b": "google/gemma-4-12B",
        "26b": "google/gemma-4-26B-A4B",
        "31b": "google/gemma-4-31B",
        "llama8b": "llama8b",
        "qwen14b": "qwen14b",
    }
)
"""Short names of shapes that are known without files or network, and what they stand for."""


def find_shape(name: str, *, revision: str | None = None) -> ModelSpec:
    """The shape of a model; its weights need not be here.

    Args:
        name: The embedded model, a folder (of which a config.json is enough) or that file, a short
            name of `SHAPES`, one of the five Gemma 4 sizes, or another hub id.
        revision: Of a hub id.

    Raises:
        ModelError: No such model, or of another family.
    """
    if name == DEMO_MODEL:
        return read_model_spec(demo_model_path(), name=name)
    path = Path(name).expanduser()
    if path.name == "config.json" and path.is_file():
        return parse_model_spec(read_config(path.parent), name=name)
    known = None if path.is_dir() else known_shape(name)
    if known is not None:
        return known
    try:
        local = find_local_model(name)
        if local is None:
            return look_up_hub_model(name, revision=revision).spec
    except ModelError as error:
        raise ModelError(
            error.message,
            why=error.why,
            fix=f"{error.fix} Known without files or network: the five Gemma 4 sizes, and "
            f"{', '.join(SHAPES)}.",
        ) from None
    return parse_model_spec(read_config(local.path), name=name)


def known_shape(name: str) -> ModelSpec | None:
    """The shape called `name`, if it is known without files or network."""
    wanted = SHAPES.get(name.lower(), name)
    config = _OTHER_CONFIGS.get(wanted)
    return parse_model_spec(config, name=wanted) if config else known_model_spec(wanted)
