"""`eightgig doctor`: what this machine can do, and the exact fix for what it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from eightgig.errors import Finding
from eightgig.hardware import machine_checks, software_checks
from eightgig.hardware.facts import Facts, gather_facts

Check = Callable[[Facts], Iterator[Finding]]

# In the order in which one mends a machine: what comes first can be the cause of what follows.
CHECKS: tuple[Check, ...] = (
    machine_checks.check_device,
    software_checks.check_python,
    software_checks.check_driver,
    software_checks.check_torch,
    software_checks.check_capability,
    software_checks.check_versions,
    software_checks.check_bitsandbytes,
    software_checks.check_step,
    software_checks.check_triton,
    machine_checks.check_memory_holders,
    machine_checks.check_spill,
    machine_checks.check_pinned_memory,
    machine_checks.check_link,
    machine_checks.check_heat_and_power,
    machine_checks.check_main_memory,
    machine_checks.check_disk,
    machine_checks.check_token,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """What the doctor found.

    Attributes:
        facts: What was seen.
        findings: What follows from it, in the order of mending.
    """

    facts: Facts
    findings: tuple[Finding, ...]

    @property
    def can_train(self) -> bool:
        """Whether nothing stands in the way; otherwise the command ends with exit code 2."""
        return all(finding.severity != "error" for finding in self.findings)


def examine(cache_dir: Path | None = None, *, measures_rates: bool = True) -> Examination:
    """Look at this machine and judge it; works where torch or bitsandbytes do not import.

    Args:
        cache_dir: Where prepared weights go; None: the default.
        measures_rates: Whether GEMM and copy rates of a GPU are measured (2 seconds).
    """
    facts = gather_facts(cache_dir, measures_rates=measures_rates)
    return Examination(facts=facts, findings=diagnose(facts))


def diagnose(facts: Facts) -> tuple[Finding, ...]:
    """The findings of every check on `facts`."""
    return tuple(finding for check in CHECKS for finding in check(facts))
