"""The stack of layers: loss and adapter gradients of an optimizer step, layer by layer.

All micro-batches of a group pass a layer before any passes the next: the layer's weights are
copied and dequantised once for the group in each pass. Memory holds one micro-batch's
intermediates, the hidden states of the group, and what waits for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eightgig.adapters.lora import Adapter, LinearGroup, layer_groups
from eightgig.engine.batch import MicroBatch
from eightgig.engine.checkpoints import DeviceWaiting, HostWaiting, Waiting
from eightgig.engine.decoder import Attend, DecoderLayer, LayerWeights
from eightgig.engine.embedding import Embedding, HostInputs
from eightgig.engine.gradients import Gradients
from eightgig.engine.head import HeadChunks, HeadResult, StreamedHead
from eightgig.engine.weights import WeightReader
from eightgig.memory.estimate import BUNDLE_BUFFERS
from eightgig.memory.plan import Plan
from eightgig.models.spec import DecoderSpec
from eightgig.ops.choose import Ops
from eightgig.quant.nf4 import code_table_tensors
from eightgig.quant.store import Store
from eightgig.streaming.host import place_on_host
from eightgig.streaming.meter import WaitMeter
from eightgig.streaming.ring import Ring, RingItem

AttendFor = Callable[[int, int], Attend]


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of labelled tokens, in the order of the micro-batches, (n,) float32 on the device."""

    values: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, 0-d."""
        return self.values.sum()


class Model:
    """A decoder whose frozen weights flow through the device.

    Args:
        decoder: What it is.
        store: Its prepared weights.
        plan: What lies where.
        ops: Fast or plain operations.
        adapter: The adapter; None: the base model alone.
        host_weights: Those of a model of the same store that was laid out otherwise; None: they are
            read from the store.
        poison: Fill freed slots with NaN bytes (tests).

    Attributes:
        host_weights: Layers, then chunks of the head, where copies to the device start from.
    """

    def __init__(
        self,
        decoder: DecoderSpec,
        store: Store,
        plan: Plan,
        ops: Ops,
        adapter: Adapter | None,
        *,
        host_weights: Sequence[Tensor] | None = None,
        poison: bool = False,
    ) -> None:
        self.decoder = decoder
        self.device = device_of(plan)
        self.dtype = getattr(torch, plan.compute_dtype)
        self._hidden_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        self._plan = plan
        self._ops = ops
        self._adapter = adapter
        self._uses_adapter = adapter is not None
        other = store.other()
        self.embedding = Embedding(
            decoder,
            store.embedding,
            store.ple,
            other,
            dtype=self.dtype,
            hidden_dtype=self._hidden_dtype,
            device=self.device,
        )
        self._final_norm = other["final_norm"].to(self.device)
        groups = _groups(decoder, adapter)
        self._reader = WeightReader(
            store.manifest.layers,
            groups,
            scale=adapter.scale if adapter is not None else 1.0,
            ops=ops,
            code_tables=code_table_tensors(store.manifest.code_tables, self.device),
            dtype=self.dtype,
            device=self.device,
        )
        self._layers = [
            DecoderLayer(
                decoder,
                layer,
                ops,
                mlp_tile_tokens=plan.mlp_tile_tokens,
                dropout=adapter.dropout if adapter is not None else 0.0,
                offload=plan.offload,
            )
            for layer in decoder.layers
        ]
        chunks = HeadChunks(
            hidden_size=decoder.hidden_size,
            vocab_size=decoder.vocab_size,
            rows=plan.head_chunk_rows,
            dtype=store.head.dtype,
            tile_tokens=plan.head_tile_tokens,
        )
        self._head = StreamedHead(chunks, ops, decoder.final_softcap)
        self.meter = WaitMeter()
        self.host_weights = self._place(store) if host_weights is None else tuple(host_weights)
        self.ring = Ring(
            self._ring_items(store),
            plan.layer_slots,
            self.device,
            meter=self.meter,
            poison=poison,
        )
        layer_visits = list(range(decoder.num_layers))
        head_visits = [decoder.num_layers + number for number in range(len(chunks.starts))]
        self._forward_visits = layer_visits + head_visits
        self._training_visits = self._forward_visits + layer_visits[::-1]
        self._current_visits: list[int] = []
        self._adapter_parts: dict[tuple[int, int], Tensor] = {}
        self._waiting: Waiting = (
            HostWaiting(
                self.device,
                self.meter,
                expected_bytes=plan.host_breakdown.get("checkpoints", 0),
                buffer_bytes=plan.breakdown.get("checkpoints", 0) // BUNDLE_BUFFERS,
            )
            if plan.checkpoints == "host" and self.device.type == "cuda"
            else DeviceWaiting()
        )

    @property
    def micro_batches_per_visit(self) -> int:
        """Micro-batches that share one visit of a layer."""
        return self._plan.micro_batches_per_visit

    def use_adapter(self, is_used: bool) -> None:
        """Switch the adapter on or off in `losses` and `logits`."""
        self._uses_adapter = is_used and self._adapter is not None

    @torch.no_grad()
    def gradients(
        self, inputs: Sequence[HostInputs], loss_tokens: int, gradients: Gradients
    ) -> Losses:
        """Loss of an optimizer step; the adapter's gradients of loss_sum / loss_tokens.

        Args:
            inputs: The step's micro-batches.
            loss_tokens: Labelled tokens of the whole step.
            gradients: Where gradients are summed; `begin_step` has been called.
        """
        size = self._plan.micro_batches_per_visit
        losses = []
        for start in range(0, len(inputs), size):
            losses.append(self._group(inputs[start : start + size], loss_tokens, gradients))
            gradients.end_group()
        return Losses(torch.cat(losses))

    @torch.no_grad()
    def losses(self, inputs: Sequence[HostInputs]) -> Losses:
        """Losses alone, in groups as in training."""
        size = self._plan.micro_batches_per_visit
        losses = []
        for start in range(0, len(inputs), size):
            self._start(self._forward_visits)
            hidden, batches = self._embed(inputs[start : start + size])
            self._forward(hidden, batches, keeps=False)
            result = self._cross_entropy(hidden, batches, grad_scale=None)
            losses.append(result.losses)
        return Losses(torch.cat(losses))

    @torch.no_grad()
    def logits(self, inputs: HostInputs) -> Tensor:
        """Logits of every token of a micro-batch, (N, V) float32."""
        return self.next_logits([inputs], None)

    @torch.no_grad()
    def next_logits(
        self,
        inputs: Sequence[HostInputs],
        attend: AttendFor | None,
        *,
        tokens: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Logits (n, V) float32 after chosen tokens of some micro-batches.

        Args:
            inputs: The micro-batches.
            attend: Called with layer and number of the micro-batch, gives what attends instead of
                attention over the micro-batch; None: that.
            tokens: For each micro-batch the places of its tokens, int64 on the device; None: all.
        """
        self._start(self._forward_visits)
        hidden, batches = self._embed(inputs)
        self._forward(hidden, batches, keeps=False, attend=attend)
        if tokens is not None:
            pairs = zip(hidden, tokens, strict=True)
            hidden = [states.index_select(0, places) for states, places in pairs]
        return self._head.logits(self.ring, self._normed(torch.cat(hidden)))

    def close(self) -> None:
        """Wait for copies and give the memory back."""
        self.embedding.close()
        self._waiting.close()
        self.ring.close()
        self._adapter_parts.clear()
        self._reader.close()

    def _group(
        self, inputs: Sequence[HostInputs], loss_tokens: int, gradients: Gradients
    ) -> Tensor:
        """One visit of every layer forward and backward, by all of `inputs`."""
        self._start(self._training_visits)
        self._waiting.begin()
        hidden, batches = self._embed(inputs)
        self._forward(hidden, batches, keeps=True)
        with torch.profiler.record_function("head"):
            losses, grads = self._head_pass(hidden, batches, grad_scale=1.0 / loss_tokens)
        hidden.clear()
        keys = [
            (layer, number)
            for layer in reversed(range(self.decoder.num_layers))
            for number in range(len(batches))
        ]
        bundles = self._waiting.read(keys)
        for layer in reversed(range(self.decoder.num_layers)):
            weights = self._open(layer)
            sums = gradients.open(layer)
            for number, batch in enumerate(batches):
                bundle = next(bundles)
                grads[number] = self._layers[layer].backward(
                    weights, bundle["input"], grads[number], batch, sums, bundle
                )
            gradients.close(layer)
            self.ring.release()
        self._waiting.clear()
        return losses

    def _start(self, visits: list[int]) -> None:
        if self._current_visits is not visits:
            self._current_visits = visits
            self.ring.start(visits)

    def _embed(self, inputs: Sequence[HostInputs]) -> tuple[list[Tensor], list[MicroBatch]]:
        pairs = [self.embedding.to_device(each) for each in inputs]
        return [hidden for hidden, _ in pairs], [batch for _, batch in pairs]

    def _forward(
        self,
        hidden: list[Tensor],
        batches: Sequence[MicroBatch],
        *,
        keeps: bool,
        attend: AttendFor | None = None,
    ) -> None:
        """Pass every micro-batch through the layers; `hidden` becomes their output."""
        for index, layer in enumerate(self._layers):
            weights = self._open(index)
            for number, batch in enumerate(batches):
                kept = {"input": hidden[number]} if keeps else None
                attends = attend(index, number) if attend is not None else None
                hidden[number] = layer.forward(
                    weights, hidden[number], batch, kept=kept, attend=attends
                )
                if kept is not None:
                    self._waiting.put((index, number), kept)
            self.ring.release()

    def _open(self, layer: int) -> LayerWeights:
        slot = self.ring.acquire()
        adapter = None
        if self._uses_adapter and self._adapter is not None:
            adapter = self._adapter_part(slot, layer)
        return self._reader.open(slot, layer, adapter)

    def _adapter_part(self, slot: Tensor, layer: int) -> Tensor:
        """The layer's compute copy: in the slot where it travels with the layer."""
        assert self._adapter is not None
        compute = self._adapter.compute[layer]
        if compute.device == self.device:
            return self._adapter.fresh_compute(layer)
        key = (slot.data_ptr(), layer)
        part = self._adapter_parts.get(key)
        if part is None:
            start = self.ring.items[layer].changing_start_bytes
            size_bytes = compute.numel() * compute.element_size()
            part = slot[start : start + size_bytes].view(compute.dtype)
            self._adapter_parts[key] = part
        return part

    def _normed(self, hidden: Tensor) -> Tensor:
        normed = torch.empty_like(hidden, dtype=self.dtype)
        return self._ops.rms_norm(hidden, self._final_norm, self.decoder.rms_norm_eps, out=normed)

    def _cross_entropy(
        self, hidden: Sequence[Tensor], batches: Sequence[MicroBatch], *, grad_scale: float | None
    ) -> HeadResult:
        sizes = [len(batch.labels) for batch in batches]
        labelled = hidden[0].new_empty(sum(sizes), hidden[0].shape[1], dtype=self.dtype)
        for part, states, batch in zip(labelled.split(sizes), hidden, batches, strict=True):
            rows = states.index_select(0, batch.label_index)
            self._ops.rms_norm(rows, self._final_norm, self.decoder.rms_norm_eps, out=part)
            del rows
        labels = np.concatenate([batch.labels for batch in batches])
        return self._head.cross_entropy(self.ring, labelled, labels, grad_scale=grad_scale)

    def _head_pass(
        self, hidden: Sequence[Tensor], batches: Sequence[MicroBatch], *, grad_scale: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Losses, and gradients of the last layer's outputs."""
        result = self._cross_entropy(hidden, batches, grad_scale=grad_scale)
        assert result.grad is not None
        sizes = [len(batch.labels) for batch in batches]
        grads = []
        for states, batch, part in zip(hidden, batches, result.grad.split(sizes), strict=True):
            rows = self._ops.rms_norm_backward(
                part,
                states.index_select(0, batch.label_index),
                self._final_norm,
                self.decoder.rms_norm_eps,
            )
            grads.append(torch.zeros_like(states).index_copy_(0, batch.label_index, rows))
        return result.losses, grads

    def _place(self, store: Store) -> Sequence[Tensor]:
        num_layers = self.decoder.num_layers
        row_bytes = self.decoder.hidden_size * store.head.element_size()
        head = store.head.view(-1).view(torch.uint8)
        chunks = head.split(self._plan.head_chunk_rows * row_bytes)
        sources = [store.blob(index) for index in range(num_layers)] + list(chunks)
        if self.device.type != "cuda":
            return sources
        return place_on_host(
            sources,
            self._plan.host_weights,
            check=lambda number: store.check(number) if number < num_layers else None,
        )

    def _ring_items(self, store: Store) -> list[RingItem]:
        """Layers, then head chunks."""
        sources, num_layers = self.host_weights, self.decoder.num_layers
        layers = [self._layer_item(sources[index], store, index) for index in range(num_layers)]
        return layers + [RingItem(source) for source in sources[num_layers:]]

    def _layer_item(self, source: Tensor, store: Store, layer: int) -> RingItem:
        def check() -> None:
            store.check(layer)

        adapter = self._adapter
        if adapter is None or adapter.compute[layer].device == self.device:
            return RingItem(source, check=check)
        compute = adapter.compute[layer]
        return RingItem(
            source,
            changing=lambda: adapter.fresh_compute(layer),
            changing_bytes=compute.numel() * compute.element_size(),
            check=check,
        )


def device_of(plan: Plan) -> torch.device:
    """The device of a plan, with its number."""
    if plan.device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _groups(decoder: DecoderSpec, adapter: Adapter | None) -> Sequence[Sequence[LinearGroup]]:
    if adapter is not None:
        return adapter.layers
    return [layer_groups(decoder, layer, None) for layer in decoder.layers]
