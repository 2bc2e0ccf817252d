"""GGUF files read back by the gguf library: every tensor, every key, every token's type."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eightgig.adapters.files import read_adapter
from eightgig.config import LoraConfig
from eightgig.data.tokenizer import load_tokenizer, stop_ids
from eightgig.errors import ExportError
from eightgig.export import gguf
from eightgig.export.folder import output_folder
from eightgig.export.gguf_keys import check_architecture, rope_factors
from eightgig.export.gguf_vocab import CONTROL, NORMAL, UNUSED, read_vocabulary
from eightgig.export.source import TunedWeights
from eightgig.models.checkpoint import read_model_spec
from tests import tiny
from tests.unit.export.adapters import write_random_adapter

FAMILIES = [*tiny.TRAINABLE_FAMILIES, "gemma3"]
# llama.cpp knows one scale of attention for Gemma 3.
GEMMA3 = {"query_pre_attn_scalar": 32}


def make(family: str, folder: Path, **settings: Any) -> Path:
    if family.startswith("gemma3"):
        settings["text_settings"] = GEMMA3
    return tiny.make_model(family, folder, **settings)


def write(base: Path, folder: Path, kind: str = "f32") -> library.GGUFReader:
    """The GGUF of a tiny model with a random adapter, read back."""
    spec = read_model_spec(base)
    adapter = write_random_adapter(folder / "adapter", spec)
    tokenizer = load_tokenizer(base)
    vocabulary = read_vocabulary(
        tokenizer,
        vocab_size=spec.decoder.vocab_size,
        stop_ids=stop_ids(tokenizer),
        is_gemma4=spec.family == "gemma4",
    )
    tensors = gguf.gguf_tensors(TunedWeights(spec, base, adapter, block_bytes=1000), kind)
    with output_folder(folder / "gguf", needed_bytes=0) as output:
        output.write(
            "model.gguf",
            gguf.model_parts(
                spec, tensors, vocabulary, name="tiny", kind=kind, observe=lambda _: None
            ),
        )
    size_bytes = (folder / "gguf" / "model.gguf").stat().st_size
    assert size_bytes <= gguf.gguf_bytes(tensors)
    return library.GGUFReader(folder / "gguf" / "model.gguf")


def values(reader: library.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_decoder_is_there_with_the_adapter_in_it(
    family: str, tmp_path: Path
) -> None:
    base = make(family, tmp_path / "base")
    spec = read_model_spec(base)
    reader = write(base, tmp_path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    prefix, head = spec.tensor_prefix, "lm_head.weight"
    expected = [name for name in spec.tensors if name.startswith(prefix) or name == head]
    extra = {"rope_freqs.weight"} if rope_factors(spec) is not None else set()
    assert len(found) == len(expected) + len(extra)
    assert extra <= set(found)
    weights = load_file(base / "model.safetensors")
    adapter = read_adapter(tmp_path / "adapter", spec).tensors
    module = "layers.1.mlp.down_proj"
    update = 3.0 * (adapter[f"{module}.lora_B"] @ adapter[f"{module}.lora_A"])
    tuned = weights[f"{prefix}{module}.weight"] + update
    np.testing.assert_allclose(
        found["blk.1.ffn_down.weight"].data, tuned.numpy(), rtol=0, atol=1e-6
    )
    norm = weights[f"{prefix}norm.weight"] + spec.decoder.norm_offset
    np.testing.assert_array_equal(found["output_norm.weight"].data, norm.numpy())
    np.testing.assert_array_equal(
        found["token_embd.weight"].data, weights[f"{prefix}embed_tokens.weight"].numpy()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_their_types_and_the_template_are_those_of_the_tokenizer(
    family: str, tmp_path: Path
) -> None:
    base = make(family, tmp_path / "base")
    tokenizer = load_tokenizer(base)
    found = values(write(base, tmp_path))
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    rows = read_model_spec(base).decoder.vocab_size
    assert len(tokens) == len(types) == rows > len(tokenizer)
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert types[len(tokenizer) :] == [UNUSED] * (rows - len(tokenizer))
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    visible = {number for number in special if types[number] != CONTROL}
    assert {tokens[number] for number in visible} <= {
        "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
        "<tool_response|>", '<|"|>',
    }  # fmt: skip
    assert all(types[n] == NORMAL for n in range(len(tokenizer)) if n not in special)
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert found["tokenizer.ggml.add_bos_token"] is begins
    assert found["general.name"] == "tiny"


def test_llamas_queries_and_keys_are_arranged_for_rotating_neighbours(tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base")
    spec = read_model_spec(base)
    found = {tensor.name: tensor.data for tensor in write(base, tmp_path).tensors}
    adapter = read_adapter(tmp_path / "adapter", spec).tensors
    weights = load_file(base / "model.safetensors")
    for name, target, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        module = f"layers.2.self_attn.{name}"
        tuned = weights[f"model.{module}.weight"] + 3.0 * (
            adapter[f"{module}.lora_B"] @ adapter[f"{module}.lora_A"]
        )
        size = len(tuned) // heads
        order = [
            head * size + pair + half * size // 2
            for head in range(heads)
            for pair in range(size // 2)
            for half in range(2)
        ]
        np.testing.assert_allclose(
            found[f"blk.2.{target}.weight"], tuned[order].numpy(), rtol=0, atol=1e-6
        )


def test_gemma_4_keys_say_what_its_layers_are(tmp_path: Path) -> None:
    found = values(write(make("gemma4_e2b", tmp_path / "base"), tmp_path))
    assert found["general.architecture"] == "gemma4"
    expected = {
        "block_count": 7,
        "attention.shared_kv_layers": 4,
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": [True, True, False, True, False, True, False],
        "attention.key_length": 32,
        "attention.key_length_swa": 16,
        "attention.head_count_kv": 1,
        "feed_forward_length": [128, 128, 128, 256, 256, 256, 256],
        "embedding_length_per_layer_input": 16,
        "rope.dimension_count": 32,
        "rope.dimension_count_swa": 16,
        "rope.freq_base": 1_000_000.0,
        "rope.freq_base_swa": 10_000.0,
        "final_logit_softcapping": 30.0,
    }
    assert {key: found[f"gemma4.{key}"] for key in expected} == expected


def test_different_key_value_heads_are_listed_layer_by_layer(tmp_path: Path) -> None:
    found = values(write(make("gemma4_12b", tmp_path / "base"), tmp_path))
    assert found["gemma4.attention.head_count_kv"] == [2, 2, 1, 2, 1]


def test_rotary_factors_leave_proportional_pairs_unrotated_and_stretch_llama_3s(
    tmp_path: Path,
) -> None:
    gemma = rope_factors(read_model_spec(make("gemma4_12b", tmp_path / "gemma")))
    assert gemma == [1.0] * 4 + [1e30] * 12
    llama = rope_factors(read_model_spec(make("llama3", tmp_path / "llama")))
    assert llama is not None
    assert len(llama) == 16
    assert llama[0] == 1.0
    assert llama[-1] == 8.0
    assert any(1.0 < factor < 8.0 for factor in llama)
    assert rope_factors(read_model_spec(make("qwen3", tmp_path / "qwen"))) is None


@pytest.mark.parametrize(("kind", "most"), [("f16", 2e-3), ("bf16", 1e-2), ("q8_0", 2e-2)])
def test_coarser_types_are_near_and_keep_vectors_in_float32(
    kind: str, most: float, tmp_path: Path
) -> None:
    base = make("gemma4_e4b", tmp_path / "base", dtype="bfloat16")
    exact = {tensor.name: tensor.data for tensor in write(base, tmp_path / "exact").tensors}
    for tensor in write(base, tmp_path / "coarse", kind).tensors:
        stored = tensor.tensor_type.name.lower()
        if len(tensor.shape) == 1:
            assert stored == "f32", tensor.name
        elif kind == "q8_0" and tensor.shape[0] % 32:
            assert stored == "f16", tensor.name
        else:
            assert stored == kind, tensor.name
        numbers = library.quants.dequantize(tensor.data, tensor.tensor_type)
        scale = np.abs(exact[tensor.name]).max()
        assert np.abs(numbers - exact[tensor.name]).max() <= most * scale, tensor.name


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e5
    from safetensors.torch import save_file

    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="float16") as caught:
        write(base, tmp_path, "f16")
    assert "bf16" in caught.value.fix
    assert not (tmp_path / "gguf").exists()


def test_the_adapter_alone_holds_its_own_tensors_and_its_scale(tmp_path: Path) -> None:
    base = make("gemma4_12b", tmp_path / "base")
    spec = read_model_spec(base)
    lora = LoraConfig(r=4, lora_alpha=12, use_rslora=True)
    adapter = write_random_adapter(tmp_path / "adapter", spec, lora)
    tensors = gguf.adapter_tensors(spec, adapter)
    parts = gguf.adapter_parts(spec, lora, tensors, name="tiny", observe=lambda _: None)
    content = b"".join(bytes(part) for part in parts)
    assert len(content) <= gguf.gguf_bytes(tensors)
    path = tmp_path / "lora.gguf"
    path.write_bytes(content)
    reader = library.GGUFReader(path)
    found = values(reader)
    assert found["general.type"] == "adapter"
    assert found["adapter.type"] == "lora"
    # llama.cpp multiplies by alpha / rank.
    assert found["adapter.lora.alpha"] / 4 == pytest.approx(12 / 2)
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(stored) == len(adapter.tensors)
    np.testing.assert_array_equal(
        stored["blk.2.attn_k.weight.lora_b"],
        adapter.tensors["layers.2.self_attn.k_proj.lora_B"].numpy(),
    )


def test_what_llama_cpp_does_not_compute_is_refused_or_said(tmp_path: Path) -> None:
    odd = read_model_spec(tiny.make_model("gemma3_text", tmp_path / "gemma3"))
    with pytest.raises(ExportError, match="attention scale"):
        check_architecture(odd)
    (finding,) = check_architecture(read_model_spec(make("mistral", tmp_path / "mistral")))
    assert "sliding window" in finding.message
    assert "8 tokens" in finding.fix
    assert check_architecture(read_model_spec(make("gemma4_31b", tmp_path / "gemma4"))) == ()


@pytest.mark.parametrize(
    ("setting", "is_refused"), [({}, False), ({"attention_factor": 1.3}, True)]
)
def test_yarn_is_written_with_its_usual_attention_factor_only(
    setting: dict[str, float], is_refused: bool, tmp_path: Path
) -> None:
    rope = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 64, **setting,
    }  # fmt: skip
    base = tiny.make_model(
        "qwen3",
        tmp_path / "base",
        text_settings={"rope_parameters": rope, "max_position_embeddings": 256},
    )
    if is_refused:
        with pytest.raises(ExportError, match="YaRN"):
            check_architecture(read_model_spec(base))
        return
    assert check_architecture(read_model_spec(base)) == ()
    found = values(write(base, tmp_path))
    assert found["qwen3.rope.scaling.type"] == "yarn"
    assert found["qwen3.rope.scaling.factor"] == 4.0
    assert found["qwen3.rope.scaling.original_context_length"] == 64


def test_other_types_need_llama_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gguf.require_type("Q8_0") == "q8_0"
    with pytest.raises(ExportError, match="llama-quantize is not installed"):
        gguf.require_type("q4_k_m")
    _program(tmp_path, "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])")
    assert gguf.require_type("q4_k_m") == "q4_k_m"
    with output_folder(tmp_path / "out", needed_bytes=0) as output:
        output.write("source.gguf", b"GGUF")
        gguf.quantize_file(output, "source.gguf", "target.gguf", "q4_k_m")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["target.gguf"]


def test_a_failing_llama_quantize_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    _program(tmp_path, 'import sys; sys.exit("no such type: " + sys.argv[3])')
    with (
        pytest.raises(ExportError) as caught,
        output_folder(tmp_path / "out", needed_bytes=0) as output,
    ):
        output.write("source.gguf", b"GGUF")
        gguf.quantize_file(output, "source.gguf", "target.gguf", "q9_x")
    assert "no such type: Q9_X" in caught.value.why
    assert not (tmp_path / "out").exists()


def _program(folder: Path, code: str) -> None:
    path = folder / "llama-quantize"
    path.write_text(f"#!{sys.executable}\n{code}\n", encoding="utf-8")
    path.chmod(0o755)


def test_a_missing_gguf_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError) as caught:
        gguf.load_gguf()
    assert "eightgig[gguf]" in caught.value.fix


def test_4_bit_checkpoints_are_written_from_their_numbers(tmp_path: Path) -> None:
    from tests.unit.quant.checkpoints import quantize_checkpoint

    source = make("llama", tmp_path / "source", dtype="bfloat16")
    numbers = quantize_checkpoint(
        source,
        tmp_path / "base",
        is_quantized=lambda name: name.endswith("_proj.weight"),
        quant_type="nf4",
        compress_statistics=True,
    )
    spec = read_model_spec(tmp_path / "base")
    adapter = write_random_adapter(tmp_path / "adapter", spec, only="layers.0.")
    tensors = gguf.gguf_tensors(TunedWeights(spec, tmp_path / "base", adapter), "f32")
    assert len(tensors) == len(read_model_spec(source).tensors)
    (down,) = (tensor for tensor in tensors if tensor.name == "blk.1.ffn_down.weight")
    assert torch.equal(
        torch.cat(list(down.blocks())), numbers["model.layers.1.mlp.down_proj.weight"].float()
    )
