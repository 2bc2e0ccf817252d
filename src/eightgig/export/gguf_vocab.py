"""A Hugging Face tokenizer as llama.cpp knows it: kind, pieces, their types, merges, special ids.

llama.cpp has three kinds that matter here: byte-level BPE (`gpt2`), whose text is first cut by one
of its built-in patterns; SentencePiece-like BPE (`llama`), which merges by the scores of pieces;
and Gemma 4's (`gemma4`), which merges over whole lines. Which one it is follows from
tokenizer.json alone; one that llama.cpp does not have is refused.

Source: llama.cpp's conversion and vocabulary code, https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from eightgig.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# GGUF's numbers of token types (gguf.TokenType).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_BLANK = "\u2581"
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SCORE_OF_ADDED = -1000.0
# Shown to people even where control tokens are not: llama.cpp's own list for Gemma 4, whose tool
# calls and thoughts are read from the text.
_VISIBLE_CONTROL = frozenset(
    {
        "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
        "<tool_response|>", '<|"|>',
    }
)  # fmt: skip

# llama.cpp ends an answer at these whatever the keys say.
_KNOWN_STOPS = frozenset(
    {
        "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>",
        "<end_of_turn>", "<eos>", "<turn|>", "<|tool_response>", "</s>",
    }
)  # fmt: skip

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
# Pattern of the first cut, and whether whole words are looked up before merging -> the name that
# llama.cpp knows this under.
_PATTERNS: Mapping[tuple[str, bool], str] = {
    (_WORDS + r"\p{N}" + _REST, False): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_WORDS + r"\p{N}{1,3}" + _REST, False): "smaug-bpe",
    (
        _CASED + r"*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|" + _CASED + r"+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        True,
    ): "tekken",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """A tokenizer in GGUF's terms.

    Attributes:
        model: `tokenizer.ggml.model`.
        pre: `tokenizer.ggml.pre`, None where the kind has none.
        tokens: Pieces by id; as many as the embedding has rows.
        types: GGUF's token type of each.
        scores: Of each piece, None for byte-level BPE.
        merges: `left right`, best first; None where scores decide.
        special: Ids by role: `bos`, `eos`, `eot`, `eom`, `unk`, `sep`, `pad`, `mask`.
        adds_bos, adds_eos: Whether plain text begins and ends with them.
        adds_space_prefix: Whether text begins with a blank; None: as the kind does.
        chat_template: As trained with, None where there is none.
    """

    model: Literal["gpt2", "llama", "gemma4"]
    pre: str | None
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space_prefix: bool | None
    chat_template: str | None


def read_vocabulary(
    tokenizer: PreTrainedTokenizerFast,
    *,
    vocab_size: int,
    stop_ids: Collection[int],
    is_gemma4: bool,
) -> Vocabulary:
    """The vocabulary of `tokenizer`.

    Args:
        tokenizer: As it was trained with.
        vocab_size: Rows of the embedding; ids without a piece get a placeholder.
        stop_ids: Tokens that end an answer.
        is_gemma4: Whether the model is a Gemma 4, whose kind of tokenizer has its own name.

    Raises:
        ExportError: llama.cpp has no such tokenizer, or it has more tokens than the model.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"its model is {model.get('type')!r}, not BPE")
    pieces = {index: piece for piece, index in tokenizer.get_vocab().items()}
    if max(pieces) >= vocab_size:
        raise ExportError(
            f"The tokenizer has {max(pieces) + 1:,} tokens, the model {vocab_size:,}.",
            why="Every token needs a row of the embedding in a GGUF.",
            fix="Use the tokenizer that belongs to the model.",
        )
    merges = [_pair(merge) for merge in model["merges"]]
    begins, ends = _added_ends(tokenizer)
    if not model.get("byte_fallback"):
        kind: Literal["gpt2", "llama", "gemma4"] = "gpt2"
    else:
        kind = "gemma4" if is_gemma4 else "llama"
    return Vocabulary(
        model=kind,
        pre=_cut_name(described, ignores_merges=bool(model.get("ignore_merges")))
        if kind == "gpt2"
        else ("default" if kind == "llama" else None),
        tokens=_tokens(tokenizer, pieces, vocab_size, is_byte_level=kind == "gpt2"),
        types=_types(tokenizer, pieces, vocab_size, is_byte_level=kind == "gpt2"),
        scores=None if kind == "gpt2" else _scores(kind, merges, pieces, vocab_size),
        merges=None if kind == "llama" else tuple(map(_merge_line, merges)),
        special=_special_ids(tokenizer, stop_ids),
        adds_bos=begins or kind == "gemma4",
        adds_eos=ends,
        adds_space_prefix=None if kind == "gpt2" else _adds_space_prefix(described),
        chat_template=_template(tokenizer),
    )


