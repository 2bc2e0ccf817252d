"""Chat models without weights: tokenizers made in code, with the control tokens of each family.

`make_chat_tokenizer("gemma4_large")` has the family's way of cutting text (Gemma: blanks become
underlines and nothing else is cut; Llama and Qwen: bytes behind a pattern; Mistral: a blank put
before the text) and its chat template: Google's own for Gemma 4, small ones of the same shape for
the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "data" / "chat_templates"
# Google's templates are not ours to copy; they lie beside the checkout where there are any.
OFFICIAL = Path(__file__).parents[2] / "shared" / "reference" / "configs"
OFFICIAL_TEMPLATES = {
    "gemma4_large": OFFICIAL / "chat_template-12B-26B-A4B-31B-it.jinja",
    "gemma4_small": OFFICIAL / "chat_template-E2B-E4B-it.jinja",
}
CHATS = ("gemma4_large", "gemma4_small", "llama3", "qwen3", "mistral", "smollm2")

_WORDS = (
    "user", "model", "system", "assistant", "thought", "call", "response", "value", "name",
    "arguments", "parameters", "add", "the", "answer", "question", "Hello", "Hi", "Bye", "See",
    "you", "one", "two", "three", "Be", "brief", "It", "shines", "Sun",
)  # fmt: skip
GEMMA4_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>", "<|channel>", "<channel|>",
    "<|turn>", "<turn|>", "<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>",
    "<audio|>", "<|video|>",
)  # fmt: skip
_LLAMA3 = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen's tags are added tokens, yet not special ones.
_QWEN_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
              "</tool_response>")  # fmt: skip
_MISTRAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_chat_tokenizer(chat: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of one of `CHATS` with its chat template.

    Args:
        chat: Which one.
        template: Another template for it.
    """
    from transformers import PreTrainedTokenizerFast

    names = _special_names(chat)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(chat)), **names
    )
    path = OFFICIAL_TEMPLATES.get(chat, TEMPLATES / f"{chat}.jinja")
    tokenizer.chat_template = template or path.read_text(encoding="utf-8")
    return tokenizer


def _special_names(chat: str) -> dict[str, str]:
    if chat.startswith("gemma4"):
        return {"bos_token": "<bos>", "eos_token": "<turn|>", "pad_token": "<pad>"}
    return {
        "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "mistral": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    }[chat]


@lru_cache
def _tokenizer_json(chat: str) -> str:
    if chat.startswith("gemma4"):
        return _underlined(GEMMA4_TOKENS, cut.Sequence([]), None)
    if chat == "mistral":
        blanks = cut.Metaspace(prepend_scheme="first", split=False)
        return _underlined(_MISTRAL, blanks, blanks)
    if chat == "llama3":
        return _bytes(_LLAMA3, (), normalizers.Sequence([]), _LLAMA3_PATTERN)
    if chat == "qwen3":
        return _bytes(_CHATML, _QWEN_TAGS, normalizers.NFC(), _LLAMA3_PATTERN)
    return _bytes(_CHATML, (), normalizers.Sequence([]), None)


def _underlined(special: Sequence[str], pre_tokenizer: object, blanks: object | None) -> str:
    """Characters joined to known words; a blank is an underline, the unknown is bytes."""
    letters = sorted(set("".join(_WORDS)) | set("▁\n.,:;!?'\"{}()[]<>|/+-=_#*0123456789"))
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = _merges([*(f"▁{word}" for word in _WORDS), *_WORDS, "\n\n"])
    known = dict.fromkeys([*vocabulary, *("".join(pair) for pair in merges)])
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(known)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    if blanks is None:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer.to_str()


def _bytes(
    special: Sequence[str], tags: Sequence[str], normalizer: object, pattern: str | None
) -> str:
    """Bytes joined to known words, cut by a pattern first."""
    merges = _merges([*(f"Ġ{word}" for word in _WORDS), *_WORDS, "ĊĊ"])
    known = dict.fromkeys([*sorted(cut.ByteLevel.alphabet()), *("".join(p) for p in merges)])
    tokenizer = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(known)}, merges=merges)
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = (
        cut.ByteLevel(add_prefix_space=False)
        if pattern is None
        else cut.Sequence(
            [
                cut.Split(Regex(pattern), behavior="isolated"),
                cut.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer.to_str()


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs that join the letters of each word from its beginning."""
    pairs = {(word[:end], word[end]): None for word in words for end in range(1, len(word))}
    return list(pairs)
