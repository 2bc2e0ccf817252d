"""What this machine is: GPU, memory, links. Looking creates no CUDA context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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
        is_measured: True when measured on this machine, False when taken from a table.
    """

    gemm_flops_per_second: float
    memory_bytes_per_second: float
    host_to_device_bytes_per_second: float
    device_to_host_bytes_per_second: float
    both_ways_bytes_per_second: float
    copy_engines: int
    is_measured: bool


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
