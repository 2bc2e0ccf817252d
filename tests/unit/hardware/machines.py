"""Facts of machines, healthy until a test breaks one thing."""

from __future__ import annotations

import dataclasses
from typing import Any

from eightgig.hardware.facts import (
    BitsandbytesFacts,
    Facts,
    StepFacts,
    TorchFacts,
    TritonFacts,
)
from eightgig.hardware.nvml import Gpu, NvmlReading, read_nvml
from eightgig.hardware.probe import Rates
from eightgig.units import GIB
from tests.unit.hardware.fake_nvml import make_nvml

RATES = Rates(
    gemm_flops_per_second=26e12,
    memory_bytes_per_second=230e9,
    host_to_device_bytes_per_second=12.4e9,
    device_to_host_bytes_per_second=12.8e9,
    both_ways_bytes_per_second=13e9,
    copy_engines=1,
    is_measured=True,
)


def gpu_machine(gpu: dict[str, Any] | None = None, **changes: Any) -> Facts:
    """A Linux machine with an RTX 4060 and everything installed."""
    nvml = read_nvml(make_nvml())
    card = dataclasses.replace(nvml.gpus[0], **(gpu or {}))
    facts = Facts(
        system="Linux",
        is_wsl=False,
        python_version=(3, 12),
        nvml=dataclasses.replace(nvml, gpus=(card,)),
        gpu=card,
        has_nvidia_card=True,
        torch=TorchFacts(
            version="2.12.1+cu130",
            cuda_build="13.0",
            is_cuda_available=True,
            architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_120"),
        ),
        bitsandbytes=BitsandbytesFacts(
            version="0.50.2",
            library="/site-packages/bitsandbytes/libbitsandbytes_cuda130.so",
            available=("12.8", "13.0"),
            is_cuda_library=True,
        ),
        step=StepFacts(device="cuda", weight=0.092, forward=0.003, gradient=0.004, update=0.001),
        triton=TritonFacts(version="3.6.0", is_right=True),
        versions={
            "torch": "2.12.1+cu130",
            "transformers": "5.23.0",
            "bitsandbytes": "0.50.2",
            "triton": "3.6.0",
        },
        c_compiler="/usr/bin/gcc",
        host_total_bytes=32 * GIB,
        host_free_bytes=24 * GIB,
        pin_limit_bytes=28 * GIB,
        pinned_bytes=2 * GIB,
        rates=RATES,
        rates_error="",
        cache_dir="/home/someone/.cache/eightgig",
        disk_free_bytes=200 * GIB,
        hub_dir="/home/someone/.cache/huggingface/hub",
        hub_free_bytes=200 * GIB,
        has_hf_token=True,
    )
    return dataclasses.replace(facts, **changes)


def cpu_machine(**changes: Any) -> Facts:
    """A machine without a GPU."""
    facts = gpu_machine(
        nvml=NvmlReading(error="NVML Shared Library Not Found"),
        has_nvidia_card=False,
        torch=TorchFacts(version="2.13.0+cpu"),
        bitsandbytes=BitsandbytesFacts(version="0.50.2", library="libbitsandbytes_cpu.so"),
        step=StepFacts(device="cpu", weight=0.092, forward=0.0, gradient=0.0, update=1e-4),
        triton=None,
        pinned_bytes=None,
        rates=None,
    )
    return dataclasses.replace(facts, gpu=None, **changes)


def torch_facts(facts: Facts, **changes: Any) -> TorchFacts:
    """The machine's torch, changed."""
    return dataclasses.replace(facts.torch, **changes)


def card(**changes: Any) -> Gpu:
    """The machine's card, changed."""
    return dataclasses.replace(read_nvml(make_nvml()).gpus[0], **changes)
