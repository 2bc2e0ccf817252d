"""A model as data: everything the planner and the engine need, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary position embedding of one kind of layer.

    Attributes:
        theta: Base of the frequencies.
        kind: Transformers' rope_type: how the frequencies are scaled.
        partial_factor: Share of the head that is rotated; the rest has frequency 0
            (`proportional`).
        parameters: Further numbers of the kind (`factor`, `low_freq_factor`, ...), as in the
            config's rope_parameters.
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn", "proportional"] = "default"
    partial_factor: float = 1.0
    parameters: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One decoder layer.

    Attributes:
        index: 0-based position.
        sliding_window: Tokens a query sees, itself included; None: all earlier ones.
        num_heads, num_kv_heads, head_dim: Sizes of the attention.
        intermediate_size: F of the MLP.
        rope: Rotary embedding of this layer.
        has_k_proj: False where K and V come from `kv_source`.
        has_v_proj: False where V is the raw output of k_proj, or comes from `kv_source`.
        kv_source: Earlier layer whose K and V this layer attends to, None: its own.
    """

    index: int
    sliding_window: int | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope: RopeSpec
    has_k_proj: bool = True
    has_v_proj: bool = True
    kv_source: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """A stack of decoder layers with its embedding and head.

    Attributes:
        hidden_size, vocab_size: D and V.
        layers: The layers in order.
        rms_norm_eps: Added to the mean square.
        norm_offset: Added to norm weights: 1 for Gemma 3, else 0.
        activation: Function of the gate.
        has_sandwich_norms: Norms after attention and MLP, too (Gemma).
        has_qk_norm: RMS norm with weight on every head of Q and K.
        has_v_norm: RMS norm without weight on every head of V (Gemma 4).
        has_qkv_bias: Bias on q_proj, k_proj, v_proj (Qwen 2).
        has_layer_scalar: The layer's output is multiplied by a stored scalar (Gemma 4).
        attention_scale: Factor of the attention scores.
        embedding_scale: Factor of the token embedding, before rounding to the weights' dtype.
        ple_size: Width of the per-layer embedding, 0 where there is none.
        final_softcap: Logits become c tanh(logits / c); None: they do not.
        tie_word_embeddings: The head is the token embedding.
        max_positions: Longest context the model was made for.
        has_experts: Mixture of experts (26B-A4B); parsed, not trained yet.
        num_experts, num_active_experts: Experts of a layer, and those a token passes.
        expert_size: F of one expert.
    """

    hidden_size: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    rms_norm_eps: float
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu_tanh"]
    has_sandwich_norms: bool = False
    has_qk_norm: bool = False
    has_v_norm: bool = False
    has_qkv_bias: bool = False
    has_layer_scalar: bool = False
    attention_scale: float
    embedding_scale: float = 1.0
    ple_size: int = 0
    final_softcap: float | None = None
    tie_word_embeddings: bool
    max_positions: int
    has_experts: bool = False
    num_experts: int = 0
    num_active_experts: int = 0
    expert_size: int = 0

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Where one tensor of a checkpoint lies.

    Attributes:
        file: Name of the safetensors file in the checkpoint's folder.
        dtype: As in the safetensors header: `BF16`, `F32`, `U8`, ...
        shape: Shape in elements.
        offset_bytes: From the start of the file.
        size_bytes: Bytes of data.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A base model: its decoder and what its checkpoint holds.

    Attributes:
        name: Hub id or folder, as the user wrote it.
        family: Name of the family in `models/families.py`.
        model_type: `model_type` of config.json.
        architecture: Class name in config.json, which the adapter is loaded onto.
        decoder: The text decoder.
        dtype: Dtype of the checkpoint's weights: `bfloat16`, `float16`, `float32`.
        module_prefix: Path of the decoder in Transformers' model, for example
            `model.language_model`.
        tensor_prefix: Start of the decoder's tensor names in the checkpoint.
        tensors: Tensors of the checkpoint, empty where only a config is known.
        skipped_parts: Parts that are not trained and not loaded, in words.
        eos_token_ids: Tokens that end a generation.
        quantization: How the checkpoint itself is quantised: None or `bnb_4bit`.
        license: Licence of the base model, None where unknown.
    """

    name: str
    family: str
    model_type: str
    architecture: str
    decoder: DecoderSpec
    dtype: str
    module_prefix: str
    tensor_prefix: str
    tensors: Mapping[str, TensorSpec]
    skipped_parts: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    quantization: Literal["bnb_4bit"] | None = None
    license: str | None = None


def linear_shapes(decoder: DecoderSpec, layer: LayerSpec) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of the layer's adaptable linears, in the order they are stored."""
    query_size = layer.num_heads * layer.head_dim
    kv_size = layer.num_kv_heads * layer.head_dim
    shapes = {"q_proj": (query_size, decoder.hidden_size)}
    if layer.has_k_proj:
        shapes["k_proj"] = (kv_size, decoder.hidden_size)
    if layer.has_v_proj:
        shapes["v_proj"] = (kv_size, decoder.hidden_size)
    shapes["o_proj"] = (decoder.hidden_size, query_size)
    shapes["gate_proj"] = (layer.intermediate_size, decoder.hidden_size)
    shapes["up_proj"] = (layer.intermediate_size, decoder.hidden_size)
    shapes["down_proj"] = (decoder.hidden_size, layer.intermediate_size)
    return shapes
