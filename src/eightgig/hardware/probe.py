"""What this machine is: GPU, memory, links. Looking creates no CUDA context."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from eightgig.config import default_cache_dir
from eightgig.errors import HardwareError
from eightgig.hardware.card_table import (
    GEMM_RATIO,
    LAPTOP_GEMM_RATIO,
    MEMORY_RATIO,
    Card,
    card_of_gpu,
    link_bytes_per_second,
)
from eightgig.hardware.nvml import Gpu, NvmlReading, read_nvml, visible_gpu
from eightgig.units import MIB

# What a context of this process takes, loaded kernels included: 0.53 GiB on an H100 (2026-11),
# 0.25 to 0.45 on consumer cards.
CONSUMER_CONTEXT_BYTES = 450 * MIB
DATA_CENTRE_CONTEXT_BYTES = 560 * MIB
_DATA_CENTRE_NAMES = ("H100", "H200", "H800", "A100", "B200", "GH200")
# Windows pins about half of the memory, WSL 2 gives up between 0.5 and 1 GiB.
_WSL_PIN_BYTES = 512 * MIB
_WINDOWS_PIN_RATIO = 0.5
_LINUX_PIN_RATIO = 0.9
_CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


# Of a current desktop, estimated; `hardware.bench` measures both.
USUAL_LAUNCH_SECONDS = 7e-6
USUAL_HOST_BYTES_PER_SECOND = 25e9
# AdamW reads and writes seven float32 numbers per parameter.
ADAMW_BYTES = 7 * 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Measured or tabulated speeds of one device.

    Attributes:
        gemm_flops_per_second: Matrix products in the compute dtype, shapes of a decoder layer.
        memory_bytes_per_second: Device memory, bytes read plus bytes written.
        host_to_device_bytes_per_second: Pinned host memory to the device, alone.
        device_to_host_bytes_per_second: Device to pinned host memory, alone.
        both_ways_bytes_per_second: Sum of both directions at the same time.
        copy_engines: Copies that can run at the same time.
        launch_seconds: Python's time to launch a small operation on the device.
        host_bytes_per_second: `ADAMW_BYTES` per parameter over the time that AdamW takes on
            `optimizer_threads` of the host, with scaling its gradients and making its compute copy.
        is_measured: True when measured on this machine, False when taken from a table.
    """

    gemm_flops_per_second: float
    memory_bytes_per_second: float
    host_to_device_bytes_per_second: float
    device_to_host_bytes_per_second: float
    both_ways_bytes_per_second: float
    copy_engines: int
    is_measured: bool
    launch_seconds: float = USUAL_LAUNCH_SECONDS
    host_bytes_per_second: float = USUAL_HOST_BYTES_PER_SECOND


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """The machine a plan is made for.

    Attributes:
        device: Where training computes.
        name: `NVIDIA GeForce RTX 4060`, or the processor's name.
        compute_capability: (major, minor) of the GPU, None on a CPU.
        has_bf16: Whether the device multiplies bfloat16 matrices at full speed.
        vram_total_bytes: Memory of the card; 0 on a CPU.
        vram_free_bytes: Of that, held by nobody.
        context_bytes: What the CUDA context of this process takes (or will take).
        display_bytes: What displays and other programs hold.
        host_total_bytes: Main memory.
        host_free_bytes: Main memory that can be taken without swapping.
        pin_limit_bytes: Most host memory that can be pinned; 0 on a CPU.
        disk_free_bytes: Free bytes where prepared weights are kept.
        cpu_threads: Threads the process may use.
        rates: Speeds, None when neither measured nor in the table.
        has_triton: Whether Triton is installed, which the fused kernels need.
    """

    device: Literal["cuda", "cpu"]
    name: str
    compute_capability: tuple[int, int] | None
    has_bf16: bool
    vram_total_bytes: int
    vram_free_bytes: int
    context_bytes: int
    display_bytes: int
    host_total_bytes: int
    host_free_bytes: int
    pin_limit_bytes: int
    disk_free_bytes: int
    cpu_threads: int
    rates: Rates | None
    has_triton: bool = False


