"""`eightgig chat`: the template of the training, the adapter on and off, one question or many."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eightgig.chat import (
    COMMANDS,
    ChatOptions,
    Conversation,
    TextPieces,
    default_sampling,
    obey,
    open_conversation,
)
from eightgig.cli.app import main
from eightgig.data.control import ControlTokens
from eightgig.errors import DataError
from eightgig.evaluation.questions import read_questions
from eightgig.evaluation.tuned_run import open_run, plan_rows
from tests import tiny, tiny_run

QUESTION = "4: which colour has grass?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    return tiny_run.make_run(root, settings=["train.max_steps=30"])


@pytest.fixture(scope="module")
def opened(run: Path) -> Iterator[Conversation]:
    with open_conversation(run, ChatOptions(max_new_tokens=8), lambda _: None) as conversation:
        yield conversation


@pytest.fixture
def conversation(opened: Conversation) -> Conversation:
    opened.reset()
    opened.system = None
    opened.use_adapter(True)
    return opened


def test_prompts_are_the_beginnings_of_the_trained_rows(
    run: Path, conversation: Conversation
) -> None:
    planned = plan_rows(open_run(run, lambda _: None), lambda _: None)
    data = (run.parents[1] / "data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"] for line in data]
    for question in read_questions(planned.rows)[:5]:
        user, _ = rows[question.source]
        assert conversation.prompt_ids(user["content"]) == question.prompt


def test_the_tuned_model_answers_and_stops(conversation: Conversation) -> None:
    pieces = list(conversation.ask(QUESTION))
    assert "".join(pieces) == "green"
    assert len(pieces) > 1


def test_the_base_model_answers_when_the_adapter_is_off(conversation: Conversation) -> None:
    conversation.use_adapter(False)
    assert "".join(conversation.ask(QUESTION)) != "green"
    conversation.reset()
    conversation.use_adapter(True)
    assert "".join(conversation.ask(QUESTION)) == "green"


def test_earlier_turns_and_the_system_turn_are_in_the_prompt(
    run: Path, conversation: Conversation
) -> None:
    conversation.system = "Be brief."
    answer = "".join(conversation.ask(QUESTION))
    tokenizer = tiny.make_tokenizer("gemma4_e2b")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And?"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(conversation.prompt_ids("And?")) == text


def test_typed_control_tokens_do_not_end_a_turn(conversation: Conversation) -> None:
    stop = tiny.make_tokenizer("gemma4_e2b").eos_token_id
    plain, typed = (conversation.prompt_ids(text) for text in ("a", "a<turn|>"))
    assert plain.count(stop) == typed.count(stop) == 1


def test_an_answer_may_be_left_early(conversation: Conversation) -> None:
    pieces = conversation.ask(QUESTION)
    first = next(pieces)
    pieces.close()
    assert tiny.make_tokenizer("gemma4_e2b").decode(conversation.prompt_ids("?")).count(first)
    conversation.reset()
    assert "".join(conversation.ask(QUESTION)) == "green"


def test_a_conversation_that_is_too_long_is_refused(conversation: Conversation) -> None:
    with pytest.raises(DataError, match="are planned for"):
        next(conversation.ask("words and " * 400))
    assert "".join(conversation.ask(QUESTION)) == "green"


def test_bytes_that_are_no_text_are_refused(conversation: Conversation) -> None:
    """As the terminal hands them on where it is not set to UTF-8."""
    with pytest.raises(DataError, match="is not UTF-8"):
        next(conversation.ask(b"gr\xfcn?".decode("utf-8", "surrogateescape")))
    assert "".join(conversation.ask(QUESTION)) == "green"


@pytest.mark.parametrize("has_template", [True, False])
def test_a_text_that_the_tokenizer_gives_up_on_is_refused(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, has_template: bool
) -> None:
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    tokenizer = json.loads(conversation._tuned.settings.tokenizer_json)
    tokenizer["pre_tokenizer"] = {**slow, "invert": False}
    monkeypatch.setattr(conversation, "_control", ControlTokens(json.dumps(tokenizer), ""))
    if not has_template:
        monkeypatch.setattr(conversation, "_template", None)
    with pytest.raises(DataError, match="does not take this conversation"):
        conversation.prompt_ids("a" * 60 + "b")


def test_commands_do_what_their_list_says(conversation: Conversation) -> None:
    assert obey(conversation, "/base") == "The base model answers."
    assert not conversation.has_adapter
    obey(conversation, "/toggle")
    assert conversation.has_adapter
    obey(conversation, "/system  Be kind. ")
    assert conversation.system == "Be kind."
    obey(conversation, "/system")
    assert conversation.system is None
    assert all(command in str(obey(conversation, "/help")) for command in COMMANDS)
    assert str(obey(conversation, "/what")).startswith("/what is no command.")
    assert obey(conversation, "/quit") is None


def test_characters_are_shown_when_they_are_whole() -> None:
    data = "aé🙂b".encode()
    pieces = TextPieces(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    shown = [list(pieces.add(token)) for token in data]
    assert [piece for some in shown for piece in some] == ["a", "é", "🙂", "b"]
    assert shown[1] == []
    assert list(pieces.finish()) == []
    assert pieces.text == "aé🙂b"


def test_half_a_character_at_the_end_is_shown_at_the_end() -> None:
    pieces = TextPieces(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    assert list(pieces.add("é".encode()[0])) == []
    assert list(pieces.finish()) == ["\ufffd"]


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        (None, {}, (0.0, 50, 1.0)),
        ({"temperature": 0.7}, {}, (0.0, 50, 1.0)),
        ({"do_sample": True}, {}, (1.0, 50, 1.0)),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 64, "top_p": 0.95},
            {},
            (0.7, 64, 0.95),
        ),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.0}, (0.0, 50, 1.0)),
        ({"do_sample": True, "top_k": "many"}, {"temperature": 2.0}, (2.0, 50, 1.0)),
    ],
)
def test_tokens_are_drawn_as_the_model_says(
    tmp_path: Path, values: Any, options: dict[str, float], expected: tuple[float, int, float]
) -> None:
    if values is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    sampling, notes = default_sampling(tmp_path, ChatOptions(**options))
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == expected
    assert notes == ()


def test_settings_of_the_model_that_are_not_used_are_named(tmp_path: Path) -> None:
    values = {"do_sample": True, "repetition_penalty": 1.05, "min_p": 0.0}
    (tmp_path / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    notes = default_sampling(tmp_path, ChatOptions())[1]
    assert notes == ("repetition_penalty of generation_config.json is not used",)


def test_one_question_is_answered_through_two_slots(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", str(run), "--prompt", QUESTION, "--set", "memory.layer_slots=2"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "green\n"


def test_one_answer_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(run), "--prompt", QUESTION, "--base", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["answer"] != "green"


def test_lines_of_standard_input_are_a_conversation(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [QUESTION, "/base", "", "/reset", "/tuned", "long " * 600, QUESTION]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", str(run), "--max-tokens", "8"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("green\n") == 2
    assert "are planned for" in shown.err


def test_a_line_of_another_encoding_ends_no_conversation(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = io.BytesIO(f"gr\xfcn?\n{QUESTION}\n".encode("latin-1"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines, encoding="utf-8"))
    assert main(["chat", str(run), "--max-tokens", "8"]) == 0
    shown = capsys.readouterr()
    assert "is not UTF-8" in shown.err
    assert "green\n" in shown.out


def test_a_conversation_with_nobody_is_refused_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat", "no run"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: Standard input cannot be read: it is closed.\nwhy: ")


class _Unreadable(io.StringIO):
    def readline(self, *_: object) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_input_that_cannot_be_read_is_said_so(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", _Unreadable())
    assert main(["chat", str(run)]) == 2
    assert "Standard input cannot be read: Input/output error." in capsys.readouterr().err


class _FillingDisk(io.StringIO):
    """Takes the first characters."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def write(self, text: str) -> int:
        self._room -= len(text)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(text)


@pytest.mark.parametrize("room", [0, 8], ids=["at the prompt", "in the answer"])
def test_a_full_disk_ends_a_conversation(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n" * 3))
    monkeypatch.setattr("sys.stdout", _FillingDisk(room))
    assert main(["chat", str(run), "--max-tokens", "8"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("error: The result cannot be written: No space left on device.") == 1
