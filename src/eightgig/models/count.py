"""How many parameters a decoder has, by part and by layer."""

from __future__ import annotations

import math

from eightgig.models.layout import PLE_LINEARS, layer_tensor_shapes, other_tensor_shapes
from eightgig.models.spec import ATTENTION_LINEARS, MLP_LINEARS, DecoderSpec, LayerSpec

# Stored, but a buffer: Transformers counts it as no parameter.
_BUFFERS = ("layer_scalar",)


def count_parameters(decoder: DecoderSpec) -> int:
    """Parameters of the text decoder; a tied head counts once."""
    return sum(parameter_counts(decoder).values())


def count_layer_parameters(decoder: DecoderSpec, layer: LayerSpec) -> int:
    """Parameters of one layer."""
    shapes = layer_tensor_shapes(decoder, layer)
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in _BUFFERS)


def count_linear_parameters(decoder: DecoderSpec) -> int:
    """Parameters of the matrices that are kept in 4 bit: layer linears and experts."""
    counts = parameter_counts(decoder)
    return sum(counts[part] for part in ("attention", "mlp", "ple_linears", "experts"))


def parameter_counts(decoder: DecoderSpec) -> dict[str, int]:
    """Parameters by part: `embedding, head, ple_table, ple_linears, attention, mlp, experts,
    router, norms, biases`; parts that do not exist are 0.
    """
    parts = (
        "embedding", "head", "ple_table", "ple_linears", "attention", "mlp", "experts", "router",
        "norms", "biases",
    )  # fmt: skip
    counts = dict.fromkeys(parts, 0)
    groups = [other_tensor_shapes(decoder)]
    groups += [layer_tensor_shapes(decoder, layer) for layer in decoder.layers]
    for shapes in groups:
        for name, shape in shapes.items():
            if name not in _BUFFERS:
                counts[_part(name)] += math.prod(shape)
    return counts


def _part(name: str) -> str:
    by_name = {"embedding": "embedding", "head": "head", "ple": "ple_table"}
    by_name |= dict.fromkeys(ATTENTION_LINEARS, "attention") | dict.fromkeys(MLP_LINEARS, "mlp")
    by_name |= dict.fromkeys(PLE_LINEARS, "ple_linears")
    if name in by_name:
        return by_name[name]
    if name.startswith(("experts", "router")):
        return name.split("_", maxsplit=1)[0]
    return "biases" if name.endswith("_bias") else "norms"
