"""What an export works on: what was asked for, the run, and what is decided before writing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eightgig.errors import Finding
from eightgig.evaluation.tuned_run import TunedRun
from eightgig.export.gguf_file import GgufTensor
from eightgig.export.gguf_vocab import Vocabulary
from eightgig.export.source import TunedWeights
from eightgig.export.weight_check import DefinedWeights, WeightCheck

Kind = Literal["merged", "gguf", "gguf-lora", "ollama", "adapter"]
KINDS: tuple[Kind, ...] = ("merged", "gguf", "gguf-lora", "ollama", "adapter")
Observe = Callable[[object], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What is exported, and how.

    Attributes:
        kind: `merged`, `gguf`, `gguf-lora`, `ollama` or `adapter`.
        output: Folder to write; None: `export/KIND` in the run folder.
        base: Hub id or folder of the base weights, where other ones than the run's are wanted: the
            originals of a 4-bit checkpoint. None: the run's.
        gguf_type: `f32`, `f16`, `bf16`, `q8_0`, or a type of llama-quantize; None: that of the
            base weights, for Ollama `q8_0`.
        is_verified: Whether the export is loaded again and compared.
        ollama_name: Name of a model that the installed Ollama shall make; None: none.
    """

    kind: Kind
    output: Path | None = None
    base: str | None = None
    gguf_type: str | None = None
    is_verified: bool = True
    ollama_name: str | None = None


@dataclass(slots=True)
class Job:
    """An export under way.

    Attributes:
        tuned: The run as it was trained.
        exported: The same with the base model that is exported.
        options: What was asked for.
        weights: The exported weights with the adapter.
        target: The folder to write.
        observe: Told what is done.
        findings: What was noticed so far.
        weight_check: What was found in the written numbers; None before, and where none is wanted.
    """

    tuned: TunedRun
    exported: TunedRun
    options: ExportOptions
    weights: TunedWeights
    target: Path
    observe: Observe
    findings: list[Finding] = field(default_factory=list)
    weight_check: WeightCheck | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.tuned.config.run.name

    @property
    def defined(self) -> DefinedWeights:
        """What the exported weights must be."""
        base = self.exported.base
        return DefinedWeights(base.spec, base.folder, self.exported.adapter)

    def find(self, *findings: Finding) -> None:
        """Take note of `findings`, and say them."""
        for finding in findings:
            self.findings.append(finding)
            self.observe(finding)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What is decided before anything is written.

    Attributes:
        needed_bytes: Of disk.
        main_files: Names of the files that programs load.
        kind: GGUF type asked for; empty for other exports.
        direct_kind: GGUF type that is written here, before llama-quantize.
        tensors, vocabulary: Of a GGUF.
        parts: Content of a GGUF of the adapter.
    """

    needed_bytes: int
    main_files: tuple[str, ...]
    kind: str = ""
    direct_kind: str = ""
    tensors: tuple[GgufTensor, ...] = ()
    vocabulary: Vocabulary | None = None
    parts: Iterator[bytes | memoryview] | None = None
