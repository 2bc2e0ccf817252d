"""What went wrong, why, and what to do: the errors users can act on, and findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing noticed in a config, a data file, a machine or a running training.

    Attributes:
        severity: `error` stops, `warning` is shown, `note` informs.
        code: Stable short name, for example `data.empty_turn`.
        message: What is the case, one sentence.
        why: Why it matters, one sentence.
        fix: What to do, one sentence or a command.
        file: File the finding is in, None where there is none.
        line: 1-based line (or row) in `file`, None where there is none.
    """

    severity: Severity
    code: str
    message: str
    why: str
    fix: str
    file: str | None = None
    line: int | None = None

    @property
    def place(self) -> str:
        """`file:line: ` as far as known, otherwise empty."""
        if self.file is None:
            return ""
        return f"{self.file}: " if self.line is None else f"{self.file}:{self.line}: "


class EightgigError(Exception):
    """Something the user can act on; everything else is a bug of eightgig.

    Args:
        message: What happened.
        why: Why it happened or matters.
        fix: What to do.
        findings: All places, where one error stands for several.
    """

    exit_code = 2

    def __init__(
        self, message: str, *, why: str, fix: str, findings: Sequence[Finding] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.why = why
        self.fix = fix
        self.findings = tuple(findings)


class ConfigError(EightgigError):
    """The configuration cannot be read or contradicts itself."""


class DataError(EightgigError):
    """The data cannot be read, rendered or trained on."""


class ModelError(EightgigError):
    """The model is missing, damaged, unsupported or does not match."""


class HardwareError(EightgigError):
    """This machine cannot do what was asked."""


class DoesNotFitError(EightgigError):
    """The plan needs more VRAM, host memory or disk than there is."""


class RunError(EightgigError):
    """A run folder is missing, taken, unfinished or does not match."""


class ExportError(EightgigError):
    """An export could not be written or does not agree with the trained model."""


class TrainingStopped(EightgigError):
    """A guard ended the run after saving it."""

    exit_code = 3
