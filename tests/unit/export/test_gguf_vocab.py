"""Tokenizers in llama.cpp's terms: which kind they are, and which are refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eightgig.errors import ExportError
from eightgig.export.gguf_vocab import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from tests import tiny

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(steps: Sequence[object], *, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that cuts text by `steps`."""
    backend = Tokenizer.from_str(tiny.make_tokenizer("llama").backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    backend.model.ignore_merges = ignore_merges
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eot_id|>")


def sentence_piece(*, blank: str = "never") -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece's converted ones: blanks, byte fallback, merges by score."""
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581a", "b"), ("b", "c")]
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "c", "\u2581a", "ab",
              "\u2581ab", "bc", "<turn>", "\u2581\u2581x"]  # fmt: skip
    backend = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    if blank == "prepend":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    if blank == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    backend.add_special_tokens(
        [AddedToken(piece, special=True) for piece in ("<s>", "</s>", "<turn>")]
    )
    backend.add_tokens([AddedToken("\u2581\u2581x", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def read(tokenizer: PreTrainedTokenizerFast, **settings: object) -> Vocabulary:
    arguments = {"vocab_size": len(tokenizer) + 2, "stop_ids": [], "is_gemma4": False, **settings}
    return read_vocabulary(tokenizer, **arguments)


@pytest.mark.parametrize(
    ("pattern", "ignore_merges", "name"),
    [
        (_QWEN2, False, "qwen2"),
        (_LLAMA3, True, "llama-bpe"),
        (_LLAMA3, False, "smaug-bpe"),
        (_TEKKEN, True, "tekken"),
    ],
)
def test_known_patterns_have_llama_cpps_names(pattern: str, ignore_merges: bool, name: str) -> None:
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    vocabulary = read(byte_level(steps, ignore_merges=ignore_merges))
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", name)
    assert vocabulary.scores is None


def test_digits_one_by_one_are_smollms_cut_and_nothing_else_is_gpt_2s() -> None:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert read(byte_level([pre_tokenizers.Digits(individual_digits=True), level])).pre == "smollm"
    assert read(tiny.make_tokenizer("llama")).pre == "gpt-2"


@pytest.mark.parametrize(
    "steps",
    [
        [
            pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [pre_tokenizers.Whitespace()],
    ],
)
def test_other_cuts_are_refused(steps: list[object]) -> None:
    with pytest.raises(ExportError, match="cannot be written into a GGUF") as caught:
        read(byte_level(steps))
    assert "--to merged" in caught.value.fix


def test_other_models_are_refused() -> None:
    backend = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(ExportError, match="WordPiece"):
        read(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(ExportError, match="tokens, the model 20"):
        read(tiny.make_tokenizer("llama"), vocab_size=20)


def test_sentence_piece_merges_become_scores_in_their_order() -> None:
    vocabulary = read(sentence_piece())
    assert (vocabulary.model, vocabulary.pre, vocabulary.merges) == ("llama", "default", None)
    assert vocabulary.scores is not None
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert scores["\u2581a"] > scores["ab"] > scores["\u2581ab"] > scores["bc"] > scores["a"]
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert types["<unk>"] == UNKNOWN
    assert types["<0x0A>"] == BYTE
    assert types["<turn>"] == CONTROL
    assert types["  x"] == USER_DEFINED  # compared with the text as it is
    assert types["ab"] == NORMAL


@pytest.mark.parametrize(
    ("blank", "adds"), [("never", False), ("prepend", True), ("metaspace", True)]
)
def test_a_blank_in_front_of_text_is_said(blank: str, adds: bool) -> None:
    assert read(sentence_piece(blank=blank)).adds_space_prefix is adds


def test_gemma_4s_kind_keeps_the_merges_and_always_begins_with_bos() -> None:
    vocabulary = read(sentence_piece(), is_gemma4=True)
    assert (vocabulary.model, vocabulary.pre) == ("gemma4", None)
    assert vocabulary.merges == ("\u2581 a", "a b", "\u2581a b", "b c")
    assert vocabulary.adds_bos
    assert vocabulary.scores is not None
    assert set(vocabulary.scores) == {-1000.0}


def test_a_stop_that_llama_cpp_does_not_know_gets_a_role() -> None:
    tokenizer = tiny.make_tokenizer("llama")
    end, text_end = (
        tokenizer.convert_tokens_to_ids(piece) for piece in ("<|eot_id|>", "<|end_of_text|>")
    )
    unknown = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    known = read(tokenizer, stop_ids=[end, text_end]).special
    assert "eot" not in known  # llama.cpp stops at <|end_of_text|> by its name
    assert known["eos"] == end
    assert read(tokenizer, stop_ids=[end, unknown]).special["eot"] == unknown
    assert read(sentence_piece(), stop_ids=[12]).special["eot"] == 12
