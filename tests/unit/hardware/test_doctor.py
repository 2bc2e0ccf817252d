"""Every finding, provoked by facts."""

import dataclasses
from collections.abc import Callable

import pytest

from eightgig.errors import Finding
from eightgig.hardware.doctor import Examination, diagnose
from eightgig.hardware.facts import (
    BitsandbytesFacts,
    Facts,
    StepFacts,
    TorchFacts,
    TritonFacts,
)
from eightgig.hardware.nvml import GpuProcess, NvmlReading
from eightgig.units import GIB, MIB
from tests.unit.hardware.machines import RATES, cpu_machine, gpu_machine, torch_facts

Make = Callable[[], Facts]


def _only(facts: Facts, code: str) -> Finding:
    (finding,) = [finding for finding in diagnose(facts) if finding.code == code]
    return finding


def _worse(facts: Facts) -> list[Finding]:
    return [finding for finding in diagnose(facts) if finding.severity != "note"]


def test_a_healthy_machine_has_notes_only() -> None:
    facts = gpu_machine()
    assert _worse(facts) == []
    assert [finding.code for finding in diagnose(facts)] == [
        "doctor.gpu",
        "doctor.nf4_step_ok",
        "doctor.copy_rate_ok",
        "doctor.hf_token",
    ]
    assert Examination(facts=facts, findings=diagnose(facts)).can_train


def test_a_machine_without_a_gpu_hears_what_works() -> None:
    facts = cpu_machine()
    assert _worse(facts) == []
    finding = _only(facts, "doctor.cpu_only")
    assert "eightgig demo" in finding.fix
    assert "float32" in finding.why
    assert Examination(facts=facts, findings=diagnose(facts)).can_train


BROKEN_TORCH = TorchFacts(error="Traceback\nOSError: libcudart.so.13: cannot open shared object")

