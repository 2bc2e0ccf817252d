"""Adapters are PEFT's files: PEFT reads ours, we read PEFT's, and nothing hostile gets in."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eightgig.adapters.files import read_adapter, write_adapter
from eightgig.config import LoraConfig
from eightgig.errors import ModelError, RunError
from eightgig.models.checkpoint import read_model_spec
from eightgig.models.spec import ModelSpec, linear_shapes
from tests import tiny

LORA = LoraConfig(r=3, lora_alpha=7, lora_dropout=0.25)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Model folders by family, made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny.make_model(family, root / family)
        return made[family]

    return folder


@pytest.fixture(scope="module")
def llama(folders: Callable[[str], Path]) -> ModelSpec:
    return read_model_spec(folders("llama"))


def _make_tensors(spec: ModelSpec, *, r: int = LORA.r, only: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in spec.decoder.layers:
        for name, (out_size, in_size) in linear_shapes(spec.decoder, layer).items():
            part = "self_attn" if name[0] in "qkvo" else "mlp"
            module = f"layers.{layer.index}.{part}.{name}"
            if only in module:
                tensors[f"{module}.lora_A"] = 0.1 * torch.randn(r, in_size, generator=generator)
                tensors[f"{module}.lora_B"] = 0.1 * torch.randn(out_size, r, generator=generator)
    return tensors


def _write(folder: Path, spec: ModelSpec, tensors: Mapping[str, Tensor], **changes: Any) -> Path:
    write_adapter(
        folder, spec=spec, lora=replace(LORA, **changes), tensors=tensors, files={"README.md": b"#"}
    )
    return folder


def _assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _lora_weights(model: Any, spec: ModelSpec) -> dict[str, Tensor]:
    """The adapter in a PEFT model, by our names."""
    prefix = f"base_model.model.{spec.module_prefix}."
    return {
        name.removeprefix(prefix).replace(".default.weight", ""): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" in name
    }


@pytest.mark.parametrize("family", ["llama", "gemma4_e2b", "gemma4_12b", "gemma4_31b"])
def test_peft_loads_what_we_write(
    family: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    spec = read_model_spec(folders(family))
    tensors = _make_tensors(spec)
    _write(tmp_path / "adapter", spec, tensors)
    model = peft.PeftModel.from_pretrained(
        tiny.load_reference(family, folders(family)), tmp_path / "adapter"
    )
    _assert_equal(_lora_weights(model, spec), tensors)
    assert model.peft_config["default"].lora_dropout == 0.25


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_scales_the_update_as_written(
    use_rslora: bool, folders: Callable[[str], Path], llama: ModelSpec, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    tensors = _make_tensors(llama, only="layers.1.mlp.up_proj")
    _write(tmp_path / "adapter", llama, tensors, use_rslora=use_rslora)
    ids = torch.tensor([[3, 20, 41, 5, 66, 7, 90]])
    base = tiny.load_reference("llama", folders("llama"))
    weight = base.get_submodule("model.layers.1.mlp.up_proj").weight
    scale = 7 / 3**0.5 if use_rslora else 7 / 3
    merged = weight.detach() + scale * (
        tensors["layers.1.mlp.up_proj.lora_B"] @ tensors["layers.1.mlp.up_proj.lora_A"]
    )
    with torch.no_grad():
        plain = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
        other = tiny.load_reference("llama", folders("llama"))
        other.get_submodule("model.layers.1.mlp.up_proj").weight.copy_(merged)
        expected = other(ids).logits
    # Float32: only the order of additions differs.
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma4_e2b", "gemma4_12b"])
@pytest.mark.parametrize("only", ["q_proj", "layers.1.", "layers.2.self_attn.o_proj"])
def test_a_part_of_the_linears_is_targeted_and_nothing_else(
    family: str, only: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    spec = read_model_spec(folders(family))
    tensors = _make_tensors(spec, only=only)
    _write(tmp_path / "adapter", spec, tensors)
    model = peft.PeftModel.from_pretrained(
        tiny.load_reference(family, folders(family)), tmp_path / "adapter"
    )
    assert sum(".lora_" in name for name in model.state_dict()) == len(tensors)
    _assert_equal(read_adapter(tmp_path / "adapter", spec).tensors, tensors)


@pytest.mark.parametrize("family", tiny.TRAINABLE_FAMILIES)
def test_what_peft_writes_is_read(
    family: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    spec = read_model_spec(folders(family))
    config = peft.LoraConfig(
        r=5, lora_alpha=11, use_rslora=True, target_modules=tiny.peft_targets(family),
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(tiny.load_reference(family, folders(family)), config)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, spec)
    assert (adapter.lora.r, adapter.lora.lora_alpha, adapter.lora.use_rslora) == (5, 11, True)
    _assert_equal(adapter.tensors, _lora_weights(model, spec))


def test_the_same_targets_come_back(llama: ModelSpec, tmp_path: Path) -> None:
    tensors = _make_tensors(llama)
    adapter = read_adapter(_write(tmp_path / "adapter", llama, tensors), llama)
    assert adapter.lora == replace(LORA, target_modules=tuple(sorted(LORA.target_modules)))


def test_an_adapter_made_on_another_class_of_the_same_decoder_is_read(
    folders: Callable[[str], Path], llama: ModelSpec, tmp_path: Path
) -> None:
    tensors = _make_tensors(llama)
    _write(tmp_path / "adapter", replace(llama, module_prefix="model.language_model"), tensors)
    _assert_equal(read_adapter(tmp_path / "adapter", llama).tensors, tensors)


def test_half_precision_becomes_float32(llama: ModelSpec, tmp_path: Path) -> None:
    folder = _write(tmp_path / "adapter", llama, _make_tensors(llama))
    path = folder / "adapter_model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    tensors = read_adapter(folder, llama).tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_an_adapter_replaces_the_one_before_whole(llama: ModelSpec, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    _write(folder, llama, _make_tensors(llama))
    (folder / "stale.txt").write_text("x")
    tensors = _make_tensors(llama, only="q_proj")
    _write(folder, llama, tensors)
    _assert_equal(read_adapter(folder, llama).tensors, tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_nan_is_not_written(llama: ModelSpec, tmp_path: Path) -> None:
    tensors = _make_tensors(llama)
    tensors["layers.0.self_attn.q_proj.lora_B"][0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.lora_B holds NaN"):
        _write(tmp_path / "adapter", llama, tensors)
    assert not (tmp_path / "adapter").exists()


def test_a_place_that_cannot_be_written_is_named(llama: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="was not written to") as caught:
        _write(tmp_path / "file" / "adapter", llama, _make_tensors(llama))
    assert "--resume" in caught.value.fix


# What must be refused: changes of adapter_config.json and what the error names.
FOREIGN_SETTINGS = {
    "dora": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "all"}, "bias"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "other modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "ranks by module": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "alphas by module": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    "trained tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "copied layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "moved base": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "a later invention": ({"use_tomorrow": {"x": 1}}, "use_tomorrow"),
    "another method": ({"peft_type": "IA3"}, "peft_type"),
    "a foreign class": ({"peft_type": "os.system"}, "peft_type"),
    "no rank": ({"r": None}, "its r"),
    "rank 0": ({"r": 0}, "its r"),
    "huge rank": ({"r": 1025}, "its r"),
    "rank true": ({"r": True}, "its r"),
    "rank in words": ({"r": "16"}, "its r"),
    "other rank": ({"r": 4}, "expected"),
    "fraction": ({"lora_alpha": 7.5}, "lora_alpha"),
    "huge alpha": ({"lora_alpha": 10**400}, "lora_alpha"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout"),
    "dropout NaN": ({"lora_dropout": float("nan")}, "lora_dropout"),
    "rslora in words": ({"use_rslora": "no"}, "use_rslora"),
}


@pytest.mark.parametrize(("changes", "named"), FOREIGN_SETTINGS.values(), ids=FOREIGN_SETTINGS)
def test_settings_that_change_the_meaning_are_refused(
    changes: dict[str, Any], named: str, llama: ModelSpec, tmp_path: Path
) -> None:
    folder = _write(tmp_path / "adapter", llama, _make_tensors(llama))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match="is not usable") as caught:
        read_adapter(folder, llama)
    assert named in caught.value.message
    assert caught.value.why
    assert caught.value.fix


def test_a_regular_expression_is_never_run_and_a_base_model_never_looked_up(
    llama: ModelSpec, tmp_path: Path
) -> None:
    tensors = _make_tensors(llama)
    folder = _write(tmp_path / "adapter", llama, tensors)
    path = folder / "adapter_config.json"
    hostile = {
        "target_modules": "(a+)+$" * 50,
        "base_model_name_or_path": "https://user:secret@host.invalid/model",
        "auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"},
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **hostile}))
    adapter = read_adapter(folder, llama)
    _assert_equal(adapter.tensors, tensors)
    assert adapter.lora.target_modules == tuple(sorted(LORA.target_modules))


def _rename(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def _changed(tensors: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    first = sorted(tensors)[0]
    return {**tensors, first: change(tensors[first])}


HOSTILE_TENSORS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "nothing": lambda _: {},
    "a tower": lambda t: _rename(t, "model.model.layers", "model.model.vision_tower.layers"),
    "a missing layer": lambda t: _rename(t, "layers.0.", "layers.99."),
    "an enormous layer": lambda t: _rename(t, "layers.0.", "layers.99999999999999999999."),
    "another linear": lambda t: _rename(t, "up_proj", "router_proj"),
    "a leading zero": lambda t: {**t, **_rename(_some(t, "layers.0."), "layers.0.", "layers.00.")},
    "a base weight": lambda t: {**t, "model.embed_tokens.weight": torch.zeros(2, 2)},
    "a path": lambda t: {**t, "../../x": torch.zeros(2, 2)},
    "no partner": lambda t: {name: v for name, v in t.items() if "lora_A" in name},
    "wrong shape": lambda t: _changed(t, lambda tensor: tensor[:, :-1].contiguous()),
    "wrong dimension": lambda t: _changed(t, lambda tensor: tensor[None].contiguous()),
    "whole numbers": lambda t: _changed(t, lambda tensor: tensor.int()),
    "double": lambda t: _changed(t, lambda tensor: tensor.double()),
    "NaN": lambda t: _changed(t, lambda tensor: tensor * torch.nan),
    "infinity": lambda t: _changed(t, lambda tensor: tensor + torch.inf),
}


def _some(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items() if part in name}


@pytest.mark.parametrize("change", HOSTILE_TENSORS.values(), ids=HOSTILE_TENSORS)
def test_tensors_of_something_else_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], llama: ModelSpec, tmp_path: Path
) -> None:
    folder = _write(tmp_path / "adapter", llama, _make_tensors(llama))
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(ModelError, match="is not usable"):
        read_adapter(folder, llama)


def _oversized_header(path: Path) -> None:
    path.write_bytes((26 << 20).to_bytes(8, "little") + b" " * 64)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link_outside(path: Path) -> None:
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


HOSTILE_FILES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a text": lambda path: path.write_bytes(b"not this"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "a header as large as memory": lambda path: path.write_bytes(b"\xff" * 64),
    "a header of 26 MiB": _oversized_header,
    "a pipe": _fifo,
    "a link that leaves the folder": _link_outside,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes of this kind")
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("damage", HOSTILE_FILES.values(), ids=HOSTILE_FILES)
def test_hostile_files_are_refused(
    damage: Callable[[Path], Any], name: str, llama: ModelSpec, tmp_path: Path
) -> None:
    folder = _write(tmp_path / "adapter", llama, _make_tensors(llama))
    damage(folder / name)
    with pytest.raises(ModelError, match="is not usable"):
        read_adapter(folder, llama)


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", '{"peft_type": "LORA"', " " * (1 << 21)])
def test_hostile_json_is_refused(text: str, llama: ModelSpec, tmp_path: Path) -> None:
    folder = _write(tmp_path / "adapter", llama, _make_tensors(llama))
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match="is not usable"):
        read_adapter(folder, llama)


def test_a_pickle_is_refused_and_said_to_be_one(llama: ModelSpec, tmp_path: Path) -> None:
    folder = _write(tmp_path / "adapter", llama, _make_tensors(llama))
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle") as caught:
        read_adapter(folder, llama)
    assert "safetensors" in caught.value.fix


def test_a_folder_that_is_not_there_is_named(llama: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        read_adapter(tmp_path / "nowhere", llama)


def test_a_snapshot_in_the_hub_cache_is_read(llama: ModelSpec, tmp_path: Path) -> None:
    tensors = _make_tensors(llama)
    written = _write(tmp_path / "adapter", llama, tensors)
    snapshot = tmp_path / "models--me--adapter" / "snapshots" / "0123"
    blobs = tmp_path / "models--me--adapter" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(written.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    _assert_equal(read_adapter(snapshot, llama).tensors, tensors)
