"""The tensors of a decoder: their short names, shapes, and names within a checkpoint.

Short names are ours (`quant/manifest.py` lists them); checkpoints know them as, for example,
`model.layers.3.self_attn.q_proj.weight`. Which of them exist follows from the `DecoderSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping

from eightgig.models.spec import ATTENTION_LINEARS, DecoderSpec, LayerSpec, linear_shapes

Shapes = dict[str, tuple[int, ...]]

PLE_LINEARS = ("ple_gate", "ple_projection", "ple_model_projection")

_LAYER_SUFFIXES: Mapping[str, str] = {
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "input_norm": "input_layernorm.weight",
    "layer_scalar": "layer_scalar",
    "ple_gate": "per_layer_input_gate.weight",
    "ple_projection": "per_layer_projection.weight",
    "ple_norm": "post_per_layer_input_norm.weight",
    "router": "router.proj.weight",
    "router_scale": "router.scale",
    "router_expert_scale": "router.per_expert_scale",
    "experts_gate_up": "experts.gate_up_proj",
    "experts_down": "experts.down_proj",
    "post_mlp_norm_1": "post_feedforward_layernorm_1.weight",
    "pre_mlp_norm_2": "pre_feedforward_layernorm_2.weight",
    "post_mlp_norm_2": "post_feedforward_layernorm_2.weight",
}
# "post_attention_layernorm" is what it says in Gemma; elsewhere it stands before the MLP.
_SANDWICH_NORM_SUFFIXES: Mapping[str, str] = {
    "post_attention_norm": "post_attention_layernorm.weight",
    "pre_mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}
_PLAIN_NORM_SUFFIXES: Mapping[str, str] = {"pre_mlp_norm": "post_attention_layernorm.weight"}

OTHER_SUFFIXES: Mapping[str, str] = {
    "embedding": "embed_tokens.weight",
    "final_norm": "norm.weight",
    "ple": "embed_tokens_per_layer.weight",
    "ple_model_projection": "per_layer_model_projection.weight",
    "ple_model_norm": "per_layer_projection_norm.weight",
}


def layer_suffixes(decoder: DecoderSpec, layer: LayerSpec) -> dict[str, str]:
    """Short name -> name after `layers.N.` of the layer's tensors in a checkpoint."""
    norms = _SANDWICH_NORM_SUFFIXES if decoder.has_sandwich_norms else _PLAIN_NORM_SUFFIXES
    suffixes = {**_LAYER_SUFFIXES, **norms}
    return {name: suffixes[name] for name in layer_tensor_shapes(decoder, layer)}


def layer_tensor_shapes(decoder: DecoderSpec, layer: LayerSpec) -> Shapes:
    """Shapes of all stored tensors of one layer, by short name; linears first."""
    hidden = (decoder.hidden_size,)
    linears = linear_shapes(decoder, layer)
    shapes: Shapes = dict(linears)
    if decoder.has_qkv_bias:
        biased = [name for name in ATTENTION_LINEARS[:3] if name in linears]
        shapes |= {name.replace("_proj", "_bias"): (linears[name][0],) for name in biased}
    shapes |= {"input_norm": hidden, "pre_mlp_norm": hidden}
    if decoder.has_sandwich_norms:
        shapes |= {"post_attention_norm": hidden, "post_mlp_norm": hidden}
    if decoder.has_qk_norm:
        shapes["q_norm"] = (layer.head_dim,)
        if layer.has_k_proj:
            shapes["k_norm"] = (layer.head_dim,)
    if decoder.has_layer_scalar:
        shapes["layer_scalar"] = (1,)
    if decoder.ple_size:
        shapes["ple_gate"] = (decoder.ple_size, decoder.hidden_size)
        shapes["ple_projection"] = (decoder.hidden_size, decoder.ple_size)
        shapes["ple_norm"] = hidden
    return shapes | (_expert_shapes(decoder) if decoder.has_experts else {})


def other_tensor_shapes(decoder: DecoderSpec) -> Shapes:
    """Shapes of the tensors outside the layers, by short name; `head` only where untied."""
    table = (decoder.vocab_size, decoder.hidden_size)
    shapes: Shapes = {"embedding": table, "final_norm": (decoder.hidden_size,)}
    if decoder.ple_size:
        width = decoder.num_layers * decoder.ple_size
        shapes["ple"] = (decoder.vocab_size, width)
        shapes["ple_model_projection"] = (width, decoder.hidden_size)
        shapes["ple_model_norm"] = (decoder.ple_size,)
    if not decoder.tie_word_embeddings:
        shapes["head"] = table
    return shapes


def _expert_shapes(decoder: DecoderSpec) -> Shapes:
    experts, size, hidden = decoder.num_experts, decoder.expert_size, decoder.hidden_size
    return {
        "router": (experts, hidden),
        "router_scale": (hidden,),
        "router_expert_scale": (experts,),
        "experts_gate_up": (experts, 2 * size, hidden),
        "experts_down": (experts, hidden, size),
        "post_mlp_norm_1": (hidden,),
        "pre_mlp_norm_2": (hidden,),
        "post_mlp_norm_2": (hidden,),
    }


def head_tensor_name(tensor_prefix: str) -> str:
    """Name of an untied head's tensor beside a decoder whose names start with `tensor_prefix`."""
    is_nested = tensor_prefix == "language_model.model."
    return "language_model.lm_head.weight" if is_nested else "lm_head.weight"
