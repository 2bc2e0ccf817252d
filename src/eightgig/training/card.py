"""The model card: what the adapter is, how it was made, how to load it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

from eightgig import __version__
from eightgig.run import to_json

if TYPE_CHECKING:
    from eightgig.training.loop import Job


def model_card(job: Job) -> str:
    """README.md of the adapter folder, with the head that the Hugging Face hub reads."""
    config, spec = job.config, job.spec
    head: dict[str, Any] = {
        "base_model": spec.name,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "sft", "eightgig"],
    }
    if spec.license is not None:
        head["license"] = spec.license
    settings = {name: to_json(getattr(config, name)) for name in ("lora", "train")}
    rows = job.rows.num_rows
    held_out = job.held_out.num_rows if job.held_out is not None else 0
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).strip(),
            "---",
            "",
            f"# {config.run.name}",
            "",
            f"A LoRA adapter for {spec.name}, trained with eightgig {__version__} on {rows:,} rows;"
            f" {held_out:,} rows were held out.",
            "",
            *_results(job),
            "## Use",
            "",
            "```python",
            "from peft import PeftModel",
            f"from transformers import {spec.architecture}, AutoTokenizer",
            "",
            f'base = {spec.architecture}.from_pretrained("{spec.name}")',
            'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
            "```",
            "",
            "## Settings",
            "",
            "```json",
            json.dumps(settings, indent=2, ensure_ascii=False),
            "```",
            "",
        ]
    )


def _results(job: Job) -> list[str]:
    losses = [
        (event["step"], event["values"]["held_out_loss"])
        for event in map(json.loads, _lines(job))
        if event["kind"] == "eval"
    ]
    if not losses:
        return []
    table = [f"| {step} | {loss:.4f} |" for step, loss in losses]
    return ["## Held-out loss", "", "| step | loss |", "|---|---|", *table, ""]


def _lines(job: Job) -> list[str]:
    path = job.run.events_path
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
