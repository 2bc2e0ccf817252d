"""Bytes of main memory and disk that training takes; the formulas of the device are `estimate`."""

from __future__ import annotations

from typing import Literal

from eightgig.memory.estimate import (
    HEAD_BYTES,
    PROCESS_BYTES,
    Layout,
    adapter_copy_bytes,
    checkpoint_bytes,
    is_optimizer_on_device,
    managed_bytes,
    offload_bytes,
)
from eightgig.memory.workload import Workload
from eightgig.units import MIB

HostWeights = Literal["pinned", "pageable", "mapped"]
# Runs of pinned memory are powers of two; the last arena is not full.
PINNED_ARENA_BYTES = 512 * MIB
PINNED_ROUNDING = 2
# Memory that is not pinned goes through two pinned buffers.
BOUNCE_BYTES = 2 * 64 * MIB
_PINNED_ITEMS = (
    "layers",
    "head",
    "gradients",
    "adapter_copies",
    "checkpoints",
    "offload",
    "staging",
)


def host_bytes(work: Workload, layout: Layout, host_weights: HostWeights) -> dict[str, int]:
    """Main memory that cannot be given back, by item; mapped files are not in it.

    Layers and the head, unless they are mapped. Adapter: masters and two moments in float32 (with
    an optimizer on the GPU a copy of them while they are saved); its gradients and compute copies
    are one pinned run each. Checkpoints: every layer's input, in arenas. Staging: the rows of two
    groups of micro-batches, gathered for the device.
    """
    on_device = is_optimizer_on_device(work)
    is_copied = host_weights != "mapped"
    waiting = checkpoint_bytes(work, layout) + PINNED_ARENA_BYTES
    items = {
        "layers": layer_blobs_bytes(work) if is_copied else 0,
        "head": head_table_bytes(work) if is_copied else 0,
        "adapter": 3 * 4 * work.master_elements,
        "gradients": 0 if on_device else _pinned_run(4 * work.master_elements),
        "adapter_copies": 0 if on_device else _pinned_run(adapter_copy_bytes(work)),
        "checkpoints": waiting if layout.checkpoints == "host" else 0,
        "offload": offload_bytes(work, layout) if layout.checkpoints == "host" else 0,
        "managed_optimizer": managed_bytes(work),
        "staging": row_bytes(work, layout) + (0 if host_weights == "pinned" else BOUNCE_BYTES),
        "process": PROCESS_BYTES[True],
    }
    return {name: size for name, size in items.items() if size}


def row_bytes(work: Workload, layout: Layout) -> int:
    """Rows of the embedding and the per-layer table for two groups of micro-batches, pinned."""
    decoder = work.decoder
    columns = decoder.hidden_size + decoder.num_layers * decoder.ple_size
    return 2 * PINNED_ROUNDING * layout.visit_tokens * columns * HEAD_BYTES


def pinned_bytes(host: dict[str, int]) -> int:
    """What of `host_bytes` should be pinned for copies to run beside the computation."""
    return sum(host.get(name, 0) for name in _PINNED_ITEMS)


def layer_blobs_bytes(work: Workload) -> int:
    """All stored layers."""
    return sum(layer.count * layer.blob_bytes for layer in work.layers)


def head_table_bytes(work: Workload) -> int:
    """The (V, D) head."""
    return work.decoder.vocab_size * work.decoder.hidden_size * HEAD_BYTES


def table_bytes(work: Workload) -> dict[str, int]:
    """Tables that stay on disk and are read through the page cache."""
    decoder = work.decoder
    rows = head_table_bytes(work)
    ple = decoder.vocab_size * decoder.num_layers * decoder.ple_size * HEAD_BYTES
    head = 0 if decoder.tie_word_embeddings else rows
    return {"embedding": rows, "head": head, "ple": ple}


def disk_bytes(work: Workload, *, is_prepared: bool, has_tables: bool, num_checkpoints: int) -> int:
    """Prepared layers, tables where they are not there yet, and checkpoints of the run.

    One more checkpoint is written before the oldest goes. The adapter itself is written at the end.
    """
    prepared = 0
    if not is_prepared:
        prepared = layer_blobs_bytes(work)
        prepared += 0 if has_tables else sum(table_bytes(work).values())
    adapter = 4 * work.master_elements
    return prepared + (num_checkpoints + 1) * checkpoint_file_bytes(work) + adapter


def checkpoint_file_bytes(work: Workload) -> int:
    """A checkpoint on the disk: masters and two moments in float32."""
    return 3 * 4 * work.master_elements


def _pinned_run(size_bytes: int) -> int:
    """torch rounds a run of pinned memory up to a power of two."""
    return 1 << (size_bytes - 1).bit_length() if size_bytes else 0
