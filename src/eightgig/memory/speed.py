"""Seconds of an optimizer step: arithmetic over rates, no measurement.

A step passes all layers forward, the head, and all layers backward. In each part copies run
beside the computation, so the part takes the longer of the two.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache

from eightgig.hardware.probe import ADAMW_BYTES, Rates
from eightgig.memory.estimate import (
    HEAD_BYTES,
    Layout,
    checkpoint_bytes,
    head_chunk_rows,
    is_optimizer_on_device,
    num_head_chunks,
    offload_bytes,
    slots_for_everything,
)
from eightgig.memory.host_estimate import PINNED_ROUNDING, row_bytes
from eightgig.memory.layers import LayerSize
from eightgig.memory.workload import Workload

# A GEMM of M tokens runs at M / (M + 180) of its best rate: 84.6, 90.8 and 96 % at 1,024, 2,048
# and 4,096 tokens on an RTX 4090 (bitsandbytes' streaming analysis). Rates are taken at 2,048.
GEMM_HALF_TOKENS = 180
RATE_TOKENS = 2048
# One of D columns runs at D / (D + 0.68 per TFLOP/s): the faster the card, the more it is held up
# by filling and draining its tiles. Measured on an H100: 596 TFLOP/s of a step's products in E2B
# and 700 in 12B. Rates are taken at 3,840.
GEMM_HALF_COLUMN_SECONDS = 0.68e-12
RATE_COLUMNS = 3840
# Share of the GEMM rate that attention reaches, forward and backward together, with head_dim up to
# 128, up to 256, and above. Hopper's GEMMs gain more from its tensor cores than attention does
# (fitted to 59 runs on an H200, 512 to 16,384 tokens); the others are estimates.
ATTENTION_RATIO = {
    "hopper": (0.52, 0.19, 0.27),
    "triton": (0.45, 0.45, 0.22),
    "plain": (0.15, 0.15, 0.08),
}
# Times that norms, rotations and activations read or write a token's columns D + Q + 2 KV + F,
# in a forward and a backward visit together; and what dropout adds, with its hashes.
ELEMENTWISE_PASSES = {"triton": 10.5, "plain": 60.0}
DROPOUT_PASSES = 23.6
# Bytes read and written per weight when a layer is dequantised; plain code makes three passes.
DEQUANT_BYTES = {"triton": 1.25, "plain": 4.8}
# Launching the work from Python: a layer's weights, a micro-batch through it, a further tile of its
# MLP, a bundle to the host or back, and what dropout and per-layer inputs add; on a processor that
# launches a small operation in 12 microseconds, as the 16 virtual CPUs beside an H200 did. These,
# `STEP_SECONDS` and `DROPOUT_PASSES` were fitted to 46 runs there; 20 others were kept apart.
LAUNCH_SECONDS = 1.2e-5
OPEN_SECONDS = 0.00012
FORWARD_SECONDS = 0.00042
BACKWARD_SECONDS = 0.0009
TILE_SECONDS = 0.00035
BUNDLE_SECONDS = 0.0001
DROPOUT_SECONDS = 0.00058
PER_LAYER_INPUT_SECONDS = 0.00008
# From the last gradient of a step to the first layer of the next the GPU has nothing to do.
STEP_SECONDS = 0.025
GATHER_BYTES_PER_SECOND = 4e9
# Pageable memory goes through a pinned buffer; mapped files that RAM does not hold, to the disk.
PAGEABLE_BYTES_PER_SECOND = 8e9
DISK_BYTES_PER_SECOND = 2e9
PACKED_RATIO = 0.93
# How far off a prediction may be, below and above: with rates measured here; where Python's
# launches bind, since a shared processor may change its pace after it was timed; and from a table.
# The 66 runs of `tests/data/measured_peaks.jsonl` that have a speed are within 15 %.
MEASURED_RANGE = (0.84, 1.19)
LAUNCH_BOUND_RANGE = (0.7, 1.3)
TABLE_RANGE = (0.65, 1.2)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Where the seconds of an optimizer step go.

    Attributes:
        seconds: In all.
        compute_seconds: GPU work of the layers and the head, or launching it where that is longer.
        copy_seconds: Copies between host and device, hidden or not.
        waiting_seconds: Of `seconds`, spent waiting for copies.
        optimizer_seconds: The update.
        tokens: Tokens of an ordinary step.
        is_launch_bound: In a pass Python takes longer to launch the work than the device to do it.
    """

    seconds: float
    compute_seconds: float
    copy_seconds: float
    waiting_seconds: float
    optimizer_seconds: float
    tokens: float
    is_launch_bound: bool

    @property
    def tokens_per_second(self) -> float:
        """Tokens over seconds."""
        return self.tokens / self.seconds


