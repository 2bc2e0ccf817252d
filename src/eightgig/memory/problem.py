"""What is asked of the planner, and the answer before it is put into words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eightgig.config import AUTO, Config
from eightgig.errors import ConfigError
from eightgig.hardware.probe import Hardware, Rates
from eightgig.memory import estimate, host_estimate
from eightgig.memory.budget import Budget, device_budget, host_budget
from eightgig.memory.layers import check_targets
from eightgig.memory.search import SUPPORTED_OFFLOADS, Candidate, Search
from eightgig.memory.workload import ComputeDtype, RowLengths, Workload, build_workload
from eightgig.models.families import TEXT_MODULE_PREFIX
from eightgig.models.spec import DecoderSpec, ModelSpec

# Planned for where neither the config nor data say how long rows are.
DEFAULT_ROW_TOKENS = 2048
_LENGTH_STEP_TOKENS = 64
FEWEST_SLOTS = 2
# An RTX 4060, where rates are needed to decide but none are known. Nothing is forecast by them.
ASSUMED_GPU_RATES = Rates(
    gemm_flops_per_second=26e12,
    memory_bytes_per_second=231e9,
    host_to_device_bytes_per_second=12.5e9,
    device_to_host_bytes_per_second=12.5e9,
    both_ways_bytes_per_second=12.5e9,
    copy_engines=1,
    is_measured=False,
)
ASSUMED_CPU_RATES = Rates(
    gemm_flops_per_second=60e9,
    memory_bytes_per_second=15e9,
    host_to_device_bytes_per_second=8e9,
    device_to_host_bytes_per_second=8e9,
    both_ways_bytes_per_second=8e9,
    copy_engines=1,
    is_measured=False,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A model, a machine and settings, checked.

    Attributes:
        spec, hardware, config, rows: As given.
        is_prepared: Whether the prepared weights are on the disk already.
        wanted_length: Longest row that is asked for.
        num_steps: Optimizer steps of the run, None where the rows are not counted.
    """

    spec: ModelSpec | DecoderSpec
    hardware: Hardware
    config: Config
    rows: RowLengths | None
    is_prepared: bool
    wanted_length: int
    num_steps: int | None

    @property
    def compute_dtype(self) -> ComputeDtype:
        """bfloat16 where the card multiplies it, float16 on older ones, float32 on a CPU."""
        if self.hardware.device == "cpu":
            return "float32"
        return "bfloat16" if self.hardware.has_bf16 else "float16"

    @property
    def rates(self) -> Rates:
        """Known speeds, or those to decide by."""
        if self.hardware.rates is not None:
            return self.hardware.rates
        return ASSUMED_CPU_RATES if self.hardware.device == "cpu" else ASSUMED_GPU_RATES


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """The layout that was chosen, and what it was compared with.

    Attributes:
        work: What it was chosen for.
        best: The choice.
        candidates: Everything that was estimated.
        device, host: The budgets.
        disk_bytes: Free disk that is needed.
        longest_row_tokens: Longest row that would fit with the least-memory layout, None if none.
        fits: Whether device, host and disk suffice and no setting is beyond the machine.
    """

    work: Workload
    best: Candidate
    candidates: tuple[Candidate, ...]
    device: Budget
    host: Budget
    disk_bytes: int
    longest_row_tokens: int | None
    fits: bool


def read_problem(
    spec: ModelSpec | DecoderSpec,
    hardware: Hardware,
    config: Config,
    *,
    rows: RowLengths | None,
    is_prepared: bool,
) -> Problem:
    """Check the settings against each other.

    Raises:
        ConfigError: A setting asks for what cannot be done.
        ModelError: `lora.target_modules` matches nothing.
    """
    decoder = spec.decoder if isinstance(spec, ModelSpec) else spec
    if config.data.max_length != AUTO:
        wanted = config.data.max_length
        wanted = wanted if rows is None else min(wanted, rows.longest_tokens)
    elif rows is not None:
        wanted = rows.longest_tokens
    else:
        wanted = min(DEFAULT_ROW_TOKENS, decoder.max_positions)
    if config.data.max_length != AUTO and wanted > decoder.max_positions:
        raise ConfigError(
            f"data.max_length is {wanted:,}; the model has {decoder.max_positions:,} positions.",
            why="What comes after the last position it never saw in training.",
            fix=f"Set data.max_length: {decoder.max_positions} or less, or auto.",
        )
    _check_memory_settings(config, wanted)
    prefix = spec.module_prefix if isinstance(spec, ModelSpec) else TEXT_MODULE_PREFIX
    check_targets(decoder, config.lora.target_modules, prefix)
    return Problem(
        spec=spec,
        hardware=hardware,
        config=config,
        rows=rows,
        is_prepared=is_prepared,
        wanted_length=max(1, wanted),
        num_steps=_num_steps(config, rows),
    )


