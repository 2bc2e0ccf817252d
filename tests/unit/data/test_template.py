"""Chat templates render as in Transformers, and cannot harm this machine."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest

from eightgig.config import DataConfig
from eightgig.data.checks import check_data
from eightgig.data.formats import RowShape, read_example
from eightgig.data.render import Renderer
from eightgig.data.rules import Notes
from eightgig.data.template import ChatTemplate, RenderingLimit, TemplateRefused
from eightgig.data.tokenizer import render_settings
from eightgig.errors import DataError
from tests.chats import CHATS, OFFICIAL_TEMPLATES, make_chat_tokenizer
from tests.unit.data.rows import chat_row, write_lines

TOOL = {
    "type": "function",
    "function": {
        "name": "sun",
        "description": "Sunny? <b>&'",
        "parameters": {"type": "object", "properties": {}},
    },
}
CALL = {"type": "function", "function": {"name": "sun", "arguments": {"city": "Bonn"}}}
TURNS = [
    {"role": "system", "content": "Be <b>brief</b> & 'kind'."},
    {"role": "user", "content": "  Sun?\n"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "sun", "content": "yes"},
    {"role": "assistant", "content": "It shines.", "reasoning_content": "Because.",
     "reasoning": "Because.", "thinking": "Because."},
    {"role": "user", "content": "Thank you"},
    {"role": "assistant", "content": "Bye"},
]  # fmt: skip


def _trl_templates() -> list[Path]:
    found = importlib.util.find_spec("trl")
    folder = Path(found.origin).parent / "chat_templates"
    # Templates for training are patched copies; that of pictures needs pictures.
    return sorted(p for p in folder.glob("*.jinja") if not p.stem.endswith("_training"))


def _render_theirs(source: str, turns: list, tools: list | None, **more: object) -> str | None:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        texts, _ = render_jinja_template([turns], tools, chat_template=source, **tokens, **more)
    except Exception:  # noqa: BLE001 - whatever a template raises there
        return None
    return texts[0]


@pytest.mark.parametrize("path", _trl_templates(), ids=lambda path: path.stem)
def test_templates_render_as_in_transformers(path):
    source = path.read_text(encoding="utf-8")
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    rendered = 0
    for start, end in itertools.product((0, 1), range(2, len(TURNS) + 1)):
        tools = [TOOL] if end % 2 else None
        for add in (False, True):
            turns = TURNS[start:end]
            theirs = _render_theirs(source, turns, tools, add_generation_prompt=add)
            try:
                ours = template.render(turns, tools or (), add_generation_prompt=add)
            except TemplateRefused:
                ours = None
            assert ours == theirs
            rendered += theirs is not None
    assert rendered


@pytest.mark.parametrize("path", _trl_templates(), ids=lambda path: path.stem)
def test_rows_of_any_template_begin_with_the_prompt_that_is_served(path):
    source = path.read_text(encoding="utf-8")
    tokenizer = make_chat_tokenizer("llama3", source)
    rows = {"messages": [TURNS[1], {"role": "assistant", "content": "It shines."},
                         *TURNS[5:]]}  # fmt: skip
    notes = Notes(file="rows.jsonl", line=1)
    example = read_example(rows, RowShape(format="messages", columns={}), notes)
    rendered = Renderer(render_settings(tokenizer)).render(example, notes)
    if not rendered:
        assert notes.has_error
        return
    for index in example.trained:
        prompt = tokenizer.apply_chat_template(
            list(example.messages[:index]), add_generation_prompt=True, return_dict=False
        )
        assert any(
            row.input_ids[: len(prompt)].tolist() == prompt and row.is_trained[len(prompt)]
            for row in rendered
        )


@pytest.mark.parametrize("chat", CHATS)
def test_tokens_are_those_of_apply_chat_template(chat):
    path = OFFICIAL_TEMPLATES.get(chat)
    if path is not None and not path.exists():
        pytest.skip("Google's chat template is not here")
    tokenizer = make_chat_tokenizer(chat)
    renderer = Renderer(render_settings(tokenizer))
    turns = [{"role": "user", "content": "Hi  you\n\nthe  answer?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    from eightgig.data.control import RenderedText

    ours = renderer.control.encode(RenderedText(prompt)).ids
    assert list(ours) == tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )


# Templates that mean harm

BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}"
    "{% endfor %}",
    "nested lists": "{% set x = 'abcdefghij' * 9 %}"
    + "".join("{% for a in x %}" for _ in range(9))
    + "".join("{% endfor %}" for _ in range(9)),
    "endless text": "{% set ns = namespace(x='abcdefgh') %}{% for a in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "product": "{{ 'a' * 99999999999 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "width": "{{ '%999999999999d' % 1 }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_is_a_bomb_is_a_finding(name, tmp_path):
    tokenizer = make_chat_tokenizer("llama3", BOMBS[name])
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(1), chat_row(2), chat_row(3)])
    report = check_data(DataConfig(path=str(path)), tokenizer)
    errors = [finding for finding in report.findings if finding.severity == "error"]
    assert errors
    assert errors[0].code in (
        "data.rendering_limit",
        "data.template_refused",
        "data.template",
        "data.no_end_of_turn",
    )


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ('{0.__class__}' | attr('format'))('') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ dict.__base__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
)


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(source):
    template = ChatTemplate(source, {})
    try:
        text = template.render([{"role": "user", "content": "Hi"}], (), add_generation_prompt=True)
    except TemplateRefused:
        return
    assert not any(word in text for word in ("uid=", "<class", "root:", "module", "function"))


def test_a_template_that_takes_too_long_stops(monkeypatch):
    monkeypatch.setattr("eightgig.data.template.RENDER_SECONDS", 0.05)
    template = ChatTemplate(BOMBS["nested loops"], {})
    for _ in range(4):
        with pytest.raises(RenderingLimit):
            template.render([], (), add_generation_prompt=False)


def test_a_large_template_is_refused():
    with pytest.raises(DataError, match="200,001 characters"):
        ChatTemplate("a" * 200_001, {})


def test_a_row_cannot_set_the_template(tmp_path):
    tokenizer = make_chat_tokenizer("llama3")
    row = {**chat_row(1), "chat_template": "PWNED", "chat_template_kwargs": {"x": 1}}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    report = check_data(DataConfig(path=str(path)), tokenizer, workers=0)
    text = "".join(token.text for token in report.preview[0].tokens)
    assert "PWNED" not in text
    assert report.summary["counts"]["data.template_column"] == 2


def test_the_date_in_a_template_is_said(tmp_path):
    source = "{{ strftime_now('%Y') }}" + make_chat_tokenizer("llama3").chat_template
    tokenizer = make_chat_tokenizer("llama3", source)
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(1)])
    report = check_data(DataConfig(path=str(path)), tokenizer, workers=0)
    assert "data.dated_template" in report.summary["counts"]


def test_a_doubled_beginning_token_is_found(tmp_path):
    source = "{{ bos_token }}" + make_chat_tokenizer("llama3").chat_template
    tokenizer = make_chat_tokenizer("llama3", source)
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(1)])
    report = check_data(DataConfig(path=str(path)), tokenizer, workers=0)
    assert report.findings[0].code == "data.double_bos"


def test_an_answer_without_an_end_is_found(tmp_path):
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = make_chat_tokenizer("llama3", source)
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(1)])
    report = check_data(DataConfig(path=str(path)), tokenizer, workers=0)
    assert report.findings[0].code == "data.no_end_of_turn"


def test_a_prompt_that_is_no_part_of_the_row_is_found(tmp_path):
    source = make_chat_tokenizer("llama3").chat_template.replace(
        "assistant<|end_header_id|>\\n\\n' }}\n{%- endif", "bot<|python_tag|>' }}\n{%- endif"
    )
    tokenizer = make_chat_tokenizer("llama3", source)
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(1)])
    report = check_data(DataConfig(path=str(path)), tokenizer, workers=0)
    assert report.findings[0].code == "data.served_prompt"


def test_special_tokens_in_a_template_may_be_lists():
    source = "{{ extra_special_tokens | join }}{{ bos_token }}"
    template = ChatTemplate(source, {"extra_special_tokens": ["<a>", "<b>"], "bos_token": "<s>"})
    assert template.render([], (), add_generation_prompt=False) == "<a><b><s>"


def test_json_in_templates_is_not_escaped():
    template = ChatTemplate("{{ tools | tojson(indent=1) }}", {})
    text = template.render([], [TOOL], add_generation_prompt=False)
    assert text == json.dumps([TOOL], indent=1, ensure_ascii=False)
