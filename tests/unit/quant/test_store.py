"""Opening a store: what is damaged is found, what is mapped is not copied."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eightgig.config import ModelConfig
from eightgig.errors import ConfigError, ModelError
from eightgig.models.checkpoint import read_model_spec
from eightgig.quant.build import StoreProgress
from eightgig.quant.store import Store, is_prepared, open_store, store_folder
from tests.unit.quant.checkpoints import CPU, Hub, make_checkpoint, weights_of


def make_store(tmp_path: Path, family: str = "llama", **settings: object) -> Store:
    spec, folder = make_checkpoint(family, tmp_path / "model", **settings)
    config = ModelConfig(name=str(folder), cache_dir=str(tmp_path / "cache"))
    return open_store(spec, folder, config, device=CPU)


def test_a_store_is_prepared_once_and_then_found(tmp_path: Path) -> None:
    spec, folder = make_checkpoint("llama", tmp_path / "model")
    config = ModelConfig(name="x", cache_dir=str(tmp_path / "cache"))
    found = SimpleNamespace(spec=spec, folder=folder, hub=None)
    assert not is_prepared(found, config)
    calls: list[StoreProgress] = []
    store = open_store(spec, folder, config, device="cpu", progress=calls.append)
    assert is_prepared(found, config)
    assert calls
    calls.clear()
    again = open_store(spec, folder, config, device="cpu", progress=calls.append)
    assert again.manifest == store.manifest
    assert calls == []


def test_blobs_are_their_files(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for index, blob in enumerate(store.manifest.layers):
        store.check(index)
        data = (store.folder / blob.file).read_bytes()
        assert store.blob(index).numpy().tobytes() == data
        assert store.blob(index).data_ptr() == store.blob(index).data_ptr()


def test_a_tied_head_is_the_memory_of_the_embedding(tmp_path: Path) -> None:
    store = make_store(tmp_path, "qwen2")
    assert store.head.data_ptr() == store.embedding.data_ptr()
    assert store.ple is None


def test_tables_are_mapped_in_the_checkpoint(tmp_path: Path) -> None:
    store = make_store(tmp_path, "gemma4_e2b", dtype="bfloat16")
    assert Path(store.manifest.embedding.file) == tmp_path / "model" / "model.safetensors"
    assert not (store.folder / "ple.safetensors").exists()
    assert store.ple is not None
    assert store.ple.dtype == torch.bfloat16
    rows = torch.tensor([0, 7, 261])
    name = "model.language_model.embed_tokens_per_layer.weight"
    assert torch.equal(store.ple[rows], weights_of(tmp_path / "model")[name][rows])


def test_a_table_that_lies_at_an_odd_byte_is_copied(tmp_path: Path) -> None:
    _, folder = make_checkpoint("llama", tmp_path / "model")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    path.write_bytes(
        (header_bytes + 1).to_bytes(8, "little")
        + data[8 : 8 + header_bytes]
        + b" "
        + data[8 + header_bytes :]
    )
    store = make_store_of(folder, tmp_path)
    assert store.manifest.embedding.file == "embedding.safetensors"
    weights = weights_of(folder)
    assert torch.equal(store.embedding, weights["model.embed_tokens.weight"])
    assert torch.equal(store.other()["final_norm"], weights["model.norm.weight"])


def make_store_of(folder: Path, tmp_path: Path) -> Store:
    config = ModelConfig(name=str(folder), cache_dir=str(tmp_path / "cache"))
    return open_store(read_model_spec(folder), folder, config, device=CPU)


def test_a_changed_byte_is_found_when_the_blob_is_checked(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    path = store.folder / store.manifest.layers[1].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    store = Store.open(store.folder)
    store.check(0)
    with pytest.raises(ModelError, match="cannot be used") as caught:
        store.check(1)
    assert "layer-001.blob does not match its checksum" in caught.value.why
    assert str(store.folder) in caught.value.fix


@pytest.mark.parametrize("file", ["layer-002.blob", "other.safetensors", "manifest.json"])
def test_a_missing_file_is_found_when_the_store_is_opened(file: str, tmp_path: Path) -> None:
    folder = make_store(tmp_path).folder
    (folder / file).unlink()
    with pytest.raises(ModelError, match="cannot be used") as caught:
        Store.open(folder)
    assert file in caught.value.why


def test_a_blob_of_another_size_is_found_when_the_store_is_opened(tmp_path: Path) -> None:
    folder = make_store(tmp_path).folder
    for change in (b"longer", b""):
        (folder / "layer-000.blob").write_bytes(change)
        with pytest.raises(ModelError, match="cannot be used"):
            Store.open(folder)


def test_a_checkpoint_that_is_gone_is_found_when_the_store_is_opened(tmp_path: Path) -> None:
    folder = make_store(tmp_path).folder
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        Store.open(folder)
    assert str(tmp_path / "model" / "model.safetensors") in caught.value.why


@pytest.mark.parametrize("text", ["", "[]", '{"format_version": 1}', '{"format_version": 99}'])
def test_a_manifest_that_cannot_be_understood_is_an_error(text: str, tmp_path: Path) -> None:
    folder = make_store(tmp_path).folder
    (folder / "manifest.json").write_text(text, "utf-8")
    with pytest.raises(ModelError, match="cannot be used"):
        Store.open(folder)


def test_damage_in_the_small_tensors_is_an_error(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (store.folder / "other.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot be used"):
        store.other()


def test_a_folder_of_ones_own_is_never_deleted(tmp_path: Path) -> None:
    spec, folder = make_checkpoint("llama", tmp_path / "model")
    config = ModelConfig(name="x", cache_dir=str(tmp_path / "cache"), delete_download=True)
    with pytest.raises(ConfigError, match="delete_download"):
        open_store(spec, folder, config, device=CPU)
    hub = Hub(folder, tmp_path / "hub")
    store = open_store(spec, hub.download, config, device=CPU)
    assert store.embedding.shape == (spec.decoder.vocab_size, spec.decoder.hidden_size)


def test_the_cache_folder_follows_the_users_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = ModelConfig(name="x")
    assert store_folder(config) == tmp_path / "eightgig"
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert store_folder(config) == Path.home() / ".cache" / "eightgig"
    own = ModelConfig(name="x", cache_dir="~/stores")
    assert store_folder(own) == Path.home() / "stores"


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    values = json.loads((store.folder / "manifest.json").read_text("utf-8"))
    assert values["key"] == store.folder.name
    assert len(values["code_tables"]["nf4"]) == 16
    assert len(values["code_tables"]["dynamic"]) == 256
