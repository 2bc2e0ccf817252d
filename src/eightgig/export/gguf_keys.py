"""The hyper-parameters of a decoder as llama.cpp reads them, by architecture.

Keys and values are those that llama.cpp's own conversion writes. What its graph of an architecture
does not compute is refused here, or said.

Source: llama.cpp's conversion and model code, https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eightgig.errors import ExportError, Finding
from eightgig.models.spec import DecoderSpec, LayerSpec, ModelSpec, RopeSpec

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma3": "GEMMA3",
    "gemma4": "GEMMA4",
}
"""Our family -> name in `gguf.MODEL_ARCH`."""

_PLAIN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Without an array of its own, llama.cpp takes every sixth layer of Gemma 3 for a global one.
_GEMMA3_PATTERN = 6
_GEMMA3_27B_LAYERS = 62


def check_architecture(spec: ModelSpec) -> tuple[Finding, ...]:
    """What llama.cpp computes otherwise than Transformers, and the user should know.

    Raises:
        ExportError: It cannot compute this decoder at all.
    """
    decoder = spec.decoder
    _check_yarn(spec)
    if spec.family == "gemma3":
        _check_gemma3(spec)
    if spec.family == "gemma4":
        _check_shared_layers(spec)
    windows = {layer.sliding_window for layer in decoder.layers} - {None}
    if spec.family not in _PLAIN_FAMILIES or not windows:
        return ()
    window = min(window for window in windows if window is not None)
    return (
        Finding(
            severity="warning",
            code="export.gguf_window",
            message=f"llama.cpp does not know the sliding window of {spec.name}.",
            why=f"Its {ARCHITECTURES[spec.family].lower()} graph attends to all tokens; up to "
            f"{window:,} tokens of context that is the same, beyond it answers may differ.",
            fix=f"Run it with a context of at most {window:,} tokens.",
        ),
    )


def add_hyper_parameters(writer: GGUFWriter, spec: ModelSpec) -> None:
    """Write everything about the decoder but its tensors."""
    decoder = spec.decoder
    last_full = _full_layer(decoder)
    writer.add_block_count(decoder.num_layers)
    writer.add_context_length(decoder.max_positions)
    writer.add_embedding_length(decoder.hidden_size)
    writer.add_feed_forward_length(_one_or_all([y.intermediate_size for y in decoder.layers]))
    writer.add_head_count(_one_or_all([y.num_heads for y in decoder.layers]))
    writer.add_head_count_kv(_one_or_all([y.num_kv_heads for y in decoder.layers]))
    writer.add_layer_norm_rms_eps(decoder.rms_norm_eps)
    writer.add_key_length(last_full.head_dim)
    writer.add_value_length(last_full.head_dim)
    writer.add_rope_freq_base(last_full.rope.theta)
    _add_rope_scaling(writer, last_full.rope)
    if spec.family in ("llama", "mistral"):
        writer.add_vocab_size(decoder.vocab_size)
        writer.add_rope_dimension_count(last_full.head_dim)
    if spec.family in ("gemma3", "gemma4"):
        _add_gemma(writer, spec)
    if spec.family == "gemma4":
        _add_gemma4(writer, decoder)


def rope_factors(spec: ModelSpec) -> list[float] | None:
    """By what llama.cpp shall divide each rotary frequency of the global layers; None: nothing."""
    layer = _full_layer(spec.decoder)
    rope, half = layer.rope, layer.head_dim // 2
    if rope.kind == "proportional":
        rotated = int(layer.head_dim * rope.partial_factor / 2)
        # A frequency divided by this is zero: the pair is not rotated.
        return [1.0] * rotated + [1e30] * (half - rotated)
    return _llama3_factors(rope, layer.head_dim) if rope.kind == "llama3" else None


def _llama3_factors(rope: RopeSpec, head_dim: int) -> list[float]:
    values = rope.parameters
    factor, old = float(values["factor"]), float(values["original_max_position_embeddings"])
    low, high = float(values["low_freq_factor"]), float(values["high_freq_factor"])
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope.theta ** (index / head_dim)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(factor)
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _add_rope_scaling(writer: GGUFWriter, rope: RopeSpec) -> None:
    import gguf

    values = rope.parameters
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(values["factor"]))
    elif rope.kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(values["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(values["original_max_position_embeddings"]))
        adders = {
            "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
            "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
        }
        for name, add in adders.items():
            if values.get(name) is not None:
                add(float(values[name]))


def _add_gemma(writer: GGUFWriter, spec: ModelSpec) -> None:
    decoder = spec.decoder
    if decoder.final_softcap is not None:
        writer.add_final_logit_softcapping(decoder.final_softcap)
    sliding = _sliding_layer(decoder)
    if sliding is None:
        return
    assert sliding.sliding_window is not None
    writer.add_sliding_window(sliding.sliding_window)
    writer.add_rope_freq_base_swa(sliding.rope.theta)
    is_sliding = [layer.sliding_window is not None for layer in decoder.layers]
    usual = [(index + 1) % _GEMMA3_PATTERN != 0 for index in range(decoder.num_layers)]
    if spec.family == "gemma4" or is_sliding != usual:
        writer.add_sliding_window_pattern(is_sliding)


def _add_gemma4(writer: GGUFWriter, decoder: DecoderSpec) -> None:
    full, sliding = _full_layer(decoder), _sliding_layer(decoder) or _full_layer(decoder)
    writer.add_shared_kv_layers(sum(layer.kv_source is not None for layer in decoder.layers))
    writer.add_embedding_length_per_layer_input(decoder.ple_size)
    writer.add_key_length_swa(sliding.head_dim)
    writer.add_value_length_swa(sliding.head_dim)
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(int(sliding.head_dim * sliding.rope.partial_factor))


def _check_yarn(spec: ModelSpec) -> None:
    """llama.cpp computes YaRN's factor of the attention itself, from the factor of the context."""
    rope = _full_layer(spec.decoder).rope
    if rope.kind != "yarn":
        return
    values = rope.parameters
    usual = 1 + 0.1 * math.log(float(values["factor"]))
    given = values.get("attention_factor")
    is_usual = given is None or math.isclose(float(given), usual, rel_tol=1e-4)
    other = [name for name in ("mscale", "mscale_all_dim") if values.get(name)]
    if is_usual and not other and values.get("truncate", True) is not False:
        return
    raise ExportError(
        f"{spec.name} cannot be written as a GGUF: its YaRN has settings of its own.",
        why="llama.cpp computes YaRN with the usual attention_factor, mscale and truncate.",
        fix="Use --to merged.",
    )


