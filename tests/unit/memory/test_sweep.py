import pytest

from eightgig.errors import ConfigError
from eightgig.memory.sweep import sweep
from eightgig.units import GIB
from tests.unit.memory import cases


def _sweep(key: str, values: list[object]) -> list[tuple[object, bool, int]]:
    points = sweep(cases.gemma("E2B"), cases.card(), cases.config(), key, values)
    return [(point.value, point.plan.fits, point.plan.peak_bytes) for point in points]


def test_longer_rows_take_more_until_they_do_not_fit() -> None:
    points = _sweep("max_length", ["1024", "4096", "16384", "65536"])
    assert [value for value, _, _ in points] == [1024, 4096, 16384, 65536]
    assert [fits for _, fits, _ in points] == [True, True, True, False]
    peaks = [peak for _, _, peak in points]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize("key", ["lora.r", "r"])
def test_a_key_may_name_its_group(key: str) -> None:
    assert [value for value, _, _ in _sweep(key, [8, 16])] == [8, 16]


def test_sizes_are_read_as_sizes() -> None:
    points = sweep(cases.gemma("E2B"), cases.card(), cases.config(), "budget", ["2GiB", "4GiB"])
    assert [point.plan.budget_bytes for point in points] == [2 * GIB, 4 * GIB]


def test_words_stay_words() -> None:
    points = sweep(
        cases.gemma("E2B"), cases.card(), cases.config(), "checkpoints", ["host", "device"]
    )
    assert [point.plan.checkpoints for point in points] == ["host", "device"]


def test_other_settings_keep_their_values() -> None:
    config = cases.config(memory={"layer_slots": 5}, lora={"r": 4})
    points = sweep(cases.gemma("E2B"), cases.card(), config, "data.max_length", [512])
    assert points[0].plan.layer_slots == 5


@pytest.mark.parametrize("key", ["max_lenght", "lora.max_length", "nothing.r", ""])
def test_an_unknown_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="not the name of one setting"):
        _sweep(key, [1])


def test_a_value_that_is_no_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory\.budget cannot be much"):
        _sweep("budget", ["much"])
