"""One optimizer step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one optimizer step did; one line of metrics.jsonl.

    Attributes:
        step: 1-based optimizer step.
        epoch: Passes over the data so far, in fractions.
        loss: Mean cross-entropy of the step's loss tokens, in nats.
        grad_norm: Norm of the whole adapter gradient before clipping.
        learning_rate: Used in this step.
        loss_tokens: Tokens that carried loss.
        tokens: All tokens of the step's rows.
        tokens_per_second: `tokens` over `seconds`.
        vram_peak_bytes: Most bytes the allocator reserved so far; 0 on a CPU.
        seconds: Wall-clock time of the step.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    loss_tokens: int
    tokens: int
    tokens_per_second: float
    vram_peak_bytes: int
    seconds: float
