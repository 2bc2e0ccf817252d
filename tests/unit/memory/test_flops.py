import dataclasses

import pytest

from eightgig.memory.flops import model_flops_per_token, model_flops_utilisation
from tests.unit.memory import cases

TOKENS = 1024


def test_a_token_costs_what_paper_and_pencil_say() -> None:
    decoder = cases.small_decoder(num_layers=2)
    work = cases.workload(decoder, max_length=TOKENS, lora={"r": 8})
    hidden, feed_forward, queries, keys = 512, 1024, 4 * 64, 2 * 64
    weights = 2 * (hidden * queries * 2 + hidden * keys * 2 + 3 * hidden * feed_forward)
    adapter = 2 * 8 * (2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + feed_forward))
    # Scores and values, 2 FLOPs each for every key, of which a causal row sees half; thrice.
    attention = 3 * 2 * 4 * queries * TOKENS / 2
    head = 4 * 32_000 * hidden
    expected = 4 * weights + 6 * adapter + attention + head
    assert model_flops_per_token(work) == pytest.approx(expected)


def test_tokens_without_loss_need_no_head() -> None:
    decoder = cases.small_decoder(num_layers=2)
    whole = cases.workload(decoder, max_length=TOKENS)
    half = dataclasses.replace(whole, loss_share=0.5)
    saved = model_flops_per_token(whole) - model_flops_per_token(half)
    assert saved == pytest.approx(0.5 * 4 * 32_000 * 512)


def test_what_is_recomputed_counts_for_nothing() -> None:
    """6 FLOPs per weight are done where nothing is kept; 4 of them are the model's."""
    work = cases.workload(cases.gemma("12B"), max_length=TOKENS)
    per_token = model_flops_per_token(work)
    used = model_flops_utilisation(work, tokens_per_second=1000.0, gemm_flops_per_second=100e12)
    assert used == pytest.approx(per_token * 1000.0 / 100e12)
    # 12 billion parameters, some of them in tables.
    assert 4 * 10e9 < per_token < 4 * 14e9
