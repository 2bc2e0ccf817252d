"""A Modelfile for Ollama: which GGUF, how turns are written, where answers stop.

Ollama writes prompts with a Go template. It is made here from what the model's own chat template
does with a few conversations, and used only where it gives the same text for others.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightgig.errors import ExportError, Finding
from eightgig.export.folder import find_program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODELFILE_NAME = "Modelfile"
_CREATE_SECONDS = 3600
_SHOWN_CHARACTERS = 200
_SYSTEM, _USER, _ANSWER, _NEXT = "\x02sys\x02", "\x02one\x02", "\x02two\x02", "\x02three\x02"
# generation_config.json -> Ollama's PARAMETER.
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")

Message = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnFormat:
    """What a chat template writes around the texts of a conversation.

    Attributes:
        start: Before the first user's text, where there is no system prompt.
        system_start, system_end: Before a system prompt, and between it and the first user's text;
            where the template takes none, it is put before that text.
        user_start: Before a later user's text.
        user_end: After a user's text.
        answer_start, answer_end: Around an earlier answer.
        prompt_end: After the last user's text, before the answer to come.
    """

    start: str
    system_start: str
    system_end: str
    user_start: str
    user_end: str
    answer_start: str
    answer_end: str
    prompt_end: str

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, as the Go template writes it."""
        text, opening = "", self.start
        for number, message in enumerate(messages, start=1):
            content = message["content"]
            if message["role"] == "system":
                opening = f"{self.system_start}{content}{self.system_end}"
            elif message["role"] == "user":
                is_last = number == len(messages)
                text += opening + content + (self.prompt_end if is_last else self.user_end)
                opening = self.user_start
            else:
                text += self.answer_start + content + self.answer_end
        return text

    def go_template(self) -> str:
        """The same as a Go template over Ollama's `.System` and `.Messages`."""
        opening = _either(
            "$first",
            _either(
                "$.System",
                _go(self.system_start) + "{{ $.System }}" + _go(self.system_end),
                _go(self.start),
            )
            + "{{ $first = false }}",
            _go(self.user_start),
        )
        user = (
            opening + "{{ .Content }}" + _either("$last", _go(self.prompt_end), _go(self.user_end))
        )
        answer = _go(self.answer_start) + "{{ .Content }}"
        answer += _either("$last", "", _go(self.answer_end))
        return (
            "{{ $first := true }}{{ range $i, $_ := .Messages }}"
            "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + _either('eq .Role "user"', user, _either('eq .Role "assistant"', answer, ""))
            + "{{ end }}"
        )


