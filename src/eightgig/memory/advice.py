"""What to change so that a plan fits, least harm first; each change is planned before it is said.

First what changes no result: other programs, bound settings, places. Then, and only as a last
resort that is called by its name, what changes what is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from eightgig.config import AUTO, Config
from eightgig.hardware.cards import DRIVER_BYTES
from eightgig.hardware.probe import Hardware
from eightgig.memory import estimate
from eightgig.memory.host_estimate import checkpoint_file_bytes
from eightgig.memory.problem import Problem, Solution, solve
from eightgig.units import GIB, MIB, format_bytes

_PLACE_SETTINGS = (
    "layer_slots",
    "checkpoints",
    "mlp_tile_tokens",
    "micro_batches_per_visit",
    "micro_batch_tokens",
    "host_weights",
    "kernels",
    "offload",
)
_SLOW_TOKENS_PER_SECOND = 20.0
_SMALLER_RANKS = (64, 32, 16, 8, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """Something to do, and the problem that would be left."""

    text: str
    problem: Problem


def advise(problem: Problem, solution: Solution) -> tuple[str, ...]:
    """Sentences, least harm first; empty where there is nothing to say."""
    notes = list(_notes(problem, solution))
    if solution.fits:
        return tuple(notes)
    notes += _shortages(problem, solution)
    if solution.disk_bytes > problem.hardware.disk_free_bytes:
        # No setting gives room on the disk: what else is wrong is judged as if there were enough.
        problem = _with_enough_disk(problem, solution.disk_bytes)
        if solve(problem).fits:
            return tuple(notes)
    harmless = list(_harmless_changes(problem, solution))
    enough = [change for change in harmless if solve(change.problem).fits]
    notes += [f"{change.text}: then it fits." for change in enough]
    if not enough and len(harmless) > 1:
        after = solve(_together(problem, solution))
        if after.fits:
            changes = list(_harmless_changes(problem, _with_room(solution, after)))
            notes.append("Together they make it fit: " + "; ".join(c.text for c in changes) + ".")
            enough = harmless
    notes += _changes_of_training(problem, is_last_resort=bool(enough))
    return tuple(notes)


def _notes(problem: Problem, solution: Solution) -> Iterator[str]:
    decoder = solution.work.decoder
    if decoder.has_experts:
        yield "Mixture-of-experts layers cannot be trained yet; the bytes are an estimate."
    guess = solution.best.time.tokens_per_second
    is_guessed = not solution.work.has_device and problem.hardware.rates is None
    if is_guessed and solution.fits and guess < _SLOW_TOKENS_PER_SECOND:
        yield (
            f"On a processor expect around {max(guess, 0.1):.2g} tokens/s (a guess, nothing was "
            "measured): enough to try things out, not to train this model."
        )
    wanted, length = problem.wanted_length, solution.work.max_length
    if length < wanted and problem.rows is None:
        yield f"Rows above {length:,} tokens do not fit."
    elif length < wanted:
        yield (
            f"Rows above {length:,} tokens do not fit (the longest has {wanted:,}): data.too_long "
            "says what happens to them."
        )


def _shortages(problem: Problem, solution: Solution) -> list[str]:
    best, hardware = solution.best, problem.hardware
    lines = []
    if not best.fits_device:
        lines.append(
            f"The least-memory layout needs {format_bytes(best.peak_bytes)} of the "
            f"{format_bytes(solution.device.total_bytes)} that may be used."
        )
    if not best.fits_host and solution.work.has_device:
        lines.append(
            f"It needs {format_bytes(best.host_bytes)} of main memory; "
            f"{format_bytes(solution.host.total_bytes)} may be used."
        )
    if solution.disk_bytes > hardware.disk_free_bytes:
        missing = solution.disk_bytes - hardware.disk_free_bytes
        lines.append(
            f"Free {format_bytes(missing)} of disk, or set model.cache_dir to a folder on another "
            f"disk: {format_bytes(solution.disk_bytes)} are needed."
        )
        lines += _fewer_checkpoints(problem, solution, missing)
    return lines


def _fewer_checkpoints(problem: Problem, solution: Solution, missing_bytes: int) -> list[str]:
    """How many checkpoints the disk could keep, where that is why it is too small."""
    limit = problem.config.run.save_total_limit
    checkpoint = checkpoint_file_bytes(solution.work)
    fewer = limit - -(-missing_bytes // checkpoint)
    if fewer < 1:
        return []
    return [
        f"run.save_total_limit: {fewer} would fit, too: each checkpoint takes "
        f"{format_bytes(checkpoint)}."
    ]


def _harmless_changes(problem: Problem, solution: Solution) -> Iterator[_Change]:
    """Changes after which the same adapter is trained."""
    hardware, config = problem.hardware, problem.config
    if hardware.display_bytes > 2 * DRIVER_BYTES:
        freed = hardware.display_bytes - DRIVER_BYTES
        yield _Change(
            text=f"Close programs that hold up to {format_bytes(freed)} of the card "
            "(`eightgig doctor` lists them)",
            problem=dataclasses.replace(problem, hardware=_without_programs(hardware)),
        )
    for name, budget in (("budget", solution.device), ("host_budget", solution.host)):
        available = _rounded_down(budget.available_bytes)
        if getattr(config.memory, name) == AUTO or budget.total_bytes == budget.available_bytes:
            continue
        if budget.total_bytes < budget.available_bytes:
            yield _change_memory(problem, name, f"Raise memory.{name} to up to {available}")
        elif name == "budget" or budget.total_bytes > hardware.host_total_bytes:
            text = f"Lower memory.{name} to {available}, or to auto (more is not there)"
            yield _change_memory(problem, name, text)
    for name in _PLACE_SETTINGS:
        if getattr(config.memory, name) != AUTO:
            yield _change_memory(problem, name, f"Set memory.{name}: auto")
    if estimate.is_optimizer_on_device(solution.work):
        yield _Change(
            text="Set train.optim: adamw_torch, which keeps masters and moments in main memory",
            problem=_with_config(problem, _with_host_optimizer(config)),
        )


def _together(problem: Problem, solution: Solution) -> Problem:
    """Every harmless change at once."""
    names = ["budget", "host_budget", *_PLACE_SETTINGS]
    memory = dataclasses.replace(problem.config.memory, **dict.fromkeys(names, AUTO))
    config = dataclasses.replace(problem.config, memory=memory)
    if estimate.is_optimizer_on_device(solution.work):
        config = _with_host_optimizer(config)
    hardware = _without_programs(problem.hardware)
    return dataclasses.replace(problem, config=config, hardware=hardware)


def _with_room(solution: Solution, after: Solution) -> Solution:
    """`solution` with what is available once all is done that leads to `after`."""
    budgets = {
        name: dataclasses.replace(
            getattr(solution, name), available_bytes=getattr(after, name).available_bytes
        )
        for name in ("device", "host")
    }
    return dataclasses.replace(solution, **budgets)


def _changes_of_training(problem: Problem, *, is_last_resort: bool) -> list[str]:
    """Changes after which something else is trained; they are named as that."""
    start = "If that is not possible: " if is_last_resort else ""
    lines = []
    rank = problem.config.lora.r
    for smaller in (r for r in _SMALLER_RANKS if r < rank):
        lora = dataclasses.replace(problem.config.lora, r=smaller)
        if solve(_with_config(problem, dataclasses.replace(problem.config, lora=lora))).fits:
            lines.append(f"{start}lora.r: {smaller} would fit; it trains a smaller adapter.")
            break
    length = _longest_fitting(problem)
    if length is not None:
        lines.append(
            f"{start}data.max_length: {length} would fit; longer rows could not be trained on."
        )
    if not lines and not is_last_resort:
        lines.append("No setting makes it fit: use a smaller model, or a machine with more memory.")
    return lines


def _longest_fitting(problem: Problem) -> int | None:
    """A shorter max_length with which all budgets hold."""
    longest = solve(problem).longest_row_tokens
    if longest is None or longest >= problem.wanted_length:
        return None
    shorter = dataclasses.replace(problem, wanted_length=longest)
    return longest if solve(shorter).fits else None


def _rounded_down(size_bytes: int) -> str:
    """A size to set: of what is there, rounding up would make more than is there."""
    if size_bytes < GIB:
        return f"{size_bytes // MIB} MiB"
    return format_bytes(size_bytes * 100 // GIB * GIB / 100)


def _without_programs(hardware: Hardware) -> Hardware:
    held = min(hardware.display_bytes, DRIVER_BYTES)
    return dataclasses.replace(
        hardware, display_bytes=held, vram_free_bytes=hardware.vram_total_bytes - held
    )


def _with_enough_disk(problem: Problem, disk_bytes: int) -> Problem:
    hardware = dataclasses.replace(problem.hardware, disk_free_bytes=disk_bytes)
    return dataclasses.replace(problem, hardware=hardware)


def _change_memory(problem: Problem, name: str, text: str) -> _Change:
    memory = dataclasses.replace(problem.config.memory, **{name: AUTO})
    config = dataclasses.replace(problem.config, memory=memory)
    return _Change(text=text, problem=_with_config(problem, config))


def _with_host_optimizer(config: Config) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, optim="adamw_torch"))


def _with_config(problem: Problem, config: Config) -> Problem:
    return dataclasses.replace(problem, config=config)
