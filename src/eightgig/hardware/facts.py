"""Everything the doctor looks at, gathered without judging.

What needs torch or bitsandbytes is asked of child processes: one that crashes, hangs or is killed
becomes an error text.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightgig.config import default_cache_dir, expand_home
from eightgig.hardware.nvml import Gpu, NvmlReading, read_nvml, visible_gpu
from eightgig.hardware.probe import (
    Rates,
    disk_free_bytes,
    host_memory,
    is_wsl,
    pin_limit_bytes,
)
from eightgig.run import from_json, installed_versions
from eightgig.units import GIB

_PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "triton",
    "triton-windows",
    "safetensors",
    "huggingface-hub",
    "peft",
    "trl",
    "accelerate",
)
_NVIDIA_VENDOR = "0x10de"
_PIN_PROBE_BYTES = 2 * GIB
_IMPORT_SECONDS = 180.0
# Messages of bitsandbytes have up to 20.
_LAST_LINES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchFacts:
    """What torch said; `error` where it could not be imported or found no device.

    Attributes:
        version: As it reports it, None where it cannot be imported.
        cuda_build: CUDA version it was built for, None for a CPU-only build.
        is_cuda_available: Whether it can use a GPU.
        architectures: `sm_80` and so on, that its kernels were built for.
        error: What went wrong.
    """

    version: str | None = None
    cuda_build: str | None = None
    is_cuda_available: bool = False
    architectures: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BitsandbytesFacts:
    """What bitsandbytes said.

    Attributes:
        version: None where it cannot be imported.
        library: Path of the native library it loaded, empty where none.
        wanted: CUDA version of the library it looked for and did not find.
        available: CUDA versions of the libraries it brings.
        is_cuda_library: Whether the loaded library has GPU kernels.
        error: What went wrong.
    """

    version: str | None = None
    library: str = ""
    wanted: str = ""
    available: tuple[str, ...] = ()
    is_cuda_library: bool = False
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """The real NF4 training step: relative errors against float32, or why there are none.

    Attributes:
        device: Where it ran.
        weight, forward, gradient, update: See `bench.nf4_step`.
        error: What went wrong.
    """

    device: str
    weight: float | None = None
    forward: float | None = None
    gradient: float | None = None
    update: float | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonFacts:
    """A kernel compiled and run.

    Attributes:
        version: As it reports it, None where no kernel was run.
        is_right: Whether the result was.
        error: What went wrong.
    """

    version: str | None = None
    is_right: bool = False
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """A machine as the doctor sees it.

    Attributes:
        system: `Linux`, `Windows` or `Darwin`.
        is_wsl: Linux inside Windows.
        python_version: (major, minor).
        nvml: Driver and cards.
        gpu: The card that CUDA would use.
        has_nvidia_card: Whether the bus shows a card of NVIDIA, driver or not; None: unknown.
        torch, bitsandbytes, step: From child processes.
        triton: Likewise; None where there is no GPU for it, or no Triton.
        versions: Installed packages that matter.
        c_compiler: Path of the compiler that Triton would use, None where there is none.
        host_total_bytes, host_free_bytes: Main memory.
        pin_limit_bytes: What the system should let be pinned.
        pinned_bytes: What it did, up to 2 GiB; None where it was not tried.
        rates: Measured speeds, None where not measured.
        rates_error: Why they could not be.
        cache_dir, disk_free_bytes: Where prepared weights go, and the room there.
        hub_dir, hub_free_bytes: Where downloads go, and the room there.
        has_hf_token: Whether a Hugging Face token is set; the token itself is never read.
    """

    system: str
    is_wsl: bool
    python_version: tuple[int, int]
    nvml: NvmlReading
    gpu: Gpu | None
    has_nvidia_card: bool | None
    torch: TorchFacts
    bitsandbytes: BitsandbytesFacts
    step: StepFacts
    triton: TritonFacts | None
    versions: Mapping[str, str]
    c_compiler: str | None
    host_total_bytes: int
    host_free_bytes: int
    pin_limit_bytes: int
    pinned_bytes: int | None
    rates: Rates | None
    rates_error: str
    cache_dir: str
    disk_free_bytes: int
    hub_dir: str
    hub_free_bytes: int
    has_hf_token: bool

    @property
    def is_windows_memory(self) -> bool:
        """Whether Windows manages the card's memory, which spills instead of failing."""
        has_wddm = self.gpu is not None and self.gpu.driver_model == "WDDM"
        return has_wddm or self.is_wsl


@dataclass(frozen=True, slots=True)
class Answer:
    """What a child process said: a JSON value, or an error text."""

    value: Any
    error: str