def solve(problem: Problem) -> Solution:
    """The best layout for the longest row that is asked for, or that fits."""
    longest = longest_row(problem)
    length = problem.wanted_length
    if problem.config.data.max_length == AUTO and longest is not None:
        length = min(length, longest)
    search = search_for(problem, length)
    best, candidates = search.run()
    disk = disk_bytes(problem, search.work)
    is_possible = (
        search.device.total_bytes <= search.device.available_bytes
        and search.host.total_bytes <= problem.hardware.host_total_bytes
        and disk <= problem.hardware.disk_free_bytes
    )
    return Solution(
        work=search.work,
        best=best,
        candidates=tuple(candidates),
        device=search.device,
        host=search.host,
        disk_bytes=disk,
        longest_row_tokens=longest,
        fits=best.fits and is_possible,
    )


def search_for(problem: Problem, max_length: int) -> Search:
    """The search for rows of up to `max_length` tokens."""
    config, hardware = problem.config, problem.hardware
    has_device = hardware.device == "cuda"
    work = build_workload(
        problem.spec,
        config,
        max_length=max_length,
        rows=problem.rows,
        compute_dtype=problem.compute_dtype,
        has_device=has_device,
    )
    host = host_budget(hardware, config.memory)
    device = host
    if has_device:
        managed = estimate.managed_bytes(work)
        device = device_budget(hardware, config.memory, managed_bytes=managed)
    return Search(
        work=work,
        hardware=hardware,
        memory=config.memory,
        device=device,
        host=host,
        rates=problem.rates,
    )


def longest_row(problem: Problem) -> int | None:
    """Longest row, in steps of 64 tokens, that fits with the layout that needs the least.

    None where not even a row of 64 tokens fits.
    """
    decoder = problem.spec.decoder if isinstance(problem.spec, ModelSpec) else problem.spec
    low, high = 0, -(-decoder.max_positions // _LENGTH_STEP_TOKENS)
    if _fits_length(problem, decoder.max_positions):
        return decoder.max_positions
    while high - low > 1:
        middle = (low + high) // 2
        if _fits_length(problem, middle * _LENGTH_STEP_TOKENS):
            low = middle
        else:
            high = middle
    return low * _LENGTH_STEP_TOKENS or None


def _fits_length(problem: Problem, max_length: int) -> bool:
    bound = problem.config.memory.micro_batch_tokens
    if bound != AUTO and bound < max_length:
        return False
    search = search_for(problem, max_length)
    return any(search.candidate(layout).fits for layout in search.least_layouts())


def disk_bytes(problem: Problem, work: Workload) -> int:
    """Free disk that preparing and training need, beside the checkpoint.

    Tables stay in the checkpoint's files unless these are deleted once they are prepared.
    """
    has_tables = not problem.config.model.delete_download
    return host_estimate.disk_bytes(
        work,
        is_prepared=problem.is_prepared,
        has_tables=has_tables,
        num_checkpoints=problem.config.run.save_total_limit,
    )


def _num_steps(config: Config, rows: RowLengths | None) -> int | None:
    train = config.train
    if train.max_steps > 0:
        return train.max_steps
    if rows is None:
        return None
    # As in training: the last step of an epoch has the rows that are left.
    return math.ceil(train.num_train_epochs * math.ceil(rows.num_rows / train.rows_per_step))


def _check_memory_settings(config: Config, max_length: int) -> None:
    memory = config.memory
    if memory.offload != AUTO:
        unsupported = [name for name in memory.offload if name not in SUPPORTED_OFFLOADS]
        if unsupported:
            raise ConfigError(
                f"memory.offload: {', '.join(unsupported)} cannot be kept in host memory.",
                why=f"Outputs that can be kept are {', '.join(SUPPORTED_OFFLOADS)}.",
                fix="Name some of these in memory.offload, or set it to auto.",
            )
    if memory.layer_slots != AUTO and memory.layer_slots < FEWEST_SLOTS:
        raise ConfigError(
            f"memory.layer_slots is {memory.layer_slots}; at least {FEWEST_SLOTS} are needed.",
            why="One layer is computed while the next is copied.",
            fix=f"Set memory.layer_slots: {estimate.RING_SLOTS}, or auto.",
        )
    if memory.micro_batch_tokens != AUTO and memory.micro_batch_tokens < max_length:
        raise ConfigError(
            f"memory.micro_batch_tokens is {memory.micro_batch_tokens}, "
            f"but a row has up to {max_length} tokens.",
            why="A row passes the model as a whole.",
            fix=f"Set memory.micro_batch_tokens: {max_length} or more, or auto.",
        )
