"""Optimizer steps: which rows, in which order, and how they are packed."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightgig.data.batches import (
    IGNORE_INDEX,
    Dataset,
    make_batch,
    measure_packing,
    pack_rows,
    step_rows,
)


def make_dataset(lengths, trained=None):
    """Rows whose tokens are all different; the second half of each is trained."""
    total = int(sum(lengths))
    input_ids = np.arange(total, dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels = np.full(total, IGNORE_INDEX, np.int32)
    for start, end in itertools.pairwise(offsets):
        labels[(start + end) // 2 : end] = input_ids[(start + end) // 2 : end]
    return Dataset(
        input_ids=input_ids,
        labels=labels if trained is None else trained,
        offsets=offsets,
        row_ids=np.arange(len(lengths), dtype=np.int64) * 10,
        fingerprint="",
        summary={},
    )


@pytest.mark.parametrize("rows", [1, 7, 8, 2051])
def test_every_row_is_trained_once_an_epoch(rows):
    steps = step_rows(make_dataset([2] * rows), epoch=0, seed=3, rows_per_step=8)
    assert sorted(np.concatenate(steps)) == list(range(rows))
    assert [len(step) for step in steps] == [8] * (rows // 8) + [rows % 8] * (rows % 8 > 0)


def test_the_order_is_the_same_for_the_same_seed_whatever_the_lengths():
    first = step_rows(make_dataset([2] * 100), epoch=4, seed=9, rows_per_step=8)
    second = step_rows(make_dataset(range(1, 101)), epoch=4, seed=9, rows_per_step=8)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_order_is_this_one_in_every_version():
    (order,) = step_rows(make_dataset([2] * 8), epoch=0, seed=42, rows_per_step=8)
    assert order.tolist() == ORDER_OF_SEED_42


ORDER_OF_SEED_42 = [7, 1, 6, 4, 3, 5, 0, 2]


@pytest.mark.parametrize("change", [{"seed": 10}, {"epoch": 5}, {"seed": -1}, {"seed": 2**70}])
def test_another_seed_or_epoch_has_another_order(change):
    dataset = make_dataset([2] * 100)
    first = step_rows(dataset, epoch=4, seed=9, rows_per_step=100)[0]
    second = step_rows(dataset, **{"epoch": 4, "seed": 9, "rows_per_step": 100, **change})[0]
    assert not np.array_equal(first, second)


def test_labels_are_shifted_inside_each_row():
    batch = make_batch(make_dataset([3, 2]), [0, 1])
    assert batch.input_ids.tolist() == [0, 1, 2, 3, 4]
    assert batch.labels.tolist() == [1, 2, IGNORE_INDEX, 4, IGNORE_INDEX]
    assert batch.row_ids.tolist() == [0, 0, 0, 10, 10]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]


def test_the_first_token_of_the_next_row_is_never_predicted():
    dataset = make_dataset([1, 1, 4], trained=np.arange(6, dtype=np.int32))
    batch = make_batch(dataset, [0, 1, 2])
    assert batch.labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, 3, 4, 5, IGNORE_INDEX]


def test_types_are_those_of_the_record():
    batch = make_batch(make_dataset([3, 2]), [1])
    dtypes = [getattr(batch, name).dtype for name in batch.__dataclass_fields__]
    assert dtypes == [np.int32, np.int32, np.int64, np.int32, np.int32]


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 100))
def test_packing_keeps_rows_whole_and_within_the_budget(lengths, budget):
    dataset = make_dataset(lengths)
    rows = np.random.default_rng(0).permutation(len(lengths))
    batches = pack_rows(dataset, rows, micro_batch_tokens=budget)
    seen = [row for batch in batches for row in (batch.row_ids[batch.cu_seqlens[:-1]] // 10)]
    assert sorted(seen) == sorted(rows)
    for batch in batches:
        assert batch.num_tokens <= budget or len(batch.cu_seqlens) == 2
        assert np.array_equal(batch.row_ids // 10, _row_of(dataset, batch.input_ids))
    assert sum(batch.num_loss_tokens for batch in batches) == sum(
        make_batch(dataset, [row]).num_loss_tokens for row in range(len(lengths))
    )


def _row_of(dataset, ids):
    return np.searchsorted(dataset.offsets, ids, side="right") - 1


@given(LENGTHS, st.integers(60, 200))
def test_packing_needs_no_more_than_half_above_the_least(lengths, budget):
    dataset = make_dataset(lengths)
    rows = np.arange(len(lengths))
    batches = pack_rows(dataset, rows, micro_batch_tokens=budget)
    # No packing needs fewer: by the sum, and since rows above half a micro-batch never share one.
    fewest = max(int(np.ceil(sum(lengths) / budget)), sum(2 * n > budget for n in lengths))
    assert len(batches) <= fewest * 3 / 2 + 1


def test_packing_is_the_same_every_time():
    dataset = make_dataset([5, 9, 5, 9, 1, 5])
    rows = np.array([3, 0, 5, 1, 2, 4])
    batches = pack_rows(dataset, rows, micro_batch_tokens=15)
    packed = [(batch.row_ids[batch.cu_seqlens[:-1]] // 10).tolist() for batch in batches]
    assert packed == [[3, 0, 4], [5, 1], [2]]


def test_without_packing_every_row_is_alone():
    batches = pack_rows(
        make_dataset([2, 3]), np.array([1, 0]), micro_batch_tokens=99, packing=False
    )
    assert [batch.row_ids[0] for batch in batches] == [10, 0]


def test_rows_of_a_step_are_used_well():
    lengths = np.random.default_rng(1).integers(20, 800, 400)
    dataset = make_dataset(lengths.tolist())
    batches = pack_rows(dataset, np.arange(400), micro_batch_tokens=2_048)
    assert sum(lengths) / (len(batches) * 2_048) > 0.95


def test_the_use_of_micro_batches_is_that_of_their_tokens():
    lengths = [70, 30, 60, 40, 90, 200]
    dataset = make_dataset(lengths)
    use = measure_packing(dataset, seed=1, rows_per_step=6, micro_batch_tokens=100)
    # 70 + 30, 60 + 40, 90 of 100, and the one that is longer than a micro-batch.
    assert use == (6, 4, (100 + 100 + 90 + 200) / (100 + 100 + 100 + 200))
    alone = measure_packing(dataset, seed=1, rows_per_step=6, micro_batch_tokens=100, packing=False)
    assert alone == (6, 6, sum(lengths) / 700)


def test_the_use_of_micro_batches_is_measured_on_the_steps_of_the_seed():
    dataset = make_dataset(np.random.default_rng(1).integers(20, 800, 90).tolist())
    use = measure_packing(dataset, seed=7, rows_per_step=8, micro_batch_tokens=2_048)
    steps = step_rows(dataset, epoch=0, seed=7, rows_per_step=8)
    packed = [pack_rows(dataset, rows, micro_batch_tokens=2_048) for rows in steps]
    assert use.rows == 90
    assert use.micro_batches == sum(map(len, packed))
    assert use.used_ratio == dataset.lengths.sum() / (use.micro_batches * 2_048)
