"""A process that renders chunks: `python -P -m eightgig.data.worker`, started by `pool`.

It reads one job and then chunks from its standard input, and writes tokens to its standard output.
It opens no file and no connection; templates run here under a limit of memory and time.
"""

from __future__ import annotations

import ctypes
import os
import sys

from eightgig.data.chunks import ChunkRenderer, Job, read_chunk, read_message, write_tokens
from eightgig.run.records import from_json
from eightgig.units import MIB

_MEMORY_BYTES = 512 * MIB


def main() -> None:
    """Render chunks until the input ends."""
    # Whatever a library prints must not end up between the tokens.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    message = read_message(sys.stdin.buffer)
    if message is None:
        return
    job = from_json(Job, message[0])
    renderer = ChunkRenderer(job, memory_bytes=_MEMORY_BYTES)
    _give_back_memory()
    while (chunk := read_chunk(sys.stdin.buffer)) is not None:
        write_tokens(output, renderer.tokenise(chunk))


def _give_back_memory() -> None:
    """Return to the system what parsing the tokenizer took: half of it for Gemma.

    The C library keeps it for later otherwise; only that of GNU can be asked.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    main()
