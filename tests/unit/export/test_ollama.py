"""Modelfiles: turns as the chat template writes them, stops, and what cannot be written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from eightgig.errors import ExportError
from eightgig.export.ollama import (
    create_model,
    modelfile,
    read_turn_format,
    sampling_defaults,
)
from tests import tiny

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": 'Say "hi"\nplease.'},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Again?"},
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gemma4_e2b", "gemma4_12b"])
@pytest.mark.parametrize("talk", [TALK, TALK[1:], TALK[1:2], TALK[:2]])
def test_turns_are_written_as_the_chat_template_writes_them(
    family: str, talk: list[dict[str, str]]
) -> None:
    tokenizer = tiny.make_tokenizer(family)
    turns = read_turn_format(tokenizer, adds_bos=False)
    assert turns is not None
    expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert turns.render(talk) == expected


def test_a_template_without_a_system_turn_works_without_one() -> None:
    tokenizer = tiny.make_tokenizer("mistral")
    turns = read_turn_format(tokenizer, adds_bos=False)
    assert turns is not None
    expected = tokenizer.apply_chat_template(TALK[1:], tokenize=False, add_generation_prompt=True)
    assert turns.render(TALK[1:]) == expected


def test_a_bos_that_the_server_adds_is_left_out() -> None:
    tokenizer = tiny.make_tokenizer("gemma4_e2b")
    turns = read_turn_format(tokenizer, adds_bos=True)
    assert turns is not None
    assert turns.start == "<|turn>user\n"
    assert turns.system_start == "<|turn>system\n"


def test_templates_that_are_no_fixed_texts_are_left_to_ollama() -> None:
    tokenizer = tiny.make_tokenizer("qwen2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}"
    )
    assert read_turn_format(tokenizer, adds_bos=False) is None
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    assert read_turn_format(tokenizer, adds_bos=False) is None
    tokenizer.chat_template = None
    assert read_turn_format(tokenizer, adds_bos=False) is None


def test_a_modelfile_names_the_gguf_the_stops_and_the_sampling(tmp_path: Path) -> None:
    values = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    turns = read_turn_format(tiny.make_tokenizer("qwen2"), adds_bos=False)
    text = modelfile("a.gguf", turns, ["<|im_end|>"], sampling_defaults(tmp_path))
    lines = text.splitlines()
    assert lines[0] == "FROM ./a.gguf"
    assert lines[1].startswith('TEMPLATE """')
    assert lines[1].count('"""') == 2
    assert lines[2:] == [
        "PARAMETER temperature 0.7",
        "PARAMETER top_k 20",
        "PARAMETER repeat_penalty 1.1",
        'PARAMETER stop "<|im_end|>"',
    ]
    values["do_sample"] = False
    (tmp_path / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    assert sampling_defaults(tmp_path) == {"temperature": 0}
    del values["do_sample"]
    (tmp_path / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    assert sampling_defaults(tmp_path) == {}
    assert sampling_defaults(tmp_path / "nowhere") == {}


def test_go_template_balances_its_blocks_and_quotes_line_breaks() -> None:
    turns = read_turn_format(tiny.make_tokenizer("gemma4_12b"), adds_bos=True)
    assert turns is not None
    text = turns.go_template()
    opened = sum(text.count(f"{{{{ {word} ") for word in ("if", "range"))
    assert opened == text.count("{{ end }}")
    assert "\n" not in text
    assert r'{{ "<|turn>user\n" }}' in text


def test_ollama_that_is_not_installed_or_refuses_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match="not installed") as caught:
        create_model(tmp_path, "mine")
    assert "ollama create mine -f" in caught.value.fix
    program = tmp_path / "ollama"
    program.write_text(f'#!{sys.executable}\nimport sys; sys.exit("server is down")\n', "utf-8")
    program.chmod(0o755)
    with pytest.raises(ExportError, match="did not create") as caught:
        create_model(tmp_path, "mine")
    assert "server is down" in caught.value.why
    program.write_text(f"#!{sys.executable}\n", "utf-8")
    create_model(tmp_path, "mine")
