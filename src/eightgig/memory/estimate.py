"""Bytes that training takes, item by item, as small pure functions.

Every formula has its derivation beside it and a row in `tests/data/measured_peaks.jsonl` that it
must not fall below. Letters: N tokens of a micro-batch, G micro-batches per visit, T tokens of an
MLP tile, D hidden, Q and KV columns of queries and of keys (or values), F feed-forward, R rank of
a group (rounded up), L layers, V vocabulary, e bytes of an element in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from eightgig.memory.layers import LayerSize
from eightgig.memory.workload import Workload
from eightgig.units import KIB, MIB

SLOT_ROUNDING_BYTES = 2 * MIB
RING_SLOTS = 3
HEAD_CHUNK_MULTIPLE = 256
# Tokens whose per-layer inputs are made at a time: float32 copies of (N, L, P) for a whole
# micro-batch would be the peak of a step in E2B and E4B.
PLE_TILE_TOKENS = 512
GRADIENT_BUFFERS = 2
# For bundles on their way to the host, later for those on their way back and the one in use.
BUNDLE_BUFFERS = 3
HEAD_BYTES = 2  # the head stays bfloat16, as in the checkpoint
# bitsandbytes keeps the states of smaller tensors in float32.
SMALLEST_8BIT_ELEMENTS = 4096
# torch gives cuBLAS 32 MiB on Hopper and 8.125 MiB elsewhere.
CUBLAS_BYTES = {True: 32 * MIB, False: 8 * MIB + 128 * KIB}
# What the allocator reserves beyond what is asked for: the last of its 20 MiB pages, and of the
# segments of small tensors; and, since freed blocks do not fit the next request exactly, shares of
# what comes and goes in a step, of the buffers between device and host, and of the hidden states of
# several micro-batches. Fitted to 47 rows of `tests/data/measured_peaks.jsonl`; 26 were kept apart.
# No row is met by less than 9 MiB.
PAGE_BYTES = 24 * MIB
FRAGMENTATION_RATIO = 0.085
BUFFER_FRAGMENTATION_RATIO = 0.2
VISIT_FRAGMENTATION_RATIO = 0.5
# torch, its libraries and Python in main memory, with a CUDA context and without.
PROCESS_BYTES = {True: 1536 * MIB, False: 640 * MIB}
EXPERTS_AT_A_TIME = 16
# Positions, places of labels, losses and their sums, per token.
INDEX_BYTES = 48
FLASH_ROW_TOKENS = 128
# float32 sums of two gradients, 64 keys, four programs on each of 132 processors.
SPLIT_BYTES_PER_COLUMN = 2 * 4 * 64 * 4 * 132
BREAKDOWN_ITEMS = (
    "layer_slots",
    "resident_layers",
    "dequant_scratch",
    "lora",
    "optimizer",
    "hidden",
    "checkpoints",
    "attention",
    "mlp",
    "head",
    "allocator_slack",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What the planner decides about memory; the fields are those of `Plan`."""

    micro_batch_tokens: int
    micro_batches_per_visit: int
    layer_slots: int
    mlp_tile_tokens: int
    head_tile_tokens: int
    checkpoints: Literal["device", "host"]
    kernels: Literal["triton", "plain"]
    offload: tuple[str, ...] = ()
    is_hopper: bool = False

    @property
    def visit_tokens(self) -> int:
        """Tokens that pass a layer in one visit."""
        return self.micro_batch_tokens * self.micro_batches_per_visit

    @property
    def mlp_tile_size(self) -> int:
        """Tokens of a tile of the MLP: a micro-batch is cut into tiles of equal size."""
        tiles = -(-self.micro_batch_tokens // self.mlp_tile_tokens)
        return -(-self.micro_batch_tokens // tiles)


def device_bytes(work: Workload, layout: Layout) -> dict[str, int]:
    """What the device must hold at the worst moment of a step, by item.

    `attention`, `mlp` and `head` use the same memory one after another; each is what it needs
    beyond the ones before it, so that the items add up to the peak.
    """
    ring, resident = slot_items(work, layout)
    attention = max(attention_visit_bytes(work, layer, layout) for layer in work.layers)
    mlp = max(
        visit(work, layer, layout)
        for layer in work.layers
        for visit in (mlp_visit_bytes, forward_visit_bytes)
    )
    outside = max(head_bytes(work, layout), embedding_bytes(work, layout))
    items = {
        "layer_slots": ring,
        "resident_layers": resident,
        "dequant_scratch": scratch_bytes(work),
        "lora": lora_device_bytes(work),
        "optimizer": optimizer_device_bytes(work),
        "hidden": hidden_bytes(work, layout),
        "checkpoints": checkpoint_device_bytes(work, layout),
        "attention": attention,
        "mlp": max(0, mlp - attention),
        "head": max(0, outside - max(attention, mlp)),
    }
    changing = sum(items[name] for name in ("hidden", "attention", "mlp", "head"))
    items["allocator_slack"] = slack_bytes(work, layout, changing)
    return items


def slot_bytes(work: Workload) -> int:
    """One slot: the largest layer's blob and, behind it, its adapter in the compute dtype.

    With an optimizer on the GPU the adapter is there already and does not travel.
    """
    item = 0 if is_optimizer_on_device(work) else work.element_bytes
    largest = max(layer.blob_bytes + layer.master_elements * item for layer in work.layers)
    return _round_up(largest, SLOT_ROUNDING_BYTES)


def head_chunk_rows(work: Workload) -> int:
    """Rows of the (V, D) head that fit a slot."""
    rows = slot_bytes(work) // (HEAD_BYTES * work.decoder.hidden_size)
    whole = rows // HEAD_CHUNK_MULTIPLE * HEAD_CHUNK_MULTIPLE
    return min(work.decoder.vocab_size, max(HEAD_CHUNK_MULTIPLE, whole))


def num_head_chunks(work: Workload) -> int:
    """Visits of slots that the head takes."""
    return -(-work.decoder.vocab_size // head_chunk_rows(work))


def slots_for_everything(work: Workload) -> int:
    """Slots with which nothing is copied any more after the first step."""
    return work.num_layers + num_head_chunks(work)


def slot_items(work: Workload, layout: Layout) -> tuple[int, int]:
    """Bytes of the slots that turn over, and of those that in effect keep a layer."""
    ring = min(layout.layer_slots, RING_SLOTS)
    return ring * slot_bytes(work), (layout.layer_slots - ring) * slot_bytes(work)


def scratch_bytes(work: Workload) -> int:
    """The whole layer dequantised: for each group [W | B] over [A | -], (out + R) x (in + R)."""
    largest = max(layer.scratch_elements for layer in work.layers)
    experts = 0
    if work.decoder.num_experts:
        decoder = work.decoder
        experts = EXPERTS_AT_A_TIME * 3 * decoder.expert_size * decoder.hidden_size
    return (largest + experts) * work.element_bytes


def is_optimizer_on_device(work: Workload) -> bool:
    """Whether masters and moments of the adapter live on the GPU."""
    return work.has_device and work.optim != "adamw_torch"


def lora_device_bytes(work: Workload) -> int:
    """float32 gradients of one layer, twice, so that one is sent while the next is summed.

    With the optimizer on the device: masters, gradients and compute copies of all layers (on a
    CPU `optimizer` has the first two).
    """
    if is_optimizer_on_device(work):
        return 2 * 4 * work.master_elements + adapter_copy_bytes(work)
    if not work.has_device:
        return adapter_copy_bytes(work)
    return GRADIENT_BUFFERS * 4 * max(layer.master_elements for layer in work.layers)


def adapter_copy_bytes(work: Workload) -> int:
    """A and B of every layer in the compute dtype."""
    return work.master_elements * work.element_bytes


def optimizer_state_bytes(work: Workload) -> int:
    """Two moments: a byte each with a float32 maximum per 256 elements, or 4 bytes each."""
    elements = work.master_elements
    if work.optim == "adamw_torch":
        return 2 * 4 * elements
    # One flat tensor per layer; too small ones stay float32.
    small = all(layer.master_elements < SMALLEST_8BIT_ELEMENTS for layer in work.layers)
    return 2 * 4 * elements if small else 2 * elements + 2 * 4 * -(-elements // 256)


def optimizer_device_bytes(work: Workload) -> int:
    """Moments inside the allocator; on a CPU masters and gradients, too.

    Paged moments are managed memory, outside the allocator: see `managed_bytes`.
    """
    if not work.has_device:
        return optimizer_state_bytes(work) + 2 * 4 * work.master_elements
    return optimizer_state_bytes(work) if work.optim == "adamw_8bit" else 0


def managed_bytes(work: Workload) -> int:
    """Moments in managed memory: the driver moves them to the card outside the allocator's cap."""
    if work.has_device and work.optim == "paged_adamw_8bit":
        return optimizer_state_bytes(work)
    return 0


def hidden_bytes(work: Workload, layout: Layout) -> int:
    """Hidden states, later their gradients, of all G micro-batches, G N D, and what goes with them.

    Rotary cos and sin, float32, hd/2 each for every head_dim; K and V of the layers that others
    attend to, with float32 gradients; per-layer inputs N L P and the (L P, D) projection that
    makes their context part; hashes for dropout.
    """
    decoder, tokens, item = work.decoder, layout.visit_tokens, work.element_bytes
    stream = tokens * decoder.hidden_size * work.stream_bytes
    rotary = tokens * 4 * sum({layer.shape.head_dim for layer in work.layers})
    shared = sum(
        layer.count * tokens * 2 * layer.kv_size * (item + 4)
        for layer in work.layers
        if layer.is_kv_source
    )
    width = decoder.num_layers * decoder.ple_size
    per_layer = width * (tokens + decoder.hidden_size) * item
    hashes = 8 * tokens if work.has_dropout else 0
    per_token = INDEX_BYTES * tokens
    return stream + rotary + shared + per_layer + hashes + per_token


def embedding_bytes(work: Workload, layout: Layout) -> int:
    """Making a micro-batch's per-layer inputs beside its embedding.

    For a tile of tokens: rows and products of L P in the compute dtype, and three float32 copies
    in their norm.
    """
    decoder, tokens = work.decoder, layout.micro_batch_tokens
    width = decoder.num_layers * decoder.ple_size
    embedded = tokens * decoder.hidden_size * 2 * work.stream_bytes
    tile = min(tokens, PLE_TILE_TOKENS)
    return embedded + tile * width * (2 * work.element_bytes + 3 * 4)


def checkpoint_bytes(work: Workload, layout: Layout) -> int:
    """Every layer's input of all G micro-batches: L G N D."""
    return work.num_layers * layout.visit_tokens * work.decoder.hidden_size * work.stream_bytes


def checkpoint_device_bytes(work: Workload, layout: Layout) -> int:
    """All of them with the outputs that are kept, or buffers for a few that leave or come back."""
    if layout.checkpoints == "device":
        return checkpoint_bytes(work, layout) + offload_bytes(work, layout)
    return BUNDLE_BUFFERS * largest_bundle_bytes(work, layout)


def largest_bundle_bytes(work: Workload, layout: Layout) -> int:
    """A buffer takes any layer's bundle."""
    return max(bundle_bytes(work, layer, layout) for layer in work.layers)


def bundle_bytes(work: Workload, layer: LayerSize, layout: Layout) -> int:
    """What one layer keeps of one micro-batch: its input D, and outputs instead of recomputing."""
    stream = work.decoder.hidden_size * work.stream_bytes
    return layout.micro_batch_tokens * (stream + kept_bytes(work, layer, layout.offload))


def kept_bytes(work: Workload, layer: LayerSize, offload: Collection[str]) -> int:
    """Outputs that a layer keeps instead of recomputing, per token.

    `attention` is the output with its adapter columns, Q + R, and a float32 per head.
    """
    hidden, item = work.decoder.hidden_size, work.element_bytes
    attention = (layer.query_size + layer.o.rank) * item + 4 * layer.shape.num_heads
    sizes = {"down_proj": hidden * item, "o_proj": hidden * item, "attention": attention}
    return sum(sizes[name] for name in offload)


def attention_saved_bytes(work: Workload, layer: LayerSize, layout: Layout) -> int:
    """What the attention half keeps for its backward pass, for a whole micro-batch.

    Normed input D + R, projection, q, own k and v, output Q + R, log-sum-exp (float32, per head),
    projected output D. Where later layers use the K and V of others, `hidden_bytes` has counted
    those, and more than the other layers' own, which live before they do.
    """
    hidden = work.decoder.hidden_size
    columns = hidden + layer.qkv.rank + layer.qkv.out_size + layer.query_size
    columns += layer.query_size + layer.o.rank + hidden
    if not any(kind.is_kv_source for kind in work.layers):
        columns += 2 * layer.kv_size
    tokens = layout.micro_batch_tokens
    return tokens * (columns * work.element_bytes + 4 * layer.shape.num_heads)


def attention_reread_bytes(work: Workload, layer: LayerSize, layout: Layout) -> int:
    """What of `attention_saved_bytes` comes back from where bundles wait: it is counted there."""
    reread = [name for name in layout.offload if name in ("o_proj", "attention")]
    return layout.micro_batch_tokens * kept_bytes(work, layer, reread)


def attention_visit_bytes(work: Workload, layer: LayerSize, layout: Layout) -> int:
    """The backward visit's attention half: what is kept, the incoming gradient D, and

    - before attention: gradients of the output projection, D + R, and of its input, Q; or
    - in attention: gradients of output and q, 2 Q, of k and v, 2 KV, the kernel's workspace; or
    - after it: gradients of q, k, v, of the projection (+ R), of its input and the result.
    """
    hidden, item = work.decoder.hidden_size, work.element_bytes
    tokens, kv = layout.micro_batch_tokens, 2 * layer.kv_size
    attention = 2 * layer.query_size + kv
    inputs = layer.query_size + kv + layer.qkv.out_size + layer.qkv.rank + hidden
    worst = max(
        tokens * (hidden + layer.o.rank + layer.query_size) * item,
        tokens * attention * item + attention_workspace_bytes(work, layer, layout),
        tokens * (inputs * item + hidden * work.stream_bytes),
    )
    saved = attention_saved_bytes(work, layer, layout) + tokens * hidden * work.stream_bytes
    saved -= attention_reread_bytes(work, layer, layout)
    widest = max(hidden, layer.query_size)
    return saved + worst + unfused_bytes(work, layout, tokens, widest)


def attention_workspace_bytes(work: Workload, layer: LayerSize, layout: Layout) -> int:
    """Inside the attention kernel's backward pass.

    FlashAttention (head_dim up to 256): float32 sums of the queries' gradient, N Q, with 128
    tokens more for each row, and K and V gradients per query head where heads share them. Ours: a
    float32 per head and token, and float32 sums of the gradients of k and v by split, no more than
    query heads and no more than fill the card. Plain: three float32 copies of the scores of 256
    queries, and float32 sums.
    """
    shape, tokens = layer.shape, layout.micro_batch_tokens
    shared = 2 * work.element_bytes if shape.num_heads != shape.num_kv_heads else 0
    sums = 4 * (tokens + FLASH_ROW_TOKENS * work.most_rows(tokens)) * layer.query_size
    flash = sums + shared * tokens * layer.query_size
    splits = min(8 * tokens * layer.query_size, SPLIT_BYTES_PER_COLUMN * shape.head_dim)
    ours = 4 * tokens * shape.num_heads + splits
    fused = max(flash, ours) if shape.head_dim <= 256 else ours
    if layout.kernels == "triton":
        return fused
    keys = min(work.max_length, (shape.sliding_window or work.max_length) + 256)
    plain = 3 * 4 * shape.num_heads * 256 * keys + tokens * 2 * layer.kv_size * 4
    return max(plain, fused) if work.has_device else plain


def mlp_visit_bytes(work: Workload, layer: LayerSize, layout: Layout) -> int:
    """The backward visit's MLP half: what attention keeps, its output D, and a tile.

    The incoming gradient is one of the visit's hidden states; the result takes the place of
    attention's output.
    """
    stream = work.decoder.hidden_size * work.stream_bytes
    _, backward = mlp_tile_bytes(work, layer, layout)
    saved = attention_saved_bytes(work, layer, layout)
    saved -= attention_reread_bytes(work, layer, layout)
    return saved + layout.micro_batch_tokens * stream + backward


def forward_visit_bytes(work: Workload, layer: LayerSize, layout: Layout) -> int:
    """The forward visit: the worse of

    - attention: all that it makes, and its output D; and
    - the MLP: that output, what is kept of attention, and the last tile beside the kept outputs of
      those before it.

    The layer's input is one of the visit's hidden states; the result takes the place of
    attention's output.
    """
    hidden, tokens, tile = work.decoder.hidden_size, layout.micro_batch_tokens, layout.mlp_tile_size
    stream = hidden * work.stream_bytes
    attention = attention_saved_bytes(work, layer, layout) + tokens * stream
    attention += unfused_bytes(work, layout, tokens, max(hidden, layer.query_size))
    forward, _ = mlp_tile_bytes(work, layer, layout)
    down = hidden * work.element_bytes if "down_proj" in layout.offload else 0
    tiles = (tokens - tile) * down + forward
    mlp = tokens * stream + attention_reread_bytes(work, layer, layout) + tiles
    return max(attention, mlp)


def mlp_tile_bytes(work: Workload, layer: LayerSize, layout: Layout) -> tuple[int, int]:
    """One tile of T tokens: its forward pass, and its recomputation with its backward pass.

    Both: normed input D + R, gate and up 2 F, product F + R, output of down D; with per-layer
    inputs gate and product 2 P and their projection D. Forward: with them the sum before the
    per-layer block D. Backward: gradient of the residual D; and gradients of the product F and of
    gate and up 2 F + R, or the latter with that of the input D; or before them those of the
    per-layer block, 3 D + 3 P. Dropout, while the adapter of down goes backward: gradient of the
    product F, its dropped input, the gradient through it and that one's masked copy, 3 F, beside
    2.5 D (measured).
    """
    decoder, item = work.decoder, work.element_bytes
    hidden, feed_forward = decoder.hidden_size, layer.shape.intermediate_size
    tokens, stream = layout.mlp_tile_size, hidden * work.stream_bytes
    both = (2 * hidden + layer.gate_up.rank + 3 * feed_forward + layer.down.rank) * item
    worst = (2 * feed_forward + layer.gate_up.rank + max(feed_forward, hidden)) * item
    forward = 0
    if decoder.ple_size:
        both += (2 * decoder.ple_size + hidden) * item
        worst = max(worst, 3 * decoder.ple_size * item + 3 * stream)
        forward += stream
    experts = decoder.num_active_experts * (2 * hidden + 3 * decoder.expert_size) * item
    unfused = 0
    if layout.kernels == "plain":
        unfused = unfused_bytes(work, layout, tokens, max(hidden, feed_forward))
    elif work.has_dropout:
        worst = max(worst, (4 * feed_forward + 5 * hidden // 2) * item)
        forward += feed_forward * item
    reread = hidden * item if "down_proj" in layout.offload else 0
    return (
        tokens * (both + forward + experts),
        tokens * (both - reread + stream + worst + 2 * experts) + unfused,
    )


def unfused_bytes(work: Workload, layout: Layout, tokens: int, columns: int) -> int:
    """Copies of (tokens, columns) that are not made where kernels are fused.

    Norms, rotations and activations in plain PyTorch: up to eight float32 copies. Dropout: dropped
    inputs, the gradient through them and its masked copy; plain, 64-bit hashes as well.
    """
    is_plain = layout.kernels == "plain"
    per_element = 8 * 4 if is_plain else 0
    if work.has_dropout:
        per_element += 3 * work.element_bytes + (4 * 8 if is_plain else 0)
    return tokens * columns * per_element


def head_bytes(work: Workload, layout: Layout) -> int:
    """Loss of the n labelled tokens of a visit, then the gradient of its hidden states G N D.

    For the loss: states, rows of the labels (later the gradient), and float32 sums U, n D each;
    rows of the labels of one chunk, at worst of all, n D, and those of one micro-batch; for a tile
    of t tokens and C rows float32 logits and their weights, of which plain code makes seven more
    copies; and the chunk where it must be converted. At its end a tile takes five float32 copies
    of D. Afterwards: the rows' gradient n D, that of all hidden states G N D, and twice the rows
    of one micro-batch.
    """
    hidden, item = work.decoder.hidden_size, work.element_bytes
    stream, tokens = hidden * work.stream_bytes, min(layout.visit_tokens, work.step_loss_tokens)
    rows, tile = head_chunk_rows(work), min(layout.head_tile_tokens, tokens)
    logits = tile * rows * (4 + item + (28 if layout.kernels == "plain" else 0))
    converted = 0 if work.compute_dtype == "bfloat16" else rows * hidden * item
    one = min(layout.micro_batch_tokens, tokens)
    kept = tokens * hidden * (2 * item + 4 + HEAD_BYTES) + one * stream
    loss = kept + max(logits + converted, tile * hidden * 5 * 4)
    gradient = tokens * hidden * item + layout.visit_tokens * stream + 2 * one * stream
    return max(loss, gradient)


def slack_bytes(work: Workload, layout: Layout, changing_bytes: int) -> int:
    """What the allocator reserves beyond what is asked for.

    Args:
        work: What is asked for.
        layout: What was decided.
        changing_bytes: What comes and goes in a step.
    """
    if not work.has_device:
        return int(changing_bytes * FRAGMENTATION_RATIO) + PROCESS_BYTES[False]
    fragments = FRAGMENTATION_RATIO * changing_bytes
    if layout.checkpoints == "host":
        fragments += BUFFER_FRAGMENTATION_RATIO * largest_bundle_bytes(work, layout)
    if layout.micro_batches_per_visit > 1:
        stream = layout.visit_tokens * work.decoder.hidden_size * work.stream_bytes
        fragments += VISIT_FRAGMENTATION_RATIO * stream
    return int(fragments) + PAGE_BYTES + CUBLAS_BYTES[layout.is_hopper]


def offload_bytes(work: Workload, layout: Layout) -> int:
    """Outputs of all layers and micro-batches that are kept instead of recomputed."""
    each = sum(layer.count * kept_bytes(work, layer, layout.offload) for layer in work.layers)
    return each * layout.visit_tokens


def _round_up(size_bytes: int, multiple: int) -> int:
    return -(-size_bytes // multiple) * multiple
