"""Tuned weights with a fault in them, each of the kinds that an export must not let through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from eightgig.export.source import TunedWeights

ONE_LINEAR = "model.layers.1.self_attn.q_proj.weight"


class NoAdapter(TunedWeights):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._scale = 0.0


class HalfScale(TunedWeights):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._scale /= 2


class OneLinearLess(TunedWeights):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        a, b = self._updates[ONE_LINEAR]
        self._updates[ONE_LINEAR] = (a, b * 0)


class Transposed(TunedWeights):
    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        for block in super().blocks(name):
            yield block.T.contiguous() if name == ONE_LINEAR else block


FAULTS = (NoAdapter, HalfScale, OneLinearLess, Transposed)
