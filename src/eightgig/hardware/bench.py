"""What only a running torch can tell: rates, and whether a real NF4 training step is right.

The only module of `hardware` that uses torch, always inside a function (and `triton_probe`, which
it calls). `eightgig doctor` runs it as a child process (`python -m eightgig.hardware.bench NAME`),
so that a library that crashes on import takes nothing else with it.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from eightgig.hardware.probe import ADAMW_BYTES, Rates, optimizer_threads
from eightgig.run import to_json
from eightgig.units import MIB

if TYPE_CHECKING:
    import torch

# Shapes of a 12B decoder layer's MLP on a GPU; a processor takes seconds for that.
_GPU_GEMM = (2048, 3840, 15360)
_CPU_GEMM = (512, 1536, 4096)
_COPY_BYTES = 128 * MIB
# Under load a card's clock comes down to what its power limit allows: what is timed comes after.
_WARM_UP_SECONDS = 0.7
_LAUNCHES, _LAUNCH_TRIES = 150, 24
_LAUNCH_SIZE, _LAUNCH_EXTRA = 64, 16
_TRIES = 8
_ADAMW_NUMBERS = 16 << 20  # with moments and gradient 256 MiB, more than a processor keeps near
_PIN_STEP_BYTES = 256 * MIB
_PIN_PROBE_BYTES = 1024 * MIB
_PIN_SECONDS = 1.0
# With two engines, both directions together are nearly twice as fast as one.
_TWO_ENGINES_RATIO = 1.3
_RANK, _IN, _OUT, _TOKENS = 32, 256, 128, 64
_LEARNING_RATE = 1e-2


def measure_rates(
    device: Literal["cuda", "cpu"],
    *,
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
) -> Rates:
    """Speeds of this machine, in about two seconds and 500 MiB each of device and main memory.

    What the device lent is given back.

    Args:
        device: Where layers will compute.
        compute_dtype: In what.
    """
    if device == "cpu":
        return _cpu_rates()
    import torch

    dtype = getattr(torch, compute_dtype)
    launching = _launch_seconds(dtype)
    gemm = _gpu_gemm_seconds(dtype)
    passing, to_device, to_host, both = _gpu_copy_seconds()
    torch.cuda.empty_cache()
    tokens, inner, outer = _GPU_GEMM
    together = 2 * _COPY_BYTES / both
    alone = _COPY_BYTES / min(to_device, to_host)
    return Rates(
        gemm_flops_per_second=2 * tokens * inner * outer / gemm,
        memory_bytes_per_second=2 * _COPY_BYTES / passing,
        host_to_device_bytes_per_second=_COPY_BYTES / to_device,
        device_to_host_bytes_per_second=_COPY_BYTES / to_host,
        both_ways_bytes_per_second=together,
        copy_engines=2 if together > _TWO_ENGINES_RATIO * alone else 1,
        is_measured=True,
        launch_seconds=launching,
        host_bytes_per_second=_adamw_rate(optimizer_threads()),
    )


def _gpu_gemm_seconds(dtype: torch.dtype) -> float:
    """One product of the shape `_GPU_GEMM`, at the clock of long work."""
    import torch

    tokens, inner, outer = _GPU_GEMM
    left = torch.randn(tokens, inner, device="cuda", dtype=dtype)
    right = torch.randn(outer, inner, device="cuda", dtype=dtype)
    out = torch.empty(tokens, outer, device="cuda", dtype=dtype)

    def multiply() -> None:
        torch.mm(left, right.t(), out=out)

    until = time.perf_counter() + _WARM_UP_SECONDS
    while time.perf_counter() < until:
        _gpu_seconds(multiply)
    return _gpu_seconds(multiply)


def _launch_seconds(dtype: torch.dtype) -> float:
    """Python's time for one small operation, in a mixture like that of a layer's visit.

    The device keeps up: no more is queued at a time than it takes without making the thread wait.
    """
    import torch

    left = torch.zeros(_LAUNCH_SIZE, _LAUNCH_SIZE, device="cuda", dtype=dtype)
    right, narrow = torch.zeros_like(left), torch.zeros_like(left)[:, :_LAUNCH_EXTRA]
    sizes = (_LAUNCH_SIZE, _LAUNCH_EXTRA)
    times = []
    for _ in range(_LAUNCH_TRIES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_LAUNCHES // 3):
            whole = left.new_empty(_LAUNCH_SIZE, sum(sizes))
            main, extra = whole.split_with_sizes(sizes, 1)
            torch.mm(left, right, out=main)
            torch.mm(main, narrow, out=extra)
            torch.add(main, left, out=main)
        times.append((time.perf_counter() - start) / _LAUNCHES)
    return statistics.median(times)


def _cpu_rates() -> Rates:
    import torch

    tokens, inner, outer = _CPU_GEMM
    left, right = torch.randn(tokens, inner), torch.randn(inner, outer)
    gemm = _cpu_seconds(lambda: torch.mm(left, right))
    first = torch.zeros(_COPY_BYTES // 2, dtype=torch.uint8)
    second = torch.empty_like(first)
    copying = _cpu_seconds(lambda: second.copy_(first))
    copied = first.numel() / copying
    return Rates(
        gemm_flops_per_second=2 * tokens * inner * outer / gemm,
        memory_bytes_per_second=2 * copied,
        host_to_device_bytes_per_second=copied,
        device_to_host_bytes_per_second=copied,
        both_ways_bytes_per_second=copied,
        copy_engines=1,
        is_measured=True,
        host_bytes_per_second=_adamw_rate(None),
    )


def optimizer_thread(processors: int | None) -> ThreadPoolExecutor:
    """A thread for AdamW on the host that uses so many processors; None: as many as any other.

    torch hands the number that was set last, by whichever thread, to every thread when it first
    computes. So that of the calling thread is set again, or all later threads would have as few.
    """
    import torch

    def use_processors(count: int) -> None:
        torch.get_num_threads()  # from now on this thread is handed nothing
        torch.set_num_threads(count)

    thread = ThreadPoolExecutor(1, thread_name_prefix="eightgig-adamw")
    if processors is not None:
        usual = torch.get_num_threads()
        thread.submit(use_processors, processors).result()
        torch.set_num_threads(usual)
    return thread


def _adamw_rate(processors: int | None) -> float:
    """See `Rates.host_bytes_per_second`; in a thread as in training."""
    import torch

    def seconds() -> float:
        numbers = torch.zeros(_ADAMW_NUMBERS)
        numbers.grad = torch.ones_like(numbers)
        compute = torch.empty_like(numbers, dtype=torch.bfloat16)
        optimizer = torch.optim.AdamW([numbers], fused=True)
        optimizer.step()  # makes the moments

        def move() -> None:
            assert numbers.grad is not None
            numbers.grad.mul_(0.5)
            optimizer.step()
            compute.copy_(numbers)

        return _cpu_seconds(move)

    with optimizer_thread(processors) as thread:
        return ADAMW_BYTES * _ADAMW_NUMBERS / thread.submit(seconds).result()


def _cpu_seconds(work: Callable[[], object]) -> float:
    """Shortest of a few runs."""
    times = []
    for _ in range(_TRIES // 2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _gpu_seconds(work: Callable[[], object]) -> float:
    """One run, of several that follow each other without a gap."""
    import torch

    work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    for _ in range(_TRIES):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / _TRIES


def _gpu_copy_seconds() -> tuple[float, float, float, float]:
    """Copying `_COPY_BYTES` on the device, to it, to the host, and both of these at once."""
    import torch

    first, second = (torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in "ab")
    pinned, back = (torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in "ab")
    lane = torch.cuda.Stream()

    def both() -> None:
        lane.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(lane):
            back.copy_(second, non_blocking=True)
        first.copy_(pinned, non_blocking=True)
        torch.cuda.current_stream().wait_stream(lane)

    return (
        _gpu_seconds(lambda: second.copy_(first)),
        _gpu_seconds(lambda: first.copy_(pinned, non_blocking=True)),
        _gpu_seconds(lambda: back.copy_(second, non_blocking=True)),
        _gpu_seconds(both),
    )


def pinned_bytes(wanted_bytes: int, *, within_seconds: float = math.inf) -> int:
    """How much of `wanted_bytes` of main memory the system lets be pinned, in that time.

    torch keeps what it pinned, see `measure_pin_limit`.
    """
    import torch

    held: list[torch.Tensor] = []
    end = time.perf_counter() + within_seconds
    while len(held) * _PIN_STEP_BYTES < wanted_bytes and time.perf_counter() < end:
        try:
            held.append(torch.empty(_PIN_STEP_BYTES, dtype=torch.uint8, pin_memory=True))
        except RuntimeError:
            break
    return len(held) * _PIN_STEP_BYTES


def measure_pin_limit(rule_bytes: int, *, host_total_bytes: int) -> int:
    """How much main memory can be pinned, as far as a second of trying shows; it is given back.

    Where the system should allow much, a gigabyte is tried: if that goes, the rule holds. Where it
    should allow little (WSL), more is tried, up to half of the memory.

    Args:
        rule_bytes: What the system should allow.
        host_total_bytes: Main memory.
    """
    give_back = _host_cache_release()
    if give_back is None:
        return rule_bytes
    if rule_bytes < _PIN_PROBE_BYTES:
        limit = pinned_bytes(host_total_bytes // 2, within_seconds=_PIN_SECONDS)
    else:
        pinned = pinned_bytes(_PIN_PROBE_BYTES)
        limit = pinned if pinned < _PIN_PROBE_BYTES else rule_bytes
    give_back()
    return limit


def _host_cache_release() -> Callable[[], None] | None:
    """What makes torch unpin memory that it keeps for later; older releases have it as private."""
    import torch

    public = getattr(torch.accelerator, "empty_host_cache", None)
    return public or getattr(torch._C, "_host_emptyCache", None)


def torch_facts() -> dict[str, Any]:
    """What this torch was built for and what it can use."""
    import torch

    error = ""
    is_available = torch.cuda.is_available()
    if torch.version.cuda is not None and not is_available:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as failure:
            error = str(failure).strip()
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "is_cuda_available": is_available,
        "architectures": list(torch.cuda.get_arch_list()) if is_available else [],
        "error": error,
    }


def bitsandbytes_facts() -> dict[str, Any]:
    """Which library bitsandbytes found, and which one it wanted."""
    import bitsandbytes
    from bitsandbytes import cextension

    library = cextension.lib
    loaded = getattr(library, "_lib", None) if hasattr(type(library), "__getitem__") else None
    is_missing = isinstance(library, cextension.ErrorHandlerMockBNBNativeLibrary)
    return {
        "version": bitsandbytes.__version__,
        "library": "" if is_missing else str(getattr(loaded, "_name", "")),
        "wanted": str(getattr(library, "requested_version", "")) if is_missing else "",
        "available": list(cextension.get_available_cuda_binary_versions()),
        "is_cuda_library": not is_missing and bool(library.compiled_with_cuda),
        "error": str(library.error_msg) if is_missing else "",
    }


def triton_kernel(device: str) -> dict[str, Any]:
    """Whether Triton compiles a kernel here: its version, and whether the result is right."""
    from eightgig.hardware.triton_probe import run_kernel

    return run_kernel(device)


def nf4_step(device: Literal["cuda", "cpu"]) -> dict[str, float]:
    """One real training step through bitsandbytes, against the same step in float32.

    A linear is quantised to NF4 with double quantisation; LoRA joins it; loss, backward, and an
    8-bit AdamW step follow.

    Returns:
        Relative errors: `weight` of quantising, `forward` and `gradient` against the dequantised
        weight in float32, and `update` of the optimizer against AdamW's first step.
    """
    import bitsandbytes
    import torch
    from bitsandbytes import functional

    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight, x, target = numbers(_OUT, _IN), numbers(_TOKENS, _IN), numbers(_TOKENS, _OUT)
    start = {"a": numbers(_RANK, _IN) / _IN**0.5, "b": numbers(_OUT, _RANK) / _RANK**0.5}
    # bfloat16 through the fast path is what training does; old cards have only float16.
    dtype = torch.float32
    if device == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    codes, state = functional.quantize_4bit(
        weight.to(device, dtype), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    dequantised = functional.dequantize_4bit(codes, state).float().cpu()

    def step(base: Callable[[torch.Tensor], torch.Tensor], place: str, kind: torch.dtype) -> Any:
        tuned = {
            name: torch.nn.Parameter(value.to(place, copy=True)) for name, value in start.items()
        }
        inputs = x.to(place, kind)
        adapter = inputs @ tuned["a"].to(kind).t() @ tuned["b"].to(kind).t()
        out = base(inputs) + adapter
        (out.float() - target.to(place)).square().mean().backward()
        return tuned, out.detach().float().cpu()

    tuned, out = step(
        lambda inputs: bitsandbytes.matmul_4bit(inputs, codes.t(), quant_state=state), device, dtype
    )
    expected, expected_out = step(lambda inputs: inputs @ dequantised.t(), "cpu", torch.float32)
    optimizer = bitsandbytes.optim.AdamW8bit(
        list(tuned.values()), lr=_LEARNING_RATE, weight_decay=0.0
    )
    optimizer.step()
    gradients, updates = [], []
    for name, value in tuned.items():
        ours, theirs = value.grad.float().cpu(), expected[name].grad
        gradients.append(_relative_error(ours, theirs))
        # From zero moments AdamW moves every number by the learning rate against its gradient.
        moved = (value.detach().float().cpu() - start[name]) / _LEARNING_RATE
        updates.append(_relative_error(moved, -ours.sign()))
    return {
        "weight": _relative_error(dequantised, weight),
        "forward": _relative_error(out, expected_out),
        "gradient": max(gradients),
        "update": max(updates),
    }


def _relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def main(arguments: list[str]) -> None:
    """Write the answer to one question as one line of JSON.

    Args:
        arguments: The question, and its argument where it has one.
    """
    questions: dict[str, Callable[..., Any]] = {
        "torch": torch_facts,
        "bitsandbytes": bitsandbytes_facts,
        "nf4_step": nf4_step,
        "triton": triton_kernel,
        "rates": measure_rates,
        "pinned": lambda wanted: pinned_bytes(int(wanted)),
    }
    answer = questions[arguments[0]](*arguments[1:])
    sys.stdout.write(json.dumps(to_json(answer)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
