from eightgig.memory.sweep import sweep
from tests.unit.memory import cases


def test_longer_rows_take_more_until_they_do_not_fit() -> None:
    lengths = (1024, 4096, 16384, 65536)
    configs = {str(length): cases.config(data={"max_length": length}) for length in lengths}
    points = sweep(cases.gemma("E2B"), cases.card(), configs)
    assert [point.value for point in points] == [str(length) for length in lengths]
    assert [point.plan.fits for point in points] == [True, True, True, False]
    peaks = [point.plan.peak_bytes for point in points]
    assert peaks == sorted(peaks)


def test_prepared_weights_need_no_disk() -> None:
    configs = {"16": cases.config()}
    prepared, fresh = (
        sweep(cases.gemma("E2B"), cases.card(), configs, is_prepared=is_prepared)[0].plan
        for is_prepared in (True, False)
    )
    assert prepared.disk_bytes < fresh.disk_bytes
