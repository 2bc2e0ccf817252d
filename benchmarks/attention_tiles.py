"""Time candidate tiles of the Triton attention kernels on this GPU, one kernel at a time.

Run it when a GPU has no tiles of its own in `eightgig.ops.triton_attention`, and put the best
there. TFLOP/s count the products that the mathematics needs, not those that a kernel repeats.

    python benchmarks/attention_tiles.py --head-dim 512 --out tiles.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from triton.testing import do_bench

from eightgig.ops import flash, triton_attention
from eightgig.ops.triton_attention import AttentionTiles, PackedRows, Tile

# head_dim: (query heads, kv heads, window)
SHAPES = {64: (32, 8, None), 128: (32, 8, None), 256: (16, 8, 1024), 512: (16, 1, None)}
TOKENS = 4096

# kernel: (with TMA, tile) or (with TMA, tile for K, tile for V); one tile makes both gradients.
Candidates = dict[str, list[tuple[bool, *tuple[Tile, ...]]]]
CANDIDATES: dict[int, Candidates] = {
    512: {
        "forward": [
            (True, Tile(64, 32, 8, 2)),
            (True, Tile(64, 64, 8, 1)),
            (False, Tile(64, 16, 8, 2)),
        ],
        "grad_q": [
            (True, Tile(64, 32, 8, 2, lazy=True)),
            (True, Tile(64, 32, 8, 1)),
            (False, Tile(32, 16, 4, 2)),
            (False, Tile(32, 16, 8, 2)),
        ],
        "grad_kv": [
            (True, Tile(32, 64, 8, 2, lazy=True), Tile(32, 64, 8, 2)),
            (True, Tile(32, 64, 8, 2, lazy=True), Tile(16, 64, 8, 3)),
            (True, Tile(64, 32, 8, 1)),
            (False, Tile(16, 32, 4, 2), Tile(16, 64, 8, 2)),
            (False, Tile(16, 32, 8, 2)),
        ],
    },
    256: {
        "forward": [(True, Tile(128, 64, 8, 2)), (False, Tile(64, 32, 8, 2))],
        "grad_q": [
            (True, Tile(64, 64, 4, 2)),
            (True, Tile(128, 32, 8, 2)),
            (True, Tile(64, 64, 8, 2)),
            (False, Tile(32, 32, 8, 2)),
        ],
        "grad_kv": [
            (True, Tile(64, 64, 8, 2)),
            (True, Tile(32, 64, 8, 2)),
            (False, Tile(32, 32, 8, 2)),
        ],
    },
    128: {
        "forward": [(True, Tile(128, 64, 8, 3)), (False, Tile(128, 64, 8, 2))],
        "grad_q": [(True, Tile(128, 64, 8, 2)), (True, Tile(64, 64, 4, 3))],
        "grad_kv": [(True, Tile(64, 64, 4, 2)), (True, Tile(64, 64, 8, 2))],
    },
    64: {
        "forward": [(True, Tile(128, 64, 4, 3)), (True, Tile(128, 128, 8, 2))],
        "grad_q": [(True, Tile(64, 64, 4, 3)), (True, Tile(128, 64, 8, 2))],
        "grad_kv": [(True, Tile(64, 64, 4, 2)), (True, Tile(64, 128, 8, 2))],
    },
}
PRODUCTS = {"forward": 2, "grad_q": 1.5, "grad_kv": 3.5, "backward": 5}


def pairs(window: int | None) -> int:
    """Query-key pairs of one head that see each other."""
    return sum(min(i + 1, window or TOKENS) for i in range(TOKENS))


def runner(
    kernel: str, tiles: AttentionTiles, tensors: dict[str, torch.Tensor], window
) -> Callable:
    q, k, v, grad = (tensors[name] for name in ("q", "k", "v", "grad"))
    bounds = torch.tensor([0, TOKENS], dtype=torch.int32, device="cuda")
    out, lse = tensors["out"], tensors["lse"]
    rows = PackedRows(cu_seqlens=bounds, max_length=TOKENS, window=window or 1 << 30)
    if kernel == "forward":
        return lambda: triton_attention.attention(q, k, v, bounds, TOKENS, 1.0, window, tiles=tiles)
    if kernel == "grad_q":
        return lambda: triton_attention.gradient_of_q(grad, q, k, v, out, lse, rows, 1.0, tiles)
    delta = tensors["delta"]
    return lambda: triton_attention.gradient_of_kv(grad, q, k, v, lse, delta, rows, 1.0, tiles)


def measure(head_dim: int, repeat_ms: int) -> list[dict[str, object]]:
    heads, kv_heads, window = SHAPES[head_dim]
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(TOKENS, count, head_dim, device="cuda", dtype=torch.bfloat16)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads), ("grad", heads))
    }
    tensors["q"] *= head_dim**-0.5
    q, k, v, grad = tensors.values()
    bounds = torch.tensor([0, TOKENS], dtype=torch.int32, device="cuda")
    lines: list[dict[str, object]] = []
    way = (flash.flash_attention, flash.flash_attention_backward)
    if head_dim > 256:
        way = (flash.efficient_attention, flash.efficient_attention_backward)
    out, lse = way[0](q, k, v, bounds, TOKENS, 1.0, window)
    forward = do_bench(lambda: way[0](q, k, v, bounds, TOKENS, 1.0, window), 10, repeat_ms)
    backward = do_bench(
        lambda: way[1](grad, q, k, v, out, lse, bounds, TOKENS, 1.0, window), 10, repeat_ms
    )
    work = 2 * heads * head_dim * pairs(window)
    for name, ms in (("forward", forward), ("backward", backward)):
        tflops = work * PRODUCTS[name] / ms / 1e9
        lines.append({"kernel": f"torch {name}", "ms": ms, "tflops": tflops})
    tensors |= {"out": out, "delta": (out.float() * grad.float()).sum(-1).t().contiguous()}
    tensors["lse"] = lse if head_dim <= 256 else lse[0, :, :TOKENS].contiguous()
    default = triton_attention.attention_tiles(head_dim, (9, 0), processors)
    assert default is not None
    for kernel, candidates in CANDIDATES[head_dim].items():
        for uses_tma, *parts in candidates:
            if kernel == "grad_kv":
                chosen = {"grad_k": parts[0], "grad_v": parts[1] if len(parts) > 1 else None}
            else:
                chosen = {kernel: parts[0]}
            tiles = replace(default, uses_tma=uses_tma, **chosen)
            line = {"kernel": kernel, "tma": uses_tma, "tile": " ".join(map(str, parts))}
            run = runner(kernel, tiles, tensors, window)
            lines.append(line | timing(run, work * PRODUCTS[kernel], repeat_ms))
    return lines


def timing(run: Callable[[], object], work: float, repeat_ms: int) -> dict[str, object]:
    started = time.perf_counter()
    try:
        run()
        torch.cuda.synchronize()
        compile_s = time.perf_counter() - started
        ms = do_bench(run, 10, repeat_ms)
    except Exception as error:  # noqa: BLE001 - a candidate that does not fit is a result
        return {"error": str(error)[:200]}
    return {"ms": ms, "tflops": work / ms / 1e9, "compile_s": compile_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[512, 256, 128])
    parser.add_argument("--repeat-ms", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = {}
    for head_dim in options.head_dim:
        results[head_dim] = measure(head_dim, options.repeat_ms)
        print(f"head_dim {head_dim}, {TOKENS} tokens, {SHAPES[head_dim]}")
        for line in results[head_dim]:
            print(
                "  ",
                {key: round(x, 3) if isinstance(x, float) else x for key, x in line.items()},
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
