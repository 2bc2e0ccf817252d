"""Counts of trials, for the tables of docs/reliability.md (`python -m tests.faults.report`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

PLUGIN_NAME = "eightgig-tally"


@dataclass
class Tally:
    """How often a fault was tried and survived, by the words that name it in the tables.

    Attributes:
        counts: Trials and passed trials.
        notes: Highest value of something measured beside them: steps lost, kills.
    """

    counts: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, what: str, *, passed: bool = True) -> None:
        """One trial of `what` is over."""
        count = self.counts.setdefault(what, [0, 0])
        count[0] += 1
        count[1] += passed

    def note(self, what: str, name: str, value: int, *, is_sum: bool = False) -> None:
        """Something counted beside the trials of `what`: the highest value stays, or the sum."""
        notes = self.notes.setdefault(what, {})
        before = notes.get(name, 0)
        notes[name] = before + value if is_sum else max(before, value)


def tally_of(config: pytest.Config) -> Tally:
    """The report's tally, or one that nobody reads."""
    found = config.pluginmanager.get_plugin(PLUGIN_NAME)
    return found if isinstance(found, Tally) else Tally()
