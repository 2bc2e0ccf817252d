"""Checkpoints for the tests of the store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import Tensor

from eightgig.models.checkpoint import read_model_spec
from eightgig.models.spec import ModelSpec
from eightgig.quant.build import Download
from eightgig.quant.nf4 import code_table_tensors, dequantize, dtype_of
from eightgig.quant.store import Store
from tests.tiny import make_model

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_checkpoint(family: str, folder: Path, **settings: object) -> tuple[ModelSpec, Path]:
    """A tiny model of `family` and its spec."""
    make_model(family, folder, **settings)
    return read_model_spec(folder), folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of the checkpoint in `folder`."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def stored_numbers(store: Store, index: int, name: str, dtype: str | None = None) -> Tensor:
    """One tensor of a layer, dequantised."""
    stored = store.manifest.layers[index].tensors[name]
    tables = code_table_tensors(store.manifest.code_tables, CPU)
    out = torch.empty(stored.shape, dtype=dtype_of(dtype or stored.dtype))
    return dequantize(store.blob(index), stored, tables, out=out)


def quantize_checkpoint(
    source: Path, target: Path, *, is_quantized: Callable[[str], bool], **settings: object
) -> dict[str, Tensor]:
    """Write the checkpoint of `source` with some weights in bitsandbytes' 4 bit.

    Args:
        source: A folder with dense weights.
        target: Where to write.
        is_quantized: Which weights, by their full names.
        settings: Of bitsandbytes' `quantize_4bit`.

    Returns:
        What bitsandbytes makes of those weights, by their full names.
    """
    target.mkdir(parents=True)
    weights, numbers = {}, {}
    for name, weight in weights_of(source).items():
        if not is_quantized(name):
            weights[name] = weight
            continue
        codes, state = functional.quantize_4bit(weight, **settings)
        parts = state.as_dict(packed=True)
        weights |= {f"{name}.{part}": value.contiguous() for part, value in parts.items()}
        weights[name] = codes
        numbers[name] = dequantize_theirs(codes, state)
    save_file(weights, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (target / "config.json").write_text(json.dumps(config), "utf-8")
    return numbers


def dequantize_theirs(codes: Tensor, state: functional.QuantState) -> Tensor:
    """bitsandbytes' numbers, read as one row (see tests/numeric/test_nf4.py)."""
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    numbers = functional.dequantize_4bit(codes, state).view(shape)
    state.shape = shape
    return numbers


class Hub:
    """A folder that plays the hub: files are fetched into a snapshot and deleted again."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source = source
        self.snapshot = folder / "snapshots" / COMMIT
        self.snapshot.mkdir(parents=True)
        self.fetched: list[str] = []
        self.most_files = 0

    @property
    def download(self) -> Download:
        """What `prepare_store` takes."""
        return Download(folder=self.snapshot, fetch=self.fetch, delete=self.delete)

    def fetch(self, file: str) -> None:
        """Copy one file into the snapshot."""
        if not (self.snapshot / file).exists():
            shutil.copyfile(self.source / file, self.snapshot / file)
            self.fetched.append(file)
        self.most_files = max(self.most_files, len(list(self.snapshot.iterdir())))

    def delete(self, file: str) -> None:
        """Remove one file from the snapshot."""
        (self.snapshot / file).unlink()
