"""The end of a run: the adapter folder, as people expect to find it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from eightgig.adapters.files import write_adapter
from eightgig.disk import Disk
from eightgig.errors import RunError
from eightgig.training.card import CARD_NAME, model_card
from eightgig.training.loop import Job
from eightgig.units import MIB, format_bytes


def deliver_adapter(job: Job, tokenizer: Any) -> None:
    """Write `adapter/`: PEFT's two files, tokenizer, chat template and model card.

    Raises:
        ModelError: The adapter holds NaN or infinity.
        RunError: The folder cannot be written, or there is no room for temporary files.
    """
    assert job.engine.adapter is not None
    job.start.optimizer.finish()
    files = _tokenizer_files(tokenizer)
    files[CARD_NAME] = model_card(job).encode("utf-8")
    write_adapter(
        job.run.adapter_path,
        spec=job.spec,
        lora=job.config.lora,
        tensors=dict(job.engine.adapter.named_tensors()),
        files=files,
    )


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """What Transformers saves of a tokenizer, chat_template.jinja included.

    Raises:
        RunError: The folder for temporary files has no room for it.
    """
    place = Path(tempfile.gettempdir())
    needed_bytes = len(tokenizer.backend_tokenizer.to_str(pretty=True).encode()) + MIB
    free_bytes = Disk().free_bytes(place)
    if free_bytes < needed_bytes:
        # Asked before: the library that writes it raises what cannot be told from a fault.
        raise RunError(
            f"The tokenizer needs {format_bytes(needed_bytes)} in {place}; "
            f"{format_bytes(free_bytes)} are free.",
            why="It is copied into the adapter by way of temporary files; the training is saved.",
            fix="Free some space there, or set TMPDIR to another folder; "
            "then run the same command with --resume.",
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
