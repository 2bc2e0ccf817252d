"""Tiny Hugging Face models, made in code: real classes, true structure, random weights.

`make_model("gemma4_e2b", folder)` writes a folder as the hub has it: safetensors, config.json,
generation_config.json, tokenizer and chat template. Everything that could hide a mistake by being
0 or 1 is random: norms, biases, layer scalars. The vocabulary is byte level with a few merges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = (
    "llama",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "gemma4_e2b",
    "gemma4_e4b",
    "gemma4_12b",
    "gemma4_31b",
    "gemma4_26b",
)
"""Every shape that can be made; `gemma4_26b` has experts: its spec parses, it is not trained."""

TRAINABLE_FAMILIES = tuple(family for family in FAMILIES if family != "gemma4_26b")
"""The shapes that eightgig trains."""

ALL_FAMILIES = (*FAMILIES, "gemma3")
"""Also the conditional class of Gemma 3, whose files name their tensors in another way."""

_LINEARS = r"(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"

# Pairs that the byte-level tokenizer joins, in order, so that tokens are of different lengths and
# text can be cut in the wrong place. "Ġ" is a space, "Ċ" a line break.
_MERGES = (
    ("t", "h"),
    ("th", "e"),
    ("i", "n"),
    ("in", "g"),
    ("a", "n"),
    ("an", "d"),
    ("e", "r"),
    ("o", "n"),
    ("Ġ", "the"),
    ("Ġ", "a"),
    ("Ċ", "Ċ"),
    ("o", "u"),
    ("l", "l"),
)


@dataclass(frozen=True, kw_only=True)
class _Template:
    """Special tokens in the order of their ids, their roles, and the chat template."""

    tokens: tuple[str, ...]
    pad: str
    bos: str | None
    eos: str
    stops: tuple[str, ...]
    text: str
    adds_bos: bool


_GEMMA4_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
    "<|think|>",
    "<|channel>",
    "<channel|>",
    "<|turn>",
    "<turn|>",
    "<|image>",
    "<|audio>",
    "<|image|>",
    "<|audio|>",
    "<image|>",
    "<audio|>",
    "<|video|>",
)

_PART_TOKENS = {
    "boi_token_id": "<|image>",
    "eoi_token_id": "<image|>",
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "boa_token_id": "<|audio>",
    "eoa_token_index": "<audio|>",
    "audio_token_id": "<|audio|>",
}

# The shape of Gemma 4's own: a real system turn, "model" for the assistant, thoughts dropped from
# earlier turns. EMPTY_THOUGHT stands for what the large models open their answer with.
_GEMMA4_TEXT = """\
{{- bos_token -}}
{%- macro answer(text) -%}
{{- (text.split('<channel|>') | last) | trim -}}
{%- endmacro -%}
{%- set first_system = messages and messages[0]['role'] in ['system', 'developer'] -%}
{%- if enable_thinking or first_system -%}
{{- '<|turn>system\\n' -}}
{%- if enable_thinking -%}{{- '<|think|>\\n' -}}{%- endif -%}
{%- if first_system -%}{{- messages[0]['content'] | trim -}}{%- endif -%}
{{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if first_system else messages) -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|turn>model\\n' + answer(message['content']) + '<turn|>\\n' -}}
{%- else -%}
{{- '<|turn>' + message['role'] + '\\n' + message['content'] | trim + '<turn|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|turn>model\\n' -}}EMPTY_THOUGHT
{%- endif -%}
"""
_EMPTY_THOUGHT = (
    "\n{%- if not enable_thinking -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}"
)


def _gemma4_template(empty_thought: str) -> _Template:
    return _Template(
        tokens=_GEMMA4_TOKENS,
        pad="<pad>",
        bos="<bos>",
        eos="<turn|>",
        stops=("<eos>", "<turn|>", "<|tool_response>"),
        text=_GEMMA4_TEXT.replace("EMPTY_THOUGHT", empty_thought),
        adds_bos=True,
    )


_TEMPLATES = {
    "gemma4_small": _gemma4_template(""),
    "gemma4_large": _gemma4_template(_EMPTY_THOUGHT),
    "gemma3": _Template(
        tokens=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        pad="<pad>",
        bos="<bos>",
        eos="<eos>",
        stops=("<eos>", "<end_of_turn>"),
        text="""\
{{- bos_token -}}
{%- set first_system = messages and messages[0]['role'] == 'system' -%}
{%- set prefix = messages[0]['content'] + '\\n\\n' if first_system else '' -%}
{%- for message in (messages[1:] if first_system else messages) -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') -}}
{{- message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
""",
        adds_bos=True,
    ),
    "chatml": _Template(
        tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        pad="<|endoftext|>",
        bos=None,
        eos="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        text="""\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
        adds_bos=False,
    ),
    "llama3": _Template(
        tokens=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|finetune_right_pad_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
        ),
        pad="<|finetune_right_pad_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        text="""\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
""",
        adds_bos=True,
    ),
    "mistral": _Template(
        tokens=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        pad="<unk>",
        bos="<s>",
        eos="</s>",
        stops=("</s>",),
        text="""\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '[INST] ' + message['content'] + ' [/INST]' -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] | trim + eos_token -}}
{%- else -%}
{{- raise_exception('Only user and assistant roles are supported!') -}}
{%- endif -%}
{%- endfor -%}
""",
        adds_bos=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """One family: the class, its text config's settings, and what belongs to it."""

    architecture: str
    config: str
    template: str
    text: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def is_conditional(self) -> bool:
        """Whether the checkpoint holds more than the text decoder."""
        return bool(self.parts)