# What is broken, the finding, whether training cannot work, a part of the message, one of the fix.
FAULTS: list[tuple[Make, str, bool, str, str]] = [
    (
        lambda: gpu_machine(python_version=(3, 14)),
        "doctor.python_version", True, "Python 3.14", "uv venv --python 3.12",
    ),
    (
        lambda: cpu_machine(has_nvidia_card=True),
        "doctor.driver_missing", True, "no working driver", "apt install nvidia-driver-580",
    ),
    (
        lambda: cpu_machine(has_nvidia_card=True, system="Windows"),
        "doctor.driver_missing", True, "no working driver", "nvidia.com/drivers",
    ),
    (
        lambda: cpu_machine(
            has_nvidia_card=True, nvml=NvmlReading(error="Driver/library version mismatch")
        ),
        "doctor.driver_missing", True, "version mismatch", "sudo reboot",
    ),
    (
        lambda: cpu_machine(
            has_nvidia_card=None,
            nvml=NvmlReading(error="nvidia-ml-py cannot be imported: No module named 'pynvml'"),
        ),
        "doctor.nvml_missing", True, "No module named 'pynvml'", "--force-reinstall nvidia-ml-py",
    ),
    (
        lambda: cpu_machine(nvml=NvmlReading(error="nvidia-ml-py cannot be imported: x")),
        "doctor.nvml_missing", False, "The driver cannot be asked", "nvidia-ml-py",
    ),
    (
        lambda: gpu_machine(rates=None, rates_error="Traceback\nRuntimeError: CUDA out of memory"),
        "doctor.rates", False, "measured: RuntimeError: CUDA out of memory", "nvidia-smi",
    ),
    (
        lambda: gpu_machine(
            nvml=dataclasses.replace(
                gpu_machine().nvml, driver_version="550.54.14", cuda_version=(12, 4)
            )
        ),
        "doctor.driver_old", True, "Driver 550.54.14 serves CUDA up to 12.4",
        "nvidia-driver-580 && sudo reboot   or: python -m pip install --force-reinstall "
        '"torch>=2.11,<2.14" --index-url https://download.pytorch.org/whl/cu126',
    ),
    (
        lambda: gpu_machine(
            nvml=dataclasses.replace(
                gpu_machine().nvml, driver_version="470.256.02", cuda_version=(11, 4)
            )
        ),
        "doctor.driver_old", True, "Driver 470.256.02 serves CUDA up to 11.4",
        "sudo apt install nvidia-driver-580 && sudo reboot",
    ),
    (
        lambda: gpu_machine(
            torch=TorchFacts(version="2.13.0+cpu"),
            nvml=dataclasses.replace(gpu_machine().nvml, cuda_version=(11, 4)),
        ),
        "doctor.torch_cpu_build", True, "built for processors only",
        "nvidia-driver-580 && sudo reboot   then: python -m pip install",
    ),
    (
        lambda: gpu_machine(torch=BROKEN_TORCH),
        "doctor.torch_missing", True, "libcudart.so.13", '"torch>=2.11,<2.14"',
    ),
    (
        lambda: gpu_machine(torch=BROKEN_TORCH, system="Windows"),
        "doctor.torch_missing", True, "libcudart.so.13", "--index-url https://download.pytorch.org/",
    ),
    (
        lambda: gpu_machine(
            torch=torch_facts(gpu_machine(), is_cuda_available=False), system="Windows"
        ),
        "doctor.torch_no_cuda", True, "no reason", "Remove-Item Env:CUDA_VISIBLE_DEVICES; ",
    ),
    (
        lambda: gpu_machine(
            triton=TritonFacts(error="ImportError: DLL load failed"), system="Windows"
        ),
        "doctor.triton_broken", False, "DLL load failed",
        "Remove-Item -Recurse -Force ~/.triton; python -m pip install --force-reinstall triton-win",
    ),
    (
        lambda: gpu_machine(versions={"torch": "2.10.0", "triton": "3"}, system="Windows"),
        "doctor.version_torch", True, "torch 2.10.0", "--index-url https://download.pytorch.org/",
    ),
    (
        lambda: gpu_machine(torch=TorchFacts(version="2.13.0+cpu")),
        "doctor.torch_cpu_build", True, "built for processors only",
        "--index-url https://download.pytorch.org/whl/cu130",
    ),
    (
        lambda: gpu_machine(
            torch=torch_facts(gpu_machine(), is_cuda_available=False, error="CUDA unknown error")
        ),
        "doctor.torch_no_cuda", True, "CUDA unknown error", "unset CUDA_VISIBLE_DEVICES",
    ),
    (
        lambda: gpu_machine(gpu={"compute_capability": (10, 0), "name": "NVIDIA New"}),
        "doctor.torch_architecture", True, "no kernels for sm_100", "--index-url",
    ),
    (
        lambda: gpu_machine(gpu={"compute_capability": (6, 1), "name": "NVIDIA GTX 1080"}),
        "doctor.capability", True, "compute capability 6.1", "memory.device: cpu",
    ),
    (
        lambda: gpu_machine(gpu={"compute_capability": (7, 5), "name": "NVIDIA GeForce RTX 2070"}),
        "doctor.no_bfloat16", False, "no fast bfloat16", "Nothing to do",
    ),
    (
        lambda: gpu_machine(
            bitsandbytes=BitsandbytesFacts(error="ImportError: undefined symbol: cget_managed_ptr")
        ),
        "doctor.bitsandbytes_missing", True, "undefined symbol", '"bitsandbytes>=0.50,<0.51"',
    ),
    (
        lambda: gpu_machine(
            bitsandbytes=BitsandbytesFacts(
                version="0.50.2", wanted="14.0", available=("12.8", "13.0"), error="not found"
            )
        ),
        "doctor.bitsandbytes_library", True, "wanted the one for CUDA 14.0 and brings 12.8, 13.0",
        "unset BNB_CUDA_VERSION",
    ),
    (
        lambda: gpu_machine(step=StepFacts(device="cuda", error="ended by signal 11.")),
        "doctor.nf4_step", True, "ended by signal 11", "python -m bitsandbytes",
    ),
    (
        lambda: gpu_machine(step=StepFacts(device="cuda", error="CUDA out of memory. Tried 2 GiB")),
        "doctor.nf4_step", True, "out of memory", "nvidia-smi",
    ),
    (
        lambda: gpu_machine(
            step=StepFacts(device="cuda", weight=0.09, forward=0.5, gradient=0.01, update=0.01)
        ),
        "doctor.nf4_wrong", True, "forward 0.5", "--force-reinstall",
    ),
    (
        lambda: gpu_machine(
            step=StepFacts(
                device="cuda", weight=0.09, forward=0.0, gradient=float("nan"), update=0.0
            )
        ),
        "doctor.nf4_wrong", True, "gradient nan", "--force-reinstall",
    ),
    (
        lambda: gpu_machine(versions={"torch": "2.12.1"}),
        "doctor.triton_missing", False, "Triton is not installed", "pip install triton",
    ),
    (
        lambda: gpu_machine(versions={}, system="Windows"),
        "doctor.triton_missing", False, "Triton is not installed", "triton-windows",
    ),
    (
        lambda: gpu_machine(c_compiler=None),
        "doctor.no_compiler", False, "no C compiler", "apt install gcc",
    ),
    (
        lambda: gpu_machine(
            triton=TritonFacts(error="main.c:4:10: fatal error: Python.h: No such file\nexit 1")
        ),
        "doctor.triton_broken", False, "Python.h is missing", "sudo apt install python3-dev",
    ),
    (
        lambda: gpu_machine(triton=TritonFacts(error="ImportError: libtriton.so: bad ELF")),
        "doctor.triton_broken", False, "libtriton.so: bad ELF", "--force-reinstall triton",
    ),
    (
        lambda: gpu_machine(triton=TritonFacts(version="3.7.1", is_right=False)),
        "doctor.triton_broken", False, "wrong result", "--force-reinstall triton",
    ),
    (
        lambda: gpu_machine(versions={"torch": "2.10.0", "triton": "3"}),
        "doctor.version_torch", True, "torch 2.10.0", '"torch>=2.11,<2.14"',
    ),
    (
        lambda: gpu_machine(versions={"torch": "2.14.0", "triton": "3"}),
        "doctor.version_torch", False, "torch 2.14.0", '"torch>=2.11,<2.14"',
    ),
    (
        lambda: gpu_machine(versions={"transformers": "5.5.1", "triton": "3"}),
        "doctor.version_transformers", True, "5.5.1", '"transformers>=5.17,<5.24"',
    ),
    (
        lambda: gpu_machine(versions={"transformers": "5.9.0", "triton": "3"}),
        "doctor.version_transformers", True, "5.9.0", '"transformers>=5.17,<5.24"',
    ),
    (
        lambda: gpu_machine(versions={"transformers": "5.12.0", "triton": "3"}),
        "doctor.version_transformers", False, "5.12.0", '"transformers>=5.17,<5.24"',
    ),
    (
        lambda: gpu_machine(versions={"transformers": "5.24.0.dev0", "triton": "3"}),
        "doctor.version_transformers", False, "5.24.0.dev0", '"transformers>=5.17,<5.24"',
    ),
    (
        lambda: gpu_machine(versions={"bitsandbytes": "0.49.1", "triton": "3"}),
        "doctor.version_bitsandbytes", True, "0.49.1", '"bitsandbytes>=0.50,<0.51"',
    ),
    (
        lambda: gpu_machine(versions={"peft": "0.18.0", "triton": "3"}),
        "doctor.version_peft", False, "peft 0.18.0", '"peft>=0.21"',
    ),
    (
        lambda: gpu_machine(
            gpu={"processes": (GpuProcess(pid=77, name="chrome", used_bytes=900 * MIB),)}
        ),
        "doctor.vram_held", False, "chrome (process 77) holds 900 MiB", "kill 77",
    ),
    (
        lambda: gpu_machine(
            gpu={"processes": (GpuProcess(pid=8, name="ollama.exe", used_bytes=GIB),)}
        ),
        "doctor.vram_held", False, "ollama", "ollama stop",
    ),
    (
        lambda: gpu_machine(
            system="Windows",
            gpu={"processes": (GpuProcess(pid=9, name="game.exe", used_bytes=GIB),)},
        ),
        "doctor.vram_held", False, "game.exe", "taskkill /PID 9",
    ),
    (
        lambda: gpu_machine(gpu={"driver_model": "WDDM"}),
        "doctor.spill", False, "main memory unasked", "Prefer No Sysmem Fallback",
    ),
    (
        lambda: gpu_machine(is_wsl=True),
        "doctor.spill", False, "main memory unasked", "Prefer No Sysmem Fallback",
    ),
    (
        lambda: gpu_machine(pinned_bytes=512 * MIB, is_wsl=True),
        "doctor.pinned_memory", False, "Only 512.0 MiB", "two pinned buffers",
    ),
    (
        lambda: gpu_machine(pinned_bytes=0),
        "doctor.pinned_memory", False, "Only 0 B", "Nothing to do",
    ),
    (
        lambda: gpu_machine(gpu={"pcie_lanes": 4}),
        "doctor.pcie_lanes", False, "uses 4 of 8 PCIe lanes", "slot next to the processor",
    ),
    (
        lambda: gpu_machine(gpu={"max_pcie_generation": 3}),
        "doctor.pcie_generation", False, "PCIe 3.0; it could do 4.0", "firmware",
    ),
    (
        lambda: gpu_machine(rates=dataclasses.replace(RATES, host_to_device_bytes_per_second=3e9)),
        "doctor.copy_rate", False, "reach 3.0 GB/s", "charger",
    ),
    (
        lambda: gpu_machine(gpu={"temperature_celsius": 88}),
        "doctor.temperature", False, "88 degrees", "nvidia-smi -pl",
    ),
    (
        lambda: gpu_machine(gpu={"slowed_by": ("heat",)}),
        "doctor.temperature", False, "slows down", "nvidia-smi -pl 86",
    ),
    (
        lambda: gpu_machine(gpu={"power_limit_watts": 60.0}),
        "doctor.power_limit", False, "60 W; 115 W is the default", "sudo nvidia-smi -pl 115",
    ),
    (
        lambda: gpu_machine(host_free_bytes=5 * GIB),
        "doctor.main_memory", False, "5.00 GiB of 32.00 GiB", "ps aux",
    ),
    (
        lambda: gpu_machine(host_free_bytes=GIB, system="Windows"),
        "doctor.main_memory", True, "1.00 GiB of 32.00 GiB", "tasklist",
    ),
    (
        lambda: gpu_machine(disk_free_bytes=12 * GIB),
        "doctor.disk", False, "12.00 GiB are free", "model.delete_download: true",
    ),
    (
        lambda: gpu_machine(disk_free_bytes=GIB),
        "doctor.disk", True, "1.00 GiB are free", "model.cache_dir",
    ),
    (
        lambda: gpu_machine(hub_free_bytes=9 * GIB),
        "doctor.hub_disk", False, "9.00 GiB are free for downloads", "export HF_HOME=",
    ),
    (
        lambda: gpu_machine(hub_free_bytes=9 * GIB, system="Windows"),
        "doctor.hub_disk", False, "huggingface/hub", "setx HF_HOME",
    ),
    (
        lambda: gpu_machine(disk_free_bytes=GIB, system="Windows"),
        "doctor.disk", True, "1.00 GiB are free", "dir /s",
    ),
    (
        lambda: gpu_machine(has_hf_token=False),
        "doctor.hf_token", False, "No Hugging Face token", "hf auth login",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "code", "is_fatal", "message", "fix"),
    FAULTS,
    ids=[f"{code}-{message}" for _, code, _, message, _ in FAULTS],
)
def test_a_fault_is_found_with_its_fix(
    make: Make, code: str, is_fatal: bool, message: str, fix: str
) -> None:
    facts = make()
    finding = _only(facts, code)
    assert message in finding.message
    assert fix in finding.fix
    assert finding.why
    assert (finding.severity == "error") == is_fatal
    assert Examination(facts=facts, findings=diagnose(facts)).can_train == (not is_fatal)


