"""Judging memory, links, heat, disk and who holds the card; each check reads facts, no machine."""

from __future__ import annotations

from collections.abc import Iterator

from eightgig.errors import Finding
from eightgig.hardware.card_table import card_of_gpu, link_bytes_per_second
from eightgig.hardware.facts import Facts
from eightgig.hardware.nvml import GpuProcess
from eightgig.units import GIB, MIB, format_bytes

_HELD_BYTES = 256 * MIB
_SLOW_LINK_RATIO = 0.6
_HOT_CELSIUS = 83
_LOW_POWER_RATIO = 0.75
_NO_DISK_BYTES = 2 * GIB
_LITTLE_DISK_BYTES = 30 * GIB
_NO_RAM_BYTES = 2 * GIB
_LITTLE_RAM_BYTES = 8 * GIB


def check_device(facts: Facts) -> Iterator[Finding]:
    """What will compute: the card, or the processor and what that is good for."""
    gpu = facts.gpu
    if gpu is not None:
        shown = ".".join(map(str, gpu.compute_capability))
        free, total = format_bytes(gpu.free_bytes), format_bytes(gpu.total_bytes)
        yield Finding(
            severity="note",
            code="doctor.gpu",
            message=f"{gpu.name}: {free} of {total} free, compute capability {shown}, driver "
            f"{facts.nvml.driver_version}, torch {facts.torch.version or 'not usable'} for "
            f"{'CUDA ' + facts.torch.cuda_build if facts.torch.cuda_build else 'no GPU'}.",
            why="Training computes here.",
            fix="Nothing to do.",
        )
    elif not facts.has_nvidia_card:
        cause = facts.nvml.error or "CUDA_VISIBLE_DEVICES hides every card"
        yield Finding(
            severity="note",
            code="doctor.cpu_only",
            message=f"No NVIDIA GPU is usable ({cause}).",
            why="On the processor the same engine computes in float32: `eightgig demo`, `check`, "
            "`plan` and models of up to about 0.5 billion parameters work; a Gemma 4 takes days.",
            fix='eightgig demo   (or plan for a card: eightgig plan --vram "RTX 4060" ...)',
        )


def check_memory_holders(facts: Facts) -> Iterator[Finding]:
    """Which programs hold the card's memory."""
    if facts.gpu is None:
        return
    for process in facts.gpu.processes:
        if process.used_bytes < _HELD_BYTES:
            continue
        yield Finding(
            severity="warning",
            code="doctor.vram_held",
            message=f"{process.name} (process {process.pid}) holds "
            f"{process.used_bytes / MIB:.0f} MiB of {facts.gpu.name}.",
            why="What others hold is subtracted from the budget; what they take later can end a "
            "run.",
            fix=_release(process, is_windows=facts.system == "Windows"),
        )


def _release(process: GpuProcess, *, is_windows: bool) -> str:
    if "ollama" in process.name.lower():
        return "ollama ps, then: ollama stop MODEL"
    if is_windows:
        return f"Close it, or: taskkill /PID {process.pid}"
    return f"Close it, or: kill {process.pid}"


def check_spill(facts: Facts) -> Iterator[Finding]:
    """Whether the driver may move the card's memory to main memory instead of failing."""
    if facts.gpu is None or not facts.is_windows_memory:
        return
    yield Finding(
        severity="warning",
        code="doctor.spill",
        message="Windows manages the card's memory and can move it to main memory unasked.",
        why="A run that spills goes on 3 to 6 times slower. The allocator's cap prevents that for "
        "our own memory, not for other programs'.",
        fix="NVIDIA Control Panel > Manage 3D settings > CUDA - Sysmem Fallback Policy > Prefer No "
        "Sysmem Fallback",
    )


def check_pinned_memory(facts: Facts) -> Iterator[Finding]:
    """Whether enough main memory can be pinned for copies beside the computation."""
    if facts.pinned_bytes is not None and facts.pinned_bytes < 2 * GIB:
        fix = "Nothing to do: weights are copied through two pinned buffers instead."
        if facts.is_wsl:
            fix = "Train in Windows or Linux itself, or leave it: two pinned buffers are used."
        yield Finding(
            severity="warning",
            code="doctor.pinned_memory",
            message=f"Only {format_bytes(facts.pinned_bytes)} of main memory could be pinned.",
            why="From memory that is not pinned, copies reach about 8 GB/s and need a thread.",
            fix=fix,
        )


def check_link(facts: Facts) -> Iterator[Finding]:
    """Whether the PCIe link is as wide and as fast as card and board allow."""
    gpu = facts.gpu
    if gpu is None:
        return
    card = card_of_gpu(gpu.name, gpu.total_bytes)
    lanes, most = gpu.pcie_lanes, gpu.max_pcie_lanes
    expected_lanes = min(most, card.pcie_lanes) if most and card else most
    if lanes and expected_lanes and lanes < expected_lanes:
        yield Finding(
            severity="warning",
            code="doctor.pcie_lanes",
            message=f"{gpu.name} uses {lanes} of {expected_lanes} PCIe lanes.",
            why="Layers reach the card more slowly than they could.",
            fix="Put the card into the slot next to the processor, and empty M.2 slots that share "
            "its lanes; check with: nvidia-smi -q -d PERFORMANCE,POWER | grep -i width",
        )
    generation = gpu.max_pcie_generation
    if generation and card and generation < card.pcie_generation:
        yield Finding(
            severity="note",
            code="doctor.pcie_generation",
            message=f"The board runs the card at PCIe {generation}.0; it could do "
            f"{card.pcie_generation}.0.",
            why="Copies take longer; the plan counts with the link as it is.",
            fix="Set the slot to its newest generation in the firmware, if the board has it.",
        )
    if facts.rates_error:
        yield Finding(
            severity="warning",
            code="doctor.rates",
            message=f"Speeds could not be measured: {facts.rates_error.splitlines()[-1]}",
            why="Training measures them, too, before it plans.",
            fix="Close what holds the card (nvidia-smi lists it), then: eightgig doctor",
        )
    yield from _check_copy_rate(facts, generation, lanes)


