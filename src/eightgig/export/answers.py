"""What a model answers to prompts, and how far two models agree in that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Precision = Literal["float32", "16 bit", "8 bit", "bfloat16 weights", "bfloat16", "4 bit"]
PRECISIONS: tuple[Precision, ...] = (
    "float32", "16 bit", "8 bit", "bfloat16 weights", "bfloat16", "4 bit",
)  # fmt: skip
"""From fine to coarse: of weights, and `bfloat16` of arithmetic."""

_KEPT_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """The greedy answer to one prompt.

    Attributes:
        first: Log-probability of every token as the first one of the answer, (V,) float32.
        ids: The answer, its stop included.
        likeliest: Log-probabilities of the likeliest tokens at each place of the answer.
    """

    first: NDArray[np.float32]
    ids: tuple[int, ...]
    likeliest: tuple[Mapping[int, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far two models may differ and still be the same.

    Attributes:
        divergence: Kullback-Leibler divergence of the first answer token, in nats, any prompt.
        margin: Greedy answers may part where the reference's choice was no more than this much
            likelier, in nats.
        reason: Why they differ at all.
    """

    divergence: float
    margin: float
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far the answers of an export agree with a reference.

    Attributes:
        num_prompts: Prompts compared.
        num_same_answers: Greedy answers that are equal token for token.
        num_ties: Answers that part at a choice within the margin.
        divergence: Largest divergence of the first answer token, in nats.
        is_within: Whether everything stays within the tolerance.
        worst: What parts most, in words; empty where nothing does.
    """

    num_prompts: int
    num_same_answers: int
    num_ties: int
    divergence: float
    is_within: bool
    worst: str


_TOLERANCES: Mapping[Precision, Tolerance] = {
    "float32": Tolerance(
        divergence=1e-4, margin=0.02, reason="both in float32, sums in another order"
    ),
    "16 bit": Tolerance(divergence=0.02, margin=0.25, reason="numbers of 16 bits are rounded"),
    "8 bit": Tolerance(divergence=0.05, margin=0.5, reason="weights of 8 bits are rounded"),
    # An update of less than half of a weight's last bit is rounded away: SmolLM2-135M, merged after
    # three steps, diverges by 0.07 nats, and parts at a choice that was 0.36 likelier (2026-11).
    "bfloat16 weights": Tolerance(
        divergence=0.1, margin=0.5, reason="tuned weights are rounded to bfloat16, with 8 bits"
    ),
    # llama.cpp multiplies bfloat16 weights with inputs rounded to bfloat16, as GPUs do:
    # SmolLM2-135M diverges by 0.06 nats from float32 (2026-11), q8_0 by less.
    "bfloat16": Tolerance(
        divergence=0.2, margin=1.0, reason="products are computed in bfloat16, with 8 bits"
    ),
    # Where either side is in 4 bit it is another model up to a point; a faulty file is off by far
    # more: wrong rows of Q or K give several nats.
    "4 bit": Tolerance(divergence=1.0, margin=2.0, reason="weights of 4 bits are rounded"),
}


def tolerance_for(*precisions: Precision) -> Tolerance:
    """The tolerance of the coarsest of `precisions`."""
    return _TOLERANCES[max(precisions, key=PRECISIONS.index)]


def make_answer(logits: Sequence[NDArray[np.float32]], ids: Sequence[int]) -> Answer:
    """An answer of the logits before each of its tokens, (V,) each."""
    steps = [log_softmax(values) for values in logits]
    return Answer(first=steps[0], ids=tuple(ids), likeliest=tuple(map(_likeliest, steps)))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities of `logits`, (V,)."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    result: NDArray[np.float32] = (wide - np.log(np.exp(wide).sum())).astype(np.float32)
    return result


def compare_answers(
    reference: Sequence[Answer], found: Sequence[Answer], tolerance: Tolerance
) -> Agreement:
    """How far `found` agrees with `reference`, prompt by prompt."""
    divergences = [_divergence(a.first, b.first) for a, b in zip(reference, found, strict=True)]
    num_same = num_ties = 0
    largest_gap, worst = 0.0, ""
    for number, (a, b) in enumerate(zip(reference, found, strict=True), start=1):
        gap, place = _first_gap(a, b)
        if place is None:
            num_same += 1
        elif gap <= tolerance.margin:
            num_ties += 1
        if gap > max(largest_gap, tolerance.margin):
            largest_gap = gap
            worst = (
                f"prompt {number} is answered otherwise from token {(place or 0) + 1} on, where "
                f"the trained model's choice is {gap:.2f} nats likelier"
            )
    divergence = max(divergences)
    if not divergence <= tolerance.divergence and not worst:
        number = divergences.index(divergence) + 1
        worst = f"the first answer token of prompt {number} diverges by {divergence:.3g} nats"
    return Agreement(
        num_prompts=len(divergences),
        num_same_answers=num_same,
        num_ties=num_ties,
        divergence=divergence,
        is_within=divergence <= tolerance.divergence and not worst,
        worst=worst,
    )


def _divergence(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Kullback-Leibler divergence in nats; infinite where the vocabularies differ."""
    if reference.shape != found.shape:
        return float("inf")
    wide, other = reference.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        terms = np.where(wide > -np.inf, np.exp(wide) * (wide - other), 0.0)
    total = float(terms.sum())
    return max(0.0, total) if np.isfinite(total) else float("inf")


def _first_gap(reference: Answer, found: Answer) -> tuple[float, int | None]:
    """Where two answers part, and how much likelier the reference found its own token there."""
    pairs = zip(reference.ids, found.ids, reference.likeliest, strict=False)
    for place, (own, other, likely) in enumerate(pairs):
        if own != other:
            return likely[own] - likely.get(other, min(likely.values())), place
    if len(reference.ids) != len(found.ids):  # one has stopped at a token that it took for text
        return float("inf"), min(len(reference.ids), len(found.ids))
    return 0.0, None


def _likeliest(log_probs: NDArray[np.float32]) -> dict[int, float]:
    count = min(_KEPT_TOKENS, len(log_probs))
    best = np.argpartition(-log_probs, count - 1)[:count]
    return {int(index): float(log_probs[index]) for index in best}
