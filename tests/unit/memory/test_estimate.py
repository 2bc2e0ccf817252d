import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eightgig.memory import estimate, host_estimate
from eightgig.memory.estimate import Layout
from eightgig.units import MIB
from tests.unit.memory import cases

LAYOUT = Layout(
    micro_batch_tokens=1024,
    micro_batches_per_visit=2,
    layer_slots=3,
    mlp_tile_tokens=512,
    head_tile_tokens=512,
    checkpoints="host",
    kernels="triton",
)
# A decoder whose bytes are worked out by hand below: D 512, Q 256, K and V 128 each, F 1024,
# four layers, V 32,000, r 16: R 48, 16, 32, 16.
SMALL = cases.small_decoder()


def _items(layout: Layout = LAYOUT, **groups: dict[str, object]) -> dict[str, int]:
    return estimate.device_bytes(cases.workload(SMALL, **groups), layout)


def test_items_are_those_of_the_plan_and_none_is_negative() -> None:
    items = _items()
    assert tuple(items) == estimate.BREAKDOWN_ITEMS
    assert all(size >= 0 for size in items.values())


def test_a_slot_holds_the_blob_and_the_adapter_s_copy_in_whole_segments() -> None:
    work = cases.workload(SMALL)
    (layer,) = work.layers
    needed = layer.blob_bytes + 2 * layer.master_elements
    assert 0 <= estimate.slot_bytes(work) - needed < 2 * MIB
    assert estimate.slot_bytes(work) % (2 * MIB) == 0


