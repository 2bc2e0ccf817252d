"""Which rows make which step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from eightgig.config import Config, DataConfig, ModelConfig, TrainConfig
from eightgig.data.batches import Dataset
from eightgig.training import step


def _dataset(lengths: list[int]) -> Dataset:
    offsets = np.cumsum([0, *lengths])
    ids = np.arange(offsets[-1], dtype=np.int32)
    rows = np.arange(len(lengths), dtype=np.int64)
    return Dataset(
        input_ids=ids, labels=ids, offsets=offsets, row_ids=rows, fingerprint="", summary={}
    )


def _config(**train: float) -> Config:
    return Config(
        model=ModelConfig(name="x"),
        data=DataConfig(path="x"),
        train=replace(TrainConfig(), gradient_accumulation_steps=3, **train),
    )


def test_every_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    schedule = step.make_schedule(_config(num_train_epochs=2), _dataset([4] * 8), 64)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (3, 6)
    rows = [
        sorted(set(batch.row_ids.tolist()))
        for number in range(1, 7)
        for batch in schedule.batches(number)
    ]
    for epoch in (rows[:3], rows[3:]):
        assert sorted(itertools.chain.from_iterable(epoch)) == list(range(8))
    assert rows[:3] != rows[3:]


def test_the_order_of_an_epoch_is_made_once(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    epochs = []
    real = step.step_rows

    def counted(*arguments, epoch, **options):  # type: ignore[no-untyped-def]
        epochs.append(epoch)
        return real(*arguments, epoch=epoch, **options)

    monkeypatch.setattr(step, "step_rows", counted)
    schedule = step.make_schedule(_config(num_train_epochs=3), _dataset([4] * 8), 64)
    for number in range(1, schedule.total_steps + 1):
        schedule.batches(number)
    assert epochs == [0, 1, 2]


def test_the_longest_step_has_the_longest_rows() -> None:
    schedule = step.make_schedule(_config(), _dataset([3, 9, 4, 8, 7]), 64)
    rows = {
        row for batch in schedule.pack(schedule.longest_rows()) for row in batch.row_ids.tolist()
    }
    assert rows == {1, 3, 4}