def gather_facts(cache_dir: Path | None = None, *, measures_rates: bool = True) -> Facts:
    """Look at this machine; takes 10 to 40 seconds, most of it importing torch.

    Args:
        cache_dir: Where prepared weights go; None: the default.
        measures_rates: Whether GEMM and copy rates of a GPU are measured.
    """
    cache_dir = cache_dir or default_cache_dir()
    nvml = read_nvml()
    gpu = visible_gpu(nvml)
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(ask_child, ("torch", "bitsandbytes"))
        torch, bitsandbytes = read_torch(next(answers)), read_bitsandbytes(next(answers))
    uses_gpu = gpu is not None and torch.is_cuda_available
    device = "cuda" if uses_gpu else "cpu"
    total, free = host_memory()
    versions, hub = installed_versions(_PACKAGES), _hub_folder()
    measured = ask_child("rates", "cuda") if uses_gpu and measures_rates else Answer(None, "")
    return Facts(
        system=platform.system(),
        is_wsl=is_wsl(),
        python_version=(sys.version_info[0], sys.version_info[1]),
        nvml=nvml,
        gpu=gpu,
        has_nvidia_card=_has_nvidia_card(),
        torch=torch,
        bitsandbytes=bitsandbytes,
        step=read_step(ask_child("nf4_step", device), device),
        triton=_run_triton(versions) if uses_gpu else None,
        versions=versions,
        c_compiler=_c_compiler(),
        host_total_bytes=total,
        host_free_bytes=free,
        pin_limit_bytes=pin_limit_bytes(total),
        pinned_bytes=ask_child("pinned", str(_PIN_PROBE_BYTES)).value if uses_gpu else None,
        rates=None if measured.value is None else from_json(Rates, measured.value),
        rates_error=measured.error,
        cache_dir=str(cache_dir),
        disk_free_bytes=disk_free_bytes(cache_dir),
        hub_dir=str(hub),
        hub_free_bytes=disk_free_bytes(hub),
        has_hf_token=_has_hf_token(),
    )


def ask_child(question: str, *arguments: str, command: Sequence[str] | None = None) -> Answer:
    """Ask `bench` in a child process.

    Args:
        question: One of the questions of `bench.main`.
        arguments: What it needs.
        command: Stands in for the command line, question and arguments included.
    """
    if command is None:
        command = (sys.executable, "-m", "eightgig.hardware.bench", question, *arguments)
    try:
        child = subprocess.run(  # noqa: S603 - our own interpreter and module
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, f"no answer within {_IMPORT_SECONDS:.0f} s")
    except OSError as error:
        return Answer(None, f"the process did not start: {error}")
    if child.returncode != 0:
        return Answer(None, _describe_end(child.returncode, child.stderr))
    try:
        # Libraries write to standard output, too; the answer is the last line.
        return Answer(json.loads(child.stdout.strip().splitlines()[-1]), "")
    except (IndexError, json.JSONDecodeError):
        return Answer(None, f"an unreadable answer: {child.stdout[-200:]!r}")


def _describe_end(code: int, stderr: str) -> str:
    last = "\n".join(stderr.strip().splitlines()[-_LAST_LINES:])
    if code < 0:
        return f"the process was ended by signal {-code}. {last}".strip()
    return last or f"the process ended with code {code}"


def read_torch(answer: Answer) -> TorchFacts:
    """The record of an answer to `torch`."""
    return TorchFacts(error=answer.error) if answer.error else from_json(TorchFacts, answer.value)


def read_bitsandbytes(answer: Answer) -> BitsandbytesFacts:
    """The record of an answer to `bitsandbytes`."""
    if answer.error:
        return BitsandbytesFacts(error=answer.error)
    return from_json(BitsandbytesFacts, answer.value)


def read_step(answer: Answer, device: str) -> StepFacts:
    """The record of an answer to `nf4_step`."""
    if answer.error:
        return StepFacts(device=device, error=answer.error)
    return from_json(StepFacts, {"device": device, **answer.value})


def read_triton(answer: Answer) -> TritonFacts:
    """The record of an answer to `triton`."""
    return TritonFacts(error=answer.error) if answer.error else from_json(TritonFacts, answer.value)


def has_triton(versions: Mapping[str, str]) -> bool:
    """Whether Triton is among the installed packages, under one of its names."""
    return "triton" in versions or "triton-windows" in versions


def _run_triton(versions: Mapping[str, str]) -> TritonFacts | None:
    return read_triton(ask_child("triton", "cuda")) if has_triton(versions) else None


def _c_compiler() -> str | None:
    names = [os.environ.get("CC", ""), "gcc", "cc", "clang", "cl"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _has_nvidia_card() -> bool | None:
    """Whether the PCI bus shows a display device of NVIDIA; None where there is no way to see."""
    vendors = list(Path("/sys/bus/pci/devices").glob("*/vendor"))
    if not vendors:
        return None
    return any(
        _read(path) == _NVIDIA_VENDOR and _read(path.with_name("class")).startswith("0x03")
        for path in vendors
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _has_hf_token() -> bool:
    """Whether huggingface_hub would find a token. Its text is not read."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    path = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token")
    try:
        return path.is_file() and path.stat().st_size > 0
    except PermissionError:  # huggingface_hub could not read it, either
        return False


def _hub_folder() -> Path:
    """Where huggingface_hub keeps downloads; the library itself is not imported."""
    return Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub")


def _hub_home() -> Path:
    home = os.environ.get("HF_HOME")
    if home:
        return expand_home(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