def test_head_chunks_fill_a_slot_by_whole_rows() -> None:
    work = cases.workload(SMALL)
    rows = estimate.head_chunk_rows(work)
    assert rows % 256 == 0
    assert rows * 2 * 512 <= estimate.slot_bytes(work) < (rows + 256) * 2 * 512
    assert estimate.num_head_chunks(work) == -(-32_000 // rows)


def test_a_small_vocabulary_is_one_chunk() -> None:
    work = cases.workload(dataclasses.replace(SMALL, vocab_size=300))
    assert estimate.head_chunk_rows(work) == 300
    assert estimate.slots_for_everything(work) == 5


def test_slots_beyond_the_ring_are_resident() -> None:
    work = cases.workload(SMALL)
    seven = dataclasses.replace(LAYOUT, layer_slots=7)
    slot = estimate.slot_bytes(work)
    assert estimate.slot_items(work, seven) == (3 * slot, 4 * slot)
    assert estimate.slot_items(work, dataclasses.replace(LAYOUT, layer_slots=2)) == (2 * slot, 0)


def test_scratch_is_one_layer_with_its_adapter() -> None:
    qkv, o = (512 + 48) * (512 + 48), (512 + 16) * (256 + 16)
    gate_up, down = (2048 + 32) * (512 + 32), (512 + 16) * (1024 + 16)
    assert _items()["dequant_scratch"] == 2 * (qkv + o + gate_up + down)


def test_checkpoints_on_the_device_are_every_layer_s_input() -> None:
    device = dataclasses.replace(LAYOUT, checkpoints="device")
    assert _items(device)["checkpoints"] == 4 * 2 * 1024 * 512 * 2
    assert _items()["checkpoints"] == 3 * 1024 * 512 * 2


def test_hidden_states_count_once_for_the_whole_visit() -> None:
    tokens = 2 * 1024
    stream, rotary = 512 * 2, 4 * 64
    assert _items()["hidden"] == tokens * (stream + rotary + estimate.INDEX_BYTES)


def test_what_attention_keeps_is_its_inputs_and_outputs() -> None:
    work = cases.workload(SMALL)
    columns = (512 + 48) + 512 + 256 + 2 * 128 + (256 + 16) + 512
    kept = estimate.attention_saved_bytes(work, work.layers[0], LAYOUT)
    assert kept == 1024 * (2 * columns + 4 * 4)


def test_a_tile_is_its_forward_pass_and_its_backward_pass_with_it() -> None:
    work = cases.workload(SMALL)
    forward, backward = estimate.mlp_tile_bytes(work, work.layers[0], LAYOUT)
    both = (512 + 32) + 2 * 1024 + (1024 + 16) + 512
    assert forward == 512 * 2 * both
    assert backward == 512 * 2 * (both + 512 + 1024 + (2 * 1024 + 32))


def test_tiles_of_a_micro_batch_are_of_one_size() -> None:
    assert LAYOUT.mlp_tile_size == 512
    assert dataclasses.replace(LAYOUT, mlp_tile_tokens=1000).mlp_tile_size == 512
    assert dataclasses.replace(LAYOUT, mlp_tile_tokens=400).mlp_tile_size == 342
    assert dataclasses.replace(LAYOUT, mlp_tile_tokens=9000).mlp_tile_size == 1024


def test_results_of_earlier_tiles_take_no_place_of_their_own() -> None:
    work, layout = cases.workload(SMALL), dataclasses.replace(LAYOUT, mlp_tile_tokens=256)
    layer = work.layers[0]
    saved = estimate.attention_saved_bytes(work, layer, layout)
    _, backward = estimate.mlp_tile_bytes(work, layer, layout)
    assert estimate.mlp_visit_bytes(work, layer, layout) == saved + 1024 * 512 * 2 + backward


def test_the_head_takes_states_sums_and_one_tile_of_logits() -> None:
    few = dataclasses.replace(LAYOUT, head_tile_tokens=64)
    many = dataclasses.replace(LAYOUT, head_tile_tokens=2048)
    work = cases.workload(SMALL)
    rows, tokens = estimate.head_chunk_rows(work), 2 * 1024
    kept = tokens * 512 * (3 * 2 + 4) + 1024 * 512 * 2
    assert estimate.head_bytes(work, few) == kept + 64 * rows * 6
    assert estimate.head_bytes(work, many) == kept + tokens * rows * 6


def test_few_labels_leave_the_gradient_of_all_hidden_states() -> None:
    work = dataclasses.replace(cases.workload(SMALL), step_loss_tokens=1)
    device = dataclasses.replace(LAYOUT, checkpoints="device")
    labelled = 512 * 2
    assert estimate.head_bytes(work, device) == 2 * 1024 * 512 * 2 + 3 * labelled


def test_the_optimizer_on_the_host_takes_two_buffers_of_a_layer_s_gradients() -> None:
    items = _items()
    (layer,) = cases.workload(SMALL).layers
    assert items["lora"] == 2 * 4 * layer.master_elements
    assert items["optimizer"] == 0


def test_the_8_bit_optimizer_takes_masters_gradients_copies_and_states() -> None:
    items = _items(train={"optim": "adamw_8bit"})
    work = cases.workload(SMALL)
    masters = work.master_elements
    assert items["lora"] == 8 * masters + estimate.adapter_copy_bytes(work)
    assert items["optimizer"] == 2 * masters + 8 * -(-masters // 256)


def test_paged_states_are_outside_the_allocator_and_counted() -> None:
    work = cases.workload(SMALL, train={"optim": "paged_adamw_8bit"})
    assert estimate.optimizer_device_bytes(work) == 0
    assert estimate.managed_bytes(work) == estimate.optimizer_state_bytes(work) > 0
    assert host_estimate.host_bytes(work, LAYOUT, "pinned")["managed_optimizer"] > 0


def test_states_of_tiny_tensors_stay_float32() -> None:
    sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 64}
    layers = tuple(dataclasses.replace(layer, **sizes) for layer in SMALL.layers)
    tiny = dataclasses.replace(SMALL, hidden_size=64, layers=layers)
    work = cases.workload(tiny, lora={"r": 4}, train={"optim": "adamw_8bit"})
    assert estimate.optimizer_state_bytes(work) == 8 * work.master_elements


def test_with_the_optimizer_on_the_device_the_adapter_does_not_travel() -> None:
    host = cases.workload(cases.gemma("12B"), lora={"r": 128})
    device = cases.workload(cases.gemma("12B"), lora={"r": 128}, train={"optim": "adamw_8bit"})
    assert estimate.slot_bytes(device) < estimate.slot_bytes(host)


def test_shared_keys_and_values_and_their_gradients_count_for_all_micro_batches() -> None:
    spec = cases.gemma("E2B")
    work = cases.workload(spec)
    one = dataclasses.replace(LAYOUT, micro_batches_per_visit=1)
    more = estimate.hidden_bytes(work, LAYOUT) - estimate.hidden_bytes(work, one)
    shared = 2 * (256 + 512) * (2 + 4)  # K and V of a sliding and a global producer
    width = 35 * 256 * 2
    assert more == 1024 * (1536 * 2 + 4 * (256 + 512) + shared + width + estimate.INDEX_BYTES)


def test_items_add_up_to_the_worst_phase() -> None:
    work = cases.workload(SMALL)
    items = estimate.device_bytes(work, LAYOUT)
    layer = work.layers[0]
    worst = max(
        estimate.attention_visit_bytes(work, layer, LAYOUT),
        estimate.mlp_visit_bytes(work, layer, LAYOUT),
        estimate.forward_visit_bytes(work, layer, LAYOUT),
        estimate.head_bytes(work, LAYOUT),
    )
    assert items["attention"] + items["mlp"] + items["head"] == worst


def test_plain_kernels_and_dropout_take_more() -> None:
    plain = dataclasses.replace(LAYOUT, kernels="plain")
    fused, unfused = sum(_items().values()), sum(_items(plain).values())
    dropped = sum(_items(lora={"lora_dropout": 0.05}).values())
    assert fused < dropped < unfused


def test_the_plain_attention_block_does_not_grow_with_the_square_of_the_row() -> None:
    work = cases.workload(SMALL, max_length=8192)
    layer = work.layers[0]
    sizes = [
        estimate.attention_workspace_bytes(
            dataclasses.replace(work, max_length=tokens),
            layer,
            dataclasses.replace(LAYOUT, kernels="plain", micro_batch_tokens=tokens),
        )
        for tokens in (2048, 4096, 8192)
    ]
    assert sizes[2] < 2.2 * sizes[1] < 5 * sizes[0]


def test_float16_needs_a_wider_residual_stream() -> None:
    work = cases.workload(SMALL)
    half = dataclasses.replace(work, compute_dtype="float16")
    assert estimate.hidden_bytes(half, LAYOUT) > estimate.hidden_bytes(work, LAYOUT)
    assert estimate.checkpoint_bytes(half, LAYOUT) == 2 * estimate.checkpoint_bytes(work, LAYOUT)


@pytest.mark.parametrize("name", ["down_proj", "o_proj", "attention"])
def test_kept_outputs_wait_on_the_host_and_in_buffers(name: str) -> None:
    work = cases.workload(SMALL)
    kept = dataclasses.replace(LAYOUT, offload=(name,))
    columns = 512 if name != "attention" else 256 + 16 + 2 * 4
    assert estimate.offload_bytes(work, kept) == 4 * 2 * 1024 * columns * 2
    host = host_estimate.host_bytes(work, kept, "pinned")
    assert host["offload"] == estimate.offload_bytes(work, kept)
    more = _items(kept)["checkpoints"] - _items()["checkpoints"]
    assert more == 3 * 1024 * columns * 2


def test_what_comes_back_from_the_host_is_not_made_again() -> None:
    work = cases.workload(SMALL)
    layer = work.layers[0]
    kept = dataclasses.replace(LAYOUT, offload=("down_proj", "o_proj", "attention"))

    def less(visit: Callable[..., int]) -> int:
        return visit(work, layer, LAYOUT) - visit(work, layer, kept)

    attention = 1024 * (512 * 2 + (256 + 16) * 2 + 4 * 4)
    assert less(estimate.attention_visit_bytes) == attention
    assert less(estimate.mlp_visit_bytes) == attention + 512 * 512 * 2
    assert less(estimate.forward_visit_bytes) < 0


def test_packed_rows_take_more_in_flash_attention_and_a_row_alone_does_not() -> None:
    layout = dataclasses.replace(LAYOUT, micro_batch_tokens=4096)
    packed = cases.workload(SMALL)
    alone = cases.workload(SMALL, data={"packing": False})
    more = [
        estimate.attention_workspace_bytes(work, work.layers[0], layout) for work in (packed, alone)
    ]
    assert more[0] - more[1] == 4 * 128 * (8 - 1) * 256


def test_mapped_layers_take_no_host_memory_of_their_own() -> None:
    work = cases.workload(SMALL)
    pinned = host_estimate.host_bytes(work, LAYOUT, "pinned")
    mapped = host_estimate.host_bytes(work, LAYOUT, "mapped")
    assert pinned["layers"] == host_estimate.layer_blobs_bytes(work)
    assert pinned["head"] == 32_000 * 512 * 2
    assert "layers" not in mapped
    assert "head" not in mapped


def test_the_host_optimizer_takes_sixteen_bytes_a_parameter_and_pins_in_powers_of_two() -> None:
    work = cases.workload(SMALL)
    host = host_estimate.host_bytes(work, LAYOUT, "mapped")
    assert host["adapter"] == 12 * work.master_elements
    assert 4 * work.master_elements <= host["gradients"] < 8 * work.master_elements
    assert host["gradients"].bit_count() == 1
    on_card = cases.workload(SMALL, train={"optim": "adamw_8bit"})
    assert "gradients" not in host_estimate.host_bytes(on_card, LAYOUT, "mapped")


def test_tables_are_the_embedding_the_head_and_per_layer_rows() -> None:
    tables = host_estimate.table_bytes(cases.workload(cases.gemma("E4B")))
    assert tables["embedding"] == 262_144 * 2560 * 2
    assert tables["head"] == 0  # tied
    assert tables["ple"] == 262_144 * 42 * 256 * 2
    assert host_estimate.table_bytes(cases.workload(SMALL))["head"] == 32_000 * 512 * 2


def test_disk_holds_the_store_and_one_checkpoint_more_than_are_kept() -> None:
    work = cases.workload(SMALL)
    masters = work.master_elements
    full = host_estimate.disk_bytes(work, is_prepared=False, has_tables=False, num_checkpoints=3)
    tables = sum(host_estimate.table_bytes(work).values())
    assert full == host_estimate.layer_blobs_bytes(work) + tables + 4 * 12 * masters + 4 * masters
    prepared = host_estimate.disk_bytes(work, is_prepared=True, has_tables=True, num_checkpoints=3)
    assert prepared == 4 * 12 * masters + 4 * masters


GROWING = ("micro_batch_tokens", "micro_batches_per_visit", "layer_slots", "mlp_tile_tokens")


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from(cases.SIZES),
    name=st.sampled_from(GROWING),
    tokens=st.integers(1, 4096),
    factor=st.integers(2, 5),
    checkpoints=st.sampled_from(["device", "host"]),
    kernels=st.sampled_from(["triton", "plain"]),
)
def test_more_never_takes_less(
    size: str, name: str, tokens: int, factor: int, checkpoints: str, kernels: str
) -> None:
    work = cases.workload(cases.gemma(size), max_length=tokens)
    layout = dataclasses.replace(
        LAYOUT, micro_batch_tokens=tokens, checkpoints=checkpoints, kernels=kernels
    )
    larger = dataclasses.replace(layout, **{name: getattr(layout, name) * factor})
    before, after = (sum(estimate.device_bytes(work, each).values()) for each in (layout, larger))
    assert before <= after
