"""Dropout of adapter inputs: its definition, recompute, and steps cut in different ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eightgig.config import LoraConfig
from eightgig.engine.batch import row_keys
from eightgig.engine.linear import Dropout
from eightgig.ops import reference
from tests import engines, tiny

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("gemma4_e2b", tmp_path_factory.mktemp("models") / "model")


class _Dropped(torch.nn.Module):
    """Stands in PEFT for its dropout: drops what ours drops."""

    def __init__(self, dropout: Dropout, name: str) -> None:
        super().__init__()
        self.dropout, self.name = dropout, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(x[0])
        mask = reference.dropout(
            ones, self.dropout.row_keys, self.dropout.module_key(self.name), self.dropout.p
        )
        return x * mask


def test_masks_give_the_gradients_that_peft_has_with_the_same_masks(
    folder: Path, tmp_path: Path
) -> None:
    engine = engines.make_engine(folder, tmp_path, lora=LORA)
    oracle = engines.make_oracle("gemma4_e2b", folder, engine, LORA)
    rows = engines.random_rows(engine.spec, [37])
    batch = engines.pack(rows)
    keys = torch.from_numpy(row_keys(batch, seed=7, step=3))
    for path, module in oracle.named_modules():
        if hasattr(module, "lora_dropout") and ".layers." in path:
            layer, name = path.split(".layers.")[1].split(".")[0::2]
            dropout = Dropout(p=LORA.lora_dropout, row_keys=keys, layer=int(layer))
            module.lora_dropout["default"] = _Dropped(dropout, name)
    loss, grads = engines.engine_gradients(engine, [batch], seed=7, step=3)
    expected_loss, expected = engines.oracle_gradients(oracle, rows, engine.spec)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, grad in expected.items():
        assert float((grads[name] - grad).norm() / grad.norm()) <= 1e-4, name


def test_a_step_has_the_same_gradients_however_it_is_cut(folder: Path, tmp_path: Path) -> None:
    plans = ({}, {"micro_batches_per_visit": 4, "mlp_tile_tokens": 7, "layer_slots": 2})
    results = []
    for number, changes in enumerate(plans):
        plan = engines.make_plan(**changes)
        engine = engines.make_engine(folder, tmp_path, lora=LORA, plan=plan)
        rows = engines.random_rows(engine.spec, [20, 31, 8, 15])
        order = rows if number == 0 else rows[::-1]
        cuts = [order[:2], order[2:]] if number == 0 else [[row] for row in order]
        batches = [engines.pack(cut) for cut in cuts]
        results.append(engines.engine_gradients(engine, batches, seed=1, step=2))
    (loss, grads), (other_loss, others) = results
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, grad in grads.items():
        assert float((others[name] - grad).norm() / grad.norm()) <= 1e-5, name


def test_masks_differ_from_step_to_step(folder: Path, tmp_path: Path) -> None:
    engine = engines.make_engine(folder, tmp_path, lora=LORA)
    batch = engines.pack(engines.random_rows(engine.spec, [20]))
    first, again, second = (
        engines.engine_gradients(engine, [batch], seed=1, step=step)[0] for step in (1, 1, 2)
    )
    assert first == again
    assert first != second


def test_evaluation_drops_nothing(folder: Path, tmp_path: Path) -> None:
    with_dropout = engines.make_engine(folder, tmp_path, lora=LORA)
    without = engines.make_engine(folder, tmp_path, lora=LoraConfig(r=4, lora_alpha=8))
    rows = engines.random_rows(without.spec, [20, 9])
    assert torch.equal(
        engines.engine_logits(with_dropout, rows), engines.engine_logits(without, rows)
    )
