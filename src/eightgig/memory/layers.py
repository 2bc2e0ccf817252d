"""Sizes of decoder layers and of the adapter on them, from the model's specification alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from eightgig.config import LoraConfig
from eightgig.errors import ModelError
from eightgig.models.families import TEXT_MODULE_PREFIX
from eightgig.models.spec import (
    ATTENTION_LINEARS,
    MLP_LINEARS,
    DecoderSpec,
    LayerSpec,
    ModelSpec,
    linear_shapes,
)

# Linears that read the same input are stacked, so that one GEMM serves them.
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
# GEMMs want rows to begin at multiples of 16 bytes.
RANK_MULTIPLE = 8
ALIGNMENT_BYTES = 256
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSize:
    """One group of stacked linears.

    Attributes:
        in_size, out_size: Of the stacked weight.
        rank: R, the sum of its adapted linears' ranks, rounded up; 0 where nothing is adapted.
        master_elements: A (R, in) and every adapted linear's B (out, r).
        lora_elements: The same without the rounding of R.
    """

    in_size: int
    out_size: int
    rank: int
    master_elements: int
    lora_elements: int

    @property
    def scratch_elements(self) -> int:
        """Elements of [W | B] over [A | -]: (out + R, in + R)."""
        return (self.out_size + self.rank) * (self.in_size + self.rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSize:
    """One kind of decoder layer.

    Attributes:
        count: Layers of this kind.
        shape: One of them.
        qkv, o, gate_up, down: Its groups.
        blob_bytes: Its stored weights.
        linear_elements: Elements of its linears, without experts.
        expert_elements: Elements of all its experts.
        is_kv_source: Whether later layers use its K and V.
    """

    count: int
    shape: LayerSpec
    qkv: GroupSize
    o: GroupSize
    gate_up: GroupSize
    down: GroupSize
    blob_bytes: int
    linear_elements: int
    expert_elements: int
    is_kv_source: bool

    @property
    def groups(self) -> tuple[GroupSize, ...]:
        """The groups in the order of `GROUPS`."""
        return (self.qkv, self.o, self.gate_up, self.down)

    @property
    def query_size(self) -> int:
        """Columns of Q."""
        return self.shape.num_heads * self.shape.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of K, and of V."""
        return self.shape.num_kv_heads * self.shape.head_dim

    @property
    def master_elements(self) -> int:
        """Elements of the layer's A and B."""
        return sum(group.master_elements for group in self.groups)

    @property
    def scratch_elements(self) -> int:
        """Elements of the whole layer, dequantised, with its adapter beside it."""
        return sum(group.scratch_elements for group in self.groups)


def layer_sizes(
    spec: ModelSpec | DecoderSpec, lora: LoraConfig, quantization: str
) -> tuple[LayerSize, ...]:
    """The kinds of layers of `spec`, in order of first appearance, and how many of each."""
    decoder = spec.decoder if isinstance(spec, ModelSpec) else spec
    prefix = spec.module_prefix if isinstance(spec, ModelSpec) else TEXT_MODULE_PREFIX
    sources = {layer.kv_source for layer in decoder.layers}
    kinds: dict[tuple[object, ...], tuple[LayerSpec, frozenset[str], int]] = {}
    for layer in decoder.layers:
        targets = adapted_linears(decoder, layer, lora.target_modules, prefix)
        key = (
            layer.sliding_window,
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_dim,
            layer.intermediate_size,
            layer.has_k_proj,
            layer.has_v_proj,
            layer.kv_source is None,
            layer.index in sources,
            targets,
        )
        first, _, count = kinds.get(key, (layer, targets, 0))
        kinds[key] = (first, targets, count + 1)
    return tuple(
        _layer_size(
            spec,
            layer,
            dict.fromkeys(targets, lora.r),
            quantization=quantization,
            count=count,
            is_kv_source=layer.index in sources,
        )
        for layer, targets, count in kinds.values()
    )


def check_targets(decoder: DecoderSpec, targets: str | Sequence[str], module_prefix: str) -> None:
    """Check that `target_modules` names only linears of a decoder, and matches one.

    A linear that this model does without, such as V's where every layer takes K for V, is no error:
    neither is it in a model in which only some layers do.

    Raises:
        ModelError: It does not: nothing, or less than was meant, would be trained.
    """
    existing = {name for layer in decoder.layers for name in linear_shapes(decoder, layer)}
    known = ATTENTION_LINEARS + MLP_LINEARS
    unknown = [] if isinstance(targets, str) else [name for name in targets if name not in known]
    matches = any(
        adapted_linears(decoder, layer, targets, module_prefix) for layer in decoder.layers
    )
    if unknown or not matches:
        names = unknown or ([] if isinstance(targets, str) else targets)
        what = ", ".join(names) if names else f'"{targets}"'
        raise ModelError(
            f"lora.target_modules: {what} matches no linear of the decoder.",
            why="Only the decoder's linears can be adapted; nothing else would be trained.",
            fix=f"Choose among {', '.join(sorted(existing))}.",
        )


