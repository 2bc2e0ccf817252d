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
class GroupWeight:
    """One group during a visit of its layer.

    Attributes:
        group: Its linears.
        scratch: (out + R, in + R) in the compute dtype, laid out as above.
        a: The adapter's A, (R, in); None where nothing is adapted.
        scale: alpha / r.
        ops: Fast or plain operations.
    """

    group: LinearGroup
    scratch: Tensor
    a: Tensor | None
    scale: float
    ops: Ops

    def new_input(self, tokens: int) -> Tensor:
        """An empty X_aug, (tokens, in + R)."""
        return self.scratch.new_empty(tokens, self.group.in_size + self.group.rank_size)

    def new_grad(self, tokens: int) -> Tensor:
        """An empty dY_aug, (tokens, out + R)."""
        return self.scratch.new_empty(tokens, self.group.out_size + self.group.rank_size)

    def complete_input(self, x_aug: Tensor, dropout: Dropout | None) -> None:
        """Set the last R columns of `x_aug` to X A^T, where there is an adapter."""
        if self.a is None:
            return
        x, xa = x_aug.split([self.group.in_size, self.group.rank_size], dim=1)
        if dropout is None:
            torch.mm(x, self.a.t(), out=xa)
            return
        xa.zero_()
        for linear in self.group.adapted:
            dropped = self._drop(x, linear, dropout)
            torch.mm(dropped, self.a[linear.rank_columns].t(), out=xa[:, linear.rank_columns])

    def forward(self, x_aug: Tensor, dropout: Dropout | None) -> Tensor:
        """The outputs (N, out) of all linears; completes `x_aug` on the way."""
        weight = self.scratch[: self.group.out_size]
        if self.a is None:
            in_size = self.group.in_size
            return torch.mm(x_aug[:, :in_size], weight[:, :in_size].t())
        self.complete_input(x_aug, dropout)
        return torch.mm(x_aug, weight.t())

    def backward(
        self, dy_aug: Tensor, x_aug: Tensor, grads: GroupMasters, dropout: Dropout | None
    ) -> Tensor:
        """Gradient of the inputs, (N, in); adds the adapter's gradients to `grads`.

        Args:
            dy_aug: (N, out + R), the first columns filled.
            x_aug: As `forward` left it.
            grads: float32 sums of the layer's gradients.
            dropout: As in `forward`.
        """
        group = self.group
        if self.a is None:
            weight = self.scratch[: group.out_size, : group.in_size]
            return torch.mm(dy_aug[:, : group.out_size], weight)
        x, xa = x_aug.split([group.in_size, group.rank_size], dim=1)
        dy, dxa = dy_aug.split([group.out_size, group.rank_size], dim=1)
        torch.mm(dy, self.scratch[: group.out_size, group.in_size :], out=dxa)
        for linear in group.adapted:
            target = grads.b[linear.name]
            add_product(target, dy[:, linear.out_rows].t(), xa[:, linear.rank_columns], self.scale)
        if dropout is None:
            add_product(grads.a, dxa.t(), x)
            return torch.mm(dy_aug, self.scratch[:, : group.in_size])
        dx = torch.mm(dy, self.scratch[: group.out_size, : group.in_size])
        for linear in group.adapted:
            dxa_linear = dxa[:, linear.rank_columns]
            dropped = self._drop(x, linear, dropout)
            add_product(grads.a[linear.rank_columns], dxa_linear.t(), dropped)
            through = torch.mm(dxa_linear, self.a[linear.rank_columns])
            dx += self._drop(through, linear, dropout)
        return dx

    def _drop(self, x: Tensor, linear: AdaptedLinear, dropout: Dropout) -> Tensor:
        return self.ops.dropout(x, dropout.row_keys, dropout.module_key(linear.name), dropout.p)


def add_product(target: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """Add alpha * left @ right to `target`, summed in its dtype whatever that of the factors."""
    if target.dtype == left.dtype:
        target.addmm_(left, right, alpha=alpha)
    elif target.device.type == "cuda":
        torch.addmm(target, left, right, out_dtype=target.dtype, alpha=alpha, out=target)
    else:
        target.addmm_(left.to(target.dtype), right.to(target.dtype), alpha=alpha)
