"""Bytes on disk, against what is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from eightgig.errors import DoesNotFitError
from eightgig.models.known import known_model_spec
from eightgig.models.space import DiskNeed, check_disk, estimate_store_bytes
from eightgig.models.spec import ModelSpec
from eightgig.units import GIB


def _need(
    purpose: str, needed_bytes: int, *, free_bytes: int = 10 * GIB, disk: int = 1
) -> DiskNeed:
    return DiskNeed(
        purpose=purpose,
        folder=Path("/cache") / purpose,
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
        disk=disk,
    )


def _spec(name: str) -> ModelSpec:
    spec = known_model_spec(name)
    assert spec is not None
    return spec


def test_what_fits_is_said_in_one_line() -> None:
    line = check_disk([_need("download", 3 * GIB), _need("store", 7 * GIB)])
    assert line == (
        "download takes 3.00 GiB in /cache/download (10.00 GiB free); "
        "store takes 7.00 GiB in /cache/store (10.00 GiB free)"
    )


def test_needs_on_one_disk_add_up() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        check_disk([_need("download", 3 * GIB), _need("store", 7 * GIB + 1)])
    assert "10.00 GiB are needed" in caught.value.message
    assert "download takes 3.00 GiB; store takes 7.00 GiB" in caught.value.why
    assert "Free 1 B there" in caught.value.fix


def test_needs_on_two_disks_do_not_add_up() -> None:
    check_disk([_need("download", 9 * GIB), _need("store", 9 * GIB, disk=2)])


def test_the_second_disk_is_checked_too() -> None:
    needs = [_need("download", GIB), _need("store", 9 * GIB, free_bytes=8 * GIB, disk=2)]
    with pytest.raises(DoesNotFitError, match="/cache/store"):
        check_disk(needs)


def test_the_store_of_the_12b_is_its_linears_in_four_bit() -> None:
    linears = 2_406_481_920 + 8_493_465_600
    small = 769_792
    assert estimate_store_bytes(_spec("gemma-4-12B")) == round(linears * 0.516) + 4 * small


def test_copied_tables_count_in_the_dtype_of_the_checkpoint() -> None:
    spec = _spec("gemma-4-E2B")
    tables = 402_653_184 + 2_348_810_240
    difference = estimate_store_bytes(spec, copies_tables=True) - estimate_store_bytes(spec)
    assert difference == 2 * tables


def test_unquantised_linears_count_in_full() -> None:
    spec = _spec("gemma-4-12B")
    linears = 2_406_481_920 + 8_493_465_600
    assert estimate_store_bytes(spec, quantization="none") == 2 * linears + 4 * 769_792
