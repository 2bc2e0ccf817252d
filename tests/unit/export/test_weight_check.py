"""Rounding stays within its bound, whatever the numbers; nothing else does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eightgig.errors import ExportError
from eightgig.export.folder import OutputFolder, output_folder
from eightgig.export.merge import write_merged
from eightgig.export.source import TunedWeights
from eightgig.export.weight_check import DefinedWeights, MergedCheck, rounding_bound
from eightgig.models.checkpoint import read_model_spec
from tests import tiny
from tests.unit.export.adapters import write_random_adapter

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LINEAR = "model.layers.1.mlp.up_proj.weight"


def rounded(numbers: torch.Tensor, kind: str) -> torch.Tensor:
    if kind != "q8_0":
        return numbers.to(_DTYPES[kind]).float()
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    codes = gguf.quants.quantize(numbers.numpy(), q8_0)
    return torch.from_numpy(gguf.quants.dequantize(codes, q8_0))


def numbers(seed: int, scale: float) -> torch.Tensor:
    """Rows with outliers, zeros and very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(64, 96, generator=generator) * scale
    values[:, ::7] *= 100
    values[3] = 0.0
    values[5, :40] *= 1e-4
    return values


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 0.05, 1.0, 30.0])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_rounding_is_within_the_bound_and_uses_most_of_it(kind: str, scale: float) -> None:
    largest = 0.0
    for seed in range(20):
        exact = numbers(seed, scale)
        ratio = (rounded(exact, kind) - exact).abs() / rounding_bound(exact, kind)
        largest = max(largest, float(ratio.nan_to_num().max()))
    assert largest <= 1.0
    if kind != "f32":  # there, the order of sums takes more than rounding
        assert largest > 0.8


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_a_number_that_is_a_step_off_is_outside_the_bound(kind: str) -> None:
    exact = torch.linspace(1.0, 1.99, 96)[None]
    step = {"f16": 2.0**-10, "bf16": 2.0**-7, "q8_0": 2.0 / 127}[kind]
    ratio = (rounded(exact, kind) + step - exact).abs() / rounding_bound(exact, kind)
    assert float(ratio.max()) > 1.0


def test_float64_rounds_to_what_is_written(tmp_path: Path) -> None:
    base = tiny.make_model("llama", tmp_path / "base", dtype="bfloat16")
    spec = read_model_spec(base)
    adapter = write_random_adapter(tmp_path / "adapter", spec)
    quick = torch.cat(list(TunedWeights(spec, base, adapter).blocks(LINEAR)))
    exact = torch.cat(list(DefinedWeights(spec, base, adapter).blocks(LINEAR)))
    torch.testing.assert_close(quick, exact, rtol=1e-6, atol=1e-6)


def merged(tmp_path: Path) -> tuple[Path, DefinedWeights]:
    """A right merge, and what it must hold."""
    base = tiny.make_model("llama", tmp_path / "base", dtype="bfloat16")
    spec = read_model_spec(base)
    adapter = write_random_adapter(tmp_path / "adapter", spec)
    with output_folder(tmp_path / "merged", needed_bytes=0) as output:
        assert isinstance(output, OutputFolder)
        write_merged(output, TunedWeights(spec, base, adapter), base, lambda _: None)
    return tmp_path / "merged", DefinedWeights(spec, base, adapter)


def test_a_right_merge_is_within_its_rounding(tmp_path: Path) -> None:
    folder, weights = merged(tmp_path)
    check = MergedCheck(folder, weights)
    check.check_file("model.safetensors")
    result = check.result()
    assert result.num_tensors == len(weights.spec.tensors)
    assert result.num_adapted == 7 * weights.spec.decoder.num_layers
    assert 0.5 < result.error_ratio <= 1.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (LINEAR, "times as far off"),
        ("model.norm.weight", "has no adapter"),
        ("model.embed_tokens.weight", "has no adapter"),
    ],
)
def test_one_bit_too_many_is_found(tmp_path: Path, name: str, words: str) -> None:
    folder, weights = merged(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    bits = tensors[name].view(torch.int16)
    bits.view(-1)[-1] ^= 4  # the third bit from the last
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError) as caught:
        MergedCheck(folder, weights).check_file(path.name)
    assert words in caught.value.why
    assert name in caught.value.why


@pytest.mark.parametrize("what", ["missing", "renamed", "dtype", "nan"])
def test_other_tensors_are_found(tmp_path: Path, what: str) -> None:
    folder, weights = merged(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if what == "dtype":
        tensors[LINEAR] = tensors[LINEAR].half()
    elif what == "nan":
        tensors[LINEAR][0, 0] = float("nan")
    else:
        tensor = tensors.pop(LINEAR)
        if what == "renamed":
            tensors["another"] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    check = MergedCheck(folder, weights)
    with pytest.raises(ExportError, match="does not hold the base weights"):
        check.check_file(path.name)
        check.result()


def test_bounds_are_never_below_a_types_smallest_number() -> None:
    tiny_numbers = torch.full((1, 32), 1e-9)
    for kind in ("f16", "q8_0"):
        error = (rounded(tiny_numbers, kind) - tiny_numbers).abs()
        assert bool((error <= rounding_bound(tiny_numbers, kind)).all())
    assert np.isfinite(rounding_bound(tiny_numbers, "bf16").numpy()).all()
