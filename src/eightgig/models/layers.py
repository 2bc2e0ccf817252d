"""The layers of a decoder from its config: sizes, windows and rotary embeddings."""

from __future__ import annotations

from eightgig.models.families import FULL, SLIDING, Family
from eightgig.models.heterogeneous import read_heterogeneous_layers
from eightgig.models.rope import read_rope, read_ropes_by_layer_type
from eightgig.models.settings import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, Settings
from eightgig.models.spec import LayerSpec, RopeSpec


def read_layers(settings: Settings, family: Family, *, hidden_size: int) -> tuple[LayerSpec, ...]:
    """The layers of a decoder, in order.

    Raises:
        ModelError: Values that make no model.
    """
    num_layers = settings.integer("num_hidden_layers", high=MAX_LAYERS)
    num_heads = settings.integer("num_attention_heads", high=MAX_HEADS)
    head_dim = settings.optional_integer("head_dim", high=MAX_HEAD_DIM)
    num_kv_heads = settings.optional_integer("num_key_value_heads", high=num_heads)
    intermediate_size = settings.integer("intermediate_size")
    windows = _read_windows(settings, family, num_layers=num_layers)
    ropes = _read_ropes(settings, family)
    layers = tuple(
        LayerSpec(
            index=index,
            sliding_window=window,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads or num_heads,
            head_dim=head_dim or max(1, hidden_size // num_heads),
            intermediate_size=intermediate_size,
            rope=ropes[FULL if window is None else SLIDING],
        )
        for index, window in enumerate(windows)
    )
    if family.is_heterogeneous:
        layers = read_heterogeneous_layers(settings, layers)
    for layer in layers:
        if layer.num_heads % layer.num_kv_heads:
            settings.refuse("num_key_value_heads", f"a divisor of the {layer.num_heads} heads")
        if layer.head_dim % 2:
            settings.refuse("head_dim", "even, because half of a head is rotated against the other")
    return layers


def _read_ropes(settings: Settings, family: Family) -> dict[str, RopeSpec]:
    if family.rope_defaults:
        return read_ropes_by_layer_type(settings, family.rope_defaults)
    return dict.fromkeys((SLIDING, FULL), read_rope(settings))


def _read_windows(settings: Settings, family: Family, *, num_layers: int) -> list[int | None]:
    """The sliding window of each layer, in tokens, the query itself included."""
    if family.window_rule == "none":
        return [None] * num_layers
    window = settings.optional_integer("sliding_window", high=MAX_POSITIONS)
    if family.window_rule == "all_layers":
        return [window] * num_layers
    if family.window_rule == "max_window_layers" and not settings.boolean("use_sliding_window"):
        window = None
    types = settings.strings("layer_types", allowed=(SLIDING, FULL), count=num_layers)
    if types is None and family.window_rule == "max_window_layers":
        first = settings.integer("max_window_layers", low=0) if window else num_layers
        types = [SLIDING if index >= first else FULL for index in range(num_layers)]
    elif types is None:
        pattern = settings.values.get("sliding_window_pattern", family.layer_pattern)
        if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 1:
            settings.refuse("sliding_window_pattern", "a whole number above 0")
        types = [FULL if (index + 1) % pattern == 0 else SLIDING for index in range(num_layers)]
    if family.is_heterogeneous:
        types[-1] = FULL  # as Transformers does
    if SLIDING in types and window is None:
        settings.refuse("sliding_window", "a number of tokens, as some layers are sliding")
    return [window if layer_type == SLIDING else None for layer_type in types]
