"""What the NVIDIA driver says about its cards, through NVML: no CUDA context is created."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

NVML_PACKAGE = "nvidia-ml-py"
_THERMAL_REASONS = ("SwThermalSlowdown", "HwThermalSlowdown", "HwSlowdown")
_POWER_REASONS = ("SwPowerCap", "HwPowerBrakeSlowdown")


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuProcess:
    """A program that holds memory of a card; 0 bytes where the driver does not tell."""

    pid: int
    name: str
    used_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One card. None where the driver does not tell.

    Attributes:
        index, uuid, name: As in nvidia-smi.
        compute_capability: (major, minor).
        total_bytes, free_bytes: Its memory, and what of it nobody holds.
        pcie_generation, pcie_lanes: Of the link now; the generation drops when idle.
        max_pcie_generation, max_pcie_lanes: What card and board could agree on.
        temperature_celsius: Of the chip.
        power_limit_watts, default_power_limit_watts: Set, and as delivered.
        slowed_by: `heat` and `power`, as far as the driver slows the clocks because of them.
        driver_model: `WDDM` or `TCC` on Windows.
        processes: Programs that hold its memory.
    """

    index: int
    uuid: str
    name: str
    compute_capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    max_pcie_generation: int | None = None
    max_pcie_lanes: int | None = None
    temperature_celsius: int | None = None
    power_limit_watts: float | None = None
    default_power_limit_watts: float | None = None
    slowed_by: tuple[str, ...] = ()
    driver_model: str | None = None
    processes: tuple[GpuProcess, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class NvmlReading:
    """The driver and its cards.

    Attributes:
        driver_version: `580.95.05`; None without a driver.
        cuda_version: Newest CUDA runtime the driver serves, (major, minor).
        gpus: All cards, in nvidia-smi's order.
        error: Why nothing could be read, empty otherwise.
    """

    driver_version: str | None = None
    cuda_version: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str = ""


def read_nvml(nvml: Any = None) -> NvmlReading:
    """Ask the driver. Without one (or without nvidia-ml-py) the reading says so in `error`.

    Args:
        nvml: Stands in for the `pynvml` module.
    """
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as error:
            return NvmlReading(error=f"{NVML_PACKAGE} cannot be imported: {error}")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return NvmlReading(error=str(error))
    try:
        cuda = _ask(nvml, nvml.nvmlSystemGetCudaDriverVersion)
        count = _ask(nvml, nvml.nvmlDeviceGetCount) or 0
        gpus = [_read_gpu(nvml, index) for index in range(count)]
        return NvmlReading(
            driver_version=_text(_ask(nvml, nvml.nvmlSystemGetDriverVersion)),
            cuda_version=None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
            gpus=tuple(gpu for gpu in gpus if gpu is not None),
        )
    finally:
        nvml.nvmlShutdown()


def visible_gpu(reading: NvmlReading, visible: str | None = None) -> Gpu | None:
    """The card that CUDA's device 0 is, as far as CUDA_VISIBLE_DEVICES tells.

    Args:
        reading: The cards.
        visible: Value of CUDA_VISIBLE_DEVICES; None reads the environment.
    """
    if visible is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return reading.gpus[0] if reading.gpus else None
    first = visible.split(",")[0].strip()
    for gpu in reading.gpus:
        if first == str(gpu.index) or (first.startswith("GPU-") and gpu.uuid.startswith(first)):
            return gpu
    return None


def _read_gpu(nvml: Any, index: int) -> Gpu | None:
    handle = _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
    memory = None if handle is None else _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    capability = _ask(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    if memory is None or capability is None:
        return None
    limit = _ask(nvml, nvml.nvmlDeviceGetPowerManagementLimit, handle)
    default = _ask(nvml, nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
    return Gpu(
        index=index,
        uuid=_text(_ask(nvml, nvml.nvmlDeviceGetUUID, handle)) or "",
        name=_text(_ask(nvml, nvml.nvmlDeviceGetName, handle)) or "NVIDIA GPU",
        compute_capability=(int(capability[0]), int(capability[1])),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        pcie_generation=_ask(nvml, nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        pcie_lanes=_ask(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        max_pcie_generation=_ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        max_pcie_lanes=_ask(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        temperature_celsius=_ask(nvml, nvml.nvmlDeviceGetTemperature, handle, 0),
        power_limit_watts=None if limit is None else limit / 1000,
        default_power_limit_watts=None if default is None else default / 1000,
        slowed_by=_slowed_by(nvml, handle),
        driver_model=_driver_model(nvml, handle),
        processes=_processes(nvml, handle),
    )


def _slowed_by(nvml: Any, handle: Any) -> tuple[str, ...]:
    bits = _ask(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    causes = []
    for cause, names in (("heat", _THERMAL_REASONS), ("power", _POWER_REASONS)):
        if any(bits & getattr(nvml, f"nvmlClocksThrottleReason{name}", 0) for name in names):
            causes.append(cause)
    return tuple(causes)


def _driver_model(nvml: Any, handle: Any) -> str | None:
    model = _ask(nvml, nvml.nvmlDeviceGetCurrentDriverModel, handle)
    return None if model is None else {0: "WDDM", 1: "TCC"}.get(int(model), "MCDM")


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    held: dict[int, int] = {}
    for ask in (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        for process in _ask(nvml, ask, handle) or ():
            used = int(process.usedGpuMemory or 0)
            held[process.pid] = max(held.get(process.pid, 0), used)
    found = (
        GpuProcess(pid=pid, name=_process_name(pid), used_bytes=used) for pid, used in held.items()
    )
    return tuple(sorted(found, key=lambda process: -process.used_bytes))


def _process_name(pid: int) -> str:
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "another user's program"


def _ask(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None where card or driver do not know it."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: Any) -> str | None:
    """Older releases of nvidia-ml-py answer in bytes."""
    if value is None:
        return None
    return value.decode() if isinstance(value, bytes) else str(value)
