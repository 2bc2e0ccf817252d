"""The end of a run: the adapter folder, as people expect to find it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from eightgig.adapters.files import write_adapter
from eightgig.training.card import CARD_NAME, model_card
from eightgig.training.loop import Job


def deliver_adapter(job: Job, tokenizer: Any) -> None:
    """Write `adapter/`: PEFT's two files, tokenizer, chat template and model card.

    Raises:
        ModelError: The adapter holds NaN or infinity.
        RunError: The folder cannot be written.
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
    """What Transformers saves of a tokenizer, chat_template.jinja included."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
