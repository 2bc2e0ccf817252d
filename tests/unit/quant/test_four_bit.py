"""Checkpoints that bitsandbytes has already quantised are taken over bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes import nn
from safetensors.torch import load_file, save_file

from eightgig.errors import ModelError
from eightgig.models.checkpoint import layer_tensor_names, other_tensor_names, read_model_spec
from eightgig.models.spec import ModelSpec, linear_shapes
from eightgig.quant import writer
from eightgig.quant.build import MANIFEST_FILE, prepare_store
from eightgig.quant.four_bit import FourBitTensor
from eightgig.quant.layout import FourBitFormat
from eightgig.quant.nf4 import DYNAMIC_TABLE, NF4_CODE, NF4_TABLE, dynamic_map, quantize_nf4
from eightgig.quant.parts import prepared_bytes
from eightgig.quant.store import Store
from tests.tiny import is_conditional, make_model
from tests.unit.quant.checkpoints import (
    CPU,
    dequantize_theirs,
    quantize_checkpoint,
    stored_numbers,
    weights_of,
)


def prepare(folder: Path, cache_dir: Path, quantization: str = "nf4") -> tuple[ModelSpec, Store]:
    spec = read_model_spec(folder)
    path = prepare_store(spec, folder, cache_dir=cache_dir, quantization=quantization, device=CPU)
    return spec, Store.open(path)


def is_linear(name: str) -> bool:
    return ".layers." in name and "_proj.weight" in name and "language_model" in name


@pytest.mark.parametrize("family", ["gemma4_e2b", "llama"])
@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("fp4", False)])
def test_a_checkpoint_that_transformers_quantised_gives_the_same_numbers(
    family: str, kind: str, nested: bool, tmp_path: Path
) -> None:
    make_model(family, tmp_path / "dense", dtype="bfloat16")
    name = json.loads((tmp_path / "dense" / "config.json").read_text("utf-8"))["architectures"][0]
    model = getattr(transformers, name).from_pretrained(
        tmp_path / "dense",
        dtype=torch.bfloat16,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested
        ),
    )
    model.save_pretrained(tmp_path / "quantized")
    spec, store = prepare(tmp_path / "quantized", tmp_path / "cache")
    assert spec.quantization == "bnb_4bit"
    modules = dict(model.named_modules())
    compared = 0
    names = {index: layer_tensor_names(spec, index) for index in range(spec.decoder.num_layers)}
    for index, full_names in names.items():
        for short, full_name in full_names.items():
            module = modules.get(full_name.removesuffix(".weight"))
            if not isinstance(module, nn.Linear4bit):
                continue
            expected = dequantize_theirs(module.weight.data, module.weight.quant_state)
            assert torch.equal(stored_numbers(store, index, short), expected), full_name
            stored = store.manifest.layers[index].tensors[short]
            assert stored.format == ("dense" if short.startswith("ple_") else "nf4")
            compared += 1
    assert compared >= 7 * 4
    if is_conditional(family):
        full_name = other_tensor_names(spec)["ple_model_projection"].removesuffix(".weight")
        weight = modules[full_name].weight
        expected = dequantize_theirs(weight.data, weight.quant_state)
        assert torch.equal(store.other()["ple_model_projection"], expected)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block_size", [32, 128, 1024])
def test_other_block_sizes_are_taken_over(block_size: int, nested: bool, tmp_path: Path) -> None:
    make_model("gemma4_31b", tmp_path / "dense", dtype="float16")
    numbers = quantize_checkpoint(
        tmp_path / "dense",
        tmp_path / "quantized",
        is_quantized=is_linear,
        blocksize=block_size,
        compress_statistics=nested,
        quant_type="nf4",
    )
    spec, store = prepare(tmp_path / "quantized", tmp_path / "cache")
    for index, blob in enumerate(store.manifest.layers):
        names = layer_tensor_names(spec, index)
        for short in linear_shapes(spec.decoder, spec.decoder.layers[index]):
            stored = blob.tensors[short]
            assert stored.block_size == block_size
            assert (stored.nested is not None) == nested
            assert torch.equal(stored_numbers(store, index, short), numbers[names[short]]), short
    written = sum(
        path.stat().st_size for path in store.folder.iterdir() if path.name != MANIFEST_FILE
    )
    assert 0 <= prepared_bytes(spec, "nf4") - written <= 1024


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("columns", [96, 64, 50])
@pytest.mark.parametrize("num_rows", [1, 700, 100_000])
def test_rows_of_a_4_bit_tensor_are_those_of_the_whole(
    nested: bool, columns: int, num_rows: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(20_001, columns, generator=generator, dtype=torch.bfloat16)
    stored = FourBitTensor(
        quantized=quantize_nf4(weight, block_size=64, nested=nested),
        four_bit_format=FourBitFormat(block_size=64, nested_block_size=256 if nested else None),
        dtype="bfloat16",
        code_tables={NF4_TABLE: NF4_CODE, DYNAMIC_TABLE: dynamic_map()},
    )
    parts = [part.dequantize() for part in stored.split(num_rows)]
    assert (len(parts) > 1) == (num_rows < 20_001)
    assert torch.equal(torch.cat(parts), stored.dequantize())


def test_a_head_in_4_bit_is_taken_over_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama", tmp_path / "dense", dtype="bfloat16", tie=False)
    numbers = quantize_checkpoint(
        tmp_path / "dense",
        tmp_path / "quantized",
        is_quantized=lambda name: name == "lm_head.weight",
        compress_statistics=True,
        quant_type="nf4",
    )
    monkeypatch.setattr(writer, "_TABLE_SLICE_BYTES", 1)
    _, store = prepare(tmp_path / "quantized", tmp_path / "cache")
    assert torch.equal(store.head, numbers["lm_head.weight"])


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_dense_linears_of_a_4_bit_checkpoint_follow_the_setting(
    quantization: str, tmp_path: Path
) -> None:
    make_model("llama", tmp_path / "dense")
    numbers = quantize_checkpoint(
        tmp_path / "dense",
        tmp_path / "quantized",
        is_quantized=lambda name: "up_proj" in name,
        quant_type="nf4",
        compress_statistics=True,
    )
    _, store = prepare(tmp_path / "quantized", tmp_path / "cache", quantization)
    tensors = store.manifest.layers[0].tensors
    assert tensors["up_proj"].format == "nf4"
    assert tensors["down_proj"].format == ("nf4" if quantization == "nf4" else "dense")
    expected = numbers["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(stored_numbers(store, 0, "up_proj"), expected)


def test_a_quantised_head_becomes_a_dense_table(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "dense")
    numbers = quantize_checkpoint(
        tmp_path / "dense",
        tmp_path / "quantized",
        is_quantized=lambda name: name == "lm_head.weight",
        quant_type="nf4",
        compress_statistics=True,
    )
    _, store = prepare(tmp_path / "quantized", tmp_path / "cache")
    assert torch.equal(store.head, numbers["lm_head.weight"])
    assert torch.equal(store.embedding, weights_of(tmp_path / "dense")["model.embed_tokens.weight"])


def test_an_unusual_code_table_keeps_its_numbers(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "dense")
    is_quantized = "model.layers.0.mlp.up_proj.weight"
    folder = tmp_path / "quantized"
    quantize_checkpoint(
        tmp_path / "dense", folder, is_quantized=lambda name: name == is_quantized, quant_type="nf4"
    )
    weights = load_file(folder / "model.safetensors")
    table = weights[f"{is_quantized}.quant_map"] = torch.linspace(-1, 1, 16)
    save_file(weights, folder / "model.safetensors")
    _, store = prepare(folder, tmp_path / "cache")
    name = store.manifest.layers[0].tensors["up_proj"].code_table
    assert name not in ("nf4", "fp4")
    assert store.manifest.code_tables[name] == tuple(table.tolist())
    assert store.manifest.layers[0].tensors["gate_proj"].code_table == "nf4"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"blocksize": 100}, "block sizes"),
        ({"blocksize": 128}, "absmax"),
        ({"dtype": "float8"}, "quant_state"),
        ({"shape": "wide"}, "quant_state"),
        ({"nested_blocksize": 0}, "block sizes"),
        ({"nested_blocksize": 16}, "nested_absmax"),
    ],
)
def test_a_description_that_does_not_fit_its_parts_is_an_error(
    changes: dict[str, object], word: str, tmp_path: Path
) -> None:
    make_model("llama", tmp_path / "dense")
    name = "model.layers.0.mlp.up_proj.weight"
    folder = tmp_path / "quantized"
    quantize_checkpoint(
        tmp_path / "dense",
        folder,
        is_quantized=lambda weight: weight == name,
        quant_type="nf4",
        compress_statistics=True,
    )
    weights = load_file(folder / "model.safetensors")
    state = f"{name}.quant_state.bitsandbytes__nf4"
    values = json.loads(bytes(weights[state].tolist())) | changes
    weights[state] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=name) as caught:
        prepare(folder, tmp_path / "cache")
    assert word in caught.value.why
