"""What a model answers to prompts, and how far two models agree in that.

One model answers greedily; the other says, at every place of that answer, how likely it finds each
token there. So both are compared behind the same words at every place, also where their own answers
would have parted long before: a near tie early in an answer says nothing about what follows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Precision = Literal["float32", "16 bit", "8 bit", "bfloat16 weights", "bfloat16", "4 bit"]
"""Of weights; `float32` and `bfloat16` of arithmetic, too."""

# The mean over one answer may be so many times that over all: it is of 16 tokens at most, and some
# prompts lie nearer to ties than others. On right exports it was 1.8 times as much at most.
_PROMPT_FACTOR = 5.0
# Half of what training changed: a divergence grows with the square of a change.
_LOST_SHARE = 0.25


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """The greedy answer to one prompt.

    Attributes:
        ids: The answer, its stop included.
        log_probs: Of every token at each place of the answer, (T, V) float32.
    """

    ids: tuple[int, ...]
    log_probs: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far two models may differ and still be the same.

    Attributes:
        divergence: Kullback-Leibler divergence in nats, the mean over every token of the answers.
        prompt_divergence: The mean over one answer.
        reason: Why they differ at all.
    """

    divergence: float
    prompt_divergence: float
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far an export agrees with the answers of a reference.

    Attributes:
        num_prompts: Prompts compared.
        num_same_answers: Greedy answers that are equal token for token.
        num_tokens: Tokens of the answers.
        num_same_tokens: Those that the export would choose, too, behind the same tokens.
        divergence: Kullback-Leibler divergence in nats, the mean over every token.
        prompt_divergence: The largest mean of one answer.
        is_within: Whether everything stays within the tolerance.
        worst: What is outside, in words; empty where nothing is.
    """

    num_prompts: int
    num_same_answers: int
    num_tokens: int
    num_same_tokens: int
    divergence: float
    prompt_divergence: float
    is_within: bool
    worst: str


@dataclass(frozen=True, slots=True)
class _Rule:
    """The mean divergence that a precision is allowed, whatever training has changed.

    Attributes:
        divergence: In nats a token.
        reason: Why there is any.
        loses_updates: Whether rounding takes a part of what training has changed: base weights lie
            on the type's own steps, and a change of less than half a step leaves them there.
    """

    divergence: float
    reason: str
    loses_updates: bool = False

    def limit(self, effect: float) -> float:
        """The mean divergence allowed where training has moved the answers by `effect`."""
        return max(self.divergence, _LOST_SHARE * effect if self.loses_updates else 0.0)


# Ten times and more what right exports of four trainings of SmolLM2-135M gave (2026-11-28, 382
# tokens of 32 answers; the largest mean of a training): float32 1e-7, float16 4e-6, q8_0 0.006,
# bfloat16 0.052 where 1.36 had been trained. One layer in another's place gave 0.17, one Q
# transposed 0.29. Smaller faults of the numbers are found by `weight_check`.
_RULES: Mapping[Precision, _Rule] = {
    "float32": _Rule(1e-4, "both in float32, sums in another order"),
    "16 bit": _Rule(1e-3, "numbers of 16 bits are rounded"),
    "8 bit": _Rule(0.06, "weights of 8 bits are rounded"),
    "bfloat16 weights": _Rule(
        0.1, "tuned weights are rounded to bfloat16, with 8 bits", loses_updates=True
    ),
    "bfloat16": _Rule(0.1, "products are computed in bfloat16, with 8 bits"),
    "4 bit": _Rule(1.0, "weights of 4 bits are rounded", loses_updates=True),
}


def tolerance_for(*precisions: Precision, effect: float = 0.0) -> Tolerance:
    """The widest tolerance among those of `precisions`.

    Args:
        precisions: Of both sides.
        effect: How far training has moved the answers, in nats a token.
    """
    rule = max((_RULES[each] for each in precisions), key=lambda each: each.limit(effect))
    return Tolerance(
        divergence=rule.limit(effect),
        prompt_divergence=_PROMPT_FACTOR * rule.limit(effect),
        reason=rule.reason,
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities of `logits`, (..., V)."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    result: NDArray[np.float32] = wide.astype(np.float32)
    return result


def compare_answers(
    reference: Sequence[Answer], found: Sequence[NDArray[np.float32]], tolerance: Tolerance
) -> Agreement:
    """How far a model agrees with the answers of `reference`.

    Args:
        reference: Answers.
        found: The other model's log-probabilities at each place of them, (T, V) each.
        tolerance: What is allowed.
    """
    divergences, same = [], []
    for answer, other in zip(reference, found, strict=True):
        divergences.append(divergence_of(answer.log_probs, other))
        same.append(_same_choices(answer, other))
    means = [float(values.mean()) for values in divergences]
    mean, largest = float(np.concatenate(divergences).mean()), max(means)
    worst = ""
    if not largest <= tolerance.prompt_divergence:
        number = means.index(largest) + 1
        worst = f"the answer to prompt {number} diverges by {largest:.3g} nats a token"
    elif not mean <= tolerance.divergence:
        worst = f"the answers diverge by {mean:.3g} nats a token"
    return Agreement(
        num_prompts=len(same),
        num_same_answers=sum(bool(each.all()) for each in same),
        num_tokens=sum(map(len, same)),
        num_same_tokens=sum(int(each.sum()) for each in same),
        divergence=mean,
        prompt_divergence=largest,
        is_within=not worst,
        worst=worst,
    )


def divergence_of(
    reference: NDArray[np.float32], found: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Kullback-Leibler divergence in nats at each place, (T,).

    Args:
        reference, found: Log-probabilities, (T, V); infinite where they are of other vocabularies.
    """
    if reference.shape != found.shape:
        return np.full(len(reference), np.inf)
    wide, other = reference.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        terms = np.where(wide > -np.inf, np.exp(wide) * (wide - other), 0.0)
    totals = terms.sum(axis=-1)
    return np.where(np.isfinite(totals), np.maximum(totals, 0.0), np.inf)


def _same_choices(answer: Answer, found: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether the other model would choose each token, too, (T,)."""
    if answer.log_probs.shape != found.shape:
        return np.zeros(len(answer.ids), dtype=bool)
    same: NDArray[np.bool_] = found.argmax(axis=-1) == np.array(answer.ids)
    return same
