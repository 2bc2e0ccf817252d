"""The card of an export: what the adapter's card says, and how this form of it is used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from eightgig import __version__
from eightgig.models.spec import ModelSpec
from eightgig.run import hide_home

_HEADING = re.compile(r"^## ", re.MULTILINE)
# Of the adapter alone.
_LEFT_OUT = ("Use",)
_RELATIONS = {
    "merged": "finetune",
    "gguf": "quantized",
    "ollama": "quantized",
    "gguf-lora": "adapter",
    "adapter": "adapter",
}


def export_card(
    spec: ModelSpec, name: str, kind: str, files: Sequence[str], adapter_card: str
) -> str:
    """README.md of an export.

    Args:
        spec: The base model.
        name: Of the run.
        kind: `merged`, `gguf`, `gguf-lora` or `ollama`.
        files: Names of the exported files that are loaded.
        adapter_card: README.md of the adapter, empty where there is none.
    """
    head: dict[str, Any] = {
        "base_model": spec.name,
        "base_model_relation": _RELATIONS[kind],
        "library_name": "transformers" if kind == "merged" else "llama.cpp",
        "pipeline_tag": "text-generation",
        "tags": [kind.partition("-")[0], "sft", "eightgig"],
    }
    if spec.license is not None:
        head["license"] = spec.license
    body = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"{spec.name}, fine-tuned with a LoRA adapter and exported with eightgig {__version__}. "
        "How the export was tested stands in `export.json`.",
        "",
        "## Use",
        "",
        *_use(spec, kind, files),
        "",
    ]
    return hide_home("\n".join(body)) + _sections(adapter_card)


def _use(spec: ModelSpec, kind: str, files: Sequence[str]) -> list[str]:
    file = files[0] if files else ""
    if kind == "merged":
        return [
            "```python",
            f"from transformers import AutoTokenizer, {spec.architecture}",
            "",
            f'model = {spec.architecture}.from_pretrained("PATH_OF_THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
            "```",
            "",
            "```",
            "vllm serve PATH_OF_THIS_FOLDER",
            "```",
        ]
    if kind == "gguf-lora":
        return ["```", f"llama-server -m BASE_MODEL.gguf --lora {file} --jinja", "```"]
    if kind == "ollama":
        return ["```", "ollama create NAME -f Modelfile", "ollama run NAME", "```"]
    return ["```", f"llama-server -m {file} --jinja", "```"]


def _sections(card: str) -> str:
    """The sections of `card` that hold for its exports, too."""
    parts = _HEADING.split(card)[1:]
    kept = [part for part in parts if part.partition("\n")[0].strip() not in _LEFT_OUT]
    return "".join(f"\n## {part.rstrip()}\n" for part in kept)
