"""What we read from config.json and headers equals what Transformers builds from them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eightgig.models.checkpoint import (
    TensorReader,
    layer_tensor_names,
    other_tensor_names,
    read_model_spec,
)
from eightgig.models.count import count_parameters
from eightgig.models.layout import layer_tensor_shapes, other_tensor_shapes
from eightgig.models.read import parse_model_spec
from eightgig.models.spec import (
    MLP_LINEARS,
    DecoderSpec,
    LayerSpec,
    ModelSpec,
    RopeSpec,
    linear_shapes,
)
from tests.tiny import ALL_FAMILIES, load_reference, make_config, make_model, peft_targets

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_model(family, root / family) for family in ALL_FAMILIES}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    return {family: load_reference(family, folder) for family, folder in folders.items()}


def _decoder(model: Any, spec: ModelSpec) -> Any:
    return model.get_submodule(spec.module_prefix)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_linears_have_the_shapes_of_transformers_modules(
    family: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    spec = read_model_spec(folders[family])
    for layer, module in zip(
        spec.decoder.layers, _decoder(models[family], spec).layers, strict=True
    ):
        theirs = {
            name.rpartition(".")[2]: tuple(child.weight.shape)
            for name, child in module.named_modules()
            if isinstance(child, torch.nn.Linear) and name.startswith(("self_attn.", "mlp."))
        }
        assert linear_shapes(spec.decoder, layer) == theirs


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_stored_tensors_are_those_of_transformers_state(
    family: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    spec = read_model_spec(folders[family])
    prefix = spec.module_prefix + "."
    theirs = {
        name: tuple(tensor.shape)
        for name, tensor in models[family].state_dict().items()
        if name.startswith(prefix) or name == "lm_head.weight"
    }
    ours = {}
    for layer in spec.decoder.layers:
        shapes = layer_tensor_shapes(spec.decoder, layer)
        ours |= {
            name: shapes[short] for short, name in layer_tensor_names(spec, layer.index).items()
        }
    others = other_tensor_names(spec)
    ours |= {others[short]: shape for short, shape in other_tensor_shapes(spec.decoder).items()}
    renamed = {name.replace(spec.tensor_prefix, prefix, 1): shape for name, shape in ours.items()}
    if spec.decoder.tie_word_embeddings:
        del theirs["lm_head.weight"]
    else:
        renamed["lm_head.weight"] = renamed.pop(others["head"], renamed.get("lm_head.weight"))
    assert renamed == theirs


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_parameters_are_counted_as_transformers_counts_them(
    family: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    spec = read_model_spec(folders[family])
    count = sum(value.numel() for value in _decoder(models[family], spec).parameters())
    if not spec.decoder.tie_word_embeddings:
        count += models[family].lm_head.weight.numel()
    assert count_parameters(spec.decoder) == count


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_scale_and_window_of_each_layer_are_those_of_transformers_attention(
    family: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    spec = read_model_spec(folders[family])
    modules = _decoder(models[family], spec).layers
    for layer, module in zip(spec.decoder.layers, modules, strict=True):
        attention = module.self_attn
        assert spec.decoder.attention_scale == pytest.approx(attention.scaling)
        if family != "mistral":  # its mask is made for the whole model
            assert layer.sliding_window == getattr(attention, "sliding_window", None)
        assert layer.head_dim == attention.head_dim
        assert layer.num_heads // layer.num_kv_heads == attention.num_key_value_groups


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_peft_adapts_the_linears_that_we_do(family: str, folders: dict[str, Path]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_reference(family, folders[family]),
        LoraConfig(r=2, target_modules=peft_targets(family)),
    )
    spec = read_model_spec(folders[family])
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in model.named_modules()
        if name.endswith(".lora_A.default")
    }
    ours = {
        f"{spec.module_prefix}.layers.{layer.index}.{part}.{linear}"
        for layer in spec.decoder.layers
        for linear in linear_shapes(spec.decoder, layer)
        for part in ["mlp" if linear in MLP_LINEARS else "self_attn"]
    }
    assert theirs == ours


def _tokens_seen_by_the_last(model: Any, *, num_layers: int, window: int) -> set[int]:
    """Positions whose input changes the last position's state of a model with few layers."""
    length = num_layers * (window - 1) + 4
    tokens = torch.arange(20, 20 + length)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits[0, -1]
        return {
            position
            for position in range(length)
            if not torch.equal(
                model(input_ids=tokens.clone().index_fill_(1, torch.tensor([position]), 60)).logits[
                    0, -1
                ],
                before,
            )
        }


def test_a_window_counts_the_query_itself(tmp_path: Path) -> None:
    settings = {"sliding_window": 3, "num_hidden_layers": 2}
    folder = make_model("mistral", tmp_path, text_settings=settings)
    windows = {layer.sliding_window for layer in read_model_spec(folder).decoder.layers}
    seen = _tokens_seen_by_the_last(load_reference("mistral", folder), num_layers=2, window=3)
    # Two layers, each looking back 2 tokens from the query.
    assert windows == {3}
    assert len(seen) == 5


