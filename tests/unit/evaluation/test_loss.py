"""Held-out loss row by row."""

import numpy as np
import pytest
import torch

from eightgig.data.batches import IGNORE_INDEX, Dataset
from eightgig.evaluation.loss import measure_loss, measure_row_losses
from tests import engines, tiny

LENGTHS = [5, 17, 2, 30, 9, 1]


def _dataset(rows: list[dict]) -> Dataset:
    ids = np.concatenate([row["ids"] for row in rows])
    is_trained = np.concatenate([row["is_trained"] for row in rows])
    return Dataset(
        input_ids=ids.astype(np.int32),
        labels=np.where(is_trained, ids, IGNORE_INDEX).astype(np.int32),
        offsets=np.cumsum([0, *LENGTHS]).astype(np.int64),
        row_ids=np.array([3, 3, 1, 1, 1, 0]),  # some rows are of one source row
        fingerprint="",
        summary={},
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> engines.Engine:
    root = tmp_path_factory.mktemp("loss")
    return engines.make_engine(tiny.make_model("qwen3", root / "model"), root / "cache")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro_batch_tokens", [30, 64])
def test_each_row_has_the_loss_of_its_own_tokens(
    engine: engines.Engine, packing: bool, micro_batch_tokens: int
) -> None:
    rows = engines.random_rows(engine.spec, LENGTHS)
    expected = []
    for row in rows:
        logits = engines.engine_logits(engine, [row])[:-1].double()
        ids = torch.from_numpy(row["ids"]).long()[1:]
        losses = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
        expected.append(float(losses[torch.from_numpy(row["is_trained"])[1:]].sum()))
    plan = engines.make_plan(micro_batch_tokens=micro_batch_tokens, micro_batches_per_visit=2)
    dataset = _dataset(rows)
    found = measure_row_losses(engine.model, dataset, plan, packing)
    np.testing.assert_allclose(found.sums, expected, rtol=1e-5, atol=1e-5)
    assert found.tokens.tolist() == [int(row["is_trained"][1:].sum()) for row in rows]
    whole = measure_loss(engine.model, dataset, plan, packing)
    assert whole.loss_tokens == found.tokens.sum()
    assert whole.loss == pytest.approx(sum(expected) / whole.loss_tokens, rel=1e-5)