def _cut_name(described: Mapping[str, Any], *, ignores_merges: bool) -> str:
    """Name under which llama.cpp knows how text is cut before it is merged."""
    cut = described.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise _unknown(f"text is cut by {', '.join(map(str, kinds))}")
    uses_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and uses_regex and not ignores_merges:
        return "gpt-2"
    is_digits = kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits")
    if is_digits and uses_regex and not ignores_merges:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not uses_regex:
        pattern = steps[0].get("pattern", {}).get("Regex", "")
        name = _PATTERNS.get((pattern, ignores_merges))
        if name is not None and steps[0].get("behavior") == "Isolated":
            return name
    raise _unknown("it cuts text by a pattern of its own")


def _unknown(what: str) -> ExportError:
    return ExportError(
        f"This tokenizer cannot be written into a GGUF: {what}.",
        why="llama.cpp has a fixed list of ways to cut text into tokens, and this is none of them; "
        "with another one the model would read other tokens than it was trained on.",
        fix="Use --to merged, which keeps the tokenizer as it is.",
    )


def _tokens(
    tokenizer: PreTrainedTokenizerFast,
    pieces: Mapping[int, str],
    vocab_size: int,
    *,
    is_byte_level: bool,
) -> tuple[str, ...]:
    added = tokenizer.added_tokens_decoder
    tokens = []
    for index in range(vocab_size):
        piece = pieces.get(index, f"[PAD{index}]")
        if index in added and not added[index].special and not is_byte_level:
            # llama.cpp compares user-defined pieces with the text as it is.
            piece = piece.replace(_BLANK, " ")
        tokens.append(piece)
    return tuple(tokens)


def _types(
    tokenizer: PreTrainedTokenizerFast,
    pieces: Mapping[int, str],
    vocab_size: int,
    *,
    is_byte_level: bool,
) -> tuple[int, ...]:
    added = tokenizer.added_tokens_decoder
    types = []
    for index in range(vocab_size):
        piece = pieces.get(index)
        if piece is None:
            types.append(UNUSED)
        elif index == tokenizer.unk_token_id and not is_byte_level:
            types.append(UNKNOWN)
        elif index in added:
            is_control = added[index].special and piece not in _VISIBLE_CONTROL
            types.append(CONTROL if is_control else USER_DEFINED)
        elif not is_byte_level and _BYTE_PIECE.fullmatch(piece):
            types.append(BYTE)
        else:
            types.append(NORMAL)
    return tuple(types)


def _scores(
    kind: str, merges: Sequence[tuple[str, str]], pieces: Mapping[int, str], vocab_size: int
) -> tuple[float, ...]:
    """Scores that make llama.cpp merge in the order of `merges`.

    It merges first what gives the piece with the highest score; so a piece's score is minus the
    place of the first merge that makes it. Gemma 4's kind reads the merges themselves.
    """
    if kind == "gemma4":
        return (_SCORE_OF_ADDED,) * vocab_size
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return tuple(
        -float(ranks[pieces[index]]) if pieces.get(index) in ranks else -float(len(merges) + index)
        for index in range(vocab_size)
    )


def _pair(merge: Any) -> tuple[str, str]:
    """A merge of tokenizer.json: a pair, or in older files `left right`."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return str(left), str(right)


def _merge_line(pair: tuple[str, str]) -> str:
    """`left right`, with blanks inside of them as byte-level BPE writes a blank."""
    return " ".join(part.replace(" ", "\u0120") for part in pair)


def _special_ids(tokenizer: PreTrainedTokenizerFast, stop_ids: Collection[int]) -> dict[str, int]:
    """Ids by role; stops besides `eos` are `eot` and `eom`, if llama.cpp does not know them."""
    roles = ("bos", "eos", "unk", "sep", "pad", "mask")
    special = {
        role: index
        for role in roles
        if (index := getattr(tokenizer, f"{role}_token_id")) is not None
    }
    template = _template(tokenizer) or ""
    written, others = [], []
    for index in sorted(set(stop_ids) - {special.get("eos")}):
        piece = tokenizer.convert_ids_to_tokens(index)
        if piece in template:
            written.append(index)
        elif piece not in _KNOWN_STOPS:
            others.append(index)
    return special | dict(zip(("eot", "eom"), written + others, strict=False))


def _template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template.strip() else None


def _added_ends(tokenizer: PreTrainedTokenizerFast) -> tuple[bool, bool]:
    """Whether plain text gets a bos in front and an eos behind."""
    ids = tokenizer("a")["input_ids"]
    begins = ids[:1] == [tokenizer.bos_token_id]
    return begins, len(ids) > 1 and ids[-1:] == [tokenizer.eos_token_id]


def _adds_space_prefix(described: Mapping[str, Any]) -> bool:
    """Whether a blank is put in front of text before it is cut."""
    normalizer = described.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    cut = described.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    return any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in steps
    )
