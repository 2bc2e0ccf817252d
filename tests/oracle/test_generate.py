"""Greedy generation against Transformers' `generate`, token for token, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from eightgig.engine.generate import (
    AnswerLimits,
    KvCache,
    Sampling,
    answer_prompts,
    generate,
    row_bytes,
)
from eightgig.errors import DoesNotFitError
from eightgig.ops.choose import choose_ops
from tests import engines, tiny

FAMILIES = (*tiny.TRAINABLE_FAMILIES, "gemma3")
OPS, _ = choose_ops(device="cpu", dtype=torch.float32, kernels="plain")
# The window of the sliding layers is 8: shorter, about as long, and longer than that.
LENGTHS = (5, 1, 21, 8, 7)
NEW_TOKENS = 14


@dataclass(frozen=True)
class Case:
    """A family's engine, prompts, and what Transformers answers to them."""

    family: str
    engine: engines.Engine
    folder: Path
    prompts: list[list[int]]
    answers: list[list[int]]


def _prompts(spec: Any, lengths: Sequence[int]) -> list[list[int]]:
    return [row["ids"].tolist() for row in engines.random_rows(spec, lengths, seed=5)]


def _greedy(oracle: torch.nn.Module, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    whole = oracle.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    return whole[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp(request.param)
    folder = tiny.make_model(request.param, root / "model")
    engine = engines.make_engine(folder, root / "cache")
    oracle = engines.make_oracle(request.param, folder, engine)
    prompts = _prompts(engine.spec, LENGTHS)
    answers = [_greedy(oracle, prompt) for prompt in prompts]
    return Case(request.param, engine, folder, prompts, answers)


def _forbid_stops(case: Case) -> Any:
    """Transformers' `min_new_tokens`: no stop token before the end."""
    stops = torch.tensor(case.engine.spec.eos_token_ids)

    def allowed(_: Sequence[Sequence[int]], logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(1, stops, float("-inf"))

    return allowed


def _answers(case: Case, model: Any, prompts: Sequence[list[int]], **options: Any) -> list[Any]:
    steps = list(
        generate(
            model,
            OPS,
            prompts,
            max_new_tokens=NEW_TOKENS,
            stop_ids=(),
            allowed=_forbid_stops(case),
            **options,
        )
    )
    assert len(steps) == NEW_TOKENS
    return [list(row) for row in zip(*steps, strict=True)]


def test_a_ragged_batch_answers_as_transformers_does(case: Case) -> None:
    assert len({tuple(answer) for answer in case.answers}) > 1
    assert _answers(case, case.engine.model, case.prompts) == case.answers


def test_answers_are_the_same_without_a_cache(case: Case) -> None:
    assert _answers(case, case.engine.model, case.prompts, has_cache=False) == case.answers


def test_answers_are_the_same_with_prompts_in_several_micro_batches(case: Case) -> None:
    answers = _answers(case, case.engine.model, case.prompts, micro_batch_tokens=22)
    assert answers == case.answers


def test_answers_are_the_same_through_two_poisoned_slots(case: Case, tmp_path: Path) -> None:
    plan = engines.make_plan(layer_slots=2, head_chunk_rows=31)
    engine = engines.make_engine(case.folder, tmp_path, plan=plan, poison=True)
    assert _answers(case, engine.model, case.prompts) == case.answers


def test_the_base_model_answers_when_the_adapter_is_off(case: Case) -> None:
    rows = engines.random_rows(case.engine.spec, [9])
    tuned_logits = engines.engine_logits(case.engine, rows)
    case.engine.model.use_adapter(False)
    try:
        ours = _answers(case, case.engine.model, case.prompts[:2])
        base_logits = engines.engine_logits(case.engine, rows)
    finally:
        case.engine.model.use_adapter(True)
    base = tiny.load_reference(case.family, case.folder)
    assert ours == [_greedy(base, prompt) for prompt in case.prompts[:2]]
    # Tiny models may like the same tokens with and without an adapter; their logits differ.
    assert not torch.allclose(tuned_logits, base_logits, rtol=1e-3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> engines.Engine:
    root = tmp_path_factory.mktemp("one")
    folder = tiny.make_model("gemma4_e2b", root / "model")
    return engines.make_engine(folder, root / "cache")


def _limits(engine: engines.Engine, *, rows: float, stop_ids: frozenset[int]) -> AnswerLimits:
    each = row_bytes(engine.spec.decoder, max(LENGTHS), 6, 4)
    return AnswerLimits(max_new_tokens=6, stop_ids=stop_ids, memory_bytes=int(rows * each))


def test_answers_do_not_depend_on_how_many_fit_into_memory(engine: engines.Engine) -> None:
    prompts = _prompts(engine.spec, LENGTHS)
    done: list[int] = []
    one_by_one = answer_prompts(
        engine.model,
        OPS,
        prompts,
        _limits(engine, rows=1.0, stop_ids=frozenset()),
        progress=done.append,
    )
    together = answer_prompts(
        engine.model, OPS, prompts, _limits(engine, rows=64, stop_ids=frozenset())
    )
    assert one_by_one == together
    assert [len(answer) for answer in together] == [6] * len(prompts)
    assert done[0] < done[-1] == len(prompts)


def test_a_prompt_that_does_not_fit_is_refused(engine: engines.Engine) -> None:
    with pytest.raises(DoesNotFitError, match="21 tokens"):
        answer_prompts(
            engine.model,
            OPS,
            _prompts(engine.spec, LENGTHS),
            _limits(engine, rows=0.9, stop_ids=frozenset()),
        )


def test_an_answer_ends_with_its_stop_token(engine: engines.Engine) -> None:
    prompts = _prompts(engine.spec, LENGTHS)
    whole = answer_prompts(
        engine.model, OPS, prompts, _limits(engine, rows=64, stop_ids=frozenset())
    )
    stop = whole[2][2]
    stopped = answer_prompts(
        engine.model, OPS, prompts, _limits(engine, rows=64, stop_ids=frozenset({stop}))
    )
    for long, short in zip(whole, stopped, strict=True):
        end = long.index(stop) + 1 if stop in long else len(long)
        assert short == long[:end]
    assert len(stopped[2]) <= 3


def test_a_batch_ends_when_every_row_has_stopped(engine: engines.Engine) -> None:
    everything = range(engine.spec.decoder.vocab_size)
    steps = list(
        generate(
            engine.model,
            OPS,
            _prompts(engine.spec, [3, 4]),
            max_new_tokens=9,
            stop_ids=everything,
        )
    )
    assert len(steps) == 1


def test_allowed_sees_what_was_made_and_decides_what_follows(engine: engines.Engine) -> None:
    wanted = [[40, 41, 42], [50, 51, 52]]

    def allowed(made: Sequence[Sequence[int]], logits: torch.Tensor) -> torch.Tensor:
        assert [list(row) for row in made] == [row[: len(made[0])] for row in wanted]
        only = torch.full_like(logits, float("-inf"))
        for number, row in enumerate(wanted):
            only[number, row[len(made[number])]] = logits[number, row[len(made[number])]]
        return only

    steps = generate(
        engine.model,
        OPS,
        _prompts(engine.spec, [3, 12]),
        max_new_tokens=3,
        stop_ids=(),
        allowed=allowed,
    )
    assert [list(row) for row in zip(*steps, strict=True)] == wanted


def test_draws_repeat_with_the_seed_and_differ_without(engine: engines.Engine) -> None:
    prompts = _prompts(engine.spec, [6, 9])

    def draw(seed: int) -> list[Any]:
        sampling = Sampling(temperature=5.0, top_k=200, top_p=0.99, seed=seed)
        steps = generate(
            engine.model, OPS, prompts, max_new_tokens=8, stop_ids=(), sampling=sampling
        )
        return list(steps)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_the_narrowest_sampling_is_greedy(engine: engines.Engine, sampling: dict[str, Any]) -> None:
    prompts = _prompts(engine.spec, [6, 9])
    options: dict[str, Any] = {"max_new_tokens": 5, "stop_ids": ()}
    drawn = list(
        generate(
            engine.model, OPS, prompts, sampling=Sampling(temperature=1.0, **sampling), **options
        )
    )
    assert drawn == list(generate(engine.model, OPS, prompts, **options))


def test_sliding_layers_keep_no_more_than_their_window(engine: engines.Engine) -> None:
    decoder = engine.spec.decoder
    cache = KvCache(decoder, 2, 100, dtype=torch.float32, device=torch.device("cpu"))
    for layer in decoder.layers:
        places = cache.of(layer)[0].shape[2]
        assert places == (100 if layer.sliding_window is None else layer.sliding_window)
    # A token more costs nothing in layers whose window is full.
    full = [layer for layer in decoder.layers if layer.sliding_window is None]
    own = sum(2 * layer.num_kv_heads * layer.head_dim * 4 for layer in full if layer.has_k_proj)
    grown = row_bytes(decoder, 50, 51, 4) - row_bytes(decoder, 50, 50, 4)
    scores = max(8 * (layer.num_kv_heads * layer.head_dim + layer.num_heads) for layer in full)
    assert grown == own + scores
