"""`python -m tests.faults.report`: run faults and probes, and print how often each was survived.

With `--slow` in the published numbers, which takes an hour; with `--write` into counts.json and
into the table of docs/reliability.md. Further arguments go to pytest: a file or `-k kill` runs, and
writes, these rows alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.tally import PLUGIN_NAME, Tally

ROOT = Path(__file__).parents[2]
COUNTS = Path(__file__).with_name("counts.json")
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults -->", "<!-- /faults -->"
_FOLDERS = ("tests/faults", "tests/security")

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and perhaps write; returns pytest's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.report", description=__doc__)
    parser.add_argument("--slow", action="store_true", help="the published numbers of trials")
    parser.add_argument("--write", action="store_true", help="into counts.json and the page")
    options, rest = parser.parse_known_args(arguments)
    tally = Tally()
    chosen = rest if any(Path(word.partition("::")[0]).exists() for word in rest) else None
    words = ["-n", "0", "-q", "-m", "" if options.slow else "not slow", *rest]
    code = pytest.main(words if chosen else [*words, *_FOLDERS], plugins=[_Counted(tally)])
    rows = rows_of(tally)
    sys.stdout.write(table(rows))
    if options.write:
        write_rows(rows)
    return int(code)


class _Counted:
    """Hands the tally to the tests."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.register(self._tally, PLUGIN_NAME)


def rows_of(tally: Tally) -> list[Row]:
    """A row for each fault."""
    date = datetime.date.today().isoformat()
    return [
        {
            "fault": what,
            "trials": trials,
            "passed": passed,
            "notes": tally.notes.get(what, {}),
            "date": date,
        }
        for what, (trials, passed) in tally.counts.items()
    ]


def read_rows() -> list[Row]:
    """The published rows."""
    return json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else []


def write_rows(rows: Sequence[Row]) -> None:
    """Put `rows` in the place of the published ones of the same faults."""
    published = {row["fault"]: row for row in read_rows()}
    published |= {row["fault"]: row for row in rows}
    text = json.dumps(list(published.values()), indent=1, ensure_ascii=False)
    COUNTS.write_text(text + "\n", encoding="utf-8")
    PAGE.write_text(page(list(published.values())), encoding="utf-8")


def page(rows: Sequence[Row]) -> str:
    """The page with these rows in its table."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table(rows) + END + rest.split(END)[1]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| fault | trials | passed | beside it |\n", "| --- | --- | --- | --- |\n"]
    for row in rows:
        notes = ", ".join(f"{name}: {value:,}" for name, value in row["notes"].items())
        lines.append(f"| {row['fault']} | {row['trials']:,} | {row['passed']:,} | {notes} |\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
