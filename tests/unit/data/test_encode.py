"""Texts are tokenised piece by piece and word by word, and the tokens are those of the whole."""

import json
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from eightgig.data.encode import ControlTokenLost, TextEncoder
from eightgig.data.words import WordTokens, can_split
from tests.chats import CHATS, make_chat_tokenizer

TEXT = st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "\n\n", "\t", "▁", "▁▁", "the", " answer", "Hello", "See you", "user\n",
         ".", "é", "日本", "🙂", "\u0301", "ﬁ", "\r\n", "<", "|>", "½", "0", "--"]
    ),
    max_size=14,
).map("".join)  # fmt: skip
TEMPLATE = "<think> <tool_call>"


@pytest.fixture(scope="module", params=CHATS)
def whole(request) -> Tokenizer:
    """The tokenizer as a server uses it."""
    made = make_chat_tokenizer(request.param, TEMPLATE)
    return Tokenizer.from_str(made.backend_tokenizer.to_str())


@pytest.fixture(scope="module")
def encoder(whole) -> TextEncoder:
    return TextEncoder(whole.to_str(), TEMPLATE)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pieces_and_words_become_the_tokens_of_the_whole_text(whole, encoder, data):
    names = st.sampled_from(sorted(encoder.control_ids))
    parts = data.draw(st.lists(st.tuples(names, TEXT), max_size=6))
    text, control = data.draw(TEXT), []
    for name, more in parts:
        control.append(len(text))
        text += name + more
    expected = whole.encode(text, add_special_tokens=False)
    found = encoder.encode(text, control)
    assert list(found.ids) == expected.ids
    for position in range(len(text) + 1):
        index = expected.char_to_token(position)
        begins = index is not None and expected.token_to_chars(index)[0] == position
        assert found.token_at(position) == (index if begins else None)


def test_a_text_is_tokenised_again_only_where_it_is_new(whole, encoder, monkeypatch):
    seen = []
    other = TextEncoder(whole.to_str(), TEMPLATE)

    def encode_piece(text: str) -> object:
        seen.append(text)
        return encoder._encode_piece(text)

    monkeypatch.setattr(other, "_encode_piece", encode_piece)
    monkeypatch.setattr(other, "_remembered", lru_cache(8)(encode_piece))
    name = min(encoder.control_ids)
    for end in ("you", "two"):
        other.encode(f"{name}Hello{name}{end}", [0, len(name) + 5])
    assert seen == [f"{name}Hello", f"{name}you", f"{name}two"]


@pytest.mark.parametrize("chat", CHATS)
def test_only_tokenizers_that_never_join_across_a_blank_go_word_by_word(chat):
    tokenizer = make_chat_tokenizer(chat, TEMPLATE).backend_tokenizer
    assert can_split(tokenizer) == chat.startswith("gemma4")


def _gemma_like(**changes) -> Tokenizer:
    described = json.loads(make_chat_tokenizer("gemma4_small", "x").backend_tokenizer.to_str())
    described["model"].update(changes)
    return Tokenizer.from_str(json.dumps(described))


def test_a_token_across_a_blank_forbids_words():
    described = json.loads(_gemma_like().to_str())["model"]
    vocabulary = {**described["vocab"], "e▁": 90_000, "e▁t": 90_001}
    merges = [["e", "▁"], ["e▁", "t"], *described["merges"]]
    tokenizer = _gemma_like(vocab=vocabulary, merges=merges)
    assert can_split(_gemma_like())
    assert not can_split(tokenizer)
    # As it must be: word by word the tokens would be others.
    assert list(WordTokens(tokenizer).encode("e te t").ids) != tokenizer.encode("e te t").ids


def _with_added(**how) -> Tokenizer:
    tokenizer = _gemma_like()
    tokenizer.add_tokens([AddedToken("<odd>", **how)])
    return tokenizer


def _with_part(name: str, part: object) -> Tokenizer:
    tokenizer = _gemma_like()
    setattr(tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        _gemma_like(ignore_merges=True),
        _gemma_like(end_of_word_suffix="</w>"),
        _with_added(lstrip=True),
        _with_added(rstrip=True),
        _with_added(single_word=True),
        _with_part("normalizer", normalizers.NFKC()),
        _with_part("pre_tokenizer", pre_tokenizers.Metaspace()),
        _with_part("pre_tokenizer", pre_tokenizers.Digits()),
        _with_part("model", models.WordLevel({"a": 0}, unk_token="a")),
    ],
)
def test_what_could_join_words_otherwise_forbids_them(tokenizer):
    assert not can_split(tokenizer)


@pytest.mark.parametrize("how", [{"lstrip": True}, {"single_word": True}, {"normalized": True}])
def test_control_tokens_that_look_around_themselves_do_not_cut_a_text(how):
    tokenizer = make_chat_tokenizer("llama3", "x").backend_tokenizer
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken("<odd>", **how)])
    encoder = TextEncoder(tokenizer.to_str(), "x")
    text = "Hello <odd> you"
    found = encoder.encode(text, [6])
    assert list(found.ids) == tokenizer.encode(text, add_special_tokens=False).ids


def test_the_character_set_aside_for_other_names_is_refused():
    encoder = TextEncoder(make_chat_tokenizer("llama3", "x").backend_tokenizer.to_str(), "x")
    with pytest.raises(ControlTokenLost):
        encoder.encode_typed("a \U000f1eff <|eot_id|>", [])
