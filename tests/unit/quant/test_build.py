"""Preparing a store: right content, atomic, resumable, within the disk."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path
from typing import NoReturn

import filelock
import pytest
import torch
from safetensors.torch import save_file

from eightgig.errors import ConfigError, DoesNotFitError, ModelError, RunError
from eightgig.models.checkpoint import layer_tensor_names, other_tensor_names, read_model_spec
from eightgig.models.spec import ModelSpec, linear_shapes
from eightgig.quant import writer
from eightgig.quant.build import MANIFEST_FILE, Progress, StoreProgress, prepare_store
from eightgig.quant.nf4 import quantize_nf4
from eightgig.quant.parts import prepared_bytes, store_key
from eightgig.quant.store import Store
from eightgig.units import format_bytes
from tests.tiny import TRAINABLE_FAMILIES
from tests.unit.quant.checkpoints import (
    CPU,
    Hub,
    make_checkpoint,
    stored_numbers,
    weights_of,
)

DiskUsage = namedtuple("DiskUsage", "total used free")


def prepare(spec: ModelSpec, folder: Path, cache_dir: Path, **settings: object) -> Store:
    path = prepare_store(
        spec, folder, cache_dir=cache_dir, device=settings.pop("device", CPU), **settings
    )
    return Store.open(path)


class Interrupted(BaseException):
    """As Ctrl-C or a kill: nobody catches it."""


def interrupt_after(share: float) -> Progress:
    def progress(now: StoreProgress) -> None:
        if now.done_bytes > share * now.total_bytes:
            raise Interrupted

    return progress


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", TRAINABLE_FAMILIES)
def test_a_dense_store_holds_the_numbers_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    spec, folder = make_checkpoint(family, tmp_path / "model")
    store = prepare(spec, folder, tmp_path / "cache", quantization="none")
    weights, others = weights_of(folder), other_tensor_names(spec)
    for index, blob in enumerate(store.manifest.layers):
        names = layer_tensor_names(spec, index)
        assert set(blob.tensors) == set(names)
        for name, full_name in names.items():
            offset = spec.decoder.norm_offset if name.endswith("_norm") else 0.0
            expected = (weights[full_name] + offset).view(blob.tensors[name].shape)
            assert torch.equal(stored_numbers(store, index, name), expected), name
    tables = {"embedding": store.embedding, "head": store.head, "ple": store.ple}
    for name, table in tables.items():
        assert (table is None) == (name not in others)
        assert table is None or torch.equal(table, weights[others[name]])
    for name, tensor in store.other().items():
        offset = spec.decoder.norm_offset if name.endswith("_norm") else 0.0
        assert torch.equal(tensor, weights[others[name]] + offset), name


@pytest.mark.parametrize("family", ["gemma4_e2b", "qwen2", "gemma3_text"])
def test_linears_are_quantised_and_the_rest_is_not(family: str, tmp_path: Path) -> None:
    spec, folder = make_checkpoint(family, tmp_path / "model", dtype="bfloat16")
    store = prepare(spec, folder, tmp_path / "cache")
    weights = weights_of(folder)
    for index, blob in enumerate(store.manifest.layers):
        linears = linear_shapes(spec.decoder, spec.decoder.layers[index])
        for name, full_name in layer_tensor_names(spec, index).items():
            stored = blob.tensors[name]
            assert stored.format == ("nf4" if name in linears else "dense"), name
            if name not in linears:
                continue
            quantized = quantize_nf4(weights[full_name])
            codes = store.blob(index)[stored.offset_bytes :][: stored.size_bytes]
            assert torch.equal(codes, quantized.codes), name
            assert stored.nested is not None
            assert stored.nested.mean == quantized.mean
            error = stored_numbers(store, index, name) - weights[full_name]
            assert error.abs().max() < 0.2 * weights[full_name].abs().max(), name
    assert torch.equal(store.embedding, weights[other_tensor_names(spec)["embedding"]])


def test_norms_of_a_16_bit_checkpoint_are_offset_in_float32(tmp_path: Path) -> None:
    spec, folder = make_checkpoint("gemma3_text", tmp_path / "model", dtype="bfloat16")
    store = prepare(spec, folder, tmp_path / "cache")
    weight = weights_of(folder)["model.layers.0.input_layernorm.weight"]
    assert torch.equal(stored_numbers(store, 0, "input_norm"), weight.float() + 1.0)


def test_the_size_is_known_before(tmp_path: Path) -> None:
    spec, folder = make_checkpoint("gemma4_e2b", tmp_path / "model")
    for quantization in ("nf4", "none"):
        store = prepare(spec, folder, tmp_path / "cache", quantization=quantization)
        written = sum(
            path.stat().st_size for path in store.folder.iterdir() if path.name != MANIFEST_FILE
        )
        planned = prepared_bytes(spec, quantization)
        assert planned - 1024 <= written <= planned


def test_progress_rises_from_nothing_to_all_bytes(tmp_path: Path) -> None:
    spec, folder = make_checkpoint("qwen3", tmp_path / "model")
    calls: list[StoreProgress] = []
    prepare(spec, folder, tmp_path, progress=calls.append)
    done = [call.done_bytes for call in calls]
    assert done[0] == 0
    assert done == sorted(done)
    assert {call.total_bytes for call in calls} == {done[-1]}
    assert len(calls) > spec.decoder.num_layers


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_an_interrupted_preparation_goes_on_and_ends_as_one_that_was_not(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = make_checkpoint("gemma4_12b", tmp_path / "model")
    whole = prepare(spec, folder, tmp_path / "whole")
    with pytest.raises(Interrupted):
        prepare(spec, folder, tmp_path / "cut", progress=interrupt_after(share))
    begun = tmp_path / "cut" / whole.folder.name
    assert not (begun / MANIFEST_FILE).exists()
    finished = {path.stem for path in begun.glob("*.blob.json")}
    blobs: list[str] = []
    write = writer.write_parts
    monkeypatch.setattr(
        writer, "write_parts", lambda path, parts: [blobs.append(path.name), write(path, parts)][1]
    )
    calls: list[StoreProgress] = []
    prepare(spec, folder, tmp_path / "cut", progress=calls.append)
    assert not finished & set(blobs)
    assert (calls[0].done_bytes > 0) == bool(finished)
    assert files_of(begun) == files_of(whole.folder)


def test_a_blob_that_was_cut_or_is_not_described_is_written_again(tmp_path: Path) -> None:
    spec, folder = make_checkpoint("llama", tmp_path / "model")
    whole = prepare(spec, folder, tmp_path / "whole")
    with pytest.raises(Interrupted):
        prepare(spec, folder, tmp_path / "cut", progress=interrupt_after(0.9))
    begun = tmp_path / "cut" / whole.folder.name
    (begun / "layer-000.blob").write_bytes(b"cut")
    (begun / "layer-001.blob.json").write_text("{", "utf-8")
    (begun / "layer-002.blob.json").unlink()
    prepare(spec, folder, tmp_path / "cut")
    assert files_of(begun) == files_of(whole.folder)


def test_a_finished_store_is_not_touched(tmp_path: Path) -> None:
    spec, folder = make_checkpoint("llama", tmp_path / "model")
    store = prepare(spec, folder, tmp_path / "cache")
    times = {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    prepare(spec, folder, tmp_path / "cache", progress=interrupt_after(0.0))
    assert times == {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()}


def test_two_processes_do_not_prepare_one_store(tmp_path: Path) -> None:
    spec, folder = make_checkpoint("llama", tmp_path / "model")
    key = store_key(spec, folder, "nf4")
    with (
        filelock.FileLock(tmp_path / f"{key}.lock"),
        pytest.raises(RunError, match="Another process is preparing"),
    ):
        prepare(spec, folder, tmp_path)
    prepare(spec, folder, tmp_path)


def test_a_disk_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = make_checkpoint("gemma4_e4b", tmp_path / "model")
    needed_bytes = prepared_bytes(spec, "nf4")
    usage = DiskUsage(0, 0, needed_bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DoesNotFitError, match=f"needs {format_bytes(needed_bytes)} of disk"):
        prepare(spec, folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.blob"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(0, 0, needed_bytes))
    prepare(spec, folder, tmp_path / "cache")


def test_going_on_needs_room_for_the_rest_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = make_checkpoint("llama", tmp_path / "model")
    with pytest.raises(Interrupted):
        prepare(spec, folder, tmp_path / "cache", progress=interrupt_after(0.9))
    usage = DiskUsage(0, 0, prepared_bytes(spec, "nf4") // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    prepare(spec, folder, tmp_path / "cache")


def test_a_disk_that_becomes_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, folder = make_checkpoint("llama", tmp_path / "model")

    def fail(path: Path, parts: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(writer, "write_parts", fail)
    with pytest.raises(DoesNotFitError, match="The disk became full"):
        prepare(spec, folder, tmp_path / "cache")


def test_a_file_system_without_large_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = make_checkpoint("llama", tmp_path / "model")

    def fail(path: Path, parts: object) -> NoReturn:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(writer, "write_parts", fail)
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        prepare(spec, folder, tmp_path / "cache")
    assert "another file system" in caught.value.fix


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    spec, folder = make_checkpoint("llama", tmp_path / "model")
    (tmp_path / "file").write_text("no folder", "utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare(spec, folder, tmp_path / "file" / "cache")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    spec, folder = make_checkpoint("llama", tmp_path / "model")
    weights = weights_of(folder)
    weights["model.layers.1.mlp.up_proj.weight"][3, 7] = value
    save_file(weights, folder / "model.safetensors")
    spec = read_model_spec(folder)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* not finite"):
        prepare(spec, folder, tmp_path / "cache")


def test_the_key_changes_with_whatever_changes_the_content(tmp_path: Path) -> None:
    spec, folder = make_checkpoint("llama", tmp_path / "model")
    keys = [
        store_key(spec, folder, "nf4"),
        store_key(spec, folder, "none"),
        store_key(spec, folder, "nf4", copies_tables=True),
    ]
    (folder / "model.safetensors").touch()
    keys.append(store_key(spec, folder, "nf4"))
    other, folder = make_checkpoint("llama", tmp_path / "model", tie=True)
    keys.append(store_key(other, folder, "nf4"))
    assert len(set(keys)) == len(keys)
    assert all(key.startswith("model-n") for key in keys)


def test_the_key_of_a_hub_snapshot_needs_no_files(tmp_path: Path) -> None:
    spec, folder = make_checkpoint("llama", tmp_path / "model")
    hub = Hub(folder, tmp_path / "hub")
    key = store_key(spec, hub.snapshot, "nf4")
    hub.fetch("model.safetensors")
    assert store_key(spec, hub.snapshot, "nf4") == key


@pytest.mark.parametrize("family", ["gemma4_e2b", "mistral", "gemma4_31b"])
def test_a_download_is_prepared_file_by_file_and_deleted(family: str, tmp_path: Path) -> None:
    spec, folder = make_checkpoint(family, tmp_path / "model", max_shard_size="150KB")
    num_files = len(list(folder.glob("*.safetensors")))
    assert num_files > 3
    hub = Hub(folder, tmp_path / "hub")
    store = prepare(spec, hub.download, tmp_path / "cache")
    assert list(hub.snapshot.iterdir()) == []
    assert hub.most_files < num_files
    assert len(hub.fetched) == len(set(hub.fetched))
    weights, others = weights_of(folder), other_tensor_names(spec)
    assert torch.equal(store.embedding, weights[others["embedding"]])
    assert torch.equal(store.head, weights[others["head"]])
    if store.ple is not None:
        assert torch.equal(store.ple, weights[others["ple"]])
    mapped = prepare(spec, folder, tmp_path / "cache")
    assert store.manifest.layers == mapped.manifest.layers


def test_an_interrupted_download_fetches_only_what_is_missing(tmp_path: Path) -> None:
    spec, folder = make_checkpoint("gemma4_e2b", tmp_path / "model", max_shard_size="150KB")
    hub = Hub(folder, tmp_path / "hub")
    with pytest.raises(Interrupted):
        prepare(spec, hub.download, tmp_path / "cache", progress=interrupt_after(0.7))
    assert len(hub.fetched) > 2
    hub.fetched.clear()
    before = {path.name for path in (tmp_path / "cache").rglob("*.blob")}
    store = prepare(spec, hub.download, tmp_path / "cache")
    assert list(hub.snapshot.iterdir()) == []
    assert len(before) > 1
    assert len(hub.fetched) < len(list(folder.glob("*.safetensors"))) / 2
    whole = prepare(spec, Hub(folder, tmp_path / "again").download, tmp_path / "other")
    assert files_of(store.folder) == files_of(whole.folder)


def test_a_download_needs_room_for_the_files_it_holds_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = make_checkpoint("mistral", tmp_path / "model", max_shard_size="150KB")
    hub = Hub(folder, tmp_path / "hub")
    own_bytes = prepared_bytes(spec, "nf4", copies_tables=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(0, 0, own_bytes))
    with pytest.raises(DoesNotFitError, match="of disk"):
        prepare(spec, hub.download, tmp_path / "cache")
    assert hub.fetched == []
    most = hub_room(own_bytes, folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(0, 0, most))
    prepare(spec, hub.download, tmp_path / "cache")


def hub_room(own_bytes: int, folder: Path) -> int:
    """The store and three files of the checkpoint, far from all of them."""
    sizes = sorted(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert len(sizes) > 4
    return own_bytes + sum(sizes[-3:])
