"""llama.cpp reads our GGUF files: tiny models of every family, and SmolLM2 with its real weights.

Needs llama-cpp-python (`pip install "eightgig[verify-gguf]"`, minutes to build) and `-m real`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eightgig.adapters.files import AdapterFolder
from eightgig.config import LoraConfig
from eightgig.data.tokenizer import load_tokenizer, stop_ids
from eightgig.export.answers import log_softmax
from eightgig.export.candidates import LlamaCpp
from eightgig.export.folder import output_folder
from eightgig.export.gguf import adapter_parts, adapter_tensors, gguf_tensors, model_parts
from eightgig.export.gguf_vocab import read_vocabulary
from eightgig.export.source import TunedWeights
from eightgig.models.checkpoint import read_model_spec
from tests import tiny
from tests.unit.export.adapters import peft_logits, write_random_adapter

pytest.importorskip("llama_cpp")
pytestmark = [
    pytest.mark.real,
    # llama-cpp-python 0.3 cleans up after itself in __del__.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FAMILIES = [*tiny.TRAINABLE_FAMILIES, "gemma3"]
IDS = list(range(40, 64))
# llama.cpp knows one scale of attention for Gemma 3.
SETTINGS = {"query_pre_attn_scalar": 32}
# Of log-probabilities down to -25. llama.cpp looks GELU up in a table of float16; with q8_0 it
# rounds the inputs of a product to 8 bits, too.
TOLERANCES = {"f32": 5e-3, "q8_0": 0.8}


def write_gguf(folder: Path, base: Path, adapter: AdapterFolder, kind: str) -> Path:
    """The GGUF of a tiny model."""
    spec = read_model_spec(base)
    tokenizer = load_tokenizer(base)
    vocabulary = read_vocabulary(
        tokenizer,
        vocab_size=spec.decoder.vocab_size,
        stop_ids=stop_ids(tokenizer),
        is_gemma4=spec.family == "gemma4",
    )
    tensors = gguf_tensors(TunedWeights(spec, base, adapter), kind)
    with output_folder(folder, needed_bytes=0) as output:
        output.write(
            "model.gguf",
            model_parts(spec, tensors, vocabulary, name="tiny", kind=kind, observe=lambda _: None),
        )
    return folder / "model.gguf"


def make_base(family: str, folder: Path) -> Path:
    settings = SETTINGS if family.startswith("gemma3") else None
    if family == "mistral":
        settings = {"sliding_window": 64}  # longer than the prompt: llama.cpp has none
    return tiny.make_model(family, folder, text_settings=settings)


def ask(path: Path, *, lora: Path | None = None) -> np.ndarray:
    with LlamaCpp(path, context_tokens=len(IDS) + 1, lora=lora) as model:
        return model.ask(IDS, num_tokens=1, end_ids=frozenset()).log_probs[0]


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_and_peft_compute(
    family: str, kind: str, tmp_path: Path
) -> None:
    base = make_base(family, tmp_path / "base")
    adapter = write_random_adapter(tmp_path / "adapter", read_model_spec(base))
    path = write_gguf(tmp_path / "gguf", base, adapter, kind)
    logits = peft_logits(family, base, tmp_path / "adapter", torch.tensor([IDS]))[0, -1]
    difference = np.abs(ask(path) - log_softmax(logits.numpy())).max()
    assert difference <= TOLERANCES[kind]


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_puts_the_adapter_alone_on_a_gguf_of_the_base(
    family: str, tmp_path: Path
) -> None:
    base = make_base(family, tmp_path / "base")
    spec = read_model_spec(base)
    lora = LoraConfig(r=4, lora_alpha=12, use_rslora=True)
    adapter = write_random_adapter(tmp_path / "adapter", spec, lora)
    plain = write_gguf(tmp_path / "gguf", base, AdapterFolder(lora=lora, tensors={}), "f32")
    tensors = adapter_tensors(spec, adapter)
    parts = adapter_parts(spec, adapter.lora, tensors, name="tiny", observe=lambda _: None)
    with output_folder(tmp_path / "lora", needed_bytes=0) as output:
        output.write("lora.gguf", parts)
    logits = peft_logits(family, base, tmp_path / "adapter", torch.tensor([IDS]))[0, -1]
    expected = log_softmax(logits.numpy())
    found = ask(plain, lora=tmp_path / "lora" / "lora.gguf")
    assert np.abs(found - expected).max() <= TOLERANCES["f32"]
    assert np.abs(ask(plain) - expected).max() > 0.1  # the adapter does something


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_cuts_text_into_the_same_tokens_and_stops_at_the_same(
    family: str, tmp_path: Path
) -> None:
    base = make_base(family, tmp_path / "base")
    adapter = write_random_adapter(tmp_path / "adapter", read_model_spec(base))
    path = write_gguf(tmp_path / "gguf", base, adapter, "f32")
    tokenizer = load_tokenizer(base)
    talk = [{"role": "user", "content": "The weather, in 2026:\n\n  fine — isn't it? äöü 🙂"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    with LlamaCpp(path, context_tokens=64) as model:
        assert model.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert all(map(model.is_stop, stop_ids(tokenizer)))
