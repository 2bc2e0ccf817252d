"""Our decoder against Transformers + PEFT in float32: logits, loss, every gradient tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import engines, tiny

TRAINABLE = [family for family in tiny.FAMILIES if family != "gemma4_26b"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.make_model(family, root / family) for family in TRAINABLE}


def _assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert grad.norm() > 0, name
        cosine = torch.nn.functional.cosine_similarity(ours[name].flatten(), grad.flatten(), dim=0)
        assert cosine >= 0.99999, (name, float(cosine))
        error = float((ours[name] - grad).norm() / grad.norm())
        assert error <= 1e-4, (name, error)


PLANS = {
    "resident": {},
    "layer_major": {"micro_batches_per_visit": 3, "mlp_tile_tokens": 17, "head_tile_tokens": 5},
    "offloaded": {"offload": ("attention", "o_proj", "down_proj"), "mlp_tile_tokens": 17},
    "streamed": {"layer_slots": 2, "head_chunk_rows": 31, "micro_batches_per_visit": 2},
}


@pytest.mark.parametrize("family", TRAINABLE)
def test_logits_of_packed_rows(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    engine = engines.make_engine(folders[family], tmp_path)
    oracle = engines.make_oracle(family, folders[family], engine)
    rows = engines.random_rows(engine.spec, [1, 23, 40, 7])
    ours, theirs = engines.engine_logits(engine, rows), engines.oracle_logits(oracle, rows)
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5


@pytest.mark.parametrize("family", ["gemma3_text", "gemma3"])
def test_a_logit_cap_holds_in_the_classes_that_have_one(family: str, tmp_path: Path) -> None:
    settings = {"final_logit_softcapping": 5.0}
    folder = tiny.make_model(family, tmp_path / "model", text_settings=settings)
    engine = engines.make_engine(folder, tmp_path / "stores")
    oracle = engines.make_oracle(family, folder, engine)
    rows = engines.random_rows(engine.spec, [23])
    ours, theirs = engines.engine_logits(engine, rows), engines.oracle_logits(oracle, rows)
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("family", TRAINABLE)
def test_loss_and_every_gradient(
    family: str, plan: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    engine = engines.make_engine(
        folders[family],
        tmp_path,
        plan=engines.make_plan(**PLANS[plan]),
        poison=plan == "streamed",
    )
    oracle = engines.make_oracle(family, folders[family], engine)
    rows = engines.random_rows(engine.spec, [40, 23, 2, 31, 9, 17])
    batches = [engines.pack(rows[:1]), engines.pack(rows[1:4]), engines.pack(rows[4:])]
    loss, grads = engines.engine_gradients(engine, batches)
    expected_loss, expected = engines.oracle_gradients(oracle, rows, engine.spec)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    _assert_same_gradients(grads, expected)
