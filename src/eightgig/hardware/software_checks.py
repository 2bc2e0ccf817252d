"""Judging driver, torch, bitsandbytes, Triton and versions; each check reads facts, no machine."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from eightgig.errors import Finding, Severity
from eightgig.hardware.facts import Facts, has_triton
from eightgig.hardware.nvml import NVML_PACKAGE

# First driver of the branch that serves each major CUDA version (NVIDIA's compatibility table).
_DRIVER_FOR_CUDA = {11: 450, 12: 525, 13: 580}
_TORCH_INDEX = "https://download.pytorch.org/whl/"
_TORCH = '"torch>=2.11,<2.14"'
_BITSANDBYTES = '"bitsandbytes>=0.50,<0.51"'
_REINSTALL = "python -m pip install --force-reinstall"
_NEWEST_CUDA_TAGS = {13: "cu130", 12: "cu126"}
_OLDEST_CAPABILITY = (7, 5)
_PYTHON_RANGE = ((3, 11), (3, 13))
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)(?::|$)")
_MESSAGE_CHARACTERS = 240
# Quantising normal numbers to NF4 loses 9.2 %; arithmetic in 16 bit less than 2 %.
_LARGEST_ERRORS = {"weight": 0.12, "forward": 0.02, "gradient": 0.03, "update": 0.05}


def check_python(facts: Facts) -> Iterator[Finding]:
    """Whether this Python is one that the dependencies support."""
    low, high = _PYTHON_RANGE
    if not low <= facts.python_version <= high:
        have = ".".join(map(str, facts.python_version))
        yield Finding(
            severity="error",
            code="doctor.python_version",
            message=f"Python {have} runs here.",
            why=f"Python {low[0]}.{low[1]} to {high[0]}.{high[1]} is supported and tested.",
            fix="uv venv --python 3.12 && uv pip install eightgig",
        )


def check_driver(facts: Facts) -> Iterator[Finding]:
    """Whether there is a driver, and one that serves torch's CUDA version."""
    if facts.nvml.error.startswith(NVML_PACKAGE):
        yield Finding(
            severity="warning" if facts.has_nvidia_card is False else "error",
            code="doctor.nvml_missing",
            message=f"The driver cannot be asked: {facts.nvml.error}",
            why="Whether there is a GPU, and what of it is free, is known through this package.",
            fix=f"python -m pip install --force-reinstall {NVML_PACKAGE}",
        )
        return
    if facts.nvml.driver_version is None:
        if facts.has_nvidia_card:
            was_updated = "mismatch" in facts.nvml.error.lower()
            yield Finding(
                severity="error",
                code="doctor.driver_missing",
                message=f"There is an NVIDIA card but no working driver ({facts.nvml.error}).",
                why="The driver was updated under the running system."
                if was_updated
                else "Without the driver nothing can use the card.",
                fix="sudo reboot" if was_updated else _install_driver(facts, 580),
            )
        return
    build = _cuda_major(facts.torch.cuda_build)
    served = facts.nvml.cuda_version
    if build is not None and served is not None and served[0] < build:
        wanted = _DRIVER_FOR_CUDA.get(build, 580)
        fix = _install_driver(facts, wanted)
        if served[0] in _NEWEST_CUDA_TAGS:
            fix += f"   or: {_reinstall_torch(_NEWEST_CUDA_TAGS[served[0]])}"
        yield Finding(
            severity="error",
            code="doctor.driver_old",
            message=(
                f"Driver {facts.nvml.driver_version} serves CUDA up to {served[0]}.{served[1]}; "
                f"this torch was built for CUDA {facts.torch.cuda_build}."
            ),
            why=f"CUDA {build} needs driver {wanted} or newer.",
            fix=fix,
        )


def _install_driver(facts: Facts, version: int) -> str:
    if facts.is_wsl or facts.system == "Windows":
        return f"Install driver {version} or newer in Windows: https://www.nvidia.com/drivers"
    return f"sudo apt install nvidia-driver-{version} && sudo reboot"


