"""LoRA as the engine sees it: which linears it joins, and where its numbers lie.

Linears that read the same input are one group (`qkv`, `o`, `gate_up`, `down`): their weights are
stacked, so that one GEMM serves them. A group's rank R is the sum of its linears' ranks, rounded
up to a multiple of 8 (16 bytes of bfloat16, which GEMMs want rows to start at). One layer's
adapter is one flat float32 run: for each group A (R, in), then each linear's B (out, r).

The engine multiplies by a *compute copy*: the same run in the compute dtype.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eightgig.config import LoraConfig
from eightgig.errors import ModelError
from eightgig.memory.layers import check_targets
from eightgig.models.spec import DecoderSpec, LayerSpec, linear_shapes

GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_RANK_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedLinear:
    """One linear of a group.

    Attributes:
        name: `q_proj` ... `down_proj`.
        out_start, out_size: Its rows in the group's stacked weight.
        rank_start, rank: Its columns in the group's rank; rank 0 where it is not adapted.
    """

    name: str
    out_start: int
    out_size: int
    rank_start: int
    rank: int

    @property
    def out_rows(self) -> slice:
        """Its rows of the stacked weight."""
        return slice(self.out_start, self.out_start + self.out_size)

    @property
    def rank_columns(self) -> slice:
        """Its columns of the group's rank."""
        return slice(self.rank_start, self.rank_start + self.rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearGroup:
    """Linears of one layer that read the same input.

    Attributes:
        name: Key of `GROUPS`.
        linears: The linears that this layer has.
        in_size, out_size: Of the stacked weight.
        rank_size: R, 0 where nothing is adapted.
    """

    name: str
    linears: tuple[AdaptedLinear, ...]
    in_size: int
    out_size: int
    rank_size: int

    @property
    def adapted(self) -> tuple[AdaptedLinear, ...]:
        """The linears with an adapter."""
        return tuple(linear for linear in self.linears if linear.rank)

    @property
    def master_size(self) -> int:
        """Elements of A and all B."""
        b_size = sum(linear.out_size * linear.rank for linear in self.linears)
        return self.rank_size * self.in_size + b_size


def module_path(name: str) -> str:
    """Path of a linear inside its layer, as in Transformers: `self_attn.q_proj`."""
    return f"mlp.{name}" if name in GROUPS["gate_up"] + GROUPS["down"] else f"self_attn.{name}"


def layer_groups(
    decoder: DecoderSpec, layer: LayerSpec, lora: LoraConfig | None, module_prefix: str = ""
) -> tuple[LinearGroup, ...]:
    """The layer's groups, in the order of `GROUPS`; no rank anywhere when `lora` is None."""
    shapes = linear_shapes(decoder, layer)
    groups = []
    for group_name, names in GROUPS.items():
        linears: list[AdaptedLinear] = []
        out_size = rank_size = 0
        for name in (name for name in names if name in shapes):
            path = f"{module_prefix}.layers.{layer.index}.{module_path(name)}"
            rank = lora.r if lora is not None and _is_target(lora.target_modules, path) else 0
            linears.append(
                AdaptedLinear(
                    name=name,
                    out_start=out_size,
                    out_size=shapes[name][0],
                    rank_start=rank_size,
                    rank=rank,
                )
            )
            out_size += shapes[name][0]
            rank_size += rank
        groups.append(
            LinearGroup(
                name=group_name,
                linears=tuple(linears),
                in_size=shapes[linears[0].name][1],
                out_size=out_size,
                rank_size=math.ceil(rank_size / _RANK_MULTIPLE) * _RANK_MULTIPLE,
            )
        )
    return tuple(groups)


def _is_target(targets: str | Sequence[str], path: str) -> bool:
    """PEFT's rule: a regular expression matches the whole path, a name its last part."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, path) is not None
    return path.rsplit(".", 1)[1] in targets


def adapter_groups(
    decoder: DecoderSpec, lora: LoraConfig, module_prefix: str
) -> tuple[tuple[LinearGroup, ...], ...]:
    """The groups of every layer.

    Raises:
        ModelError: `target_modules` names a linear that no layer has, or matches nothing.
    """
    check_targets(decoder, lora.target_modules, module_prefix)
    return tuple(layer_groups(decoder, layer, lora, module_prefix) for layer in decoder.layers)


def lora_scale(lora: LoraConfig) -> float:
    """The factor of the update: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
    return lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)


def count_trainable(layers: Sequence[Sequence[LinearGroup]]) -> int:
    """Trainable parameters, without the padding of ranks."""
    return sum(
        linear.rank * (group.in_size + linear.out_size)
        for groups in layers
        for group in groups
        for linear in group.linears
    )


