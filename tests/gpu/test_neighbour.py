"""A second process takes the card's memory in mid-run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu import neighbour

pytestmark = pytest.mark.gpu


def test_a_run_gives_way_and_goes_on(tmp_path: Path) -> None:
    setting = neighbour.make_setting(tmp_path)
    with neighbour.Neighbour() as other:
        rows = list(neighbour.trials(setting, other, 2))
    assert all(row["out_of_memory"] for row in rows)
    assert all(row["passed"] for row in rows), rows