def _check_copy_rate(facts: Facts, generation: int | None, lanes: int | None) -> Iterator[Finding]:
    if facts.rates is None or not generation or not lanes or facts.gpu is None:
        return
    is_laptop = "laptop" in facts.gpu.name.lower()
    expected = link_bytes_per_second(generation, lanes, is_laptop=is_laptop)
    measured = facts.rates.host_to_device_bytes_per_second
    back = facts.rates.device_to_host_bytes_per_second
    text = (
        f"Copies to the card reach {measured / 1e9:.1f} GB/s, back {back / 1e9:.1f}, both ways "
        f"{facts.rates.both_ways_bytes_per_second / 1e9:.1f} ({facts.rates.copy_engines} copy "
        f"engine{'s' if facts.rates.copy_engines > 1 else ''}); PCIe {generation}.0 x{lanes} "
        f"allows about {expected / 1e9:.1f}."
    )
    if measured < _SLOW_LINK_RATIO * expected:
        yield Finding(
            severity="warning",
            code="doctor.copy_rate",
            message=text,
            why="Streamed layers wait for the link.",
            fix="On a laptop plug in the charger and choose the performance mode; elsewhere set "
            "PCIe power saving (ASPM) off in the firmware.",
        )
    else:
        yield Finding(
            severity="note",
            code="doctor.copy_rate_ok",
            message=text,
            why="Streamed layers are hidden behind the computation at this rate.",
            fix="Nothing to do.",
        )


def check_heat_and_power(facts: Facts) -> Iterator[Finding]:
    """Whether heat or a power limit slows the card."""
    gpu = facts.gpu
    if gpu is None:
        return
    temperature = gpu.temperature_celsius
    if "heat" in gpu.slowed_by or (temperature is not None and temperature >= _HOT_CELSIUS):
        yield Finding(
            severity="warning",
            code="doctor.temperature",
            message=f"{gpu.name} is at {temperature or 'unknown'} degrees Celsius"
            + (" and slows down because of it." if "heat" in gpu.slowed_by else "."),
            why="A card that is hot before training slows down during a night of it.",
            fix="Clean the fans, raise the laptop, or cap the power: sudo nvidia-smi -pl "
            f"{int(_LOW_POWER_RATIO * (gpu.default_power_limit_watts or 120))}",
        )
    limit, default = gpu.power_limit_watts, gpu.default_power_limit_watts
    if limit and default and limit < _LOW_POWER_RATIO * default:
        yield Finding(
            severity="warning",
            code="doctor.power_limit",
            message=f"The power limit is {limit:.0f} W; {default:.0f} W is the default.",
            why="Speed falls with the power limit.",
            fix=f"sudo nvidia-smi -pl {default:.0f}",
        )


def check_main_memory(facts: Facts) -> Iterator[Finding]:
    """Whether enough main memory is free."""
    free = facts.host_free_bytes
    if free >= _LITTLE_RAM_BYTES:
        return
    is_none = free < _NO_RAM_BYTES
    yield Finding(
        severity="error" if is_none else "warning",
        code="doctor.main_memory",
        message=f"{format_bytes(free)} of {format_bytes(facts.host_total_bytes)} main memory are "
        "free.",
        why="Weights wait in main memory: about 6 GiB for E2B, 13 GiB for 12B. Less is possible by "
        "mapping them from the disk, which is slower.",
        fix="Close browsers and other programs; see what holds it with: "
        + ("tasklist" if facts.system == "Windows" else "ps aux --sort=-rss | head"),
    )


def check_disk(facts: Facts) -> Iterator[Finding]:
    """Whether prepared weights will fit where the cache is, and downloads where theirs is."""
    free, is_windows = facts.disk_free_bytes, facts.system == "Windows"
    if free < _LITTLE_DISK_BYTES:
        yield Finding(
            severity="error" if free < _NO_DISK_BYTES else "warning",
            code="doctor.disk",
            message=f"{format_bytes(free)} are free for {facts.cache_dir}.",
            why="A download takes 10 GiB (E2B) to 24 GiB (12B), its prepared form 6 to 8 GiB.",
            fix="Set model.cache_dir to a folder on another disk and model.delete_download: true; "
            f"see what fills this one with: {_fillers(facts.cache_dir, is_windows=is_windows)}",
        )
    free = facts.hub_free_bytes
    if free < _LITTLE_DISK_BYTES and free != facts.disk_free_bytes:
        yield Finding(
            severity="warning",
            code="doctor.hub_disk",
            message=f"{format_bytes(free)} are free for downloads in {facts.hub_dir}.",
            why="A checkpoint takes 10 GiB (E2B) to 24 GiB (12B) before it is prepared.",
            fix="setx HF_HOME D:\\huggingface" if is_windows else "export HF_HOME=/other/disk",
        )


def _fillers(folder: str, *, is_windows: bool) -> str:
    return f"dir /s {folder}" if is_windows else f"du -xhd1 {folder}"


def check_token(facts: Facts) -> Iterator[Finding]:
    """Whether gated models could be downloaded. The token is never read or shown."""
    if facts.has_hf_token:
        message, fix = "A Hugging Face token is set.", "Nothing to do."
    else:
        message, fix = "No Hugging Face token is set.", "hf auth login"
    yield Finding(
        severity="note",
        code="doctor.hf_token",
        message=message,
        why="Gemma 4 needs none; gated models such as Llama do.",
        fix=fix,
    )