def adapted_linears(
    decoder: DecoderSpec, layer: LayerSpec, targets: str | Sequence[str], module_prefix: str
) -> frozenset[str]:
    """Linears of `layer` that carry an adapter, by PEFT's rule for `target_modules`."""
    names = linear_shapes(decoder, layer)
    if not isinstance(targets, str):
        return frozenset(name for name in names if name in targets)
    if targets == "all-linear":
        return frozenset(names)
    pattern = re.compile(targets)
    paths = {name: f"{module_prefix}.layers.{layer.index}.{_inside(name)}" for name in names}
    return frozenset(name for name, path in paths.items() if pattern.fullmatch(path))


def _inside(name: str) -> str:
    return f"mlp.{name}" if name in MLP_LINEARS else f"self_attn.{name}"


def _layer_size(
    spec: ModelSpec | DecoderSpec,
    layer: LayerSpec,
    ranks: dict[str, int],
    *,
    quantization: str,
    count: int,
    is_kv_source: bool,
) -> LayerSize:
    decoder = spec.decoder if isinstance(spec, ModelSpec) else spec
    shapes = linear_shapes(decoder, layer)
    groups = {group: _group_size(shapes, names, ranks) for group, names in GROUPS.items()}
    return LayerSize(
        count=count,
        shape=layer,
        qkv=groups["qkv"],
        o=groups["o"],
        gate_up=groups["gate_up"],
        down=groups["down"],
        blob_bytes=blob_bytes(spec, layer, quantization),
        linear_elements=sum(prod(shape) for shape in shapes.values()),
        expert_elements=sum(map(prod, _expert_shapes(decoder))),
        is_kv_source=is_kv_source,
    )


def _group_size(
    shapes: dict[str, tuple[int, int]], names: Sequence[str], ranks: dict[str, int]
) -> GroupSize:
    present = [name for name in names if name in shapes]
    in_size = shapes[present[0]][1]
    rank = sum(ranks.get(name, 0) for name in present)
    padded = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
    b_elements = sum(shapes[name][0] * ranks.get(name, 0) for name in present)
    return GroupSize(
        in_size=in_size,
        out_size=sum(shapes[name][0] for name in present),
        rank=padded,
        master_elements=padded * in_size + b_elements,
        lora_elements=rank * in_size + b_elements,
    )


def blob_bytes(spec: ModelSpec | DecoderSpec, layer: LayerSpec, quantization: str) -> int:
    """Bytes of one stored layer: every part begins at a multiple of `ALIGNMENT_BYTES`."""
    decoder = spec.decoder if isinstance(spec, ModelSpec) else spec
    item_bytes = _ITEM_BYTES[spec.dtype] if isinstance(spec, ModelSpec) else 2
    is_nested = not _has_plain_absmax(spec)
    linears = [*linear_shapes(decoder, layer).values(), *_expert_shapes(decoder)]
    total = 0
    for shape in linears:
        if quantization == "nf4":
            total += nf4_bytes(prod(shape), is_nested=is_nested)
        else:
            total += _align(prod(shape) * item_bytes)
    float32_sizes, dense_sizes = _dense_sizes(decoder, layer)
    total += sum(_align(4 * size) for size in float32_sizes)
    return total + sum(_align(item_bytes * size) for size in dense_sizes)


def nf4_bytes(elements: int, *, is_nested: bool = True) -> int:
    """Bytes of a linear in NF4: half a byte each, and one maximum per 64.

    Nested (double quantisation), a maximum takes one byte and 256 of them share a float32.
    """
    blocks = -(-elements // 64)
    codes = _align(-(-elements // 2))
    if not is_nested:
        return codes + _align(4 * blocks)
    return codes + _align(blocks) + _align(4 * -(-blocks // 256))


def _has_plain_absmax(spec: ModelSpec | DecoderSpec) -> bool:
    """Whether a checkpoint that came in 4 bit keeps float32 maxima."""
    if not isinstance(spec, ModelSpec) or spec.quantization is None:
        return False
    return not any(name.endswith(".nested_absmax") for name in spec.tensors)


def _expert_shapes(decoder: DecoderSpec) -> list[tuple[int, int, int]]:
    """Gate and up stacked, and down, of all experts of a layer."""
    if not decoder.num_experts:
        return []
    experts, size, hidden = decoder.num_experts, decoder.expert_size, decoder.hidden_size
    return [(experts, 2 * size, hidden), (experts, hidden, size)]


def _dense_sizes(decoder: DecoderSpec, layer: LayerSpec) -> tuple[list[int], list[int]]:
    """Elements of what is stored in float32, and in the checkpoint's dtype."""
    hidden = decoder.hidden_size
    norms = [hidden] * (4 if decoder.has_sandwich_norms else 2)
    if decoder.has_qk_norm:
        norms += [layer.head_dim] * (2 if layer.has_k_proj else 1)
    if decoder.has_layer_scalar:
        norms.append(1)
    dense: list[int] = []
    if decoder.has_qkv_bias:
        kv_size = layer.num_kv_heads * layer.head_dim
        dense.append(layer.num_heads * layer.head_dim)
        dense += [kv_size] * (layer.has_k_proj + layer.has_v_proj)
    if decoder.ple_size:
        dense += [decoder.ple_size * hidden] * 2
        norms.append(hidden)
    if decoder.num_experts:
        # Router with its scales, and three more norms around the experts.
        dense.append(decoder.num_experts * hidden)
        norms += [hidden] * 4 + [decoder.num_experts]
    return norms, dense


def _align(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
