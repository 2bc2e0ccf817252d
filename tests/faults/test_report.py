"""The published counts stand in the page as they were counted."""

from __future__ import annotations

from tests.faults.report import PAGE, page, read_rows, rows_of, table
from tests.faults.tally import Tally


def test_the_page_holds_the_counts() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_rows())


def test_nothing_published_has_failed() -> None:
    rows = read_rows()
    assert len(rows) > 10
    assert [row["fault"] for row in rows if row["passed"] != row["trials"]] == []


def test_trials_are_counted() -> None:
    tally = Tally()
    for number in range(5):
        tally.add("a fault", passed=number != 3)
        tally.note("a fault", "steps", number)
        tally.note("a fault", "kills", number, is_sum=True)
    (row,) = rows_of(tally)
    assert (row["trials"], row["passed"]) == (5, 4)
    assert row["notes"] == {"steps": 4, "kills": 10}
    assert "| a fault | 5 | 4 |  | steps: 4, kills: 10 |" in table([row])
