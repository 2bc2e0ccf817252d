"""What share of a device's arithmetic a training puts to use."""

from __future__ import annotations

from eightgig.memory.speed import (
    attention_flops_per_token,
    head_flops_per_loss_token,
    linear_flops_per_token,
)
from eightgig.memory.workload import Workload


def model_flops_per_token(work: Workload) -> float:
    """FLOPs that LoRA training needs for a token, however it is done; recomputation is not one.

    - frozen linears: 4 per weight, 2 forward and 2 for the gradient of the input; no gradient of
      the weight is needed;
    - adapter: 6 per parameter, its own gradient included;
    - attention: twice as much backward as forward, 3 x 4 H hd per key that is seen;
    - head: logits and gradient of the hidden state, on tokens with loss.

    Norms, activations and dequantisation do not count.

    Source: the definition of model FLOPs in Chowdhery et al. 2022, PaLM, appendix B,
    https://arxiv.org/abs/2204.02311. Differs: there all weights are trained, 6 per weight.
    """
    recomputed = 1 / 3  # of the linears: forward twice, gradient once
    linears = linear_flops_per_token(work) * (1 - recomputed)
    # There: forward, recompute, and 2.5 for a backward pass that makes the scores again.
    attention = attention_flops_per_token(work, work.row_tokens) * 3 / 4.5
    head = head_flops_per_loss_token(work) * work.loss_share
    return linears + 6.0 * work.lora_elements + attention + head


def model_flops_utilisation(
    work: Workload, *, tokens_per_second: float, gemm_flops_per_second: float
) -> float:
    """Share of the measured GEMM rate that went into `model_flops_per_token`, 0 to 1.

    PaLM divides by the rate on the data sheet. Here it is the rate that a large matrix product
    reaches on the same machine, so that cards, power limits and processors can be compared.
    """
    return tokens_per_second * model_flops_per_token(work) / gemm_flops_per_second