def test_every_code_of_the_checks_is_provoked() -> None:
    provoked = {code for _, code, _, _, _ in FAULTS}
    provoked |= {finding.code for finding in diagnose(gpu_machine())}
    provoked |= {finding.code for finding in diagnose(cpu_machine())}
    assert provoked == {
        "doctor.gpu", "doctor.cpu_only", "doctor.nvml_missing", "doctor.rates",
        "doctor.python_version", "doctor.driver_missing",
        "doctor.driver_old", "doctor.torch_missing", "doctor.torch_cpu_build",
        "doctor.torch_no_cuda", "doctor.torch_architecture", "doctor.capability",
        "doctor.no_bfloat16", "doctor.bitsandbytes_missing", "doctor.bitsandbytes_library",
        "doctor.nf4_step", "doctor.nf4_wrong", "doctor.nf4_step_ok", "doctor.triton_missing",
        "doctor.no_compiler", "doctor.triton_broken", "doctor.hub_disk",
        "doctor.version_torch", "doctor.version_transformers",
        "doctor.version_bitsandbytes", "doctor.version_peft", "doctor.vram_held", "doctor.spill",
        "doctor.pinned_memory", "doctor.pcie_lanes", "doctor.pcie_generation", "doctor.copy_rate",
        "doctor.copy_rate_ok", "doctor.temperature", "doctor.power_limit", "doctor.main_memory",
        "doctor.disk", "doctor.hf_token",
    }  # fmt: skip


