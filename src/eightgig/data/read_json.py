"""JSON files: one array of rows, or rows one behind the other, read piece by piece."""

from __future__ import annotations

import codecs
import json
import re
from typing import IO

from eightgig.data.raw import MAX_ROW_BYTES, NotUtf8, RawRow, Read, too_large
from eightgig.data.rules import make_finding
from eightgig.errors import Finding

_READ_CHARS = 1 << 20
_BLANKS = re.compile(r"[ \t\r\n]*")


class _Decoded:
    """Text of a UTF-8 file, read piece by piece, and how far it is used."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.position = 0
        self.line = 1
        """Line that `position` lies in."""
        self.is_complete = False

    @property
    def waiting(self) -> int:
        """Characters behind `position` that are read already."""
        return len(self.text) - self.position

    def starts_with(self, character: str) -> bool:
        """Whether `character` stands at `position`."""
        return self.text.startswith(character, self.position)

    def read_more(self) -> None:
        """Read on, as much again as is waiting; drop what is used.

        Raises:
            NotUtf8: The file is not UTF-8.
        """
        self.text = self.text[self.position :]
        self.position = 0
        data = self._file.read(max(_READ_CHARS, len(self.text)))
        self.is_complete = not data
        try:
            self.text += self._decode.decode(data, final=self.is_complete)
        except UnicodeDecodeError as error:
            raise NotUtf8(self.line + self.text.count("\n"), error) from None

    def use(self, end: int) -> None:
        """Go on behind `end`."""
        self.line += self.text.count("\n", self.position, end)
        self.position = end

    def skip_blanks(self) -> None:
        """Go on to the next character that is no blank, or to the end of the file."""
        while True:
            match = _BLANKS.match(self.text, self.position)
            assert match is not None, "the pattern matches nothing, too"
            self.use(match.end())
            if self.waiting or self.is_complete:
                return
            self.read_more()


def read_json(file: IO[bytes], name: str) -> Read:
    """One array of rows, or rows one behind the other (JSONL is a case of that)."""
    decoded = _Decoded(file)
    try:
        decoded.skip_blanks()
        is_array = decoded.starts_with("[")
        if is_array:
            decoded.use(decoded.position + 1)
        yield from _read_values(decoded, name, is_array=is_array)
    except NotUtf8 as error:
        yield make_finding("data.encoding", error.message, file=name, line=error.line)


def _read_values(decoded: _Decoded, name: str, *, is_array: bool) -> Read:
    decoder = json.JSONDecoder()
    is_first = True
    while True:
        decoded.skip_blanks()
        if is_array and not is_first and decoded.starts_with(","):
            decoded.use(decoded.position + 1)
            decoded.skip_blanks()
        elif is_array and decoded.starts_with("]"):
            return
        elif is_array and not is_first:
            message = "A comma or the closing ] of the array is missing here."
            yield make_finding("data.json", message, file=name, line=decoded.line)
            return
        if not decoded.waiting:
            return
        end = _value_end(decoder, decoded)
        if isinstance(end, str):
            yield _value_finding(decoded, end, name)
            return
        data = decoded.text[decoded.position : end].encode("utf-8", "surrogatepass")
        yield RawRow(line=decoded.line, data=data)
        decoded.use(end)
        is_first = False


def _value_end(decoder: json.JSONDecoder, decoded: _Decoded) -> int | str:
    """Where the value at the position ends, or what is wrong with it."""
    while True:
        try:
            end = decoder.raw_decode(decoded.text, decoded.position)[1]
            # A number may go on behind what was read so far.
            if end < len(decoded.text) or decoded.is_complete:
                return end
        except json.JSONDecodeError as error:
            # What is cut off fails at its end, but for a text, which fails where it begins.
            far_from_end = error.pos < len(decoded.text) - _READ_CHARS
            is_cut = not far_from_end or error.msg.startswith("Unterminated string")
            if decoded.is_complete or not is_cut:
                lines = decoded.text.count("\n", decoded.position, error.pos)
                return f"{error.msg} (column {error.colno}, {lines} lines below)"
        except RecursionError:
            return "it is nested too deeply"
        if decoded.waiting > MAX_ROW_BYTES:
            return "too large"
        decoded.read_more()


def _value_finding(decoded: _Decoded, problem: str, name: str) -> Finding:
    if problem == "too large":
        return too_large(name, decoded.line)
    code = "data.too_deep" if "deeply" in problem else "data.json"
    message = f"The row that begins here is no valid JSON: {problem}."
    return make_finding(code, message, file=name, line=decoded.line)
