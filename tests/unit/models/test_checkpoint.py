"""A checkpoint is checked against its config, tensor by tensor, before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from eightgig.errors import ModelError
from eightgig.models.checkpoint import (
    TensorReader,
    layer_tensor_names,
    other_tensor_names,
    quantized_parts,
    read_model_spec,
)
from tests.tiny import make_model

Weights = dict[str, Any]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    families = ("llama", "qwen2", "gemma4_e2b", "gemma4_12b")
    return {family: make_model(family, root / family) for family in families}


@pytest.fixture
def copy(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        return Path(shutil.copytree(originals[family], tmp_path / family))

    return make


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")


def _edit_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    path = folder / "model.safetensors"
    weights = dict(load_file(path))
    change(weights)
    save_file(weights, path)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no model folder"):
        read_model_spec(tmp_path / "nowhere")


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(ModelError) as caught:
        read_model_spec(tmp_path / "model")
    assert "a file has its name" in caught.value.why


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it holds no config\.json"):
        read_model_spec(tmp_path)


def test_the_folder_of_an_adapter_is_told_from_that_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ModelError) as caught:
        read_model_spec(tmp_path)
    assert "LoRA adapter" in caught.value.why


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": '])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        read_model_spec(tmp_path)


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="this user may read everything"
)
def test_an_unreadable_config_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch(mode=0o000)
    with pytest.raises(ModelError, match="Permission denied"):
        read_model_spec(tmp_path)


def test_truncated_weights_are_refused_with_the_files_name(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be used: .*cut off"):
        read_model_spec(folder)


def test_missing_tensors_are_named(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen2")
    _edit_weights(folder, lambda weights: weights.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(ModelError, match=r"lacks 1 of 50 tensors: model\.layers\.1\.self_attn\.k_"):
        read_model_spec(folder)


def test_an_untied_head_must_be_there(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    _edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        read_model_spec(folder)


def test_misshapen_tensors_are_named_with_both_shapes(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    _edit_config(folder, lambda config: config.update(intermediate_size=128))
    with pytest.raises(ModelError, match=r"gate_proj\.weight has shape \(112, 64\) instead of"):
        read_model_spec(folder)


def test_eight_bit_floats_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    _edit_weights(folder, lambda weights: weights.update({name: weights[name].astype(np.int8)}))
    with pytest.raises(ModelError, match="is stored as I8"):
        read_model_spec(folder)


def test_a_tied_head_is_the_embedding(originals: dict[str, Path]) -> None:
    spec = read_model_spec(originals["qwen2"])
    names = other_tensor_names(spec)
    assert spec.decoder.tie_word_embeddings
    assert names["head"] == names["embedding"] == "model.embed_tokens.weight"


def test_a_head_stored_beside_a_tied_config_is_used(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen2")
    table = "model.embed_tokens.weight"
    _edit_weights(folder, lambda weights: weights.update({"lm_head.weight": weights[table] + 1}))
    spec = read_model_spec(folder)
    assert not spec.decoder.tie_word_embeddings
    assert other_tensor_names(spec)["head"] == "lm_head.weight"


def test_a_conditional_checkpoint_names_what_is_skipped(originals: dict[str, Path]) -> None:
    spec = read_model_spec(originals["gemma4_e2b"])
    assert spec.skipped_parts == ("vision tower", "audio tower")
    assert read_model_spec(originals["gemma4_12b"]).skipped_parts == (
        "vision embedder",
        "audio embedder",
    )


def test_unused_k_and_v_of_shared_layers_are_no_part(originals: dict[str, Path]) -> None:
    spec = read_model_spec(originals["gemma4_e2b"])
    unused = "model.language_model.layers.6.self_attn.k_proj.weight"
    assert unused in spec.tensors
    assert unused not in layer_tensor_names(spec, 6).values()


def test_unknown_tensors_are_told(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    extra = {"model.layers.9.mlp.up_proj.weight": np.zeros((2, 2), dtype=np.float32)}
    _edit_weights(folder, lambda weights: weights.update(extra))
    assert read_model_spec(folder).skipped_parts == (
        "1 unused tensor (model.layers.9.mlp.up_proj.weight)",
    )


def test_a_text_checkpoint_skips_nothing(originals: dict[str, Path]) -> None:
    assert read_model_spec(originals["llama"]).skipped_parts == ()


def test_the_license_comes_from_the_model_card(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    card = "---\nlibrary_name: x\nlicense: apache-2.0\n---\nlicense: other\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    assert read_model_spec(folder).license == "apache-2.0"


def test_text_outside_the_front_matter_is_no_license(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "README.md").write_text("---\na: b\n---\nlicense: other\n", encoding="utf-8")
    assert read_model_spec(folder).license is None


def test_a_name_replaces_the_folder_in_messages(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    assert read_model_spec(folder).name == str(folder)
    assert read_model_spec(folder, name="meta/llama").name == "meta/llama"


def test_sharded_and_single_files_give_the_same_bytes(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    sharded = make_model("llama", tmp_path, max_shard_size="100KB")
    whole = read_model_spec(originals["llama"])
    parts = read_model_spec(sharded)
    assert len({spec.file for spec in parts.tensors.values()}) > 2
    for name in whole.tensors:
        expected = TensorReader(originals["llama"], whole.tensors).read(name)
        assert np.array_equal(TensorReader(sharded, parts.tensors).read(name), expected)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 7), slice(200, 999), slice(5, 5)])
def test_rows_are_read_without_the_rest(originals: dict[str, Path], rows: slice) -> None:
    spec = read_model_spec(originals["qwen2"])
    reader = TensorReader(originals["qwen2"], spec.tensors)
    name = "model.embed_tokens.weight"
    whole = reader.read(name).view(np.float32).reshape(spec.tensors[name].shape)
    assert np.array_equal(reader.read(name, rows).view(np.float32), whole[rows].reshape(-1))


def test_bytes_outlive_the_reader_and_cannot_be_written(originals: dict[str, Path]) -> None:
    spec = read_model_spec(originals["qwen2"])
    reader = TensorReader(originals["qwen2"], spec.tensors)
    data = reader.read("model.norm.weight")
    before = data.tobytes()
    reader.close()
    assert data.tobytes() == before
    assert not data.flags.writeable


def test_a_file_that_shrank_since_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    spec = read_model_spec(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2_000])
    reader = TensorReader(folder, spec.tensors)
    with pytest.raises(ModelError, match="has become shorter"):
        for name in spec.tensors:
            reader.read(name)


def test_a_file_that_vanished_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    spec = read_model_spec(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        TensorReader(folder, spec.tensors).read("model.norm.weight")


def _save_in_four_bit(source: Path, target: Path, **settings: Any) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **settings
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("settings", "has_nested"),
    [
        ({"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, True),
        ({"bnb_4bit_quant_type": "nf4"}, False),
        ({"bnb_4bit_quant_type": "fp4"}, False),
        ({"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}, False),
    ],
)
def test_checkpoints_of_bitsandbytes_are_recognised(
    originals: dict[str, Path], tmp_path: Path, settings: dict[str, Any], has_nested: bool
) -> None:
    folder = _save_in_four_bit(originals["qwen2"], tmp_path, **settings)
    spec = read_model_spec(folder)
    assert spec.quantization == "bnb_4bit"
    assert spec.dtype == "bfloat16"
    assert spec.skipped_parts == ()
    parts = quantized_parts(spec.tensors, layer_tensor_names(spec, 0)["q_proj"])
    assert parts is not None
    assert {"codes", "absmax", "quant_map", "quant_state"} <= set(parts)
    assert ("nested_absmax" in parts) == has_nested
    assert quantized_parts(spec.tensors, "model.norm.weight") is None


def test_the_packed_size_of_a_four_bit_weight_is_checked(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    folder = _save_in_four_bit(originals["qwen2"], tmp_path, bnb_4bit_quant_type="nf4")
    _edit_config(folder, lambda config: config.update(intermediate_size=128))
    with pytest.raises(ModelError, match="bytes of 4-bit codes instead of 4096"):
        read_model_spec(folder)
