"""One decoder layer, forward and backward, for every dense family; described by data.

A visit recomputes what the backward pass needs from the layer's input, so nothing but that input
(and, where the plan says so, chosen outputs) waits between the two passes. The MLP half runs in
tiles of tokens, since its intermediate is the largest activation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eightgig.adapters.lora import GroupMasters
from eightgig.engine.batch import MicroBatch
from eightgig.engine.linear import Dropout, GroupWeight, Widened
from eightgig.models.spec import DecoderSpec, LayerSpec
from eightgig.ops.choose import Ops
from eightgig.ops.reference import HeadLayout

Attend = Callable[[Tensor, Tensor | None, Tensor | None, Tensor], None]
OFFLOADS = ("attention", "o_proj", "down_proj")
"""Outputs that can be kept instead of computed again; `attention` is its output and `lse`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """The weights of one layer while it is visited; views of a slot and of scratch.

    Attributes:
        groups: By name: `qkv`, `o`, `gate_up`, `down`.
        dense: By short name: norms (float32), `layer_scalar` (0-d float32), and in the compute
            dtype `qkv_bias`, `ple_gate`, `ple_projection`.
    """

    groups: Mapping[str, GroupWeight]
    dense: Mapping[str, Tensor]


@dataclass(kw_only=True)
class AttentionSaved:
    """What the backward of the attention half needs, recomputed in the same visit.

    Attributes:
        normed: Normed input, (N, D).
        qkv: Output of the joined projections, (N, `HeadLayout.width`).
        q, k, v: Heads after norm and rotation, (N, H or K, hd).
        attended: Output of attention, (N, H hd).
        lse: What `Ops.attention` returns beside its output.
        projected: Output of `o_proj`, (N, D).
    """

    normed: Widened
    qkv: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attended: Widened
    lse: Tensor
    projected: Tensor


@dataclass(kw_only=True)
class MlpSaved:
    """What the backward of the MLP half needs, for one tile of T tokens.

    Attributes:
        normed: Normed input, (T, D).
        gate, up: Outputs of the joined projections, (T, F).
        product: activation(gate) * up, (T, F).
        projected: Output of `down_proj`, (T, D).
        ple_input: The layer's per-layer inputs, (T, P); None, like all below, without them.
        ple_gate, ple_product: What they are gated by, and the product, (T, P).
        ple_projected: That product back in the hidden size, (T, D).
    """

    normed: Widened
    gate: Tensor
    up: Tensor
    product: Widened
    projected: Tensor
    ple_input: Tensor | None = None
    ple_gate: Tensor | None = None
    ple_product: Tensor | None = None
    ple_projected: Tensor | None = None


