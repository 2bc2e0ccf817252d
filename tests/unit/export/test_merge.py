"""Merged weights are the base model's files plus the adapter, and nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from eightgig.config import LoraConfig
from eightgig.export.folder import copy_model_files, output_folder
from eightgig.export.merge import (
    config_without_quantization,
    merged_bytes,
    precision_findings,
    write_merged,
)
from eightgig.export.source import TunedWeights
from eightgig.models.checkpoint import read_model_spec
from eightgig.quant.build import Download
from tests import tiny
from tests.unit.export.adapters import peft_logits, transformers_logits, write_random_adapter
from tests.unit.quant.checkpoints import quantize_checkpoint

FAMILIES = tiny.ALL_FAMILIES
# Lower ids are control tokens; Transformers looks for images where an image token stands.
IDS = torch.arange(40, 64)[None]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in float32: to 1e-5 of the largest logit, as sums are made in another order."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def merge(
    base: Path,
    adapter: Path,
    target: Path,
    *,
    lora: LoraConfig | None = None,
    only: str = "",
    block_bytes: int = 64 << 20,
    download: Download | None = None,
) -> TunedWeights:
    """Write the merged folder of a random adapter."""
    spec = read_model_spec(base)
    arguments = {} if lora is None else {"lora": lora}
    weights = TunedWeights(
        spec,
        base,
        write_random_adapter(adapter, spec, only=only, **arguments),
        block_bytes=block_bytes,
    )
    with output_folder(target, needed_bytes=merged_bytes(weights)) as output:
        write_merged(output, weights, download or base, lambda _: None)
        if spec.quantization is not None:
            output.write("config.json", config_without_quantization(base))
        copy_model_files(output, base, skip=tuple(output.files))
    return weights


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_base_with_adapter_in_peft(family: str, tmp_path: Path) -> None:
    base = tiny.make_model(family, tmp_path / "base")
    merge(base, tmp_path / "adapter", tmp_path / "merged", block_bytes=1000)
    expected = peft_logits(family, base, tmp_path / "adapter", IDS)
    found = transformers_logits(family, tmp_path / "merged", IDS)
    assert_close(found, expected)
    plain = transformers_logits(family, base, IDS)
    assert (plain - expected).abs().max() > 1e-2  # the adapter does something


@pytest.mark.parametrize("family", FAMILIES)
def test_files_names_dtypes_and_places_are_those_of_the_original(
    family: str, tmp_path: Path
) -> None:
    base = tiny.make_model(family, tmp_path / "base", dtype="bfloat16", max_shard_size="100KB")
    weights = merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = read_model_spec(tmp_path / "merged")
    assert merged.tensors == weights.spec.tensors
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    for path in base.iterdir():
        copy = tmp_path / "merged" / path.name
        if path.suffix != ".safetensors":
            assert copy.read_bytes() == path.read_bytes(), path.name
            continue
        with safe_open(path, "pt") as before, safe_open(copy, "pt") as after:
            assert after.metadata() == before.metadata()
            changed = {
                name
                for name in before.keys()  # noqa: SIM118 (not a mapping)
                if not torch.equal(before.get_tensor(name), after.get_tensor(name))
            }
        assert changed == weights.adapted_names & changed
        assert changed == {
            name for name in weights.adapted_names if weights.spec.tensors[name].file == path.name
        }


def test_sums_are_made_in_float32_and_rounded_once(tmp_path: Path) -> None:
    base = tiny.make_model("qwen2", tmp_path / "base", dtype="bfloat16")
    lora = LoraConfig(r=4, lora_alpha=7, use_rslora=True)
    merge(base, tmp_path / "adapter", tmp_path / "merged", lora=lora, block_bytes=1)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    a, b = (
        adapter[f"base_model.model.{name.replace('.weight', f'.lora_{part}.weight')}"].double()
        for part in "AB"
    )
    exact = before[name].double() + 7 / 4**0.5 * (b @ a)
    assert (after[name] == exact.bfloat16()).float().mean() > 0.999
    assert after[name].dtype == torch.bfloat16


def test_only_adapted_linears_change(tmp_path: Path) -> None:
    base = tiny.make_model("llama", tmp_path / "base")
    weights = merge(base, tmp_path / "adapter", tmp_path / "merged", only="layers.1.self_attn.k_")
    assert weights.adapted_names == {"model.layers.1.self_attn.k_proj.weight"}
    expected = peft_logits("llama", base, tmp_path / "adapter", IDS)
    found = transformers_logits("llama", tmp_path / "merged", IDS)
    assert_close(found, expected)


def test_shards_of_a_download_are_fetched_one_by_one_and_deleted(tmp_path: Path) -> None:
    base = tiny.make_model("llama", tmp_path / "base", max_shard_size="100KB")
    spec = read_model_spec(base)
    hidden = tmp_path / "hub"
    hidden.mkdir()
    shards = sorted({tensor.file for tensor in spec.tensors.values()})
    weights = TunedWeights(spec, base, write_random_adapter(tmp_path / "adapter", spec))
    for shard in shards:
        (base / shard).rename(hidden / shard)
    most = 0

    def fetch(name: str) -> None:
        nonlocal most
        (base / name).write_bytes((hidden / name).read_bytes())
        most = max(most, len(list(base.glob("*.safetensors"))))

    download = Download(folder=base, fetch=fetch, delete=lambda name: (base / name).unlink())
    with output_folder(tmp_path / "merged", needed_bytes=0) as output:
        write_merged(output, weights, download, lambda _: None)
        copy_model_files(output, base, skip=tuple(output.files))
    assert most == 1
    assert len(shards) > 1
    assert not list(base.glob("*.safetensors"))
    for shard in shards:
        (hidden / shard).rename(base / shard)
    expected = peft_logits("llama", base, tmp_path / "adapter", IDS)
    found = transformers_logits("llama", tmp_path / "merged", IDS)
    assert_close(found, expected)


@pytest.mark.parametrize("family", ["llama", "gemma4_e2b"])
def test_a_4_bit_base_becomes_16_bit_and_says_what_is_lost(family: str, tmp_path: Path) -> None:
    source = tiny.make_model(family, tmp_path / "source", dtype="bfloat16")
    base = tmp_path / "base"
    numbers = quantize_checkpoint(
        source,
        base,
        is_quantized=lambda name: (
            (name.endswith("_proj.weight") and "language_model" in name)
            or (family == "llama" and name.endswith("_proj.weight"))
        ),
        quant_type="nf4",
        compress_statistics=True,
    )
    spec = read_model_spec(base)
    assert spec.quantization == "bnb_4bit"
    weights = TunedWeights(spec, base, write_random_adapter(tmp_path / "adapter", spec))
    with output_folder(tmp_path / "merged", needed_bytes=merged_bytes(weights)) as output:
        write_merged(output, weights, base, lambda _: None)
        output.write("config.json", config_without_quantization(base))
        copy_model_files(output, base, skip=tuple(output.files))
    (finding,) = precision_findings(weights)
    assert finding.severity == "warning"
    assert "4 bit" in finding.message
    assert "--base" in finding.fix
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    merged, original = read_model_spec(tmp_path / "merged"), read_model_spec(source)
    assert {n: (t.dtype, t.shape) for n, t in merged.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in original.tensors.items()
    }
    size_bytes = sum(tensor.size_bytes for tensor in merged.tensors.values())
    assert size_bytes == merged_bytes(weights)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    for name in weights.adapted_names:
        key = spec.module_prefix + "." + name.removeprefix(spec.tensor_prefix)
        a, b = (
            adapter[f"base_model.model.{key.replace('.weight', f'.lora_{part}.weight')}"]
            for part in "AB"
        )
        assert torch.equal(after[name], (numbers[name].float() + 3.0 * (b @ a)).bfloat16())
    assert torch.isfinite(transformers_logits(family, tmp_path / "merged", IDS)).all()


def test_no_more_than_a_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    base = tiny.make_model("gemma4_e2b", tmp_path / "base", dtype="bfloat16")
    spec = read_model_spec(base)
    adapter = write_random_adapter(tmp_path / "adapter", spec)
    weights = TunedWeights(spec, base, adapter, block_bytes=4096)
    for name, tensor in spec.tensors.items():
        if not name.startswith(spec.tensor_prefix):
            continue
        blocks = list(weights.blocks(name))
        assert sum(block.numel() for block in blocks) == max(1, math.prod(tensor.shape))
        row_bytes = 4 * math.prod(tensor.shape[1:])
        assert max(4 * block.numel() for block in blocks) <= max(4096, row_bytes)
