"""A layer's weights for one visit: dequantised into scratch, the rest read in its slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from eightgig.adapters.lora import LinearGroup, split_masters
from eightgig.engine.decoder import LayerWeights
from eightgig.engine.linear import GroupWeight
from eightgig.models.spec import ATTENTION_LINEARS, MLP_LINEARS
from eightgig.ops.choose import Ops
from eightgig.ops.reference import Placed
from eightgig.quant.manifest import StoredBlob, StoredTensor
from eightgig.quant.nf4 import dense_view, dequantize

_BIASES = ("q_bias", "k_bias", "v_bias")
_MATRICES = ("ple_gate", "ple_projection")
_GROUP_MULTIPLE = 128  # elements: groups start at a multiple of 256 bytes
_KERNEL_COLUMNS = 8  # that `ops.triton_dequant` reads at once


@dataclass(frozen=True, slots=True)
class _Opened:
    """Views of one slot while one layer is in it; made once, since slots do not move.

    Attributes:
        weights: What the layer computes with.
        fill: Each writes a part of scratch: one linear, or the whole adapter.
        copies: (target, source): dense tensors into the compute dtype.
    """

    weights: LayerWeights
    fill: tuple[Callable[[], object], ...]
    copies: tuple[tuple[Tensor, Tensor], ...]


class WeightReader:
    """Opens slots: dequantises linears into one scratch buffer that all layers share.

    Args:
        blobs: Formats of the layers.
        groups: Linear groups of each layer.
        scale: alpha / r of the adapter.
        ops: Fast or plain operations.
        code_tables: Quantisation tables on the device.
        dtype: Compute dtype.
        device: Where the slots are.
    """

    def __init__(
        self,
        blobs: Sequence[StoredBlob],
        groups: Sequence[Sequence[LinearGroup]],
        *,
        scale: float,
        ops: Ops,
        code_tables: dict[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._blobs = tuple(blobs)
        self._groups = tuple(tuple(layer) for layer in groups)
        self._scale = scale
        self._ops = ops
        self._code_tables = code_tables
        self._scratch = torch.empty(
            max(scratch_size(layer) for layer in self._groups), dtype=dtype, device=device
        )
        self._opened: dict[tuple[int, int, bool], _Opened] = {}

    def open(self, slot: Tensor, layer: int, adapter: Tensor | None) -> LayerWeights:
        """The weights of `layer`, whose blob is in `slot`.

        They are valid until the next call.

        Args:
            slot: (slot_bytes,) uint8 that starts with the layer's blob.
            layer: Its index.
            adapter: The layer's compute copy, flat in the compute dtype; None without adapter.
        """
        key = (slot.data_ptr(), layer, adapter is not None)
        opened = self._opened.get(key)
        if opened is None:
            opened = self._opened[key] = self._make(slot, layer, adapter)
        for fill in opened.fill:
            fill()
        for target, source in opened.copies:
            target.copy_(source)
        return opened.weights

    def close(self) -> None:
        """Drop every view and the scratch buffer."""
        self._opened.clear()
        self._scratch = self._scratch.new_empty(0)

    def _reader(self, slot: Tensor, stored: StoredTensor, rows: Tensor) -> Callable[[], object]:
        """What dequantises one linear of `slot` into `rows`; its views are made only once."""
        make = self._ops.dequantizer
        fits_kernel = stored.shape[-1] % _KERNEL_COLUMNS == 0
        if make is None or stored.format == "dense" or not fits_kernel:
            return partial(dequantize, slot, stored, self._code_tables, out=rows)
        codes = slot[stored.offset_bytes : stored.offset_bytes + stored.size_bytes]
        code = self._code_tables[stored.code_table]
        start, count = stored.absmax_offset_bytes, stored.absmax_count
        nested = stored.nested
        if nested is None:
            absmax = slot[start : start + 4 * count].view(torch.float32)
            return make(codes, absmax, None, 0.0, stored.block_size, 0, code, None, out=rows)
        nested_bytes = slot[nested.offset_bytes : nested.offset_bytes + 4 * nested.count]
        return make(
            codes,
            slot[start : start + count],
            nested_bytes.view(torch.float32),
            nested.mean,
            stored.block_size,
            nested.block_size,
            code,
            self._code_tables[nested.code_table],
            out=rows,
        )

    def _make(self, slot: Tensor, layer: int, adapter: Tensor | None) -> _Opened:
        groups, stored = self._groups[layer], self._blobs[layer].tensors
        parts = split_masters(adapter, groups) if adapter is not None else {}
        weights: dict[str, GroupWeight] = {}
        fill: list[Callable[[], object]] = []
        pieces: list[Placed] = []
        start = source = 0
        for group in groups:
            rows, columns = group.out_size + group.rank_size, group.in_size + group.rank_size
            scratch = self._scratch[start : start + rows * columns].view(rows, columns)
            targets = scratch[:, : group.in_size]
            fill += [
                self._reader(slot, stored[linear.name], targets[linear.out_rows])
                for linear in group.linears
            ]
            if group.rank_size:
                pieces += _adapter_pieces(group, source, start)
            source += group.master_size
            start += _rounded(rows * columns)
            a = parts[group.name].a if group.rank_size and adapter is not None else None
            weights[group.name] = GroupWeight(group, scratch, a, self._scale, self._ops)
        if adapter is not None and pieces:
            fill.append(self._ops.placer(adapter, self._scratch, pieces, self._scale))
        copies: list[tuple[Tensor, Tensor]] = []
        dense = self._dense(slot, stored, copies)
        return _Opened(LayerWeights(groups=weights, dense=dense), tuple(fill), tuple(copies))

    def _dense(
        self,
        slot: Tensor,
        stored: Mapping[str, StoredTensor],
        copies: list[tuple[Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        """Norms as they are, in float32; what enters a GEMM in the compute dtype."""
        dense: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            if name in ATTENTION_LINEARS + MLP_LINEARS or name in _BIASES:
                continue
            view = dense_view(slot, tensor)
            if name in _MATRICES and view.dtype != self._scratch.dtype:
                dense[name] = torch.empty_like(view, dtype=self._scratch.dtype)
                copies.append((dense[name], view))
            else:
                dense[name] = view
        biases = [dense_view(slot, stored[name]) for name in _BIASES if name in stored]
        if biases:
            sizes = [len(bias) for bias in biases]
            dense["qkv_bias"] = self._scratch.new_empty(sum(sizes))
            targets = dense["qkv_bias"].split(sizes)
            copies += zip(targets, biases, strict=True)
        return dense


def _adapter_pieces(group: LinearGroup, source: int, start: int) -> list[Placed]:
    """Where the parts of a group's adapter go: A below W, and beside each linear its s B.

    Args:
        group: With an adapter.
        source: First element of its run in the layer's compute copy.
        start: First element of its part of scratch.
    """
    stride = group.in_size + group.rank_size
    pieces = [
        Placed(
            source=source,
            target=start + group.out_size * stride,
            rows=group.rank_size,
            columns=group.in_size,
            stride=stride,
            start=0,
            width=group.in_size,
            is_scaled=False,
        )
    ]
    source += group.rank_size * group.in_size
    for linear in group.linears:
        pieces.append(
            Placed(
                source=source,
                target=start + linear.out_start * stride + group.in_size,
                rows=linear.out_size,
                columns=group.rank_size,
                stride=stride,
                start=linear.rank_start,
                width=linear.rank,
                is_scaled=True,
            )
        )
        source += linear.out_size * linear.rank
    return pieces


def scratch_size(groups: Sequence[LinearGroup]) -> int:
    """Elements of scratch that one layer takes; each group starts at an aligned place."""
    sizes = [
        (group.out_size + group.rank_size) * (group.in_size + group.rank_size) for group in groups
    ]
    return sum(_rounded(size) for size in sizes)


def _rounded(size: int) -> int:
    return -(-size // _GROUP_MULTIPLE) * _GROUP_MULTIPLE
