"""`eightgig doctor`: verdict, findings and exit code; what it finds has tests of its own."""

import dataclasses
import json
from pathlib import Path

import pytest

from eightgig.cli.app import main
from eightgig.hardware import doctor
from eightgig.hardware.facts import BitsandbytesFacts, Facts, StepFacts, TorchFacts
from eightgig.hardware.nvml import Gpu, NvmlReading
from eightgig.hardware.probe import Rates
from eightgig.units import GIB, TIB

GPU = Gpu(
    index=0,
    uuid="GPU-1",
    name="NVIDIA GeForce RTX 4060",
    compute_capability=(8, 9),
    total_bytes=8 * GIB,
    free_bytes=7 * GIB,
)
RATES = Rates(
    gemm_flops_per_second=26e12,
    memory_bytes_per_second=231e9,
    host_to_device_bytes_per_second=12 * GIB,
    device_to_host_bytes_per_second=13 * GIB,
    both_ways_bytes_per_second=13 * GIB,
    copy_engines=1,
    is_measured=True,
)


def _facts() -> Facts:
    return Facts(
        system="Linux",
        is_wsl=False,
        python_version=(3, 11),
        nvml=NvmlReading(driver_version="580.95.05", cuda_version=(13, 0), gpus=(GPU,)),
        gpu=GPU,
        has_nvidia_card=True,
        torch=TorchFacts(
            version="2.13.0+cu130",
            cuda_build="13.0",
            is_cuda_available=True,
            architectures=("sm_80", "sm_90"),
        ),
        bitsandbytes=BitsandbytesFacts(version="0.50.2", library="x.so", is_cuda_library=True),
        step=StepFacts(device="cuda", weight=0.09, forward=0.001, gradient=0.001, update=0.001),
        versions={"torch": "2.13.0+cu130", "bitsandbytes": "0.50.2"},
        c_compiler="/usr/bin/cc",
        host_total_bytes=32 * GIB,
        host_free_bytes=28 * GIB,
        pin_limit_bytes=16 * GIB,
        pinned_bytes=2 * GIB,
        rates=RATES,
        cache_dir="/cache",
        disk_free_bytes=TIB,
        has_hf_token=True,
    )


def _examine(monkeypatch: pytest.MonkeyPatch, facts: Facts) -> None:
    def gather(cache_dir: Path | None = None, *, measures_rates: bool = True) -> Facts:
        return facts

    monkeypatch.setattr(doctor, "gather_facts", gather)


def test_a_machine_that_can_train_ends_with_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _examine(monkeypatch, _facts())
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "NVIDIA GeForce RTX 4060, 8.00 GiB, 7.00 GiB free" in shown
    assert "12.00 GiB/s in, 13.00 GiB/s out" in shown
    assert shown.splitlines()[-1] == "This machine can train."


def test_a_machine_that_cannot_ends_with_2_and_every_finding_has_a_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = dataclasses.replace(_facts(), torch=TorchFacts(error="ImportError: libcudart"))
    _examine(monkeypatch, broken)
    assert main(["doctor"]) == 2
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    assert lines[first + 1].startswith("  why: ")
    assert lines[first + 2].startswith("  fix: ")
    assert lines[-1].startswith("Training cannot work here")


def test_the_examination_can_be_had_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _examine(monkeypatch, dataclasses.replace(_facts(), torch=TorchFacts(error="ImportError: x")))
    assert main(["doctor", "--json"]) == 2
    shown = json.loads(capsys.readouterr().out)
    assert shown["can_train"] is False
    assert shown["facts"]["gpu"]["name"] == "NVIDIA GeForce RTX 4060"
    for finding in shown["findings"]:
        assert set(finding) == {"severity", "code", "file", "line", "message", "why", "fix"}
