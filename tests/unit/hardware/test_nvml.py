import dataclasses
import os
from types import SimpleNamespace

import pytest

from eightgig.hardware.nvml import NvmlReading, read_nvml, visible_gpu
from eightgig.units import GIB, MIB
from tests.unit.hardware.fake_nvml import NVMLError, make_nvml


def test_a_card_is_read_with_its_link_and_limits() -> None:
    reading = read_nvml(make_nvml())
    assert reading.driver_version == "580.95.05"
    assert reading.cuda_version == (13, 0)
    assert reading.error == ""
    (gpu,) = reading.gpus
    assert gpu.name == "NVIDIA GeForce RTX 4060"
    assert gpu.total_bytes == 8188 * MIB
    assert (gpu.pcie_generation, gpu.max_pcie_generation, gpu.pcie_lanes) == (1, 4, 8)
    assert gpu.power_limit_watts == 115
    assert gpu.slowed_by == ()
    assert gpu.driver_model is None


def test_a_machine_without_a_driver_says_why() -> None:
    reading = read_nvml(make_nvml(Init=NVMLError("NVML Shared Library Not Found")))
    assert reading.gpus == ()
    assert reading.driver_version is None
    assert reading.error == "NVML Shared Library Not Found"


def test_questions_that_a_card_does_not_answer_stay_open() -> None:
    unknown = NVMLError("Not Supported")
    reading = read_nvml(
        make_nvml(
            GetCurrPcieLinkWidth=unknown,
            GetTemperature=unknown,
            GetPowerManagementLimit=unknown,
            GetPowerManagementDefaultLimit=unknown,
            GetCurrentClocksThrottleReasons=unknown,
            SystemGetCudaDriverVersion=unknown,
        )
    )
    (gpu,) = reading.gpus
    assert reading.cuda_version is None
    assert gpu.pcie_lanes is None
    assert gpu.temperature_celsius is None
    assert gpu.power_limit_watts is None
    assert gpu.slowed_by == ()


def test_a_card_that_has_fallen_off_the_bus_is_left_out() -> None:
    assert read_nvml(make_nvml(GetMemoryInfo=NVMLError("GPU is lost"))).gpus == ()


@pytest.mark.parametrize(
    ("bits", "causes"),
    [(0, ()), (1, ()), (32, ("heat",)), (4, ("power",)), (68, ("heat", "power"))],
)
def test_reasons_of_slow_clocks_are_told_apart(bits: int, causes: tuple[str, ...]) -> None:
    (gpu,) = read_nvml(make_nvml(GetCurrentClocksThrottleReasons=bits)).gpus
    assert gpu.slowed_by == causes


@pytest.mark.parametrize(("model", "name"), [(0, "WDDM"), (1, "TCC"), (2, "MCDM")])
def test_windows_driver_models_have_names(model: int, name: str) -> None:
    (gpu,) = read_nvml(make_nvml(GetCurrentDriverModel=model)).gpus
    assert gpu.driver_model == name


def test_a_program_that_computes_and_draws_is_one_holder() -> None:
    mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=2 * GIB)
    drawing = SimpleNamespace(pid=os.getpid(), usedGpuMemory=GIB)
    gone = SimpleNamespace(pid=2**22 + 1, usedGpuMemory=None)
    (gpu,) = read_nvml(
        make_nvml(GetComputeRunningProcesses=[mine], GetGraphicsRunningProcesses=[drawing, gone])
    ).gpus
    first, second = gpu.processes
    assert (first.pid, first.used_bytes) == (os.getpid(), 2 * GIB)
    assert (second.name, second.used_bytes) == ("another user's program", 0)


def test_names_in_bytes_are_read_too() -> None:
    (gpu,) = read_nvml(make_nvml(GetName=b"NVIDIA A10", GetUUID=b"GPU-9")).gpus
    assert (gpu.name, gpu.uuid) == ("NVIDIA A10", "GPU-9")


@pytest.mark.parametrize(
    ("visible", "index"),
    [(None, 0), ("0", 0), ("1,0", 1), ("GPU-b", 1), ("", None), ("-1", None), ("7", None)],
)
def test_the_first_visible_card_is_the_one(
    visible: str | None, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (gpu,) = read_nvml(make_nvml()).gpus
    cards = [
        dataclasses.replace(gpu, index=number, uuid=f"GPU-{letter}")
        for number, letter in enumerate("ab")
    ]
    found = visible_gpu(NvmlReading(gpus=tuple(cards)), visible)
    assert (None if found is None else found.index) == index


def test_the_environment_can_hide_every_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpu(read_nvml(make_nvml())) is None