def test_one_disk_is_reported_once() -> None:
    facts = gpu_machine(disk_free_bytes=9 * GIB, hub_free_bytes=9 * GIB)
    assert [finding.code for finding in _worse(facts)] == ["doctor.disk"]


def test_a_driver_that_serves_no_torch_is_not_answered_with_another_torch() -> None:
    nvml = dataclasses.replace(gpu_machine().nvml, cuda_version=(11, 4))
    assert "pip install" not in _only(gpu_machine(nvml=nvml), "doctor.driver_old").fix


def test_one_cause_is_reported_once() -> None:
    # Without torch neither bitsandbytes nor the step can work; the step says nothing more.
    facts = gpu_machine(
        torch=BROKEN_TORCH,
        bitsandbytes=BitsandbytesFacts(error="ModuleNotFoundError: torch"),
        step=StepFacts(device="cpu", error="ModuleNotFoundError: torch"),
    )
    codes = [finding.code for finding in _worse(facts)]
    assert codes == ["doctor.torch_missing", "doctor.bitsandbytes_missing"]


def test_the_worst_of_several_bad_ranges_is_named_once() -> None:
    findings = diagnose(gpu_machine(versions={"transformers": "5.5.0", "triton": "3"}))
    assert [f.code for f in findings].count("doctor.version_transformers") == 1


