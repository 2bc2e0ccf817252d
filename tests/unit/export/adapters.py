"""Random adapters for tiny models, and Transformers + PEFT with one on."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from eightgig.adapters.files import AdapterFolder, read_adapter, write_adapter
from eightgig.config import LoraConfig
from eightgig.models.spec import ModelSpec, linear_shapes
from tests import tiny

LORA = LoraConfig(r=4, lora_alpha=12)


def write_random_adapter(
    folder: Path, spec: ModelSpec, lora: LoraConfig = LORA, *, only: str = ""
) -> AdapterFolder:
    """Write an adapter of usual size (B is not zero) on every linear whose path has `only`."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in spec.decoder.layers:
        for name, (out_size, in_size) in linear_shapes(spec.decoder, layer).items():
            part = "self_attn" if name[0] in "qkvo" else "mlp"
            module = f"layers.{layer.index}.{part}.{name}"
            if only in module:
                a = torch.randn(lora.r, in_size, generator=generator)
                b = torch.randn(out_size, lora.r, generator=generator)
                tensors[f"{module}.lora_A"] = a * in_size**-0.5
                tensors[f"{module}.lora_B"] = b * 0.1
    write_adapter(folder, spec=spec, lora=lora, tensors=tensors, files={})
    return read_adapter(folder, spec)


def peft_logits(family: str, base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the base model with the adapter on, in float32."""
    model = PeftModel.from_pretrained(tiny.load_reference(family, base), adapter)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def transformers_logits(family: str, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the model in `folder`, in float32."""
    with torch.no_grad():
        logits: torch.Tensor = tiny.load_reference(family, folder)(input_ids=ids).logits
    return logits
