"""A process that renders chunks: `python -P -m eightgig.data.worker`, started by `pool`.

It reads one job and then chunks from its standard input, and writes tokens to its standard output;
forks of it, which share the memory of the tokenizer, do so through pipes of their own. It opens no
file and no connection; templates run here under a limit of memory and time.
"""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Sequence
from typing import IO, NoReturn

from eightgig.data.chunks import ChunkRenderer, Job, read_chunk, read_message, write_tokens
from eightgig.run.records import from_json
from eightgig.units import MIB

_MEMORY_BYTES = 512 * MIB


def main(arguments: Sequence[str]) -> None:
    """Render chunks until the input ends.

    Args:
        arguments: `INPUT:OUTPUT`, the numbers of two open files, for each further process.
    """
    # Whatever a library prints must not end up between the tokens.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    message = read_message(sys.stdin.buffer)
    if message is None:
        return
    job = from_json(Job, message[0])
    renderer = ChunkRenderer(job, memory_bytes=_MEMORY_BYTES)
    _give_back_memory()
    pairs = [tuple(map(int, text.split(":"))) for text in arguments]
    for own in pairs:
        if os.fork() == 0:
            # An end that stays open anywhere would hide that its reader or writer has ended.
            _close([end for pair in pairs if pair != own for end in pair])
            sys.stdin.close()
            output.close()
            _fork(renderer, *own)
    _close([end for pair in pairs for end in pair])
    _serve(renderer, sys.stdin.buffer, output)


def _close(ends: Sequence[int]) -> None:
    for end in ends:
        os.close(end)


def _fork(renderer: ChunkRenderer, into: int, back: int) -> NoReturn:
    """The life of a further process."""
    code = 1
    try:
        with os.fdopen(into, "rb") as source, os.fdopen(back, "wb") as target:
            _serve(renderer, source, target)
        code = 0
    except BaseException:  # noqa: BLE001 - the process ends here
        traceback.print_exc()
    finally:
        os._exit(code)


def _serve(renderer: ChunkRenderer, source: IO[bytes], target: IO[bytes]) -> None:
    while (chunk := read_chunk(source)) is not None:
        write_tokens(target, renderer.tokenise(chunk))


def _give_back_memory() -> None:
    """Return to the system what parsing the tokenizer took: half of it for Gemma.

    The C library keeps it for later otherwise; only that of GNU can be asked.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    main(sys.argv[1:])