class DecoderLayer:
    """The computation of one layer.

    Args:
        decoder: The stack it belongs to.
        layer: Which layer.
        ops: Fast or plain operations.
        mlp_tile_tokens: Tokens per tile of the MLP.
        dropout: Share of adapter inputs dropped in training.
        offload: Outputs that `forward` keeps, of `OFFLOADS`.
    """

    def __init__(
        self,
        decoder: DecoderSpec,
        layer: LayerSpec,
        ops: Ops,
        *,
        mlp_tile_tokens: int,
        dropout: float,
        offload: Collection[str] = (),
    ) -> None:
        self.spec = layer
        self.heads = HeadLayout(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            has_k=layer.has_k_proj,
            has_v=layer.has_v_proj,
            norms_v=decoder.has_v_norm and layer.has_k_proj,
        )
        self.rotary_key = rotary_key(layer)
        self._decoder = decoder
        self._ops = ops
        self._eps = decoder.rms_norm_eps
        self._tile = mlp_tile_tokens
        self._dropout = dropout
        self._offload = frozenset(offload)
        self._is_shared = any(other.kv_source == layer.index for other in decoder.layers)

    def forward(
        self,
        weights: LayerWeights,
        hidden: Tensor,
        batch: MicroBatch,
        *,
        kept: dict[str, Tensor] | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """The layer's output, (N, D).

        Args:
            weights: Of this visit.
            hidden: The layer's input, (N, D).
            batch: The micro-batch.
            kept: Outputs that the plan keeps for the backward pass are added to it.
            attend: Replaces attention over the micro-batch, called with (q, k, v, out): used
                with a KV cache.
        """
        hidden, saved = self._attention_forward(weights, hidden, batch, attend, {})
        if kept is not None and "attention" in self._offload:
            kept |= {"attention": saved.attended.whole, "lse": saved.lse}
        if kept is not None and "o_proj" in self._offload:
            kept["o_proj"] = saved.projected
        del saved
        for number, tile in enumerate(self._tiles(batch)):
            part = _part(hidden, tile)
            mlp_saved, residual = self._mlp_forward(weights, part, batch, tile, None)
            if kept is not None and "down_proj" in self._offload:
                kept[f"down_proj.{number}"] = mlp_saved.projected
            self._mlp_out(weights.dense, mlp_saved, residual, out=part)
            del mlp_saved, residual
        return hidden

    def backward(
        self,
        weights: LayerWeights,
        hidden: Tensor,
        grad: Tensor,
        batch: MicroBatch,
        grads: Mapping[str, GroupMasters],
        kept: Mapping[str, Tensor],
    ) -> Tensor:
        """The gradient of the layer's input, (N, D).

        Args:
            weights: Of this visit.
            hidden: The layer's input, (N, D).
            grad: Gradient of its output, (N, D).
            batch: The micro-batch; gradients of shared K and V are added to it.
            grads: float32 sums of the adapter's gradients, by group; added to.
            kept: What `forward` kept.
        """
        middle, saved = self._attention_forward(weights, hidden, batch, None, kept)
        for number, tile in enumerate(self._tiles(batch)):
            self._mlp_backward(
                weights,
                _part(middle, tile),
                _part(grad, tile),
                batch,
                tile,
                grads,
                projected=kept.get(f"down_proj.{number}"),
            )
        return self._attention_backward(weights, hidden, middle, batch, saved, grads)

    def _tiles(self, batch: MicroBatch) -> list[slice]:
        """The tokens in tiles of equal size, as near to the planned one as that allows."""
        count = -(-batch.num_tokens // self._tile)
        size = -(-batch.num_tokens // count)
        return [
            slice(at, min(at + size, batch.num_tokens)) for at in range(0, batch.num_tokens, size)
        ]

    def _dropout_of(self, batch: MicroBatch, tile: slice | None = None) -> Dropout | None:
        if batch.row_keys is None or not self._dropout:
            return None
        keys = batch.row_keys if tile is None else batch.row_keys[tile]
        return Dropout(p=self._dropout, row_keys=keys, layer=self.spec.index)

    def _attention_forward(
        self,
        weights: LayerWeights,
        hidden: Tensor,
        batch: MicroBatch,
        attend: Attend | None,
        kept: Mapping[str, Tensor],
    ) -> tuple[Tensor, AttentionSaved]:
        ops, dense, dropout = self._ops, weights.dense, self._dropout_of(batch)
        qkv_weight, o_weight = weights.groups["qkv"], weights.groups["o"]
        cos, sin = batch.rotary[self.rotary_key]
        normed = qkv_weight.new_input(batch.num_tokens)
        ops.rms_norm(hidden, dense["input_norm"], self._eps, out=normed.main)
        qkv = qkv_weight.forward(normed, dropout)
        if "qkv_bias" in dense:
            qkv += dense["qkv_bias"]
        q, k, v = ops.qkv_norm_rope(
            qkv, self.heads, dense.get("q_norm"), dense.get("k_norm"), cos, sin, self._eps
        )
        if self.spec.kv_source is not None and attend is None:
            k, v = batch.shared_kv[self.spec.kv_source]
        elif self._is_shared and k is not None and v is not None:
            batch.shared_kv[self.spec.index] = (k, v)
        if "attention" in kept:
            attended, lse = o_weight.widened_input(kept["attention"]), kept["lse"]
        else:
            attended = o_weight.new_input(batch.num_tokens)
            lse = self._attend(q, k, v, attended.main.view(q.shape), batch, attend)
        projected = kept.get("o_proj")
        if projected is None:
            projected = o_weight.forward(attended, dropout)
        elif "attention" not in kept:
            o_weight.complete_input(attended, dropout)
        middle = ops.residual_norm(hidden, projected, dense.get("post_attention_norm"), self._eps)
        if attend is not None:
            k = v = q  # a KV cache keeps its own; nothing is saved for a backward
        assert k is not None and v is not None
        saved = AttentionSaved(
            normed=normed, qkv=qkv, q=q, k=k, v=v, attended=attended, lse=lse, projected=projected
        )
        return middle, saved

    def _attend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        out: Tensor,
        batch: MicroBatch,
        attend: Attend | None,
    ) -> Tensor:
        if attend is not None:
            attend(q, k, v, out)
            return q
        _, lse = self._ops.attention(
            q,
            k,
            v,
            batch.cu_seqlens,
            batch.max_length,
            self._decoder.attention_scale,
            self.spec.sliding_window,
            out=out,
        )
        return lse

    def _attention_backward(
        self,
        weights: LayerWeights,
        hidden: Tensor,
        grad: Tensor,
        batch: MicroBatch,
        saved: AttentionSaved,
        grads: Mapping[str, GroupMasters],
    ) -> Tensor:
        ops, dense, dropout = self._ops, weights.dense, self._dropout_of(batch)
        qkv_weight, o_weight = weights.groups["qkv"], weights.groups["o"]
        grad_projected = o_weight.new_grad(batch.num_tokens)
        grad_residual = ops.residual_norm_backward(
            grad,
            saved.projected,
            dense.get("post_attention_norm"),
            self._eps,
            out=grad_projected.main,
        )[0]
        grad_out = o_weight.backward(grad_projected, saved.attended, grads["o"], dropout)
        del grad_projected
        grad_q, grad_k, grad_v = ops.attention_backward(
            grad_out.view(saved.q.shape),
            saved.q,
            saved.k,
            saved.v,
            saved.attended.main.view(saved.q.shape),
            saved.lse,
            batch.cu_seqlens,
            batch.max_length,
            self._decoder.attention_scale,
            self.spec.sliding_window,
        )
        del grad_out
        own_k, own_v = self._share_kv_grads(batch, grad_k, grad_v)
        grad_qkv = qkv_weight.new_grad(batch.num_tokens)
        cos, sin = batch.rotary[self.rotary_key]
        ops.qkv_norm_rope_backward(
            grad_q,
            own_k,
            own_v,
            saved.qkv,
            self.heads,
            dense.get("q_norm"),
            dense.get("k_norm"),
            cos,
            sin,
            self._eps,
            out=grad_qkv.main,
        )
        grad_normed = qkv_weight.backward(grad_qkv, saved.normed, grads["qkv"], dropout)
        return ops.rms_norm_backward(
            grad_normed, hidden, dense["input_norm"], self._eps, add=grad_residual
        )

    def _share_kv_grads(
        self, batch: MicroBatch, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Hand gradients of K and V to the layer that made them, or take what was handed on."""
        source = self.spec.kv_source
        if source is not None:
            given = batch.shared_kv_grads.get(source)
            if given is None:
                batch.shared_kv_grads[source] = (grad_k.float(), grad_v.float())
            else:
                given[0].add_(grad_k)
                given[1].add_(grad_v)
            return None, None
        taken = batch.shared_kv_grads.pop(self.spec.index, None)
        if taken is not None:
            return taken[0].add_(grad_k).to(grad_k.dtype), taken[1].add_(grad_v).to(grad_v.dtype)
        return grad_k, grad_v

    def _mlp_forward(
        self,
        weights: LayerWeights,
        hidden: Tensor,
        batch: MicroBatch,
        tile: slice,
        projected: Tensor | None,
    ) -> tuple[MlpSaved, Tensor]:
        """What the MLP half makes of one tile, and what `_mlp_out` adds the last of it to.

        `projected` is the output of `down_proj` where it was kept: then it is not computed again.
        """
        ops, dense, dropout = self._ops, weights.dense, self._dropout_of(batch, tile)
        gate_up_weight, down_weight = weights.groups["gate_up"], weights.groups["down"]
        normed = gate_up_weight.new_input(len(hidden))
        ops.rms_norm(hidden, dense["pre_mlp_norm"], self._eps, out=normed.main)
        gate, up = gate_up_weight.forward(normed, dropout).chunk(2, 1)
        product = down_weight.new_input(len(hidden))
        ops.glu(gate, up, self._decoder.activation, out=product.main)
        if projected is None:
            projected = down_weight.forward(product, dropout)
        else:
            down_weight.complete_input(product, dropout)
        saved = MlpSaved(normed=normed, gate=gate, up=up, product=product, projected=projected)
        if batch.ple is None:
            return saved, hidden
        middle = ops.residual_norm(hidden, projected, dense.get("post_mlp_norm"), self._eps)
        saved.ple_input = batch.ple[tile, self.spec.index]
        saved.ple_gate = torch.mm(middle.to(projected.dtype), dense["ple_gate"].t())
        saved.ple_product = ops.glu(saved.ple_gate, saved.ple_input, self._decoder.activation)
        saved.ple_projected = torch.mm(saved.ple_product, dense["ple_projection"].t())
        return saved, middle

    def _mlp_out(
        self, dense: Mapping[str, Tensor], saved: MlpSaved, residual: Tensor, *, out: Tensor
    ) -> None:
        """Write the layer's output for one tile; a backward pass does not need it."""
        branch, norm = saved.projected, dense.get("post_mlp_norm")
        if saved.ple_projected is not None:
            branch, norm = saved.ple_projected, dense["ple_norm"]
        scalar = dense.get("layer_scalar")
        self._ops.residual_norm(residual, branch, norm, self._eps, scalar=scalar, out=out)

    def _mlp_backward(
        self,
        weights: LayerWeights,
        hidden: Tensor,
        grad: Tensor,
        batch: MicroBatch,
        tile: slice,
        grads: Mapping[str, GroupMasters],
        *,
        projected: Tensor | None,
    ) -> None:
        """Put the gradient of the MLP half's input in its place.

        Args:
            weights: Of this visit.
            hidden: Input of one tile, (T, D); the gradient is written over it.
            grad: Gradient of the layer's output, (T, D).
            batch: The micro-batch.
            tile: Its tokens.
            grads: float32 sums of the adapter's gradients, by group; added to.
            projected: Output of `down_proj`, (T, D), where `forward` kept it.
        """
        saved = self._mlp_forward(weights, hidden, batch, tile, projected)[0]
        ops, dense, dropout = self._ops, weights.dense, self._dropout_of(batch, tile)
        gate_up_weight, down_weight = weights.groups["gate_up"], weights.groups["down"]
        scalar = dense.get("layer_scalar")
        if saved.ple_gate is not None:
            grad = self._ple_backward(dense, grad, saved)
            scalar = None
        grad_projected = down_weight.new_grad(len(hidden))
        grad_residual = ops.residual_norm_backward(
            grad,
            saved.projected,
            dense.get("post_mlp_norm"),
            self._eps,
            scalar=scalar,
            out=grad_projected.main,
        )[0]
        grad_product = down_weight.backward(grad_projected, saved.product, grads["down"], dropout)
        del grad_projected
        grad_gate_up = gate_up_weight.new_grad(len(hidden))
        out_gate, out_up = grad_gate_up.main.chunk(2, 1)
        ops.glu_backward(
            saved.gate,
            saved.up,
            grad_product,
            self._decoder.activation,
            out_gate=out_gate,
            out_up=out_up,
        )
        del grad_product
        grad_normed = gate_up_weight.backward(grad_gate_up, saved.normed, grads["gate_up"], dropout)
        ops.rms_norm_backward(
            grad_normed, hidden, dense["pre_mlp_norm"], self._eps, add=grad_residual, out=hidden
        )

    def _ple_backward(self, dense: Mapping[str, Tensor], grad: Tensor, saved: MlpSaved) -> Tensor:
        """Gradient of what enters the per-layer embedding block, (T, D)."""
        ops = self._ops
        assert saved.ple_gate is not None
        grad_residual, grad_projected = ops.residual_norm_backward(
            grad,
            saved.ple_projected,
            dense["ple_norm"],
            self._eps,
            scalar=dense.get("layer_scalar"),
        )
        projection = dense["ple_projection"]
        grad_product = torch.mm(grad_projected.to(projection.dtype), projection)
        grad_gate, _ = ops.glu_backward(
            saved.ple_gate, saved.ple_input, grad_product, self._decoder.activation
        )
        through_gate = torch.mm(grad_gate, dense["ple_gate"])
        return grad_residual + through_gate.to(grad_residual.dtype)


def _part(tensor: Tensor, tile: slice) -> Tensor:
    """The rows of a tile; without a view where that is all of them."""
    return tensor if tile.stop - tile.start == len(tensor) else tensor[tile]


def rotary_key(layer: LayerSpec) -> tuple[object, ...]:
    """What layers with the same angles have in common."""
    rope = layer.rope
    parameters = tuple(sorted((key, str(value)) for key, value in rope.parameters.items()))
    return (rope.kind, rope.theta, rope.partial_factor, layer.head_dim, parameters)
