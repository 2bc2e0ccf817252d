import pytest

from eightgig.memory.workload import RowLengths, build_workload, measure_rows
from tests.unit.memory import cases


def test_rows_are_measured_with_bounds_that_hold_in_any_order() -> None:
    rows = measure_rows([10, 40, 30, 20], [5, 1, 30, 10], rows_per_step=2)
    assert rows == RowLengths(
        longest_tokens=40,
        mean_tokens=25.0,
        num_rows=4,
        loss_share=0.46,
        step_tokens=70,
        step_loss_tokens=40,
    )


def test_no_rows_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="no rows"):
        measure_rows([], [], rows_per_step=8)


def test_without_rows_every_row_is_the_longest() -> None:
    work = cases.workload(cases.small_decoder(), max_length=100)
    assert (work.step_tokens, work.step_loss_tokens, work.row_tokens) == (800, 800, 100.0)


def test_bounds_of_the_rows_limit_a_step() -> None:
    rows = measure_rows([7] * 20 + [90], [3] * 21, rows_per_step=8)
    work = build_workload(cases.small_decoder(), cases.config(), max_length=90, rows=rows)
    assert work.step_tokens == 90 + 7 * 7
    assert work.step_loss_tokens == 8 * 3
    assert work.mean_step_tokens == pytest.approx(8 * (230 / 21))


def test_all_rows_of_a_step_may_share_a_micro_batch() -> None:
    work = cases.workload(cases.small_decoder(), max_length=100)
    assert [work.most_rows(tokens) for tokens in (3, 100, 1000)] == [3, 8, 8]
    alone = cases.workload(cases.small_decoder(), max_length=100, data={"packing": False})
    assert alone.most_rows(100) == 1


def test_rows_cut_to_max_length_do_not_count_as_long_as_they_were() -> None:
    rows = RowLengths(longest_tokens=900, mean_tokens=400.0, num_rows=3)
    work = build_workload(cases.small_decoder(), cases.config(), max_length=128, rows=rows)
    assert work.row_tokens == 128
    assert work.step_tokens == 8 * 128


@pytest.mark.parametrize(
    ("dtype", "element", "stream"), [("bfloat16", 2, 2), ("float16", 2, 4), ("float32", 4, 4)]
)
def test_float16_layers_add_up_in_float32(dtype: str, element: int, stream: int) -> None:
    work = build_workload(cases.small_decoder(), cases.config(), max_length=8, compute_dtype=dtype)
    assert (work.element_bytes, work.stream_bytes) == (element, stream)
