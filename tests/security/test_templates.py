"""Hostile chat templates, through the path that every row takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eightgig.config import DataConfig
from eightgig.data.checks import check_data
from eightgig.data.template import ChatTemplate, RenderingLimit, TemplateRefused
from eightgig.errors import DataError
from tests.chats import make_chat_tokenizer
from tests.security.watch import SECRET

# Further than those of tests/unit/data/test_template.py.
ESCAPES = (
    "{{ ''.__class__.mro()[1].__subclasses__()[40]('/etc/passwd').read() }}",
    "{{ joiner.__init__.__globals__['os'].mkdir('PWNED') }}",
    "{{ cycler['__init__']['__globals__']['os'].mkdir('PWNED') }}",
    "{{ (messages|attr('__class__')|attr('__mro__'))[1] }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|groupby('__class__') }}",
    "{{ messages|sum(attribute='__class__.__name__', start='') }}",
    "{{ [messages]|map('attr', '__class__')|list }}",
    "{{ '%s'|format(messages.__class__) }}",
    "{{ '{0[__class__]}'.format_map({'0': messages}) }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ raise_exception.__closure__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ loop.__class__ }}{% for x in [1] %}{{ loop._iterable.__class__ }}{% endfor %}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% for x in [1] %}{{ loop._to_iterator.__func__.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "{% set ns = namespace(a=1) %}{{ ns._Namespace__attrs }}",
    "{% set ns = namespace(**{'__class__': 1}) %}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ caller.__globals__ }}",
    "{{ varargs.__class__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ self._TemplateReference__context.environment.globals }}",
    "{{ url_for.__globals__ }}",
    "{{ config.items() }}",
    "{{ environment.loader }}",
    "{% extends '/etc/passwd' %}",
    "{% from '/etc/passwd' import x %}",
    "{% include ['a', '/proc/self/environ'] %}",
    "{% debug %}",
    "{{ messages[0].__setitem__('role', 'x') }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages.clear() }}",
    "{{ messages.sort() }}",
    "{{ messages[0].setdefault('a', 1) }}",
    "{{ ().__class__.__base__.__subclasses__()|length }}",
    "{{ (lambda: 1)() }}",
    "{{ import('os') }}",
    "{{ __builtins__ }}",
    "{{ get_flashed_messages.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "{{ {}.fromkeys.__self__ }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ 'a'.encode().__class__ }}",
    "{{ (1).__class__.__bases__ }}",
    "{{ x.gi_frame.f_globals }}{% set x = messages|map('upper') %}{{ x.gi_frame }}",
)


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_reaches_nothing(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    try:
        text = ChatTemplate(source, {}).render(messages, (), add_generation_prompt=True)
    except (DataError, TemplateRefused):
        text = ""
    words = ("<class", "<function", "<module", "root:", "<code", "built-in", SECRET, "<built")
    assert not any(word in text for word in words), text
    assert messages == [{"role": "user", "content": "Hi"}]


BOMBS = {
    "gigabytes of text": "{% for a in range(99999) %}{{ 'x' * 9999999 }}{% endfor %}",
    "gigabytes in a list": "{% set x = [1] * 9999999999 %}{{ x }}",
    "gigabytes by join": "{{ (['x' * 999999] * 99999)|join }}",
    "gigabytes by replace": "{{ ('x' * 99999)|replace('x', 'x' * 99999) }}",
    "gigabytes by indent": "{{ ('\\n' * 99999)|indent(99999) }}",
    "gigabytes by center": "{{ 'x'|center(99999999999) }}",
    "gigabytes by format": "{{ '{:>99999999999}'.format('x') }}",
    "gigabytes by tojson": "{{ ['x' * 9999]|tojson(indent=999999999) }}",
    "gigabytes by batch": "{{ range(99999)|batch(99999999, 'x')|list }}",
    "a large range": "{{ range(10 ** 12)|list }}",
    "a long sum": "{{ range(99999)|map('string')|join|list|length * 9 ** 99999 }}",
    "lorem ipsum": "{{ lipsum(n=9999999) }}",
    "a slow pattern": "{{ ('a' * 99999 ~ 'b')|wordwrap(1)|urlize }}",
    "calls of calls": "{% macro a(n) %}{% for x in range(9) %}{{ a(n) }}{% endfor %}{% endmacro %}"
    "{{ a(1) }}",
    "a large number as text": "{{ (9 ** 999999)|string }}",
    "blocks": "".join(f"{{% block b{n} %}}" for n in range(3000)) + "{% endblock %}" * 3000,
    "parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "conditions": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "dates": "{{ strftime_now('%Y' * 9999999) }}",
    "text while it compiles": "{% autoescape 'x' * 99999999999 %}{% endautoescape %}",
    "a power while it compiles": "{% autoescape 9 ** 9 ** 9 %}{% endautoescape %}",
    "a filter while it compiles": "{{ 'x'|center(99999999999)|length }}",
    "a test while it compiles": "{{ 1 in 9999999999 * [1] }}",
}


# Each of these computes until its time is over, for two rows.
_LONG = ("a slow pattern", "lorem ipsum", "dates", "calls of calls")


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(source, id=name, marks=pytest.mark.slow if name in _LONG else ())
        for name, source in BOMBS.items()
    ],
)
def test_a_template_that_never_ends_is_a_finding(source: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    path.write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")
    try:
        report = check_data(DataConfig(path=str(path)), make_chat_tokenizer("llama3", source))
    except DataError:
        return
    assert any(finding.severity == "error" for finding in report.findings)


def test_a_limit_is_met_only_so_often() -> None:
    template = ChatTemplate("{% for a in range(99999) %}{{ range(9999)|list }}{% endfor %}", {})
    for _ in range(3):
        with pytest.raises(RenderingLimit):
            template.render([], (), add_generation_prompt=False)