def _reinstall_torch(tag: str) -> str:
    return f"{_REINSTALL} {_TORCH} --index-url {_TORCH_INDEX}{tag}"


def _unset(facts: Facts, variable: str) -> str:
    return f"Remove-Item Env:{variable}" if facts.system == "Windows" else f"unset {variable}"


def _fitting_torch(facts: Facts) -> str:
    """How to get a torch that this driver serves, and a driver first where it serves none.

    With a card it comes from torch's own index: what pip has by itself is built for processors on
    Windows, and elsewhere for the newest drivers alone.
    """
    if facts.gpu is None:
        return f"{_REINSTALL} {_TORCH}"
    major = (facts.nvml.cuda_version or (13, 0))[0]
    if major >= min(_NEWEST_CUDA_TAGS):
        return _reinstall_torch(_NEWEST_CUDA_TAGS.get(major, _NEWEST_CUDA_TAGS[13]))
    return f"{_install_driver(facts, 580)}   then: {_reinstall_torch(_NEWEST_CUDA_TAGS[13])}"


def _cuda_major(build: str | None) -> int | None:
    return None if build is None else int(build.split(".", maxsplit=1)[0])


def check_torch(facts: Facts) -> Iterator[Finding]:
    """Whether torch imports, was built for GPUs, sees this one and has kernels for it."""
    torch, gpu = facts.torch, facts.gpu
    if torch.version is None:
        yield Finding(
            severity="error",
            code="doctor.torch_missing",
            message=f"torch cannot be imported: {_last_line(torch.error)}",
            why="Everything is computed with it.",
            fix=_fitting_torch(facts),
        )
        return
    if gpu is None:
        return
    if torch.cuda_build is None:
        yield Finding(
            severity="error",
            code="doctor.torch_cpu_build",
            message=f"torch {torch.version} was built for processors only; {gpu.name} is idle.",
            why="It came from an index without GPU builds, or the driver was missing then.",
            fix=_fitting_torch(facts),
        )
    elif not torch.is_cuda_available:
        cause = _last_line(torch.error) or "it gives no reason"
        yield Finding(
            severity="error",
            code="doctor.torch_no_cuda",
            message=f"torch {torch.version} for CUDA {torch.cuda_build} cannot use {gpu.name}: "
            f"{cause}",
            why="Driver and torch do not fit, or CUDA_VISIBLE_DEVICES hides the card.",
            fix=f"{_unset(facts, 'CUDA_VISIBLE_DEVICES')}; nvidia-smi; {_fitting_torch(facts)}",
        )
    elif torch.architectures and not _has_kernels(torch.architectures, gpu.compute_capability):
        major, minor = gpu.compute_capability
        yield Finding(
            severity="error",
            code="doctor.torch_architecture",
            message=f"torch {torch.version} has no kernels for sm_{major}{minor} ({gpu.name}).",
            why=f"It was built for {', '.join(torch.architectures)}.",
            fix=_fitting_torch(facts),
        )


