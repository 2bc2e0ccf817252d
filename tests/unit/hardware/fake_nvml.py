"""A stand-in for the `pynvml` module: one RTX 4060 with what a test changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from eightgig.units import MIB


class NVMLError(Exception):
    """What pynvml raises."""


def make_nvml(**changes: Any) -> SimpleNamespace:
    """A driver with one card.

    Args:
        changes: Answers by function name without `nvml` and `Device`; an exception is raised.
    """
    answers: dict[str, Any] = {
        "Init": None,
        "Shutdown": None,
        "SystemGetDriverVersion": "580.95.05",
        "SystemGetCudaDriverVersion": 13000,
        "GetCount": 1,
        "GetHandleByIndex": "handle",
        "GetMemoryInfo": SimpleNamespace(total=8188 * MIB, free=7900 * MIB),
        "GetCudaComputeCapability": (8, 9),
        "GetUUID": "GPU-1234-abcd",
        "GetName": "NVIDIA GeForce RTX 4060",
        "GetCurrPcieLinkGeneration": 1,
        "GetCurrPcieLinkWidth": 8,
        "GetMaxPcieLinkGeneration": 4,
        "GetMaxPcieLinkWidth": 8,
        "GetTemperature": 41,
        "GetPowerManagementLimit": 115_000,
        "GetPowerManagementDefaultLimit": 115_000,
        "GetCurrentClocksThrottleReasons": 0,
        "GetCurrentDriverModel": NVMLError("not supported"),
        "GetComputeRunningProcesses": [],
        "GetGraphicsRunningProcesses": [],
        **changes,
    }
    module = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlClocksThrottleReasonSwThermalSlowdown=32,
        nvmlClocksThrottleReasonHwThermalSlowdown=64,
        nvmlClocksThrottleReasonHwSlowdown=8,
        nvmlClocksThrottleReasonSwPowerCap=4,
        nvmlClocksThrottleReasonHwPowerBrakeSlowdown=128,
    )
    for name, answer in answers.items():
        prefix = "nvml" if name.startswith(("Init", "Shutdown", "System")) else "nvmlDevice"
        setattr(module, prefix + name, _answering(answer))
    return module


def _answering(answer: Any) -> Any:
    def ask(*_: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask
