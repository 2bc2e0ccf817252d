"""A 4-bit forward pass against Transformers' load_in_4bit, on a CPU."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.nn.modules
import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig

from eightgig.models.layout import PLE_LINEARS
from tests import engines, tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("family", ["gemma4_e2b", "gemma4_12b", "llama", "qwen2"])
def test_logits_of_a_4_bit_base_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the processor has AVX512-bf16, bitsandbytes answers in bfloat16, and only to layers
    # whose rows are a multiple of 32.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    # On processors with AVX512, bitsandbytes 0.50.2 misreads blocks that cross rows.
    settings = None if family.startswith("gemma4") else {"intermediate_size": 128}
    folder = tiny.make_model(family, tmp_path / "model", text_settings=settings)
    engine = engines.make_engine(folder, tmp_path / "stores", quantization="nf4")
    engine.model.use_adapter(False)
    # Naming modules replaces Transformers' own list, so the tables and towers are named, too.
    names = ["lm_head", "embed_tokens", "vision", "audio", "embed_vision", "embed_audio"]
    names += ["per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"]
    assert len(PLE_LINEARS) == 3
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=names,
    )
    reference = getattr(transformers, engine.spec.architecture).from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    rows = engines.random_rows(engine.spec, [23, 40])
    ours = engines.engine_logits(engine, rows)
    theirs = engines.oracle_logits(reference, rows)
    # bitsandbytes' mean of the block maxima depends on the number of threads: a rounding.
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-3