@dataclass(frozen=True, slots=True)
class GroupMasters:
    """Views of one group in a layer's flat run.

    Attributes:
        a: (R, in).
        b: By linear, (out, r).
    """

    a: Tensor
    b: Mapping[str, Tensor]


def split_masters(flat: Tensor, groups: Sequence[LinearGroup]) -> dict[str, GroupMasters]:
    """Views of a layer's flat run (masters, gradients or compute copy) by group name."""
    views: dict[str, GroupMasters] = {}
    start = 0
    for group in groups:
        a_size = group.rank_size * group.in_size
        a = flat[start : start + a_size].view(group.rank_size, group.in_size)
        start += a_size
        b: dict[str, Tensor] = {}
        for linear in group.adapted:
            size = linear.out_size * linear.rank
            b[linear.name] = flat[start : start + size].view(linear.out_size, linear.rank)
            start += size
        views[group.name] = GroupMasters(a, b)
    return views


class Adapter:
    """Masters of the adapter and the compute copies made of them.

    Attributes:
        layers: Groups of every layer.
        scale: alpha / r.
        dropout: Share of adapter inputs dropped in training.
        whole: All masters, one layer behind the other.
        masters: One flat float32 tensor per layer.
        compute: One flat tensor per layer in the compute dtype.
        fresh: One event per layer; cleared while its compute copy is older than its masters.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[LinearGroup]],
        *,
        scale: float,
        dropout: float,
        dtype: torch.dtype,
        device: torch.device,
        pin: bool = False,
    ) -> None:
        self.layers = tuple(tuple(groups) for groups in layers)
        self.scale = scale
        self.dropout = dropout
        sizes = [sum(group.master_size for group in groups) for groups in self.layers]
        self.whole = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self.masters: list[Tensor] = list(self.whole.split(sizes))
        whole_copy = torch.zeros(sum(sizes), dtype=dtype, device=device, pin_memory=pin)
        self.compute: list[Tensor] = list(whole_copy.split(sizes))
        self.fresh = [threading.Event() for _ in self.layers]

    def initialize(self, generator: torch.Generator) -> None:
        """PEFT's start: A uniform within 1/sqrt(in) (Kaiming, a = sqrt(5)), B zero."""
        for flat, groups in zip(self.masters, self.layers, strict=True):
            flat.zero_()
            views = split_masters(flat, groups)
            for group in groups:
                bound = 1 / math.sqrt(group.in_size)
                for linear in group.adapted:
                    rows = torch.empty(linear.rank, group.in_size)
                    rows.uniform_(-bound, bound, generator=generator)
                    views[group.name].a[linear.rank_columns] = rows.to(flat.device)
        self.refresh_all()

    def fresh_compute(self, layer: int) -> Tensor:
        """The compute copy of `layer`, once it is as new as its masters."""
        self.fresh[layer].wait()
        return self.compute[layer]

    def refresh(self, layer: int) -> None:
        """Make the compute copy of `layer` from its masters."""
        self.compute[layer].copy_(self.masters[layer])
        self.fresh[layer].set()

    def refresh_all(self) -> None:
        """Make every compute copy from its masters."""
        for layer in range(len(self.layers)):
            self.refresh(layer)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views of the masters: `layers.{i}.{module}.lora_A` (r, in) and `.lora_B` (out, r)."""
        for index, (flat, groups) in enumerate(zip(self.masters, self.layers, strict=True)):
            yield from named_views(flat, groups, index)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take masters from tensors named as in `named_tensors`.

        Raises:
            ModelError: A tensor is missing, unknown, or of another shape.
        """
        views = dict(self.named_tensors())
        wrong = sorted(set(views) ^ set(tensors)) or sorted(
            name for name, view in views.items() if view.shape != tensors[name].shape
        )
        if wrong:
            raise ModelError(
                f"The adapter does not match the model: {', '.join(wrong[:3])}.",
                why="Every adapted linear needs its A and B, in the rank of the configuration.",
                fix="Use the adapter's own base model, lora.r and lora.target_modules.",
            )
        for name, view in views.items():
            view.copy_(tensors[name])
        self.refresh_all()


def named_views(
    flat: Tensor, groups: Sequence[LinearGroup], index: int
) -> Iterator[tuple[str, Tensor]]:
    """Named A and B of one layer's flat run (masters, gradients or moments)."""
    views = split_masters(flat, groups)
    for group in groups:
        for linear in group.adapted:
            name = f"layers.{index}.{module_path(linear.name)}"
            yield f"{name}.lora_A", views[group.name].a[linear.rank_columns]
            yield f"{name}.lora_B", views[group.name].b[linear.name]
