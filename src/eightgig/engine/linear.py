"""The adapted linears of a layer: one GEMM for base weight and adapter together.

A group's weight lies in scratch as

    [ W   s B ]      W (out, in), B (out, R) block-diagonal
    [ A    -  ]      A (R, in)

so that with X_aug = [X | X A^T] the output is X_aug [W | s B]^T, and with dY_aug = [dY | dY s B]
the gradient is dX = dY_aug [W ; A]. With dropout, X A^T is made of dropped inputs and the
adapter's part of dX is masked, linear by linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eightgig.adapters.lora import AdaptedLinear, GroupMasters, LinearGroup
from eightgig.ops.choose import Ops


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropout:
    """Dropout of adapter inputs in one micro-batch.

    Attributes:
        p: Share dropped.
        row_keys: (N,) hashes of the tokens.
        layer: Index of the layer.
    """

    p: float
    row_keys: Tensor
    layer: int

    def module_key(self, name: str) -> int:
        """A number below 2^32 for each linear of each layer."""
        return (self.layer * 16 + _MODULE_NUMBERS[name] + 1) * 0x9E3779B1 & 0xFFFFFFFF


_MODULE_NUMBERS = {
    name: number
    for number, name in enumerate(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
}


@dataclass(frozen=True, slots=True)
class Widened:
    """X_aug or dY_aug.

    Attributes:
        whole: (N, size + R).
        main: Its first columns, X or dY, (N, size).
        extra: The others, (N, R).
    """

    whole: Tensor
    main: Tensor
    extra: Tensor


class GroupWeight:
    """One group during a visit of its layer.

    Every view is made here, once for all visits: making one takes as long as a small launch.

    Args:
        group: Its linears.
        scratch: (out + R, in + R) in the compute dtype, laid out as above.
        a: The adapter's A, (R, in); None where nothing is adapted.
        scale: alpha / r.
        ops: Fast or plain operations.
    """

    def __init__(
        self, group: LinearGroup, scratch: Tensor, a: Tensor | None, scale: float, ops: Ops
    ) -> None:
        self.group = group
        self.scratch = scratch
        self._scale = scale
        self._ops = ops
        in_size, out_size, rank_size = group.in_size, group.out_size, group.rank_size
        self._in_sizes, self._out_sizes = (in_size, rank_size), (out_size, rank_size)
        self._base = scratch[:out_size, :in_size]
        self._with_b_t = scratch[:out_size].t()
        self._b = scratch[:out_size, in_size:]
        self._with_a = scratch[:, :in_size]
        self._a_t = None if a is None else a.t()
        self._linear_sizes = [linear.out_size for linear in group.linears]
        ranks = [linear.rank for linear in group.linears]
        self._rank_sizes = [*ranks, rank_size - sum(ranks)]  # the last is padding

    def new_input(self, tokens: int) -> Widened:
        """An empty X_aug of so many tokens."""
        return self.widened_input(self.scratch.new_empty(tokens, sum(self._in_sizes)))

    def new_grad(self, tokens: int) -> Widened:
        """An empty dY_aug of so many tokens."""
        whole = self.scratch.new_empty(tokens, sum(self._out_sizes))
        return Widened(whole, *whole.split_with_sizes(self._out_sizes, 1))

    def widened_input(self, whole: Tensor) -> Widened:
        """`whole` is an X_aug."""
        return Widened(whole, *whole.split_with_sizes(self._in_sizes, 1))

    def complete_input(self, x: Widened, dropout: Dropout | None) -> None:
        """Set `extra` of `x` to X A^T, where there is an adapter."""
        if self._a_t is None:
            return
        if dropout is None:
            torch.mm(x.main, self._a_t, out=x.extra)
            return
        x.extra.zero_()
        for linear in self.group.adapted:
            dropped = self._drop(x.main, linear, dropout)
            columns = self._a_t[:, linear.rank_columns]
            torch.mm(dropped, columns, out=x.extra[:, linear.rank_columns])

    def forward(self, x: Widened, dropout: Dropout | None) -> Tensor:
        """The outputs (N, out) of all linears; completes `x` on the way."""
        if self._a_t is None:
            return torch.mm(x.main, self._base.t())
        self.complete_input(x, dropout)
        return torch.mm(x.whole, self._with_b_t)

    def backward(
        self, dy: Widened, x: Widened, grads: GroupMasters, dropout: Dropout | None
    ) -> Tensor:
        """Gradient of the inputs, (N, in); adds the adapter's gradients to `grads`.

        Args:
            dy: Gradient of the outputs; its `extra` is filled here.
            x: As `forward` left it.
            grads: float32 sums of the layer's gradients.
            dropout: As in `forward`.
        """
        if self._a_t is None:
            return torch.mm(dy.main, self._base)
        torch.mm(dy.main, self._b, out=dy.extra)
        self._add_b_gradients(dy, x, grads)
        if dropout is None:
            add_product(grads.a, dy.extra.t(), x.main)
            return torch.mm(dy.whole, self._with_a)
        dx = torch.mm(dy.main, self._base)
        for linear in self.group.adapted:
            through_a = dy.extra[:, linear.rank_columns]
            dropped = self._drop(x.main, linear, dropout)
            add_product(grads.a[linear.rank_columns], through_a.t(), dropped)
            through = torch.mm(through_a, self._a_t[:, linear.rank_columns].t())
            dx += self._drop(through, linear, dropout)
        return dx

    def _add_b_gradients(self, dy: Widened, x: Widened, grads: GroupMasters) -> None:
        linears = self.group.linears
        if len(linears) == 1 and linears[0].rank == self.group.rank_size:
            add_product(grads.b[linears[0].name], dy.main.t(), x.extra, self._scale)
            return
        outputs = dy.main.t().split_with_sizes(self._linear_sizes)
        inputs = x.extra.split_with_sizes(self._rank_sizes, 1)
        for linear, output, narrow in zip(linears, outputs, inputs, strict=False):
            if linear.rank:
                add_product(grads.b[linear.name], output, narrow, self._scale)

    def _drop(self, x: Tensor, linear: AdaptedLinear, dropout: Dropout) -> Tensor:
        return self._ops.dropout(x, dropout.row_keys, dropout.module_key(linear.name), dropout.p)


def add_product(target: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """Add alpha * left @ right to `target`, summed in its dtype whatever that of the factors."""
    if target.dtype == left.dtype:
        target.addmm_(left, right, alpha=alpha)
    elif target.device.type == "cuda":
        torch.addmm(target, left, right, out_dtype=target.dtype, alpha=alpha, out=target)
    else:
        target.addmm_(left.to(target.dtype), right.to(target.dtype), alpha=alpha)
