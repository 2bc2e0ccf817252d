"""Gemma 4's layers: other heads on global layers, shared K and V, wider MLPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eightgig.errors import ModelError
from eightgig.models.settings import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, Settings
from eightgig.models.spec import LayerSpec

_OVERRIDABLE = ("head_dim", "num_key_value_heads")


def read_heterogeneous_layers(
    settings: Settings, layers: tuple[LayerSpec, ...]
) -> tuple[LayerSpec, ...]:
    """`layers` with what differs between them.

    Configs on the hub say `global_head_dim` and `num_global_key_value_heads`; those saved by
    Transformers 5 say `per_layer_config` instead, with an entry per layer that differs.

    Raises:
        ModelError: Values that make no model.
    """
    if "per_layer_config" in settings.values:
        layers = _override_layers(settings, layers)
    else:
        layers = _widen_global_layers(settings, layers)
    if settings.boolean("attention_k_eq_v"):
        layers = tuple(
            dataclasses.replace(layer, has_v_proj=layer.sliding_window is not None)
            for layer in layers
        )
    return _share_keys_and_values(settings, layers)


def _widen_global_layers(
    settings: Settings, layers: tuple[LayerSpec, ...]
) -> tuple[LayerSpec, ...]:
    head_dim = settings.integer("global_head_dim", high=MAX_HEAD_DIM)
    num_kv_heads = None
    if settings.boolean("attention_k_eq_v"):
        num_kv_heads = settings.optional_integer("num_global_key_value_heads", high=MAX_HEADS)
    return tuple(
        layer
        if layer.sliding_window is not None
        else dataclasses.replace(
            layer, head_dim=head_dim, num_kv_heads=num_kv_heads or layer.num_kv_heads
        )
        for layer in layers
    )


def _override_layers(settings: Settings, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    overrides = {
        _layer_index(settings, key, num_layers=len(layers)): value
        for key, value in settings.mapping("per_layer_config").items()
    }
    return tuple(
        _override_layer(settings, layer, overrides.get(layer.index, {})) for layer in layers
    )


def _layer_index(settings: Settings, key: object, *, num_layers: int) -> int:
    text = str(key)
    is_index = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_LAYERS)) + 1
    if not is_index or int(text) >= num_layers:
        settings.refuse("per_layer_config", f"settings by layer, 0 to {num_layers - 1}")
    return int(text)


def _override_layer(settings: Settings, layer: LayerSpec, override: Any) -> LayerSpec:
    is_known = isinstance(override, Mapping) and all(
        key in _OVERRIDABLE or (key == "skip" and not value) for key, value in override.items()
    )
    if not is_known:
        settings.refuse("per_layer_config", f"changes of {' and '.join(_OVERRIDABLE)} only")
    changed = Settings(name=settings.name, values=override, defaults={})
    head_dim, num_kv_heads = layer.head_dim, layer.num_kv_heads
    if "head_dim" in override:
        head_dim = changed.integer("head_dim", high=MAX_HEAD_DIM)
    if "num_key_value_heads" in override:
        num_kv_heads = changed.integer("num_key_value_heads", high=MAX_HEADS)
    return dataclasses.replace(layer, head_dim=head_dim, num_kv_heads=num_kv_heads)


def _share_keys_and_values(
    settings: Settings, layers: tuple[LayerSpec, ...]
) -> tuple[LayerSpec, ...]:
    """The last layers attend to K and V of the last earlier layer of their own kind."""
    num_shared = settings.integer("num_kv_shared_layers", low=0, high=len(layers) - 1)
    has_wide_mlp = settings.boolean("use_double_wide_mlp")
    own = layers[: len(layers) - num_shared]
    shared = []
    for layer in layers[len(own) :]:
        is_sliding = layer.sliding_window is not None
        producers = [other for other in own if (other.sliding_window is not None) == is_sliding]
        if not producers:
            settings.refuse("num_kv_shared_layers", "small enough to leave layers of each kind")
        _check_same_heads(settings, layer, producers[-1])
        shared.append(
            dataclasses.replace(
                layer,
                intermediate_size=layer.intermediate_size * (2 if has_wide_mlp else 1),
                has_k_proj=False,
                has_v_proj=False,
                kv_source=producers[-1].index,
            )
        )
    return (*own, *shared)


def _check_same_heads(settings: Settings, layer: LayerSpec, producer: LayerSpec) -> None:
    own = (layer.head_dim, layer.num_kv_heads)
    theirs = (producer.head_dim, producer.num_kv_heads)
    if own != theirs:
        raise ModelError(
            f"Layer {layer.index} of {settings.name} shares K and V of layer {producer.index}, "
            "but their heads differ.",
            why=f"head_dim and K, V heads are {own} and {theirs}.",
            fix="Download config.json again from the model's source.",
        )