def _has_kernels(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Kernels of one major version run on every later minor one; `compute_` ones on all later."""
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = re.match(r"\d+", number)
        if digits is None:
            continue
        built = (int(digits.group()[:-1]), int(digits.group()[-1]))
        if kind == "compute" and built <= capability:
            return True
        if kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
    return False


def check_capability(facts: Facts) -> Iterator[Finding]:
    """Whether the card is new enough, and multiplies bfloat16."""
    gpu = facts.gpu
    if gpu is None:
        return
    shown = ".".join(map(str, gpu.compute_capability))
    if gpu.compute_capability < _OLDEST_CAPABILITY:
        yield Finding(
            severity="error",
            code="doctor.capability",
            message=f"{gpu.name} has compute capability {shown}.",
            why="The kernels need tensor cores: 7.5 (RTX 20) is the least.",
            fix="Use an RTX 20 or newer card, or set memory.device: cpu.",
        )
    elif gpu.compute_capability < (8, 0):
        yield Finding(
            severity="note",
            code="doctor.no_bfloat16",
            message=f"{gpu.name} (compute capability {shown}) has no fast bfloat16.",
            why="Layers compute in float16 with a float32 residual stream; the gradients of a step "
            "are divided by its loss tokens in float32.",
            fix="Nothing to do.",
        )


def check_bitsandbytes(facts: Facts) -> Iterator[Finding]:
    """Whether bitsandbytes imports and found the library for this device."""
    found = facts.bitsandbytes
    reinstall = f"{_REINSTALL} --no-deps {_BITSANDBYTES}"
    if found.version is None:
        yield Finding(
            severity="error",
            code="doctor.bitsandbytes_missing",
            message=f"bitsandbytes cannot be imported: {_last_line(found.error)}",
            why="It quantises to NF4 and brings the 8-bit optimizers.",
            fix=reinstall,
        )
    elif facts.gpu is not None and facts.torch.is_cuda_available and not found.is_cuda_library:
        wanted = found.wanted or facts.torch.cuda_build or "unknown"
        brought = ", ".join(found.available) or "none"
        yield Finding(
            severity="error",
            code="doctor.bitsandbytes_library",
            message=(
                f"bitsandbytes {found.version} loaded no GPU library: it wanted the one for CUDA "
                f"{wanted} and brings {brought}. {_last_line(found.error)}".strip()
            ),
            why="Without it neither NF4 nor the 8-bit optimizers run on the card.",
            fix=f"{_unset(facts, 'BNB_CUDA_VERSION')}; {reinstall}",
        )


def check_step(facts: Facts) -> Iterator[Finding]:
    """Whether a real NF4 forward, backward and 8-bit step agrees with float32."""
    step = facts.step
    if step.error:
        if facts.torch.version is None or facts.bitsandbytes.version is None:
            return
        yield Finding(
            severity="error",
            code="doctor.nf4_step",
            message=f"A real NF4 training step failed on {step.device}: {_last_line(step.error)}",
            why="Training takes thousands of such steps.",
            fix=_mend_step(step.error),
        )
        return
    errors = {name: value for name in _LARGEST_ERRORS if (value := getattr(step, name)) is not None}
    # A comparison that NaN fails, too.
    wrong = [name for name, value in errors.items() if not value <= _LARGEST_ERRORS[name]]
    shown = ", ".join(f"{name} {value:.2g}" for name, value in errors.items())
    if wrong:
        yield Finding(
            severity="error",
            code="doctor.nf4_wrong",
            message=f"A real NF4 training step on {step.device} is off: {shown} (relative).",
            why=f"{', '.join(wrong)} should be within "
            + ", ".join(f"{_LARGEST_ERRORS[name]:.2g}" for name in wrong)
            + " of the float32 result.",
            fix=f"{_fitting_torch(facts)}   then: {_REINSTALL} --no-deps {_BITSANDBYTES}",
        )
    else:
        yield Finding(
            severity="note",
            code="doctor.nf4_step_ok",
            message=f"A real NF4 training step on {step.device} is right: {shown} (relative).",
            why="Quantising, forward, backward and the 8-bit optimizer agree with float32.",
            fix="Nothing to do.",
        )


def _mend_step(error: str) -> str:
    if "out of memory" in error.lower():
        return "Close what holds the card's memory (nvidia-smi lists it); then: eightgig doctor"
    return "Mend what is reported above; what bitsandbytes says itself: python -m bitsandbytes"


def check_triton(facts: Facts) -> Iterator[Finding]:
    """Whether the fused kernels can be compiled."""
    if facts.gpu is None or not facts.torch.is_cuda_available:
        return
    is_windows = facts.system == "Windows"
    package = "triton-windows" if is_windows else "triton"
    delete = "Remove-Item -Recurse -Force" if is_windows else "rm -rf"
    if not has_triton(facts.versions):
        yield Finding(
            severity="warning",
            code="doctor.triton_missing",
            message="Triton is not installed.",
            why="The fused kernels are written in it; plain PyTorch takes more memory and time.",
            fix=f"python -m pip install {package}",
        )
    elif facts.c_compiler is None and not is_windows:
        yield Finding(
            severity="warning",
            code="doctor.no_compiler",
            message="There is no C compiler.",
            why="Triton compiles a small launcher with it before the first kernel runs.",
            fix="sudo apt install gcc",
        )
    elif facts.triton is not None and not facts.triton.is_right:
        error = facts.triton.error
        lacks_headers = "Python.h" in error
        yield Finding(
            severity="warning",
            code="doctor.triton_broken",
            message="Triton compiles no kernel here: "
            + ("Python.h is missing." if lacks_headers else _last_line(error) or "wrong result."),
            why="The fused kernels are written in it; plain PyTorch takes more memory and time.",
            fix="sudo apt install python3-dev"
            if lacks_headers
            else f"{delete} ~/.triton; {_REINSTALL} {package}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _BadVersion:
    """Releases of a package, from `first` up to but without `end`, and what is wrong with them.

    `fix` is what to install instead; which torch that is depends on the card.
    """

    package: str
    first: tuple[int, ...]
    end: tuple[int, ...]
    severity: Severity
    why: str
    fix: str = ""


_TRANSFORMERS = '"transformers>=5.17,<5.24"'
_ALWAYS = (10**6,)
_BAD_VERSIONS = (
    _BadVersion(
        package="torch", first=(0,), end=(2, 11), severity="error",
        why="Products of bfloat16 with float32 sums came with torch 2.11.",
    ),
    _BadVersion(
        package="torch", first=(2, 14), end=_ALWAYS, severity="warning",
        why="Newer than the tested releases; private attention operators may have changed.",
    ),
    _BadVersion(
        package="transformers", first=(5, 5, 0), end=(5, 5, 2), severity="error",
        why="Gemma 4 E2B and E4B lose their shared keys and values without a cache.",
        fix=_TRANSFORMERS,
    ),
    _BadVersion(
        package="transformers", first=(0,), end=(5, 10), severity="error",
        why="Gemma 4 12B (gemma4_unified) is not known yet.",
        fix=_TRANSFORMERS,
    ),
    _BadVersion(
        package="transformers", first=(5, 10), end=(5, 17), severity="warning",
        why="Older than the tested releases: templates and tokenizers may render differently.",
        fix=_TRANSFORMERS,
    ),
    _BadVersion(
        package="transformers", first=(5, 24), end=_ALWAYS, severity="warning",
        why="Newer than the tested releases.",
        fix=_TRANSFORMERS,
    ),
    _BadVersion(
        package="bitsandbytes", first=(0,), end=(0, 50), severity="error",
        why="Its NF4 kernels and libraries differ from the format that is written.",
        fix=_BITSANDBYTES,
    ),
    _BadVersion(
        package="bitsandbytes", first=(0, 51), end=_ALWAYS, severity="warning",
        why="Newer than the tested releases.",
        fix=_BITSANDBYTES,
    ),
    _BadVersion(
        package="peft", first=(0,), end=(0, 21), severity="warning",
        why="Adapters of gemma4_unified do not load there.",
        fix='"peft>=0.21"',
    ),
)  # fmt: skip


def check_versions(facts: Facts) -> Iterator[Finding]:
    """Whether a package has a release that is known to be bad; the worst of each package."""
    reported: set[str] = set()
    for bad in _BAD_VERSIONS:
        installed = facts.versions.get(bad.package)
        if installed is None or bad.package in reported:
            continue
        if bad.first <= _version(installed) < bad.end:
            reported.add(bad.package)
            yield Finding(
                severity=bad.severity,
                code=f"doctor.version_{bad.package}",
                message=f"{bad.package} {installed} is installed.",
                why=bad.why,
                fix=_fitting_torch(facts)
                if bad.package == "torch"
                else f"python -m pip install {bad.fix}",
            )


def _version(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: `2.13.0+cpu` is (2, 13, 0)."""
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else (0,)


def _last_line(text: str) -> str:
    """The last line of `text`, or, where a message of several lines ends it, its beginning."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if _EXCEPTION.match(line)]
    said = lines[starts[-1] if starts else -1 :]
    return textwrap.shorten(" ".join(said), _MESSAGE_CHARACTERS, placeholder=" ...")