def _check_gemma3(spec: ModelSpec) -> None:
    decoder = spec.decoder
    layer = decoder.layers[0]
    size = layer.head_dim
    if decoder.num_layers == _GEMMA3_27B_LAYERS:
        size = decoder.hidden_size // layer.num_heads
    if not math.isclose(decoder.attention_scale, size**-0.5, rel_tol=1e-6):
        raise ExportError(
            f"{spec.name} cannot be written as a GGUF: its attention scale is "
            f"{decoder.attention_scale:.6g}.",
            why=f"llama.cpp computes a Gemma 3 of {decoder.num_layers} layers with "
            f"{size**-0.5:.6g}; no key of a GGUF says otherwise.",
            fix="Use --to merged.",
        )


def _check_shared_layers(spec: ModelSpec) -> None:
    """llama.cpp takes K and V of the last two layers that have their own, sliding and global."""
    layers = spec.decoder.layers
    first = next((layer.index for layer in layers if layer.kv_source is not None), len(layers))
    for layer in layers[first:]:
        expected = first - (2 if layer.sliding_window is not None else 1)
        if layer.kv_source != expected:
            raise ExportError(
                f"{spec.name} cannot be written as a GGUF: layer {layer.index} takes keys and "
                f"values of layer {layer.kv_source}.",
                why=f"llama.cpp takes those of layer {expected}.",
                fix="Use --to merged.",
            )


def _full_layer(decoder: DecoderSpec) -> LayerSpec:
    """The first layer that sees all tokens, or the first layer."""
    found = (layer for layer in decoder.layers if layer.sliding_window is None)
    return next(found, decoder.layers[0])


def _sliding_layer(decoder: DecoderSpec) -> LayerSpec | None:
    return next((layer for layer in decoder.layers if layer.sliding_window is not None), None)


def _one_or_all(values: list[int]) -> Any:
    """One number where all layers agree, else all of them."""
    return values[0] if len(set(values)) == 1 else values
