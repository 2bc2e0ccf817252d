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
# Tests that are probes, by the beginning of their names, and what they are of.
_PROBES = {
    "tests/security/": "probes of tests/security",
    "tests/unit/adapters/test_files.py::test_hostile": "probes of adapters",
    "tests/unit/adapters/test_files.py::test_settings_that_change": "probes of adapters",
    "tests/unit/adapters/test_files.py::test_tensors_of_something": "probes of adapters",
    "tests/unit/adapters/test_files.py::test_a_pickle": "probes of adapters",
    "tests/unit/adapters/test_files.py::test_a_regular_expression": "probes of adapters",
    "tests/unit/models/test_headers.py::": "probes of safetensors headers and indexes",
    "tests/unit/data/test_template.py::test_a_template_that_is": "probes of chat templates",
    "tests/unit/data/test_template.py::test_a_template_cannot": "probes of chat templates",
    "tests/unit/data/test_control_tokens.py::": "probes of control tokens in rows",
    "tests/unit/test_run.py::test_secrets": "probes of secrets in logs",
}
# Measured on 2026-11-23 with Transformers 5.23 and TRL 1.16 by a harness of its own; the first
# words of a fault name the row.
_BASELINE = {
    "SIGKILL": "29/40",
    "kill storm": "11/16",
    "SIGTERM": "all since the last save lost",
    "finished run": "1 extra step",
    "two processes": "no lock",
    "run resumed with a setting, data": "0/9",
    "NaN or infinity": "0/4",
    "whole run, one file": "6/66 silent, 19/66 stuck",
    "whole run, power cut": "0/12",
    "whole run, disk full": "1/46",
    "whole run on a file system": "1/7 (a file system of 0.7 to 2.3 MB)",
    "a save and its rotation, killed": "1/41 inside a save",
    "probes of tests/security": "59/75 (4 exploited, 11 hung, 1 redirected)",
}

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and perhaps write; returns pytest's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.report", description=__doc__)
    parser.add_argument("--slow", action="store_true", help="the published numbers of trials")
    parser.add_argument("--write", action="store_true", help="into counts.json and the page")
    options, rest = parser.parse_known_args(arguments)
    tally = Tally()
    elsewhere = sorted({name.partition("::")[0] for name in _PROBES if "/unit/" in name})
    chosen = rest if any(Path(word.partition("::")[0]).exists() for word in rest) else None
    words = ["-n", "0", "-q", "-m", "" if options.slow else "not slow", *rest]
    code = pytest.main(
        words if chosen else [*words, *_FOLDERS, *elsewhere], plugins=[_Counted(tally)]
    )
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

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for beginning, what in _PROBES.items():
            if not report.nodeid.startswith(beginning):
                continue
            if report.when == "call" and not report.skipped:
                self._tally.add(what, passed=report.passed)
            elif report.when == "teardown" and report.failed:
                # Its watch has found it wrong after its call.
                self._tally.counts[what][1] -= 1


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
    head = "| fault | trials | passed | Transformers and TRL | beside it |\n"
    lines = [head, "| --- | --- | --- | --- | --- |\n"]
    for row in rows:
        notes = ", ".join(f"{name}: {value:,}" for name, value in row["notes"].items())
        baseline = next((b for f, b in _BASELINE.items() if row["fault"].startswith(f)), "")
        numbers = f"{row['trials']:,} | {row['passed']:,}"
        lines.append(f"| {row['fault']} | {numbers} | {baseline} | {notes} |\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