def read_turn_format(tokenizer: PreTrainedTokenizerFast, *, adds_bos: bool) -> TurnFormat | None:
    """How the chat template of `tokenizer` writes turns; None where no fixed texts do it.

    Args:
        tokenizer: With the template that was trained with.
        adds_bos: Whether the server puts the bos in front; then it is left out here.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        found = _probe(tokenizer)
    except (ValueError, LookupError):
        return None
    if any(_texts_differ(tokenizer, found, talk) for talk in _TALKS):
        return None
    bos = tokenizer.bos_token or ""
    if not adds_bos or not bos:
        return found
    return TurnFormat(
        start=found.start.removeprefix(bos),
        system_start=found.system_start.removeprefix(bos),
        system_end=found.system_end,
        user_start=found.user_start,
        user_end=found.user_end,
        answer_start=found.answer_start,
        answer_end=found.answer_end,
        prompt_end=found.prompt_end,
    )


def modelfile(
    gguf_name: str, turns: TurnFormat | None, stops: Sequence[str], sampling: Mapping[str, Any]
) -> str:
    """The text of a Modelfile.

    Args:
        gguf_name: The GGUF beside it.
        turns: How turns are written; None: left to Ollama.
        stops: Texts that end an answer.
        sampling: Ollama's parameters by name.
    """
    lines = [f"FROM ./{gguf_name}"]
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.go_template()}"""')
    lines += [f"PARAMETER {name} {value}" for name, value in sampling.items()]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Sampling that the model's generation_config.json asks for, by Ollama's names."""
    try:
        values = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if isinstance(values, dict) and values.get("do_sample") is False:
        return {"temperature": 0}  # Ollama's own is 0.8
    if not isinstance(values, dict) or not values.get("do_sample"):
        return {}
    return {
        name.replace("repetition", "repeat"): values[name]
        for name in _SAMPLING
        if isinstance(values.get(name), (int, float)) and not isinstance(values[name], bool)
    }


def no_template_finding() -> Finding:
    """Says that Ollama must find the template itself."""
    return Finding(
        severity="warning",
        code="export.ollama_template",
        message="The chat template could not be written as a Go template; the Modelfile has none.",
        why="Ollama then looks for a template of its own that resembles the one in the GGUF, and "
        "may write prompts otherwise than the model was trained on.",
        fix="Compare `ollama show --template` with the chat template, and write TEMPLATE by hand.",
    )


def require_program(name: str) -> str:
    """The installed Ollama, that shall create the model `name`.

    Raises:
        ExportError: There is none.
    """
    program = find_program(("ollama",))
    if program is None:
        raise ExportError(
            f"The model {name} cannot be created here: Ollama is not installed.",
            why="Its own program makes a model of the GGUF and the Modelfile.",
            fix="Install Ollama, or leave --ollama-name out and, where it is installed, run in the "
            f"export's folder: ollama create {name} -f {MODELFILE_NAME}",
        )
    return program


def create_model(folder: Path, name: str) -> None:
    """Have the installed Ollama make the model `name` of the Modelfile in `folder`.

    Raises:
        ExportError: Ollama is not installed, or refuses.
    """
    program = require_program(name)
    done = subprocess.run(  # noqa: S603 - a list of arguments, no shell
        [program, "create", name, "-f", MODELFILE_NAME],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=_CREATE_SECONDS,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        last = said[-1][:_SHOWN_CHARACTERS] if said else f"exit code {done.returncode}"
        raise ExportError(
            f"Ollama did not create the model {name}.",
            why=f"It said: {last}.",
            fix=f"Start it (`ollama serve`), then run: ollama create {name} -f "
            f"{folder / MODELFILE_NAME}",
        )


_TALKS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Why?"},),
    (
        {"role": "user", "content": "Is it so?"},
        {"role": "assistant", "content": "It is."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Still."},
        {"role": "user", "content": "Good."},
    ),
    (
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye."},
    ),
)


def _probe(tokenizer: PreTrainedTokenizerFast) -> TurnFormat:
    """Cut rendered conversations at the texts that were put into them.

    Raises:
        ValueError: A text does not stand where it should.
    """
    system = {"role": "system", "content": _SYSTEM}
    user, answer = ({"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER})
    following = {"role": "user", "content": _NEXT}
    start, prompt_end = _cut(_render(tokenizer, (user,)), _USER)
    user_end = _cut(_render(tokenizer, (user,), is_prompt=False), _USER)[1]
    _, middle, between, _ = _cut(
        _render(tokenizer, (user, answer, following)), _USER, _ANSWER, _NEXT
    )
    answer_end = _cut(_render(tokenizer, (user, answer), is_prompt=False), _USER, _ANSWER)[2]
    system_start, system_end = start, "\n\n"
    if _takes_system(tokenizer):
        system_start, system_end, _ = _cut(_render(tokenizer, (system, user)), _SYSTEM, _USER)
    # What closes a last answer may be less than what stands between it and the next turn.
    if not between.startswith(answer_end):
        answer_end = ""
    return TurnFormat(
        start=start,
        system_start=system_start,
        system_end=system_end,
        user_start=between.removeprefix(answer_end),
        user_end=user_end,
        answer_start=middle.removeprefix(user_end),
        answer_end=answer_end,
        prompt_end=prompt_end,
    )


def _texts_differ(
    tokenizer: PreTrainedTokenizerFast, turns: TurnFormat, talk: Sequence[Message]
) -> bool:
    if talk[0]["role"] == "system" and not _takes_system(tokenizer):
        return False
    return turns.render(talk) != _render(tokenizer, talk)


def _takes_system(tokenizer: PreTrainedTokenizerFast) -> bool:
    talk = ({"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER})
    try:
        return _SYSTEM in _render(tokenizer, talk)
    except ValueError:
        return False


def _render(
    tokenizer: PreTrainedTokenizerFast, talk: Sequence[Message], *, is_prompt: bool = True
) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in talk],
                tokenize=False,
                add_generation_prompt=is_prompt,
            )
        )
    except TemplateError as error:
        raise ValueError(str(error)) from error


def _cut(text: str, *marks: str) -> list[str]:
    parts, rest = [], text
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            raise ValueError(f"{mark!r} is not in the rendered text")
        parts.append(before)
    return [*parts, rest]


def _either(condition: str, then: str, other: str) -> str:
    """A choice in a Go template."""
    return f"{{{{ if {condition} }}}}{then}{{{{ else }}}}{other}{{{{ end }}}}"


def _go(text: str) -> str:
    """Go code that writes `text`: a literal, so that no blank of it is trimmed."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
