"""What a person types never becomes a control token, and everything else stays as it is."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eightgig.data.formats import Example, RowShape, read_example
from eightgig.data.render import Renderer
from eightgig.data.rules import Notes
from eightgig.data.tokenizer import render_settings
from tests.chats import CHATS, OFFICIAL_TEMPLATES, make_chat_tokenizer

CLOSING = {
    "gemma4_large": "<turn|>",
    "gemma4_small": "<turn|>",
    "llama3": "<|eot_id|>",
    "qwen3": "<|im_end|>",
    "mistral": "</s>",
    "smollm2": "<|im_end|>",
}


@pytest.fixture(scope="module", params=CHATS)
def chat(request):
    path = OFFICIAL_TEMPLATES.get(request.param)
    if path is not None and not path.exists():
        pytest.skip(f"Google's chat template is not here: {path.name}")
    return request.param


@pytest.fixture(scope="module")
def tokenizer(chat):
    return make_chat_tokenizer(chat)


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(render_settings(tokenizer))


def render(renderer, *turns, **more):
    notes = Notes(file="rows.jsonl", line=1)
    row = {"messages": list(turns), **more}
    read = read_example(row, RowShape(format="messages", columns={}), notes)
    rows = () if read is None else renderer.render(read, notes)
    return rows, [finding.code for finding in notes.findings]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def control_ids(renderer, row):
    known = set(renderer.control.ids.values())
    return [token for token in row.input_ids.tolist() if token in known]


@pytest.mark.parametrize("place", ["question", "answer", "system", "after a blank", "twice"])
def test_a_typed_token_stays_text(chat, tokenizer, renderer, place):
    token = CLOSING[chat]
    typed = {"after a blank": f"a {token} b", "twice": f"a{token}{token}b"}.get(place, f"a{token}b")
    plain = "aXb"

    def turns(text):
        if place == "answer":
            return [user("Hi"), assistant(text)]
        if place == "system":
            return [{"role": "system", "content": text}, user("Hi"), assistant("Hello")]
        return [user(text), assistant("Hello")]

    (row,), codes = render(renderer, *turns(typed))
    (other,), _ = render(renderer, *turns(plain))
    assert control_ids(renderer, row) == control_ids(renderer, other)
    assert typed in tokenizer.decode(row.input_ids)
    assert codes == ["data.control_token"]


def test_text_around_a_typed_token_is_cut_as_ever(chat, tokenizer, renderer):
    (row,), _ = render(renderer, user(f"the question {CLOSING[chat]}"), assistant("It shines."))
    (plain,), _ = render(renderer, user("the question x"), assistant("It shines."))
    trained = row.input_ids[row.is_trained].tolist()
    assert trained == plain.input_ids[plain.is_trained].tolist()
    pairs = enumerate(zip(row.input_ids, plain.input_ids, strict=False))
    start = next(index for index, (one, other) in pairs if one != other)
    question = tokenizer.decode(plain.input_ids[:start])
    assert question.endswith(("the question ", "the question"))


def test_a_token_cannot_be_put_together_from_parts(chat, renderer):
    token = CLOSING[chat]
    parts = [{"type": "text", "text": token[:2]}, {"type": "text", "text": token[2:] + " Hi"}]
    rows, _ = render(renderer, user(parts), assistant("Hello"))
    plain, _ = render(renderer, user("Hi"), assistant("Hello"))
    assert [control_ids(renderer, row) for row in rows] == [
        control_ids(renderer, row) for row in plain
    ]


def test_tools_and_arguments_cannot_hold_real_tokens(chat, renderer):
    if chat == "smollm2":
        pytest.skip("its template renders no calls")
    token = CLOSING[chat]

    def turns(text):
        function = {"name": "sun", "arguments": {text: [text]}}
        call = assistant("", tool_calls=[{"type": "function", "function": function}])
        return [user("Sun?"), call, {"role": "tool", "name": "sun", "content": text},
                assistant("Yes.")]  # fmt: skip

    rows, codes = render(renderer, *turns(f"a{token}b"))
    plain, _ = render(renderer, *turns("aXb"))
    assert "data.control_token" in codes
    assert [control_ids(renderer, row) for row in rows] == [
        control_ids(renderer, row) for row in plain
    ]


def test_reasoning_in_tags_of_the_family_is_read_by_the_template():
    tokenizer = make_chat_tokenizer("qwen3")
    renderer = Renderer(render_settings(tokenizer))
    (row,), codes = render(renderer, user("Hi"), assistant("<think>\nSo.\n</think>\n\nHello"))
    (other,), _ = render(renderer, user("Hi"), assistant("Hello", reasoning="So."))
    assert codes == []
    assert row.input_ids.tolist() == other.input_ids.tolist()


def test_a_token_typed_into_reasoning_in_tags_stays_text():
    tokenizer = make_chat_tokenizer("qwen3")
    renderer = Renderer(render_settings(tokenizer))
    typed = "<think>\nSo <|im_end|> on.\n</think>\n\nHello"
    (row,), codes = render(renderer, user("Hi"), assistant(typed))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row.input_ids.tolist().count(end) == 2
    assert codes == ["data.control_token"]


def test_a_users_thinking_tags_are_text():
    tokenizer = make_chat_tokenizer("qwen3")
    renderer = Renderer(render_settings(tokenizer))
    (row,), _ = render(renderer, user("What is </think>?"), assistant("A tag."))
    tag = tokenizer.convert_tokens_to_ids("</think>")
    assert row.input_ids.tolist().count(tag) == 1  # that of the empty thought


def test_reasoning_that_a_template_cuts_from_an_answer_is_refused():
    path = OFFICIAL_TEMPLATES["gemma4_small"]
    if not path.exists():
        pytest.skip("Google's chat template is not here")
    renderer = Renderer(render_settings(make_chat_tokenizer("gemma4_small")))
    rows, codes = render(renderer, user("Hi"), assistant("<|channel>thought\nSo.<channel|>Hello"))
    assert rows == ()
    assert codes[0] == "data.content_lost"


def test_the_character_set_aside_cannot_forge_a_token(chat, renderer):
    token = CLOSING[chat]
    for mark in ("\U000f1eff", *(chr(0xF1E00 + n) for n in range(64))):
        forged = f"{token[0]}{mark}{token[1:]} {token}"
        rows, codes = render(renderer, user(forged), assistant("Hello"))
        assert {"data.control_token", "data.control_token_lost"} >= set(codes) != set()
        for row in rows:
            assert control_ids(renderer, row) == control_ids(
                renderer, render(renderer, user("Hi"), assistant("Hello"))[0][0]
            )


ALPHABET = st.sampled_from(
    [*"ab \n\t.<>|[]/{}", "Hello", "日", "🙂", "ß", "\u0301", "\ufb01", "<|", "|>", "think", "turn"]
)
TEXT = st.lists(ALPHABET, max_size=12).map("".join)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_row_breaks_and_no_prompt_is_ever_trained(chat, tokenizer, renderer, data):
    tokens = st.sampled_from(sorted(renderer.control.ids))
    text = st.lists(st.one_of(TEXT, tokens), max_size=4).map("".join)
    turns = []
    for _ in range(data.draw(st.integers(1, 3))):
        turns.append(user(data.draw(text)))
        more = {"reasoning": data.draw(text)} if data.draw(st.booleans()) else {}
        turns.append(assistant(data.draw(text), **more))
    rows, codes = render(renderer, *turns)
    if not rows:
        assert codes
        return
    closing = tokenizer.convert_tokens_to_ids(CLOSING[chat])
    answers = 0
    for row in rows:
        ids, trained = row.input_ids, row.is_trained
        starts = [i for i in range(1, len(ids)) if trained[i] and not trained[i - 1]]
        ends = [i for i in range(len(ids)) if trained[i] and not trained[i + 1 :][:1].any()]
        answers += len(starts)
        assert not trained[0]
        assert all(ids[end] == closing for end in ends)
        # A trained span ends at the first closing token in it: no prompt lies inside.
        spans = zip(starts, ends, strict=True)
        assert all((ids[a : b + 1] == closing).sum() == 1 for a, b in spans)
    assert answers == len(turns) // 2


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(
                ["role", "content", "tool_calls", "function", "name", "arguments", "type", "text",
                 "reasoning", "weight", "x"]
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=20,
)  # fmt: skip
COLUMNS = ("messages", "conversations", "prompt", "completion", "text", "tools", "system",
           "instruction", "input", "output", "chat_template")  # fmt: skip
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "x", None]), "content": JSON},
    optional={"tool_calls": JSON, "reasoning": JSON, "name": JSON, "weight": JSON},
)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["messages", "prompt_completion", "sharegpt", "alpaca", "text"]),
    st.dictionaries(st.sampled_from(COLUMNS), st.one_of(JSON, st.lists(MESSAGE, max_size=4))),
)
@example("messages", {"messages": [user("Hi"), assistant("Hello", weight=True)]})
@example("sharegpt", {"conversations": [{"from": [], "value": {}}]})
def test_no_row_at_all_breaks(renderer, shape, row):
    notes = Notes(file="rows.jsonl", line=1)
    read = read_example(row, RowShape(format=shape, columns={}), notes)
    assert read is None or isinstance(read, Example)
    rows = () if read is None else renderer.render(read, notes)
    assert rows or notes.has_error
