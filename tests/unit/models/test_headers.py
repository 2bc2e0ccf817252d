"""safetensors headers are read without the data, and not believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from eightgig.errors import ModelError
from eightgig.models.headers import (
    INDEX_FILE,
    MAX_HEADER_BYTES,
    SINGLE_FILE,
    read_header,
    read_tensor_specs,
)


def _write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _entry(dtype: str, shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _write_sharded(folder: Path) -> dict[str, str]:
    weight_map = {}
    for number, names in ((1, ("a", "b")), (2, ("c",))):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: np.arange(4, dtype=np.float32) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return weight_map


def test_tensors_are_found_where_safetensors_put_them(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    arrays = {
        "odd": np.arange(7, dtype=np.float16),
        "scalar": np.array(2.5, dtype=np.float32),
        "empty": np.zeros((0, 3), dtype=np.float32),
        "table": np.arange(6, dtype=np.uint8).reshape(2, 3),
    }
    save_file(arrays, path, metadata={"format": "pt"})
    data = path.read_bytes()
    specs = read_tensor_specs(tmp_path)
    assert set(specs) == set(arrays)
    for name, array in arrays.items():
        spec = specs[name]
        assert spec.shape == array.shape
        assert data[spec.offset_bytes : spec.offset_bytes + spec.size_bytes] == array.tobytes()


def test_sharded_tensors_are_found_in_their_files(tmp_path: Path) -> None:
    weight_map = _write_sharded(tmp_path)
    specs = read_tensor_specs(tmp_path)
    assert {name: spec.file for name, spec in specs.items()} == weight_map


def test_an_index_is_preferred_to_files_that_it_does_not_name(tmp_path: Path) -> None:
    _write_sharded(tmp_path)
    save_file({"other": np.zeros(1, dtype=np.float32)}, tmp_path / "consolidated.safetensors")
    assert "other" not in read_tensor_specs(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    _write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"1 of 2 files.*model-00002-of-00002\.safetensors"
    ) as caught:
        read_tensor_specs(tmp_path)
    assert "hf download" in caught.value.fix


def test_a_tensor_missing_from_its_shard_is_named(tmp_path: Path) -> None:
    weight_map = _write_sharded(tmp_path)
    weight_map["lost"] = weight_map["a"]
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(ModelError, match="expects 'lost'"):
        read_tensor_specs(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "pickle.bin", 3, None],
)
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, file: object) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": file}}), encoding="utf-8")
    with pytest.raises(ModelError, match=INDEX_FILE):
        read_tensor_specs(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, []])
def test_an_index_without_a_map_is_refused(tmp_path: Path, index: object) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=INDEX_FILE):
        read_tensor_specs(tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 5, 8, 40])
def test_a_file_cut_off_in_its_header_is_refused(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / SINGLE_FILE
    save_file({"weight": np.arange(100, dtype=np.float32)}, path)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be used: its header is cut"):
        read_header(path)


def test_a_file_cut_off_in_its_data_is_refused_with_the_tensors_name(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    save_file({"weight": np.arange(100, dtype=np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"'weight' ends at byte .*cut off"):
        read_header(path)


def test_a_header_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse: takes no space
    with pytest.raises(ModelError, match=r"its header claims 23\.8 MiB"):
        read_header(path)


@pytest.mark.parametrize("header", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"7"])
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(ModelError, match="JSON"):
        read_header(_write(tmp_path / SINGLE_FILE, header))


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"dtype": 1, "shape": [1], "data_offsets": [0, 4]},
        _entry("F32", [-1], [0, 4]),
        _entry("F32", [True], [0, 4]),
        _entry("F32", [1.0], [0, 4]),  # type: ignore[list-item]
        _entry("F32", [1] * 17, [0, 4]),
        _entry("F32", [1], [0, 4, 8]),
        _entry("F32", [1], [-4, 0]),
    ],
)
def test_an_entry_that_is_none_is_refused(tmp_path: Path, entry: object) -> None:
    with pytest.raises(ModelError, match="'w'"):
        read_header(_write(tmp_path / SINGLE_FILE, {"w": entry}, b"\0" * 16))


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets"),
    [("F32", [3], [0, 8]), ("BF16", [2, 2], [0, 16]), ("F32", [1], [4, 0]), ("NEW", [1], [4, 0])],
)
def test_sizes_that_contradict_the_shape_are_refused(
    tmp_path: Path, dtype: str, shape: list[int], offsets: list[int]
) -> None:
    header = {"w": _entry(dtype, shape, offsets)}
    with pytest.raises(ModelError, match="cannot have"):
        read_header(_write(tmp_path / SINGLE_FILE, header, b"\0" * 16))


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    header = {"a": _entry("F32", [2], [0, 8]), "b": _entry("F32", [2], [4, 12])}
    with pytest.raises(ModelError, match="'a' and 'b' overlap"):
        read_header(_write(tmp_path / SINGLE_FILE, header, b"\0" * 12))


def test_dtypes_of_the_future_keep_their_size(tmp_path: Path) -> None:
    header = {"w": _entry("F4", [6], [0, 3])}
    specs = read_header(_write(tmp_path / SINGLE_FILE, header, b"\0" * 3))
    assert (specs["w"].dtype, specs["w"].size_bytes) == ("F4", 3)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["pytorch_model.bin"], "pickles"),
        (["model.gguf"], "GGUF"),
        (["adapter_model.safetensors", "adapter_config.json"], "LoRA adapter"),
        (["model-00001-of-00002.safetensors"], "index.json is missing"),
        ([], "neither"),
    ],
)
def test_other_formats_are_refused_with_the_way_out(
    tmp_path: Path, files: list[str], expected: str
) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(ModelError) as caught:
        read_tensor_specs(tmp_path)
    assert expected in caught.value.why
    assert caught.value.fix


def test_pickles_come_with_the_command_that_converts_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError) as caught:
        read_tensor_specs(tmp_path)
    assert f"from_pretrained('{tmp_path}'" in caught.value.fix
    assert "save_pretrained" in caught.value.fix