_PLAIN: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Producers of shared K and V are layers 1 (sliding) and 2 (full).
_SHARED_KV_LAYERS = [_SLIDING, _SLIDING, _FULL, _SLIDING, _FULL, _SLIDING, _FULL]
_UNSHARED_LAYERS = [_SLIDING, _SLIDING, _FULL, _SLIDING, _FULL]
_GEMMA3: Mapping[str, Any] = {
    **_PLAIN,
    "num_hidden_layers": 5,
    "layer_types": _UNSHARED_LAYERS,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "rope_parameters": {
        _FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
_GEMMA4: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "max_position_embeddings": 512,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
}
_E_SERIES: Mapping[str, Any] = {
    **_GEMMA4,
    "num_hidden_layers": 7,
    "layer_types": _SHARED_KV_LAYERS,
    "num_kv_shared_layers": 4,
    "hidden_size_per_layer_input": 16,
}
_DENSE_LARGE: Mapping[str, Any] = {
    **_GEMMA4,
    "num_hidden_layers": 5,
    "layer_types": _UNSHARED_LAYERS,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
}
_VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 16,
}
_AUDIO: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [8, 4],
    "output_proj_dims": 48,
}
_GEMMA4_CLASS = "Gemma4ForConditionalGeneration"

_SHAPES: Mapping[str, _Shape] = {
    "llama": _Shape(
        architecture="LlamaForCausalLM",
        config="LlamaConfig",
        template="llama3",
        text={**_PLAIN, "rms_norm_eps": 1e-5},
    ),
    "llama3": _Shape(
        architecture="LlamaForCausalLM",
        config="LlamaConfig",
        template="llama3",
        text={
            **_PLAIN,
            "head_dim": 32,
            "tie_word_embeddings": True,
            # Wavelengths of head_dim 32 fall into all three bands of this scaling.
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": _Shape(
        architecture="MistralForCausalLM",
        config="MistralConfig",
        template="mistral",
        text={**_PLAIN, "sliding_window": 8, "head_dim": 32},
    ),
    "qwen2": _Shape(
        architecture="Qwen2ForCausalLM",
        config="Qwen2Config",
        template="chatml",
        text={**_PLAIN, "tie_word_embeddings": True},
    ),
    "qwen3": _Shape(
        architecture="Qwen3ForCausalLM",
        config="Qwen3Config",
        template="chatml",
        text={**_PLAIN, "head_dim": 32},
    ),
    "gemma3_text": _Shape(
        architecture="Gemma3ForCausalLM",
        config="Gemma3TextConfig",
        template="gemma3",
        text=_GEMMA3,
    ),
    "gemma3": _Shape(
        architecture="Gemma3ForConditionalGeneration",
        config="Gemma3Config",
        template="gemma3",
        text=_GEMMA3,
        parts={
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            }
        },
    ),
    "gemma4_e2b": _Shape(
        architecture=_GEMMA4_CLASS,
        config="Gemma4Config",
        template="gemma4_small",
        text={**_E_SERIES, "num_key_value_heads": 1, "use_double_wide_mlp": True},
        parts={
            "vision_config": {**_VISION, "use_clipped_linears": True},
            "audio_config": _AUDIO,
        },
    ),
    "gemma4_e4b": _Shape(
        architecture=_GEMMA4_CLASS,
        config="Gemma4Config",
        template="gemma4_small",
        text={**_E_SERIES, "hidden_size": 96, "num_key_value_heads": 2},
        parts={
            "vision_config": {**_VISION, "use_clipped_linears": True},
            "audio_config": _AUDIO,
        },
    ),
    "gemma4_12b": _Shape(
        architecture="Gemma4UnifiedForConditionalGeneration",
        config="Gemma4UnifiedConfig",
        template="gemma4_large",
        # The unified text config knows no per-layer embedding.
        text={
            **{key: value for key, value in _DENSE_LARGE.items() if "per_layer" not in key},
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
        },
        parts={
            "vision_config": {
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 64,
                "mm_posemb_size": 8,
                "output_proj_dims": 64,
            },
            "audio_config": {"audio_embed_dim": 16},
        },
    ),
    "gemma4_31b": _Shape(
        architecture=_GEMMA4_CLASS,
        config="Gemma4Config",
        template="gemma4_large",
        text={
            **_DENSE_LARGE,
            "hidden_size": 96,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "num_global_key_value_heads": 2,
        },
        parts={"vision_config": {**_VISION, "standardize": True}},
    ),
    "gemma4_26b": _Shape(
        architecture=_GEMMA4_CLASS,
        config="Gemma4Config",
        template="gemma4_large",
        text={
            **_DENSE_LARGE,
            "intermediate_size": 48,
            "num_key_value_heads": 4,
            "num_global_key_value_heads": 2,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
        parts={"vision_config": {**_VISION, "standardize": True}},
    ),
}


def make_model(
    family: str,
    folder: Path,
    *,
    dtype: str = "float32",
    tie: bool | None = None,
    max_shard_size: str | None = None,
    seed: int = 0,
    text_settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a tiny model of `family` with its tokenizer into `folder`.

    Args:
        family: One of `FAMILIES`.
        folder: Where to write; made if missing.
        dtype: Of the stored weights: `float32`, `bfloat16` or `float16`.
        tie: Whether the head is the embedding; None: as usual in the family.
        max_shard_size: Largest safetensors file, such as `100KB`; None: one file.
        seed: Of the weights.
        text_settings: Further settings of the text config, over the family's own.

    Returns:
        `folder`.
    """
    import torch

    tokenizer = make_tokenizer(family)
    config = make_config(family, tie=tie, text_settings=text_settings)
    model = _model_class(family)(config).to(getattr(torch, dtype))
    _fill_weights(model, family=family, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = _ids(tokenizer, _template(family).stops)
    weights = {**model.state_dict(), **_unused_shared_weights(model, seed=seed)}
    model.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size or "1GB")
    tokenizer.save_pretrained(folder)
    return folder


def load_reference(family: str, folder: Path, *, dtype: str = "float32") -> PreTrainedModel:
    """The folder's model as Transformers builds it, in evaluation mode: the oracle."""
    model: PreTrainedModel = _model_class(family).from_pretrained(folder, dtype=dtype)
    return model.eval()


def peft_targets(family: str) -> str:
    """Regex for PEFT's `target_modules`: the seven linears of the text decoder, nothing else."""
    layers = r"layers\.\d+\." + _LINEARS
    return r".*language_model\." + layers if is_conditional(family) else r"model\." + layers


def is_conditional(family: str) -> bool:
    """Whether the family's checkpoint is of a class with vision or audio parts."""
    return _SHAPES[family].is_conditional


def make_config(
    family: str, *, tie: bool | None = None, text_settings: Mapping[str, Any] | None = None
) -> Any:
    """Transformers' config object of the tiny model of `family`."""
    import transformers

    shape = _SHAPES[family]
    tokenizer = make_tokenizer(family)
    text: dict[str, Any] = {**shape.text, "vocab_size": _vocab_size(tokenizer)}
    text |= {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if text.get("hidden_size_per_layer_input"):
        text["vocab_size_per_layer_input"] = text["vocab_size"]
    if tie is not None:
        text["tie_word_embeddings"] = tie
    text |= text_settings or {}
    config_class = getattr(transformers, shape.config)
    if not shape.is_conditional:
        return config_class(**text)
    tokens = _PART_TOKENS if family.startswith("gemma4") else {}
    stops = [token for token in _template(family).stops if token != "<|tool_response>"]
    return config_class(
        text_config=text,
        **{name: dict(settings) for name, settings in shape.parts.items()},
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()},
        eos_token_id=_ids(tokenizer, stops),
        tie_word_embeddings=text.get("tie_word_embeddings", True),
    )


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with the family's special tokens and a chat template of its shape."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    template = _template(family)
    pieces = [*template.tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [left + right for left, right in _MERGES]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(_MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in template.tokens]
    )
    if template.adds_bos and template.bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{template.bos} $A",
            pair=f"{template.bos} $A {template.bos} $B",
            special_tokens=[(template.bos, vocab[template.bos])],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=template.pad,
        bos_token=template.bos,
        eos_token=template.eos,
        model_max_length=512,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template.text
    return tokenizer


def _template(family: str) -> _Template:
    return _TEMPLATES[_SHAPES[family].template]


def _model_class(family: str) -> Any:
    import transformers

    return getattr(transformers, _SHAPES[family].architecture)


def _ids(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def _vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of the embedding: more than tokens, as in most models, and no power of two."""
    return len(tokenizer) + 7


def _unused_shared_weights(model: PreTrainedModel, *, seed: int) -> dict[str, Tensor]:
    """K and V tensors of layers that use another layer's: in Gemma's checkpoints, in no model."""
    import torch

    text = model.config.get_text_config()
    shared = getattr(text, "num_kv_shared_layers", 0)
    if not shared:
        return {}
    generator = torch.Generator().manual_seed(seed + 1)
    weights = model.state_dict()
    extra = {}
    for index in range(text.num_hidden_layers - shared, text.num_hidden_layers):
        producer = [
            earlier
            for earlier in range(text.num_hidden_layers - shared)
            if text.layer_types[earlier] == text.layer_types[index]
        ][-1]
        for part in ("k_proj", "v_proj", "k_norm"):
            like = weights[f"model.language_model.layers.{producer}.self_attn.{part}.weight"]
            noise = torch.randn(like.shape, generator=generator).to(like.dtype)
            extra[f"model.language_model.layers.{index}.self_attn.{part}.weight"] = noise
    return extra


def _fill_weights(model: PreTrainedModel, *, family: str, seed: int) -> None:
    """Replace every parameter and layer scalar by seeded random numbers of sensible size."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    # Gemma 3 multiplies by 1 + weight, the others by the weight.
    norm_center = 0.0 if family.startswith("gemma3") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if family.startswith("gemma4") and name.endswith(("q_norm.weight", "k_norm.weight")):
                # The scores are not divided by sqrt(head_dim): at 1 they would be one-hot.
                values = 0.4 + 0.1 * noise
            elif "norm" in name and parameter.dim() == 1:
                values = norm_center + 0.2 * noise
            elif parameter.dim() == 1:
                values = 0.2 * noise
            else:
                values = noise * parameter.shape[-1] ** -0.5
            parameter.copy_(values)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(0.8 + 0.4 * torch.rand(buffer.shape, generator=generator))
        # Logits of a few units, so that a missing soft-cap or scale shows.
        model.get_output_embeddings().weight.mul_(3.0)
