"""`eightgig doctor`: verdict, findings and exit code; what it finds has tests of its own."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from eightgig.cli.app import main
from eightgig.hardware import doctor
from eightgig.hardware.facts import (
    BitsandbytesFacts,
    Facts,
    StepFacts,
    TorchFacts,
    TritonFacts,
)
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
        triton=TritonFacts(version="3.7.1", is_right=True),
        versions={"torch": "2.13.0+cu130", "bitsandbytes": "0.50.2"},
        c_compiler="/usr/bin/cc",
        host_total_bytes=32 * GIB,
        host_free_bytes=28 * GIB,
        pin_limit_bytes=16 * GIB,
        pinned_bytes=2 * GIB,
        rates=RATES,
        rates_error="",
        cache_dir="/cache",
        disk_free_bytes=TIB,
        hub_dir="/hub",
        hub_free_bytes=TIB,
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


def _shadow(folder: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """Modules that come before the installed ones, in this process's children."""
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ImportError('libtorch_cpu.so: undefined symbol')", "undefined symbol"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("import sys; sys.exit('DLL load failed')", "DLL load failed"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals")
def test_a_torch_that_does_not_import_is_found_and_the_rest_examined(
    code: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _shadow(tmp_path, monkeypatch, torch=code)
    monkeypatch.setenv("HF_TOKEN", "hf_SecretOfTheUser")
    assert main(["doctor"]) == 2
    shown = capsys.readouterr()
    start = "error: torch cannot be imported: "
    (line,) = [line for line in shown.out.splitlines() if line.startswith(start)]
    assert words in line
    assert 'fix: python -m pip install --force-reinstall "torch>=2.11,<2.14"' in shown.out
    assert "A Hugging Face token is set." in shown.out
    assert "SecretOfTheUser" not in shown.out + shown.err


def test_a_bitsandbytes_that_does_not_import_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _shadow(
        tmp_path,
        monkeypatch,
        bitsandbytes="print('a banner')\nraise RuntimeError('CUDA Setup failed despite CUDA')",
    )
    assert main(["doctor", "--json"]) == 2
    shown = json.loads(capsys.readouterr().out)
    errors = [finding for finding in shown["findings"] if finding["severity"] == "error"]
    assert [finding["code"] for finding in errors] == ["doctor.bitsandbytes_missing"]
    assert "CUDA Setup failed despite CUDA" in errors[0]["message"]
    assert '"bitsandbytes>=0.50,<0.51"' in errors[0]["fix"]
    assert shown["facts"]["torch"]["version"].startswith("2.")


def test_a_message_of_several_lines_is_shown_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = (
        "\n        CUDA Setup failed despite GPU being available. Please run the following command "
        "to get more information:\n\n        python -m bitsandbytes\n\n        Inspect the output "
        "of the command and see if you can locate CUDA libraries. You might need to add them\n"
        "        to your LD_LIBRARY_PATH.\n"
    )
    _shadow(tmp_path, monkeypatch, bitsandbytes=f"raise RuntimeError({said!r})")
    assert main(["doctor", "--json"]) == 2
    findings = json.loads(capsys.readouterr().out)["findings"]
    (finding,) = [each for each in findings if each["code"] == "doctor.bitsandbytes_missing"]
    start = "bitsandbytes cannot be imported: RuntimeError: CUDA Setup failed despite GPU"
    assert finding["message"].startswith(start)
    assert "python -m bitsandbytes" in finding["message"]
    assert "\n" not in finding["message"]


def test_a_step_that_gives_no_number_is_json_still(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = StepFacts(device="cuda", weight=0.09, forward=float("nan"), gradient=0.01, update=0.01)
    _examine(monkeypatch, dataclasses.replace(_facts(), step=step))
    assert main(["doctor", "--json"]) == 2
    shown = capsys.readouterr().out
    assert "NaN" not in shown
    assert json.loads(shown)["facts"]["step"]["forward"] is None


def test_a_processor_alone_can_train_small_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = dataclasses.replace(
        _facts(),
        gpu=None,
        nvml=NvmlReading(error="no driver"),
        has_nvidia_card=False,
        torch=TorchFacts(version="2.13.0+cpu"),
        triton=None,
        rates=None,
    )
    _examine(monkeypatch, alone)
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "This machine can train, on its processor: small models."
    assert any("eightgig demo" in line for line in lines)


def test_link_heat_and_power_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = dataclasses.replace(
        GPU,
        max_pcie_generation=4,
        pcie_lanes=8,
        max_pcie_lanes=8,
        temperature_celsius=45,
        power_limit_watts=115.0,
    )
    _examine(monkeypatch, dataclasses.replace(_facts(), gpu=card))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "4.0 x8" in shown
    assert "45 degrees Celsius, limit 115 W" in shown
