"""log.txt: what eightgig had to say during a run, without secrets."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eightgig.errors import EightgigError
from eightgig.run.folder import Run, writing_to

_MASK = "***"
_SECRETS = (
    # Tokens of Hugging Face, GitHub, GitLab and of the usual services, by their prefix.
    # Behind the escapes of JSON, too: a line break there ends with a letter.
    re.compile(
        r"()(?:\b|(?<=\\[nrt]))(?:hf_|api_org_|ghp_|github_pat_|glpat-|sk-)[A-Za-z0-9_-]{8,}"
    ),
    # https://user:password@host
    re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s@]+(?=@)"),
    re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}"),
    # Signed addresses, as the hub hands them out for downloads.
    re.compile(r"(?i)([?&](?:token|key|sig|signature|policy|x-amz-[\w-]+)=)[^&\s\"']+"),
    re.compile(
        r"(?i)((?:api|auth|access|hub|hf|wandb)_?(?:api_?)?(?:token|key)[\"']?\s*[=:]\s*[\"']?)"
        r"[^\s\"',;]+"
    ),
    re.compile(r"(?i)(\b(?:password|passwd|secret)[\"']?\s*[=:]\s*[\"']?)[^\s\"',;]+"),
)


def mask_secrets(text: str) -> str:
    """`text` without tokens, passwords and the path of the home folder."""
    for secret in _SECRETS:
        text = secret.sub(rf"\1{_MASK}", text)
    return hide_home(text)


def hide_home(text: str) -> str:
    """`text` with `~` for the path of the home folder, as it is and as JSON writes it."""
    try:
        home = str(Path.home())
    except RuntimeError:  # a user without one
        return text
    if len(home) <= 1:
        return text
    return text.replace(json.dumps(home)[1:-1], "~").replace(home, "~")


@contextmanager
def log_to(run: Run) -> Iterator[None]:
    """Append what eightgig's loggers say to `run.log_path`, from INFO upwards.

    An error that ends the block is written there, too.

    Raises:
        RunError: The log cannot be made.
    """
    logger = logging.getLogger("eightgig")
    with writing_to(run.folder):
        handler = _LogFile(run.log_path, encoding="utf-8")
    handler.setFormatter(_MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log_end(logger, sys.exc_info()[1])
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


def _log_end(logger: logging.Logger, error: BaseException | None) -> None:
    """Say why a run ended early; neither Ctrl-C nor a closed generator is an error."""
    if isinstance(error, EightgigError):
        logger.error("%s %s %s", error.message, error.why, error.fix)
    elif isinstance(error, Exception):
        logger.error("The run ended early.", exc_info=error)


class _LogFile(logging.FileHandler):
    """A log that a full disk leaves with gaps, and nothing else: neither tracebacks nor an end."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Pass over what the disk does not take; a line that cannot be made is our fault."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file, whatever becomes of its last lines."""
        with suppress(OSError):
            super().close()


class _MaskingFormatter(logging.Formatter):
    """Masks the finished line: secrets may stand in arguments and tracebacks, too."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_secrets(super().format(record))
