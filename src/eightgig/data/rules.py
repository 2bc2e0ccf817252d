"""What can be wrong with data: one rule per code, with its severity, reason and remedy.

A finding is a rule met at a place. `Notes` collects the findings of one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from eightgig.errors import Finding, Severity

KEPT_FINDINGS = 100
"""Findings of one code that are kept; the others are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Why something matters and what to do, for every place it is met at."""

    severity: Severity
    why: str
    fix: str


def _error(why: str, fix: str) -> Rule:
    return Rule(severity="error", why=why, fix=fix)


def _warning(why: str, fix: str) -> Rule:
    return Rule(severity="warning", why=why, fix=fix)


def _note(why: str, fix: str) -> Rule:
    return Rule(severity="note", why=why, fix=fix)


_READING: Mapping[str, Rule] = {
    "data.not_found": _error(
        "There is nothing to train on.",
        "Correct `data.path`: a file, a list of files, a glob such as data/*.jsonl, or a "
        "`datasets` name.",
    ),
    "data.folder": _error(
        "A folder may hold files that are no training data.",
        "Name the files, for example FOLDER/*.jsonl.",
    ),
    "data.file_kind": _error(
        "Only JSONL, JSON, CSV, Parquet and Arrow files are read, plain or packed with gzip or "
        "zstd.",
        "Convert the file to JSONL: one JSON object per line.",
    ),
    "data.split_unused": _error(
        "Only a `datasets` name or folder has splits; the whole file would be read.",
        "Delete `data.split`, or name the file of that split in `data.path`.",
    ),
    "data.outside_link": _error(
        "A link inside a data folder could bring in any file of this machine.",
        "Name the linked file itself in `data.path` if you want it.",
    ),
    "data.unreadable": _error(
        "The file cannot be opened.", "Check that it exists and that you may read it."
    ),
    "data.empty_file": _error("There is nothing to train on.", "Fill the file or leave it out."),
    "data.encoding": _error(
        "Text that is not UTF-8 would become other characters than those written.",
        "Convert it: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW (or the encoding it was written in).",
    ),
    "data.json": _error(
        "The row cannot be read.", "Write each row as one valid JSON object on its own line."
    ),
    "data.json_constant": _warning(
        "NaN and Infinity are not JSON; other programs refuse the file.",
        "Write null, or leave the key out.",
    ),
    "data.duplicate_key": _error(
        "Only one of the two values can be used, and which one is chance.",
        "Delete or rename one of them.",
    ),
    "data.not_an_object": _error(
        "A row needs named columns.",
        'Write each row as an object, for example {"messages": [...]}.',
    ),
    "data.row_too_large": _error(
        "A row above 64 MiB is a damaged file or not a training example.",
        "Split the row, or check that rows end with a line break.",
    ),
    "data.too_deep": _error(
        "Nothing that can be trained on is nested this deeply.",
        "Flatten the row to at most 64 levels.",
    ),
    "data.too_many_columns": _error(
        "A row with more than 256 columns is a table of numbers, not text.",
        "Keep the columns that are trained on.",
    ),
    "data.too_many_rows": _error(
        "More than 10,000,000 rows are not read.", "Split the data over several runs."
    ),
    "data.csv": _error(
        "Cells would end up in the wrong column.",
        'Quote cells that hold separators, quotes or line breaks: "...", with quotes doubled.',
    ),
    "data.damaged_file": _error(
        "What is behind the damage cannot be read.", "Write or download the file again."
    ),
    "data.datasets": _error(
        "The rows cannot be read.",
        "Check the name (owner/name:subset where there are several) and `data.split`, and log in "
        "with `hf auth login` if it is gated.",
    ),
}

_COLUMNS: Mapping[str, Rule] = {
    "data.columns": _error(
        "Without these columns it is not known what to train on.",
        "Use messages, prompt and completion, conversations, instruction and output, or text; or "
        "map your names with `data.columns`.",
    ),
    "data.missing_column": _error(
        "The row has nothing to train on.", "Add the column to this row or delete the row."
    ),
    "data.mixed_format": _error(
        "All rows of a file must have one shape.",
        "Convert the row, put rows of another shape into a file of their own and name both in "
        "`data.path`, or correct `data.format`.",
    ),
    "data.column_type": _error(
        "The column must hold text.", "Write the value as text, or delete the row."
    ),
    "data.template_column": _warning(
        "The template belongs to the model; a row that could set it could replace every prompt.",
        "Delete the column; use `data.chat_template` to choose a template.",
    ),
    "data.tokens_column": _error(
        "Rows that are already tokens cannot be checked against the model's template.",
        "Give the text instead: messages, prompt and completion, or text.",
    ),
}

_TURNS: Mapping[str, Rule] = {
    "data.no_messages": _error("There is nothing to train on.", "Fill the row or delete it."),
    "data.message_type": _error(
        "The conversation cannot be rendered.",
        'Write messages as a list of {"role": ..., "content": ...}.',
    ),
    "data.role": _error(
        "The template would render the role as it is written, and the model would learn a role "
        "that no server sends.",
        "Use system, developer, user, assistant or tool.",
    ),
    "data.content_missing": _error(
        "The template would render an empty turn.", "Add the text of the turn, or delete the row."
    ),
    "data.content_type": _error(
        "The template would render something else than text, or fail.",
        "Write content as text, or as a list of text parts.",
    ),
    "data.media": _error(
        "Only text is trained; the model would learn to answer without seeing the picture.",
        "Delete the row, or describe the picture in words.",
    ),
    "data.empty_turn": _error(
        "An empty answer teaches the model to say nothing; an empty question, to answer anything.",
        "Fill the turn in or delete the row.",
    ),
    "data.role_order": _error(
        "No server sends turns in this order, and templates render it differently.",
        "Let user and assistant take turns after an optional system turn; join neighbours of one "
        "role.",
    ),
    "data.no_answer": _error(
        "There is no assistant turn to learn from.", "Add the answer, or delete the row."
    ),
    "data.trailing_turn": _warning(
        "Turns after the last answer are not trained and were left out.",
        "Add the missing answer, or delete the turns.",
    ),
    "data.message_keys": _note(
        "Unknown keys of a message are not rendered.",
        "Nothing, if they are only notes; otherwise rename them to what the template knows.",
    ),
    "data.tools": _error(
        "The model would see other tools than the server will send.",
        'Write tools as a list of {"type": "function", "function": {"name": ..., ...}}.',
    ),
    "data.tool_call": _error(
        "The call would be rendered differently from what the server reads back.",
        'Write calls as {"type": "function", "function": {"name": ..., "arguments": {...}}}.',
    ),
}

_RENDERING: Mapping[str, Rule] = {
    "data.no_template": _error(
        "Without a chat template it is not known how a conversation becomes text for this model.",
        "Set `data.chat_template` to a template file or to the model's tuned sibling (for example "
        "google/gemma-4-12B-it), or to `none` to put prompt and completion one behind the other "
        "as they are.",
    ),
    "data.template": _error(
        "Nothing can be rendered with this template.",
        "Set `data.chat_template` to another template file or to the model's tuned sibling.",
    ),
    "data.template_refused": _error(
        "The model's chat template does not allow this conversation.",
        "Change the row to what the template allows, or delete it.",
    ),
    "data.system_unsupported": _error(
        "This model knows no system turn; a server would refuse the prompt.",
        "Move the text of the system turn to the beginning of the first user turn.",
    ),
    "data.rendering_limit": _error(
        "Rendering took too long or too much memory; the template, the tokenizer or the row is "
        "hostile or damaged.",
        "Use the template and the tokenizer of the model's publisher, or delete the row.",
    ),
    "data.content_lost": _error(
        "The template dropped or changed what is written in the row; it would not be trained.",
        "Move the text to a turn that the template renders, or delete the row.",
    ),
    "data.tools_lost": _warning(
        "The model's chat template has no place for tools; neither would a server tell it of them.",
        "Delete the column tools, or choose a model whose template renders tools.",
    ),
    "data.reasoning_lost": _error(
        "The template has no place for reasoning here; it would be dropped.",
        "Delete the reasoning, or choose a model whose template renders it.",
    ),
    "data.served_prompt": _error(
        "The model would be trained behind a prompt that no server sends.",
        "Delete the row, or change the turn named so that the template renders it the same way in "
        "a prompt.",
    ),
    "data.no_end_of_turn": _error(
        "The model would not learn to stop.",
        "Set `data.chat_template` to a template that closes the assistant's turn with a control "
        "token.",
    ),
    "data.doubled_end": _error(
        "The answer already ends with the control token that the template adds.",
        "Delete the control token from the text.",
    ),
    "data.prerendered": _error(
        "The text has already been through a chat template; prompts would be trained too, and "
        "control tokens doubled.",
        "Give the conversation as messages and let the model's own template render it.",
    ),
    "data.reasoning_tags": _warning(
        "These tags are plain text to this model; it would learn to think aloud in its answers.",
        "Move the text between the tags to the key `reasoning` of the turn, or delete it.",
    ),
    "data.control_token": _warning(
        "The text holds the name of a control token; it is read as ordinary text and never "
        "becomes the real token.",
        "Nothing, if the text is about the token; otherwise delete it.",
    ),
    "data.control_token_lost": _error(
        "The template reacts to the control token in the text, so it cannot be kept as text.",
        "Delete the control token from the text.",
    ),
    "data.double_bos": _error(
        "Two beginning-of-text tokens are a prompt that the model has never seen.",
        "Remove the token from the text, or from the template if the tokenizer adds it.",
    ),
    "data.split_per_turn": _note(
        "The template renders earlier answers differently once they are history, so each answer "
        "is trained in a row of its own behind the prompt that a server would send.",
        "Nothing. With `data.train_on: last_assistant` only the last answer is trained.",
    ),
    "data.nothing_trained": _error(
        "No token of the row would be trained.", "Fill the answer in or delete the row."
    ),
    "data.surrogate": _error(
        "Half of a character pair is no character and cannot become tokens.",
        "Write the whole character, or delete the escape.",
    ),
}

_LENGTHS: Mapping[str, Rule] = {
    "data.too_long": _error(
        "Rows longer than `data.max_length` do not fit the plan, and nothing is cut silently.",
        "Raise `data.max_length`, or set `data.too_long` to drop or truncate.",
    ),
    "data.dropped": _warning(
        "Rows longer than `data.max_length` are left out, as `data.too_long: drop` says.",
        "Raise `data.max_length` to keep them.",
    ),
    "data.truncated": _warning(
        "Rows longer than `data.max_length` lose their end, as `data.too_long: truncate` says.",
        "Raise `data.max_length` to keep it.",
    ),
    "data.answer_cut": _warning(
        "The model would learn answers that stop in the middle.",
        "Raise `data.max_length`, or set `data.too_long: drop`.",
    ),
    "data.no_rows": _error(
        "There is nothing to train on.",
        "Add rows, or fix those refused; where all are too long, raise `data.max_length`.",
    ),
    "data.held_out": _error(
        "Every row would be held out and none trained on.", "Lower `data.held_out`."
    ),
    "data.held_out_skipped": _note(
        "One row or group cannot be split.", "Add rows, or name `data.held_out_path`."
    ),
    "data.leak": _warning(
        "Rows that are trained on say nothing about new ones; they were left out of the held-out "
        "rows.",
        "Delete them from one of the two files.",
    ),
}

_TEXTS: Mapping[str, Rule] = {
    "data.stand_in": _warning(
        "A program wrote this where a text was missing; the model would learn to say it.",
        "Fill the text in or delete the row.",
    ),
    "data.control_character": _warning(
        "Characters without a shape come from damaged or binary sources.",
        "Remove them from the text.",
    ),
    "data.mojibake": _warning(
        "The text was once read in the wrong encoding; the model would learn the broken letters.",
        "Write the file again from its source, read in the right encoding.",
    ),
    "data.placeholder": _warning(
        "A placeholder that was never filled in teaches the model to write it.",
        "Fill it in, or delete the row.",
    ),
    "data.secret": _warning(
        "A model can repeat what it was trained on, and this would open an account.",
        "Replace it with an invented one, and revoke it if it is real.",
    ),
    "data.personal": _warning(
        "A model can repeat what it was trained on.",
        "Replace it with an invented one, unless it may be published.",
    ),
    "data.prompt_in_text": _warning(
        "Rows of plain text are trained whole, so prompts are learned like answers.",
        "Split the text into prompt and completion, or into messages.",
    ),
}

_WHOLE: Mapping[str, Rule] = {
    "data.duplicates": _warning(
        "Repeated rows are learned by heart.", "Delete the repetitions, unless they are meant."
    ),
    "data.near_duplicates": _warning(
        "Rows that are almost the same are learned by heart, and say little when held out.",
        "Delete them, or hold them out together with `data.group_column`.",
    ),
    "data.held_out_near": _warning(
        "Held-out rows that resemble trained ones make the evaluation look too good.",
        "Hold similar rows out together with `data.group_column`.",
    ),
    "data.dominant_answer": _warning(
        "Always giving this answer is right so often that the model may learn nothing else.",
        "Add rows with other answers, or leave some of these out.",
    ),
    "data.prompts_trained": _note(
        "`data.train_on: all` trains prompts like answers.",
        "Set `data.train_on: assistant` unless the model shall learn to write prompts.",
    ),
    "data.few_trained_tokens": _note(
        "A few hundred tokens are learned by heart in one pass.", "Add rows if you can."
    ),
    "data.small_trained_share": _note(
        "Nearly all of the time goes into reading prompts.",
        "Shorten the prompts if you can; nothing is wrong otherwise.",
    ),
    "data.stop_token": _warning(
        "A server that does not know this token would let the model go on.",
        "Let the server stop at it, or choose the chat template of this model.",
    ),
    "data.dated_template": _note(
        "The chat template writes the date of today into prompts; rows are rendered with the date "
        "of their preparation.",
        "Nothing, or set `data.chat_template` to a copy without the date.",
    ),
}

TEXT_CODES = frozenset(_TEXTS)
"""Codes that only a check of the texts can find; rendering does not need them."""

RULES: Mapping[str, Rule] = MappingProxyType(
    {**_READING, **_COLUMNS, **_TURNS, **_RENDERING, **_LENGTHS, **_TEXTS, **_WHOLE}
)
"""Every rule, by its code."""


def make_finding(
    code: str, message: str, *, file: str | None = None, line: int | None = None, fix: str = ""
) -> Finding:
    """The rule `code` met at a place.

    Args:
        code: A key of `RULES`.
        message: What is the case, one sentence.
        file: File the finding is in.
        line: 1-based line or row in `file`.
        fix: What to do, where it is known better than the rule says.
    """
    rule = RULES[code]
    return Finding(
        severity=rule.severity,
        code=code,
        message=message,
        why=rule.why,
        fix=fix or rule.fix,
        file=file,
        line=line,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Notes:
    """Findings of one row, with the place they share."""

    file: str
    line: int
    findings: list[Finding] = field(default_factory=list)

    def add(self, code: str, message: str, *, fix: str = "") -> None:
        """Note that the rule `code` is met in this row."""
        self.findings.append(make_finding(code, message, file=self.file, line=self.line, fix=fix))

    @property
    def has_error(self) -> bool:
        """Whether the row cannot be trained on."""
        return any(finding.severity == "error" for finding in self.findings)