def _frequencies(rope: RopeSpec, layer: LayerSpec) -> np.ndarray:
    """Inverse frequencies where the kind leaves no doubt about them."""
    half = np.arange(layer.head_dim // 2)
    inverse = rope.theta ** -(2 * half / layer.head_dim)
    if rope.kind == "proportional":
        inverse[int(rope.partial_factor * layer.head_dim // 2) :] = 0.0
    return inverse / (rope.parameters["factor"] if rope.kind == "linear" else 1.0)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text", "gemma4_12b"])
def test_rotary_frequencies_are_those_of_transformers(
    family: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    spec = read_model_spec(folders[family])
    rotary = _decoder(models[family], spec).rotary_emb
    for layer in spec.decoder.layers:
        kind = "full" if layer.sliding_window is None else "sliding"
        is_by_type = spec.family.startswith("gemma")
        name = f"{kind}_attention_inv_freq" if is_by_type else "inv_freq"
        expected = getattr(rotary, name).double().numpy()
        assert _frequencies(layer.rope, layer) == pytest.approx(expected, rel=1e-6)


def test_llama_3_scaling_keeps_its_numbers(folders: dict[str, Path]) -> None:
    rope = read_model_spec(folders["llama3"]).decoder.layers[0].rope
    assert (rope.kind, rope.theta) == ("llama3", 10_000.0)
    assert rope.parameters == {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


@pytest.mark.parametrize("family", ["gemma4_e2b", "gemma4_e4b"])
def test_shared_layers_read_the_layers_that_transformers_stores(
    family: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    spec = read_model_spec(folders[family])
    modules = _decoder(models[family], spec).layers
    stored = {
        (layer.sliding_window is None): layer.index
        for layer, module in zip(spec.decoder.layers, modules, strict=True)
        if module.self_attn.store_full_length_kv
    }
    for layer, module in zip(spec.decoder.layers, modules, strict=True):
        source = stored[layer.sliding_window is None]
        is_shared = module.self_attn.is_kv_shared_layer
        assert layer.kv_source == (source if is_shared else None)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_embedding_is_scaled_as_in_transformers(
    family: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    spec = read_model_spec(folders[family])
    embedding = _decoder(models[family], spec).embed_tokens
    scale = float(getattr(embedding, "embed_scale", torch.tensor(1.0)))
    assert spec.decoder.embedding_scale == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_bytes_read_from_the_files_are_transformers_weights(
    family: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    spec = read_model_spec(folders[family])
    reader = TensorReader(folders[family], spec.tensors)
    state = models[family].state_dict()
    names = [*layer_tensor_names(spec, 1).values(), *other_tensor_names(spec).values()]
    for name in names:
        tensor = spec.tensors[name]
        ours = torch.from_numpy(reader.read(name).copy()).view(_TORCH_DTYPES[tensor.dtype])
        theirs = state[_transformers_name(spec, name)]
        assert torch.equal(ours.reshape(tensor.shape), theirs), name


def _transformers_name(spec: ModelSpec, name: str) -> str:
    if name.endswith("lm_head.weight"):
        return "lm_head.weight"
    return name.replace(spec.tensor_prefix, spec.module_prefix + ".", 1)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_class_and_eos_tokens_are_the_folders(
    family: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    spec = read_model_spec(folders[family])
    assert spec.architecture == type(models[family]).__name__
    assert list(spec.eos_token_ids) == models[family].generation_config.eos_token_id
    assert spec.dtype == "float32"


@pytest.mark.parametrize(
    ("class_name", "model_type"),
    [
        ("LlamaConfig", "llama"),
        ("MistralConfig", "mistral"),
        ("Qwen2Config", "qwen2"),
        ("Qwen3Config", "qwen3"),
        ("Gemma3TextConfig", "gemma3_text"),
        ("Gemma4TextConfig", "gemma4_text"),
        ("Gemma4UnifiedTextConfig", "gemma4_unified_text"),
    ],
)
def test_missing_keys_take_the_defaults_of_transformers(class_name: str, model_type: str) -> None:
    import transformers

    written = getattr(transformers, class_name)().to_dict()
    bare = parse_model_spec({"model_type": model_type}, name="bare")
    full = parse_model_spec(written, name="bare")
    assert dataclasses.replace(bare, dtype=full.dtype) == full


@pytest.mark.parametrize(
    "text_settings",
    [
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_windows_follow_transformers(family: str, text_settings: dict[str, Any]) -> None:
    config = make_config(family, text_settings=text_settings)
    raw = {**config.to_dict(), **text_settings}
    del raw["layer_types"]
    for written in (raw, config.to_dict()):
        decoder = parse_model_spec(written, name=family).decoder
        windows = [layer.sliding_window for layer in decoder.layers]
        assert windows == [
            config.sliding_window if kind == "sliding_attention" else None
            for kind in config.layer_types
        ]


@pytest.mark.parametrize("family", ["gemma4_e2b", "gemma4_12b", "gemma4_31b", "gemma4_26b"])
def test_hub_configs_and_those_saved_by_transformers_give_one_decoder(family: str) -> None:
    saved = make_config(family).to_dict()
    assert "per_layer_config" in saved["text_config"]
    hub = json.loads(json.dumps(saved))
    overrides = list(hub["text_config"].pop("per_layer_config").values())[-1]
    hub["text_config"]["global_head_dim"] = overrides["head_dim"]
    hub["text_config"]["num_global_key_value_heads"] = overrides.get("num_key_value_heads")
    assert _without_name(saved) == _without_name(hub)


def _without_name(config: dict[str, Any]) -> DecoderSpec:
    return parse_model_spec(config, name="model").decoder


def test_scores_of_gemma_3_are_scaled_by_its_own_number(folders: dict[str, Path]) -> None:
    decoder = read_model_spec(folders["gemma3_text"]).decoder
    assert decoder.attention_scale == pytest.approx(1 / math.sqrt(24))
    assert decoder.norm_offset == 1.0