def optimizer_threads() -> int:
    """Processors for AdamW on the host: the others are left to what feeds the GPU."""
    return max(1, cpu_threads() // 3)


def probe(
    device: Literal["auto", "cuda", "cpu"] = "auto", cache_dir: Path | None = None
) -> Hardware:
    """This machine, without creating a CUDA context; rates come from the table of cards.

    Args:
        device: `auto` takes the GPU if there is one.
        cache_dir: Where prepared weights are kept, for the free disk.

    Raises:
        HardwareError: `cuda` is asked for and there is no usable GPU.
    """
    reading = NvmlReading() if device == "cpu" else read_nvml()
    gpu = visible_gpu(reading)
    if device == "cuda" and gpu is None:
        raise HardwareError(
            "memory.device is cuda, but no GPU can be used here.",
            why=reading.error or "CUDA_VISIBLE_DEVICES hides every card, or there is none.",
            fix="Run `eightgig doctor` for the cause, or set memory.device: cpu.",
        )
    return describe_machine(gpu, cache_dir or default_cache_dir())


def describe_machine(gpu: Gpu | None, cache_dir: Path) -> Hardware:
    """The machine with `gpu` as its device, or its processor where that is None."""
    total, free = host_memory()
    card = None if gpu is None else card_of_gpu(gpu.name, gpu.total_bytes)
    generation = None if gpu is None else gpu.max_pcie_generation
    lanes = None if gpu is None else gpu.max_pcie_lanes
    return Hardware(
        device="cpu" if gpu is None else "cuda",
        name=processor_name() if gpu is None else gpu.name,
        compute_capability=None if gpu is None else gpu.compute_capability,
        has_bf16=gpu is not None and gpu.compute_capability >= (8, 0),
        vram_total_bytes=0 if gpu is None else gpu.total_bytes,
        vram_free_bytes=0 if gpu is None else gpu.free_bytes,
        context_bytes=0 if gpu is None else context_bytes(gpu.name),
        display_bytes=0 if gpu is None else gpu.total_bytes - gpu.free_bytes,
        host_total_bytes=total,
        host_free_bytes=free,
        pin_limit_bytes=0 if gpu is None else pin_limit_bytes(total),
        disk_free_bytes=disk_free_bytes(cache_dir),
        cpu_threads=cpu_threads(),
        rates=None if card is None else card_rates(card, generation=generation, lanes=lanes),
        has_triton=importlib.util.find_spec("triton") is not None,
    )


def card_rates(card: Card, *, generation: int | None = None, lanes: int | None = None) -> Rates:
    """What `card` reaches, from the table.

    Args:
        card: The card.
        generation, lanes: Of the board's slot, where it is slower than the card's connector.
    """
    link = link_bytes_per_second(
        min(generation or card.pcie_generation, card.pcie_generation),
        min(lanes or card.pcie_lanes, card.pcie_lanes),
        is_laptop=card.is_laptop,
    )
    gemm_ratio = LAPTOP_GEMM_RATIO if card.is_laptop else GEMM_RATIO
    return Rates(
        gemm_flops_per_second=card.peak_flops_per_second * gemm_ratio,
        memory_bytes_per_second=card.memory_gb_per_second * 1e9 * MEMORY_RATIO,
        host_to_device_bytes_per_second=link,
        device_to_host_bytes_per_second=link,
        both_ways_bytes_per_second=link if card.copy_engines == 1 else 1.6 * link,
        copy_engines=card.copy_engines,
        is_measured=False,
    )


def context_bytes(name: str) -> int:
    """What the CUDA context of this process will take on a card called `name`."""
    is_data_centre = any(part in name for part in _DATA_CENTRE_NAMES)
    return DATA_CENTRE_CONTEXT_BYTES if is_data_centre else CONSUMER_CONTEXT_BYTES


def host_memory() -> tuple[int, int]:
    """Main memory and what of it is free, within the limits of a container.

    A container's use counts the files that it has read or written, too: after a download that is
    all it may have. They give way when memory is needed, so they are free, as psutil counts them.
    """
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for limit_path, used_path in _CGROUP_LIMITS:
        limit, used = _read_number(limit_path), _read_number(used_path)
        if limit is not None and used is not None and limit < total:
            used -= min(used, _cached_bytes(used_path.with_name("memory.stat")))
            total, free = limit, max(0, min(free, limit - used))
    return total, free


def _cached_bytes(stat_path: Path) -> int:
    """Pages of files that a container holds; version 1 has sums over its children beside them."""
    try:
        lines = stat_path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    sizes = {name: int(size) for name, _, size in (line.partition(" ") for line in lines)}
    return sum(
        sizes.get(f"total_{name}", sizes.get(name, 0)) for name in ("active_file", "inactive_file")
    )


def pin_limit_bytes(host_total_bytes: int) -> int:
    """Most main memory that the system lets be pinned, as a rule of thumb."""
    if is_wsl():
        return _WSL_PIN_BYTES
    ratio = _WINDOWS_PIN_RATIO if sys.platform == "win32" else _LINUX_PIN_RATIO
    return int(host_total_bytes * ratio)


def is_wsl() -> bool:
    """Whether this is Linux inside Windows."""
    return "microsoft" in platform.release().lower()


def disk_free_bytes(folder: Path) -> int:
    """Free bytes on the disk that `folder` is or will be on."""
    existing = folder.expanduser().absolute()
    while not _may_see(existing) and existing != existing.parent:
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _may_see(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # a folder of another user; until Python 3.14 it is not just absent
        return False


def cpu_threads() -> int:
    """Threads that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """The processor's name, or at least its kind."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
