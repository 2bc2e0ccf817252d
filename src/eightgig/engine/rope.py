"""Frequencies and angles of rotary position embeddings, in float32 as in Transformers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eightgig.models.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position for each pair of the head, and the factor of cos and sin.

    Returns:
        (head_dim / 2,) float32, zero where a pair is not rotated; and the factor.

    Source: the rope types of transformers.modeling_rope_utils.
    """
    if rope.kind == "proportional":
        rotated = int(rope.partial_factor * head_dim // 2)
        frequencies = torch.zeros(head_dim // 2)
        frequencies[:rotated] = _frequencies(rope.theta, head_dim)[:rotated]
        return frequencies / rope.parameters.get("factor", 1.0), 1.0
    frequencies = _frequencies(rope.theta, head_dim)
    if rope.kind == "linear":
        return frequencies / rope.parameters["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(frequencies, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, head_dim)
    return frequencies, 1.0


def angles(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (N, head_dim / 2) float32 each, of `positions` (N,)."""
    phases = positions[:, None].float() * frequencies
    return phases.cos() * factor, phases.sin() * factor


def _frequencies(theta: float, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (theta**exponents)


def _llama3(frequencies: Tensor, rope: RopeSpec) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between interpolated."""
    factor = rope.parameters["factor"]
    low, high = rope.parameters["low_freq_factor"], rope.parameters["high_freq_factor"]
    context = rope.parameters["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    stretched = torch.where(wavelengths > context / low, frequencies / factor, between)
    return torch.where(wavelengths < context / high, frequencies, stretched)


def _yarn(rope: RopeSpec, head_dim: int) -> tuple[Tensor, float]:
    """Source: Peng et al. 2023, https://arxiv.org/abs/2309.00071."""
    parameters = rope.parameters
    factor, context = parameters["factor"], parameters["original_max_position_embeddings"]

    def pair_of(rotations: float) -> float:
        """Pair that turns `rotations` times within the original context."""
        log = math.log(context / (rotations * 2 * math.pi))
        return head_dim * log / (2 * math.log(rope.theta))

    low = pair_of(parameters.get("beta_fast") or 32)
    high = pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no length
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = _frequencies(rope.theta, head_dim)
    stretched = 1.0 / (factor * rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    return stretched * ramp + kept * (1 - ramp), _yarn_factor(rope, factor)


def _yarn_factor(rope: RopeSpec, factor: float) -> float:
    given = rope.parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
    return scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale(1.0)