def test_minor_cuda_versions_fit_each_other() -> None:
    facts = gpu_machine()
    newer = gpu_machine(torch=torch_facts(facts, cuda_build="13.2"))
    assert _worse(newer) == []


def test_forward_compatible_kernels_count() -> None:
    facts = gpu_machine(gpu={"compute_capability": (12, 1)})
    assert _worse(facts) == []
    intermediate = torch_facts(facts, architectures=("sm_80", "compute_90"))
    assert _worse(gpu_machine(gpu={"compute_capability": (10, 0)}, torch=intermediate)) == []


def test_a_hidden_card_leaves_the_processor() -> None:
    facts = dataclasses.replace(cpu_machine(), nvml=gpu_machine().nvml, has_nvidia_card=None)
    assert "CUDA_VISIBLE_DEVICES" in _only(facts, "doctor.cpu_only").message


def test_a_card_of_an_unknown_name_is_judged_by_the_driver_alone() -> None:
    facts = gpu_machine(gpu={"name": "NVIDIA Something", "pcie_lanes": 4})
    assert "4 of 8" in _only(facts, "doctor.pcie_lanes").message
    assert not [f for f in diagnose(facts) if f.code == "doctor.pcie_generation"]


def test_silence_about_the_link_is_no_finding() -> None:
    gpu = {"pcie_lanes": None, "max_pcie_lanes": None, "max_pcie_generation": None}
    assert not [f for f in diagnose(gpu_machine(gpu=gpu)) if "pcie" in f.code or "copy" in f.code]


def test_an_unknown_driver_version_is_not_called_old() -> None:
    nvml = NvmlReading(driver_version="580.95.05", gpus=gpu_machine().nvml.gpus)
    assert _worse(gpu_machine(nvml=nvml)) == []
