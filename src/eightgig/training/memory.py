"""The one place where running out of memory is caught: a detour, not an end."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from eightgig.errors import DoesNotFitError
from eightgig.memory.ladder import next_rung
from eightgig.memory.plan import Plan
from eightgig.run import Run, write_json

ResultT = TypeVar("ResultT")

# What libraries raise as plain RuntimeErrors when they cannot allocate.
_SIGNS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """Memory ran out; the message of whoever noticed."""

    message: str


def attempt(work: Callable[[], ResultT]) -> ResultT | OutOfMemory:
    """The result of `work`, or word that memory ran out, with all it held given back.

    The handler runs after the `except` block: until then the exception holds the frames, and the
    frames hold the tensors.
    """
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError) as error:
        message = str(error) or "the system has no more memory"
    except RuntimeError as error:
        message = str(error)
        if not any(sign in message for sign in _SIGNS):
            raise
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return OutOfMemory(message.splitlines()[0])


@dataclass(frozen=True, slots=True)
class Rung:
    """The plan one rung further down, and what to say of it in an event."""

    plan: Plan
    values: Mapping[str, str]


def go_down(run: Run, plan: Plan, trouble: OutOfMemory, *, where: str) -> Rung:
    """The rung below `plan`; it is written into the run folder, for the run when it is resumed.

    Args:
        run: The run.
        plan: What there was no memory for.
        trouble: What was said.
        where: For people: `in step 12`.

    Raises:
        DoesNotFitError: There is nothing left to give up.
    """
    lower = next_rung(plan)
    if lower is None:
        raise DoesNotFitError(
            f"Memory ran out {where}, with everything given up that can be.",
            why=trouble.message,
            fix=f"Set data.max_length below {plan.max_length:,}, close other programs, "
            "or choose a smaller model; then run the same command with --resume.",
        )
    now, choice = lower
    try:
        write_json(run.plan_path, now)
    except OSError as error:
        _LOGGER.warning("plan.json does not know of the new layout: %s", error)
    values = {"cause": trouble.message, choice.name: choice.value, "before": choice.rejected}
    return Rung(now, values)
