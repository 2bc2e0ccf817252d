"""Time of every fast operation against its plain definition and the memory floor, on this GPU.

Shapes are Gemma 4 12B's. The floor counts each input read once and each output written once, at
the rate of a device-to-device copy measured first.

    python benchmarks/operations.py --tokens 2048 --out operations.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from eightgig.ops import reference
from eightgig.ops.choose import Ops, choose_ops
from eightgig.ops.reference import HeadLayout

HIDDEN, FEED_FORWARD, HEAD_CHUNK = 3840, 15360, 8192
EPS = 1e-6
LAUNCHES = 20  # few enough for the queue of the GPU not to fill up


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def launch_us(run: Callable[[], object]) -> float:
    """Host time of one call, in microseconds, with the GPU far behind."""
    run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(LAUNCHES):
        run()
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return seconds / LAUNCHES * 1e6


def cases(n: int) -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any], int]]:
    """By name: operation, arguments, options and bytes moved."""
    hidden, grad, add = normal(n, HIDDEN), normal(n, HIDDEN), normal(n, HIDDEN)
    weight, scalar = normal(HIDDEN, dtype=torch.float32), torch.tensor(0.7, device="cuda")
    row, scaled, added = 2 * n * HIDDEN, {"scalar": scalar}, {"add": add}
    found: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], int]] = {
        "rms_norm": ("rms_norm", (hidden, weight, EPS), {}, 2 * row),
        "rms_norm_backward": ("rms_norm_backward", (grad, hidden, weight, EPS), added, 4 * row),
        "residual_norm": ("residual_norm", (add, hidden, weight, EPS), scaled, 3 * row),
        "residual_norm_backward": (
            "residual_norm_backward",
            (grad, hidden, weight, EPS),
            scaled,
            4 * row,
        ),
        "dropout": ("dropout", (hidden, torch.arange(n, device="cuda"), 7, 0.1), {}, 2 * row),
    }
    both, grad = normal(n, 2 * FEED_FORWARD), normal(n, FEED_FORWARD)
    gated = (both[:, :FEED_FORWARD], both[:, FEED_FORWARD:])
    wide = 2 * n * FEED_FORWARD
    found["glu"] = ("glu", (*gated, "gelu_tanh"), {}, 3 * wide)
    found["glu_backward"] = ("glu_backward", (*gated, grad, "gelu_tanh"), {}, 5 * wide)
    logits = normal(n, HEAD_CHUNK, dtype=torch.float32)
    labels = torch.zeros(n, dtype=torch.int64, device="cuda")
    sums, maxima, out = logits[:, 0].clone(), logits[:, 1].clone(), normal(n, HEAD_CHUNK)
    for name, options in (("capped", (30.0, None)), ("uncapped", (None, maxima))):
        arguments = (logits, labels, *options, sums, out)
        moved = 6 * n * HEAD_CHUNK
        found[f"cross_entropy_chunk {name}"] = ("cross_entropy_chunk", arguments, {}, moved)
    return found | head_cases(n) | dequantize_case()


def head_cases(n: int) -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any], int]]:
    found: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], int]] = {}
    for name, kv_heads, size, has_v in (("sliding", 8, 256, True), ("global", 1, 512, False)):
        heads = HeadLayout(
            num_heads=16,
            num_kv_heads=kv_heads,
            head_dim=size,
            has_k=True,
            has_v=has_v,
            norms_v=True,
        )
        angles = normal(n, size // 2, dtype=torch.float32)
        weights = [normal(size, dtype=torch.float32)] * 2
        fixed = (normal(n, heads.width), heads, *weights, angles.cos(), angles.sin(), EPS)
        moved = 2 * n * (heads.width + (16 + 2 * kv_heads) * size) + 4 * n * size
        found[f"qkv_norm_rope {name}"] = ("qkv_norm_rope", fixed, {}, moved)
        grads = (normal(n, 16, size), normal(n, kv_heads, size), normal(n, kv_heads, size))
        moved += 2 * n * heads.width
        operation = "qkv_norm_rope_backward"
        found[f"{operation} {name}"] = (operation, (*grads, *fixed), {}, moved)
    return found


def dequantize_case() -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any], int]]:
    count = HIDDEN * FEED_FORWARD
    codes = torch.randint(0, 256, (count // 2,), device="cuda", dtype=torch.uint8)
    absmax = torch.randint(0, 256, (count // 64,), device="cuda", dtype=torch.uint8)
    tables = normal(16, dtype=torch.float32), normal(256, dtype=torch.float32)
    nested = normal(count // 64 // 256, dtype=torch.float32)
    out = normal(FEED_FORWARD, HIDDEN + 16)[:, :HIDDEN]
    arguments = (codes, absmax, nested, 0.1, 64, 256, *tables)
    name = f"dequantize {FEED_FORWARD} x {HIDDEN}"
    return {name: ("dequantizer", arguments, {"out": out}, int(2.516 * count))}


def attention_cases(n: int) -> dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]:
    bounds = torch.tensor([0, n], dtype=torch.int32, device="cuda")
    shapes = {
        "attention 256 window 1024": (16, 8, 256, 1024),
        "attention 512": (16, 1, 512, None),
        "attention 128": (32, 8, 128, None),
    }
    found = {}
    for name, (heads, kv_heads, size, window) in shapes.items():
        tensors = tuple(normal(n, count, size) for count in (heads, kv_heads, kv_heads, heads))
        found[name] = (tensors, (bounds, n, size**-0.5, window))
    return found


def copy_rate() -> float:
    """Bytes read plus bytes written per second of a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    ms = do_bench(partial(torch.empty_like(source).copy_, source), 10, 50)
    return float(2 * source.numel() / ms * 1e3)


def measure(ops: Ops, tokens: int, rate: float) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for name, (operation, args, options, moved) in cases(tokens).items():
        run = partial(getattr(ops, operation), *args, **options)
        if operation == "dequantizer":
            run = run()
        line = {"name": name, "floor_ms": moved / rate * 1e3, "ms": do_bench(run, 5, 30)}
        line["host_us"] = launch_us(run)
        if operation != "dequantizer":
            plain = partial(getattr(reference, operation), *args, **options)
            line["plain_ms"] = do_bench(plain, 5, 20)
        lines.append(line)
    for name, (tensors, rows) in attention_cases(tokens).items():
        q, k, v, grad = tensors
        forward = partial(ops.attention, q, k, v, *rows)
        backward = partial(ops.attention_backward, grad, q, k, v, *forward(), *rows)
        for part, run in (("forward", forward), ("backward", backward)):
            ms = do_bench(run, 5, 30)
            lines.append({"name": f"{name} {part}", "ms": ms, "host_us": launch_us(run)})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    ops, choices = choose_ops(device="cuda", dtype=torch.bfloat16, kernels="auto")
    for choice in choices:
        print(choice)
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, copy {rate / 1e12:.2f} TB/s, {options.tokens} tokens")
    lines = measure(ops, options.tokens, rate)
    for line in lines:
        print("  ", {key: round(x, 4) if isinstance(x, float) else x for key, x in line.items()})
    if options.out:
        options.out.write_text(json.dumps(lines, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