def step_time(
    work: Workload, layout: Layout, rates: Rates, source_bytes_per_second: float = math.inf
) -> StepTime:
    """The time of an ordinary optimizer step.

    Args:
        work: What is asked for.
        layout: What was decided.
        rates: Speeds of the device.
        source_bytes_per_second: How fast layers and head can be read where they lie.
    """
    tokens = work.mean_step_tokens
    micro_batches = num_micro_batches(work, layout)
    visits = -(-micro_batches // layout.micro_batches_per_visit)
    forward, backward = _layer_seconds(work, layout, rates, tokens / micro_batches)
    dequant = _dequant_seconds(work, layout, rates) * visits
    launching = _launch_seconds(work, layout, rates, micro_batches, visits)
    head = _head_seconds(work, layout, rates, tokens * work.loss_share)
    source = min(rates.host_to_device_bytes_per_second, source_bytes_per_second)
    copies = _copy_seconds(work, layout, rates, source, visits)
    optimizer = _optimizer_seconds(work, rates)
    # On the host the update of one step runs beside the forward pass that follows, and the rows of
    # a step are gathered beside the whole step before.
    on_device = is_optimizer_on_device(work)
    beside = 0.0 if on_device else optimizer
    working = (forward * micro_batches + dequant, backward * micro_batches + dequant)
    computing = (max(working[0], launching[0]), head, max(working[1], launching[1]))
    seconds = max(computing[0], copies[0], beside)
    seconds += max(computing[1], copies[1]) + max(computing[2], copies[2])
    pairs = zip(copies, computing, strict=True)
    seconds += STEP_SECONDS if work.has_device else 0.0
    seconds = max(seconds + (optimizer if on_device else 0.0), _gather_seconds(work, tokens))
    return StepTime(
        seconds=seconds,
        compute_seconds=sum(computing),
        copy_seconds=sum(copies),
        waiting_seconds=sum(max(0.0, copy - compute) for copy, compute in pairs),
        optimizer_seconds=optimizer,
        tokens=tokens,
        is_launch_bound=work.has_device
        and any(
            launch > work_seconds for launch, work_seconds in zip(launching, working, strict=True)
        ),
    )


def speed_range(time: StepTime, rates: Rates) -> tuple[float, float]:
    """Lowest and highest share of the forecast tokens/s that is to be expected."""
    if not rates.is_measured:
        return TABLE_RANGE
    return LAUNCH_BOUND_RANGE if time.is_launch_bound else MEASURED_RANGE


def num_micro_batches(work: Workload, layout: Layout) -> int:
    """Micro-batches of an ordinary step.

    Rows of one length fill a micro-batch by the row; mixed ones are packed to 93 %.
    """
    if not work.is_packed:
        return work.rows_per_step
    if work.row_tokens == work.max_length:
        rows = max(1, layout.micro_batch_tokens // work.max_length)
        return math.ceil(work.rows_per_step / rows)
    return math.ceil(work.mean_step_tokens / (PACKED_RATIO * layout.micro_batch_tokens))


def linear_flops_per_token(work: Workload) -> float:
    """Forward, recompute and gradient of the frozen linears: 6 per weight a token meets."""
    return 6.0 * sum(layer.count * _active_elements(work, layer) for layer in work.layers)


def attention_flops_per_token(work: Workload, row_tokens: float) -> float:
    """4 H hd per key seen, 4.5 times: forward, recompute, and 2.5 for the backward pass."""
    return 4.5 * sum(
        layer.count * 4 * layer.query_size * mean_keys(row_tokens, layer.shape.sliding_window)
        for layer in work.layers
    )


def head_flops_per_loss_token(work: Workload) -> float:
    """Logits and gradient of the hidden state: 2 V D each."""
    return 4.0 * work.decoder.vocab_size * work.decoder.hidden_size


def mean_keys(row_tokens: float, window: int | None) -> float:
    """Keys that a query of a causal row sees on average: S / 2, or W - W^2 / 2 S in a window."""
    if window is None or window >= row_tokens:
        return row_tokens / 2
    return window - window * window / (2 * row_tokens)


def _active_elements(work: Workload, layer: LayerSize) -> float:
    """Weights that a token is multiplied with in a layer: of the experts, those it passes."""
    decoder = work.decoder
    share = decoder.num_active_experts / decoder.num_experts if decoder.num_experts else 0.0
    # Gate, projection and the context part of a per-layer embedding.
    per_layer_input = 3 * decoder.ple_size * decoder.hidden_size
    return layer.linear_elements + share * layer.expert_elements + per_layer_input


def _gemm_ratio(tokens: float) -> float:
    """Rate at `tokens`, compared with the rate at `RATE_TOKENS`."""
    best = RATE_TOKENS / (RATE_TOKENS + GEMM_HALF_TOKENS)
    return tokens / (tokens + GEMM_HALF_TOKENS) / best


def _gemm_rate(work: Workload, rates: Rates) -> float:
    """Rate of this model's products, of which D columns are one side."""
    rate, columns = rates.gemm_flops_per_second, work.decoder.hidden_size
    half = GEMM_HALF_COLUMN_SECONDS * rate
    return rate * columns / (columns + half) * (RATE_COLUMNS + half) / RATE_COLUMNS


def _attention_rate(layer: LayerSize, layout: Layout, rates: Rates) -> float:
    is_hopper = layout.is_hopper and layout.kernels == "triton"
    up_to_128, up_to_256, above = ATTENTION_RATIO["hopper" if is_hopper else layout.kernels]
    head_dim = layer.shape.head_dim
    ratio = up_to_128 if head_dim <= 128 else up_to_256 if head_dim <= 256 else above
    return rates.gemm_flops_per_second * ratio


def _layer_seconds(
    work: Workload, layout: Layout, rates: Rates, tokens: float
) -> tuple[float, float]:
    """GPU work of one micro-batch in all layers, forward and backward (recompute included)."""
    tile = min(tokens, layout.mlp_tile_tokens)
    rate = _gemm_rate(work, rates)
    forward = backward = 0.0
    for layer in work.layers:
        mlp = layer.shape.intermediate_size * work.decoder.hidden_size * 3
        other = _active_elements(work, layer) - mlp
        lora = sum(group.rank * (group.in_size + group.out_size) for group in layer.groups)
        # 2 per weight each for forward, recompute and gradient; the adapter's own gradients too.
        once = 2 * tokens * (mlp / _gemm_ratio(tile) + (other + lora) / _gemm_ratio(tokens)) / rate
        adapter = 2 * 2 * tokens * lora / _gemm_ratio(tokens) / rate
        repeated = 2.5 if "attention" in layout.offload else 3.5
        saved = _offloaded_flops_ratio(work, layer, layout.offload) * once
        keys = mean_keys(min(tokens, work.row_tokens), layer.shape.sliding_window)
        attend = 4 * tokens * layer.query_size * keys / _attention_rate(layer, layout, rates)
        columns = work.decoder.hidden_size + layer.query_size + 2 * layer.kv_size
        columns += layer.shape.intermediate_size
        if work.decoder.ple_size:
            columns += work.decoder.hidden_size + 2 * work.decoder.ple_size
        passes = ELEMENTWISE_PASSES[layout.kernels]
        passes += DROPOUT_PASSES if work.has_dropout else 0.0
        touched = tokens * columns * work.element_bytes * passes
        passing = touched / rates.memory_bytes_per_second
        forward += layer.count * (once + attend + passing / 4)
        backward += layer.count * (2 * once - saved + adapter + repeated * attend + passing * 3 / 4)
    return forward, backward


def _launch_seconds(
    work: Workload, layout: Layout, rates: Rates, micro_batches: int, visits: int
) -> tuple[float, float]:
    """Python's time for a step's layers, forward and backward; the GPU works beside it."""
    tiles = -(-layout.micro_batch_tokens // layout.mlp_tile_tokens)
    shared = TILE_SECONDS * (tiles - 1)
    if layout.checkpoints == "host":
        shared += BUNDLE_SECONDS
    if work.has_dropout:
        shared += DROPOUT_SECONDS
    if work.decoder.ple_size:
        shared += PER_LAYER_INPUT_SECONDS
    forward = OPEN_SECONDS * visits + (FORWARD_SECONDS + shared) * micro_batches
    # The backward pass computes its tiles forward again.
    again = TILE_SECONDS * (tiles - 1)
    backward = OPEN_SECONDS * visits + (BACKWARD_SECONDS + shared + again) * micro_batches
    each = work.num_layers * rates.launch_seconds / LAUNCH_SECONDS
    return each * forward, each * backward


def _offloaded_flops_ratio(work: Workload, layer: LayerSize, offload: tuple[str, ...]) -> float:
    """Share of a layer's forward GEMMs that need not be recomputed."""
    hidden, feed_forward = work.decoder.hidden_size, layer.shape.intermediate_size
    elements = {
        "down_proj": hidden * feed_forward,
        "o_proj": hidden * layer.query_size,
        "attention": 0,
    }
    return sum(elements[name] for name in offload) / layer.linear_elements


def _dequant_seconds(work: Workload, layout: Layout, rates: Rates) -> float:
    """All layers once."""
    elements = sum(
        layer.count * (layer.linear_elements + layer.expert_elements) for layer in work.layers
    )
    bytes_each = DEQUANT_BYTES[layout.kernels] * work.element_bytes / 2
    return elements * bytes_each / rates.memory_bytes_per_second


def _head_seconds(work: Workload, layout: Layout, rates: Rates, loss_tokens: float) -> float:
    tile = min(layout.head_tile_tokens, max(1.0, loss_tokens))
    rate = _gemm_rate(work, rates) * _gemm_ratio(tile)
    gemm = loss_tokens * head_flops_per_loss_token(work) / rate
    passes = 1.0 if layout.kernels == "triton" else 5.0
    logits = loss_tokens * work.decoder.vocab_size * (8 + work.element_bytes) * passes
    return gemm + logits / rates.memory_bytes_per_second


def _copy_seconds(
    work: Workload, layout: Layout, rates: Rates, source_rate: float, visits: int
) -> tuple[float, float, float]:
    """Copies of a step during the forward pass, the head and the backward pass."""
    if not work.has_device and layout.layer_slots >= slots_for_everything(work):
        return (0.0, 0.0, 0.0)
    forward, head, backward = copies_per_pass(
        work.num_layers, num_head_chunks(work), cached_slots(work, layout)
    )
    layer = sum(kind.count * kind.blob_bytes for kind in work.layers) / work.num_layers
    chunk = head_chunk_rows(work) * work.decoder.hidden_size * HEAD_BYTES
    share = work.mean_step_tokens / (layout.visit_tokens * visits)
    kept = 0.0
    if layout.checkpoints == "host":
        kept = checkpoint_bytes(work, layout) + offload_bytes(work, layout)
        kept *= share * visits
    rows = row_bytes(work, layout) / (2 * PINNED_ROUNDING) * share * visits
    gradients = 0 if is_optimizer_on_device(work) else 4 * work.master_elements * visits
    return (
        _both_ways(rates, visits * forward * layer / source_rate, rows, kept),
        visits * head * chunk / source_rate,
        _both_ways(rates, visits * backward * layer / source_rate, kept, gradients),
    )


def _both_ways(rates: Rates, weights_seconds: float, to_device: float, to_host: float) -> float:
    """Seconds of a part's copies; one copy engine takes one direction at a time."""
    down = weights_seconds + to_device / rates.host_to_device_bytes_per_second
    up = to_host / rates.device_to_host_bytes_per_second
    if rates.copy_engines == 1:
        return down + up
    moved = down * rates.host_to_device_bytes_per_second + to_host
    return max(down, up, moved / rates.both_ways_bytes_per_second)


def cached_slots(work: Workload, layout: Layout) -> int:
    """Slots that keep something: one is always being filled, unless everything fits."""
    if layout.layer_slots >= slots_for_everything(work):
        return layout.layer_slots
    return max(1, layout.layer_slots - 1)


@lru_cache(maxsize=512)
def copies_per_pass(num_layers: int, num_chunks: int, num_slots: int) -> tuple[int, int, int]:
    """Copies per visit group in the forward pass, the head and the backward pass.

    The order 0 .. L-1, head chunks, L-1 .. 0 repeats; by Belady's rule what is used furthest in
    the future gives way.
    """
    layers, chunks = range(num_layers), range(num_layers, num_layers + num_chunks)
    order = [*layers, *chunks, *reversed(layers)]
    cycles, n = 3, len(order)
    visits = order * cycles
    following = [0] * len(visits)
    next_at: dict[int, int] = {}
    for at in range(len(visits) - 1, -1, -1):
        # Beyond the last cycle the same order goes on.
        following[at] = next_at.get(visits[at], len(visits) + order.index(visits[at]))
        next_at[visits[at]] = at
    copies = [0, 0, 0]
    held: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    for at, item in enumerate(visits):
        if item not in held:
            if len(held) == num_slots:
                while True:
                    use, victim = heapq.heappop(furthest)
                    if held.get(victim) == -use:
                        break
                del held[victim]
            if at >= n * (cycles - 1):
                copies[_part(at % n, num_layers, num_chunks)] += 1
        held[item] = following[at]
        heapq.heappush(furthest, (-following[at], item))
    return copies[0], copies[1], copies[2]


def _part(position: int, num_layers: int, num_chunks: int) -> int:
    if position < num_layers:
        return 0
    return 1 if position < num_layers + num_chunks else 2


def _optimizer_seconds(work: Workload, rates: Rates) -> float:
    touched = ADAMW_BYTES * work.master_elements
    if is_optimizer_on_device(work):
        return touched / rates.memory_bytes_per_second
    return touched / rates.host_bytes_per_second


def _gather_seconds(work: Workload, tokens: float) -> float:
    """Rows of the embedding and the per-layer table, collected by the CPU."""
    decoder = work.decoder
    columns = decoder.hidden_size + decoder.num_layers * decoder.ple_size
    return tokens * columns * HEAD_BYTES / GATHER_BYTES_PER_SECOND
