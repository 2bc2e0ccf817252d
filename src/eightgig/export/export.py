"""A finished run handed on: written beside its place, tested, and only then put there.

Read `export_run` top to bottom; each line is one part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from eightgig import __version__
from eightgig.adapters.files import CONFIG_NAME, WEIGHTS_NAME, AdapterFolder, read_adapter
from eightgig.disk import Disk
from eightgig.errors import ExportError, Finding
from eightgig.evaluation.tuned_run import TunedRun, open_run
from eightgig.export import gguf, ollama
from eightgig.export.card import export_card
from eightgig.export.folder import (
    RECORD_NAME,
    OutputFolder,
    check_room,
    copy_model_files,
    output_folder,
    small_files_bytes,
)
from eightgig.export.gguf_file import DIRECT_TYPES, GgufTensor, load_gguf
from eightgig.export.gguf_keys import check_architecture
from eightgig.export.gguf_vocab import Vocabulary, read_vocabulary
from eightgig.export.merge import (
    config_without_quantization,
    merged_bytes,
    precision_findings,
    write_merged,
)
from eightgig.export.source import TunedWeights
from eightgig.export.verify import (
    References,
    Verification,
    make_references,
    unverified_finding,
    verify_gguf,
    verify_merged,
    why_not_verified,
)
from eightgig.models.find import FoundModel, find_base_model
from eightgig.quant.fetch import checkpoint_of
from eightgig.quant.parts import file_bytes
from eightgig.quant.store import store_folder
from eightgig.run import to_json

Kind = Literal["merged", "gguf", "gguf-lora", "ollama", "adapter"]
KINDS: tuple[Kind, ...] = ("merged", "gguf", "gguf-lora", "ollama", "adapter")
Observe = Callable[[object], None]

_EXPORTS_FOLDER = "export"
_CARD_NAME = "README.md"
_SMALL_BYTES = 1 << 20
_OLLAMA_TYPE = "q8_0"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What was exported; `export.json` of its folder holds the same.

    Attributes:
        folder: Where it is.
        kind: As asked for.
        model: The base model.
        eightgig: Version of the writer.
        files: Size in bytes and SHA-256 of each file.
        findings: What was lost or could not be tested.
        verification: How it was tested, None where that was not wanted.
    """

    folder: Path
    kind: str
    model: str
    eightgig: str
    files: dict[str, dict[str, Any]]
    findings: tuple[Finding, ...]
    verification: Verification | None


@dataclass(slots=True)
class _Job:
    """What an export works on: the run, the base weights to export, and what is noticed."""

    tuned: TunedRun
    exported: TunedRun
    options: ExportOptions
    weights: TunedWeights
    target: Path
    observe: Observe
    findings: list[Finding] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.tuned.config.run.name

    def find(self, *findings: Finding) -> None:
        for finding in findings:
            self.findings.append(finding)
            self.observe(finding)


def export_run(folder: Path, options: ExportOptions, observe: Observe = lambda _: None) -> Export:
    """Export the run in `folder`.

    Args:
        folder: The run folder; the run must have ended.
        options: What, and how.
        observe: Called with findings, `ExportProgress` and lines of text on the way.

    Raises:
        RunError: There is no run, or it has not ended.
        ModelError: The base model is missing, or the adapter is of another one.
        DoesNotFitError: The disk has too little room.
        ExportError: It cannot be written in this form, or does not agree with the trained model.
    """
    job = _open_job(folder, options, observe)
    prepare, write, verify = _STEPS[options.kind]
    with _checkpoint(job):
        job.find(*precision_findings(job.weights))
        prepared = prepare(job)
        needed_bytes = prepared.needed_bytes + small_files_bytes(job.exported.base.folder)
        with output_folder(job.target, needed_bytes=needed_bytes + _SMALL_BYTES) as output:
            references = _references(job)
            write(job, prepared, output)
            verification = None
            if options.is_verified:
                verification = verify(job, prepared, output, references)
                if not verification.is_verified:
                    job.find(unverified_finding(verification))
            export = _finish(job, prepared, output, verification)
    if options.ollama_name is not None:
        observe(f"Creating {options.ollama_name} in Ollama")
        ollama.create_model(job.target, options.ollama_name)
    return export


def _references(job: _Job) -> References | None:
    """What the export is compared with; None where it is not asked to answer."""
    options = job.options
    if not options.is_verified or options.kind == "adapter" or why_not_verified(options.kind):
        return None
    return make_references(job.tuned, job.exported, job.target, job.observe)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
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


def _open_job(folder: Path, options: ExportOptions, observe: Observe) -> _Job:
    tuned = open_run(folder, observe)
    exported = tuned if options.base is None else _with_base(tuned, options.base, observe)
    name: str = options.kind
    if options.gguf_type is not None:
        name += f"-{options.gguf_type.lower()}"
    target = (options.output or tuned.run.folder / _EXPORTS_FOLDER / name).absolute()
    return _Job(
        tuned=tuned,
        exported=exported,
        options=options,
        weights=TunedWeights(exported.base.spec, exported.base.folder, exported.adapter),
        target=target,
        observe=observe,
    )


@contextmanager
def _checkpoint(job: _Job) -> Iterator[None]:
    """The base checkpoint on this machine, where it is read out of order.

    Merging goes file by file, and fetches one at a time by itself.
    """
    found, spec = checkpoint_of(job.exported.base), job.weights.spec
    in_order = job.options.kind in ("merged", "adapter") and spec.quantization is None
    if isinstance(found, Path) or in_order:
        yield
        return
    files = sorted(file_bytes(spec))
    check_room(found.folder, sum(file_bytes(spec).values()), Disk())
    try:
        for file in files:
            job.observe(f"Fetching {file}")
            found.fetch(file)
        yield
    finally:
        for file in files:
            if (found.folder / file).exists():
                found.delete(file)


def _with_base(tuned: TunedRun, base: str, observe: Observe) -> TunedRun:
    """The run on other base weights; the adapter must fit them."""
    config = replace(tuned.config.model, name=base, revision=None, delete_download=False)
    found = find_base_model(config, store_folder=store_folder(config), show=observe)
    if found.spec.decoder != tuned.base.spec.decoder:
        raise ExportError(
            f"The adapter was trained for {tuned.base.spec.name}; {base} is another model.",
            why="Their decoders differ: "
            f"{_sizes(tuned.base)} there, {_sizes(found)} here, or other settings.",
            fix="Name the unquantised original of the base model, or leave --base out.",
        )
    return replace(
        tuned,
        base=found,
        adapter=read_adapter(tuned.run.adapter_path, found.spec),
        config=replace(tuned.config, model=config),
    )


def _sizes(found: FoundModel) -> str:
    decoder = found.spec.decoder
    return f"{found.spec.family}, {decoder.num_layers} layers of {decoder.hidden_size}"


def _prepare_merged(job: _Job) -> _Prepared:
    spec = job.weights.spec
    files = tuple(sorted({tensor.file for tensor in spec.tensors.values()}))
    return _Prepared(needed_bytes=merged_bytes(job.weights), main_files=files)


def _write_merged(job: _Job, _: _Prepared, output: OutputFolder) -> None:
    base = job.exported.base
    write_merged(output, job.weights, checkpoint_of(base), job.observe)
    if base.spec.quantization is not None:
        output.write("config.json", config_without_quantization(base.folder))
    template = None
    if job.tuned.config.data.chat_template not in (None, "none"):
        template = str(job.tuned.tokenizer.chat_template)
        job.find(_template_finding(job))
    copy_model_files(output, base.folder, template=template, skip=tuple(output.files))


def _verify_merged(
    job: _Job, _: _Prepared, output: OutputFolder, references: References | None
) -> Verification:
    assert references is not None
    return verify_merged(output.path, job.exported, references, job.observe)


def _prepare_gguf(job: _Job) -> _Prepared:
    load_gguf()
    is_ollama = job.options.kind == "ollama"
    spec = job.weights.spec
    kind = job.options.gguf_type or (_OLLAMA_TYPE if is_ollama else gguf.base_type(spec))
    kind = gguf.require_type(kind)
    job.find(*check_architecture(spec))
    direct = kind if kind in DIRECT_TYPES else gguf.base_type(spec)
    tensors = gguf.gguf_tensors(job.weights, direct)
    size_bytes = gguf.gguf_bytes(tensors)
    return _Prepared(
        # llama-quantize reads one file and writes another, which is not larger.
        needed_bytes=size_bytes if direct == kind else 2 * size_bytes,
        main_files=(f"{job.name}-{kind}.gguf",),
        kind=kind,
        direct_kind=direct,
        tensors=tuple(tensors),
        vocabulary=_vocabulary(job),
    )


def _vocabulary(job: _Job) -> Vocabulary:
    spec = job.weights.spec
    return read_vocabulary(
        job.tuned.tokenizer,
        vocab_size=spec.decoder.vocab_size,
        stop_ids=job.tuned.stop_ids,
        is_gemma4=spec.family == "gemma4",
    )


def _write_gguf(job: _Job, prepared: _Prepared, output: OutputFolder) -> None:
    (name,) = prepared.main_files
    direct = name if prepared.kind == prepared.direct_kind else "unquantised.gguf"
    _write_model(job, prepared, output, direct, job.weights)
    if direct != name:
        job.observe(f"llama-quantize makes {prepared.kind}")
        gguf.quantize_file(output, direct, name, prepared.kind)
    if job.options.kind == "ollama":
        _write_modelfile(job, prepared, output)


def _write_model(
    job: _Job, prepared: _Prepared, output: OutputFolder, name: str, weights: TunedWeights
) -> None:
    assert prepared.vocabulary is not None
    tensors = list(prepared.tensors)
    if weights is not job.weights:
        tensors = gguf.gguf_tensors(weights, prepared.direct_kind)
    output.write(
        name,
        gguf.model_parts(
            weights.spec,
            tensors,
            prepared.vocabulary,
            name=job.name,
            kind=prepared.direct_kind,
            observe=job.observe,
        ),
    )


def _write_modelfile(job: _Job, prepared: _Prepared, output: OutputFolder) -> None:
    assert prepared.vocabulary is not None
    tokenizer = job.tuned.tokenizer
    turns = ollama.read_turn_format(tokenizer, adds_bos=prepared.vocabulary.adds_bos)
    if turns is None:
        job.find(ollama.no_template_finding())
    stops = [str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(job.tuned.stop_ids)]
    sampling = ollama.sampling_defaults(job.exported.base.folder)
    text = ollama.modelfile(prepared.main_files[0], turns, stops, sampling)
    output.write(ollama.MODELFILE_NAME, text.encode("utf-8"))


def _verify_gguf(
    job: _Job, prepared: _Prepared, output: OutputFolder, references: References | None
) -> Verification:
    if references is None:
        return Verification(is_verified=False, program=why_not_verified(job.options.kind) or "")
    job.observe("Loading the GGUF with llama.cpp")
    path = output.path / prepared.main_files[0]
    return verify_gguf(path, job.exported, references, prepared.kind)


def _prepare_lora(job: _Job) -> _Prepared:
    load_gguf()
    spec = job.weights.spec
    job.find(*check_architecture(spec))
    needed_bytes, parts = gguf.adapter_parts(
        spec, job.exported.adapter, name=job.name, observe=job.observe
    )
    direct = gguf.base_type(spec)
    if job.options.is_verified and why_not_verified(job.options.kind) is None:
        # llama.cpp tests the adapter on a GGUF of the base model, which is deleted again.
        needed_bytes += gguf.gguf_bytes(gguf.gguf_tensors(job.weights, direct))
    return _Prepared(
        needed_bytes=needed_bytes,
        main_files=(f"{job.name}-lora.gguf",),
        kind=direct,
        direct_kind=direct,
        vocabulary=_vocabulary(job),
        parts=parts,
    )


def _write_lora(_: _Job, prepared: _Prepared, output: OutputFolder) -> None:
    assert prepared.parts is not None
    output.write(prepared.main_files[0], prepared.parts)


def _verify_lora(
    job: _Job, prepared: _Prepared, output: OutputFolder, references: References | None
) -> Verification:
    if references is None:
        return Verification(is_verified=False, program=why_not_verified(job.options.kind) or "")
    base, lora = "base.gguf", output.path / prepared.main_files[0]
    nothing = AdapterFolder(lora=job.exported.adapter.lora, tensors={})
    plain = TunedWeights(job.weights.spec, job.exported.base.folder, nothing)
    job.observe("Writing a GGUF of the base model, to test the adapter on it")
    _write_model(job, prepared, output, base, plain)
    try:
        return verify_gguf(output.path / base, job.exported, references, prepared.kind, lora=lora)
    finally:
        output.remove(base)


def _prepare_adapter(job: _Job) -> _Prepared:
    files = [path for path in job.tuned.run.adapter_path.iterdir() if path.is_file()]
    return _Prepared(
        needed_bytes=sum(path.stat().st_size for path in files), main_files=(WEIGHTS_NAME,)
    )


def _write_adapter(job: _Job, _: _Prepared, output: OutputFolder) -> None:
    for path in sorted(job.tuned.run.adapter_path.iterdir()):
        if path.is_file():
            output.copy(path)


def _verify_adapter(
    job: _Job, _: _Prepared, output: OutputFolder, __: References | None
) -> Verification:
    read_adapter(output.path, job.tuned.base.spec)
    names = f"{CONFIG_NAME} and {WEIGHTS_NAME}"
    return Verification(is_verified=True, program=f"read back: {names} fit the base model")


def _finish(
    job: _Job, prepared: _Prepared, output: OutputFolder, verification: Verification | None
) -> Export:
    """Write the card and `export.json`."""
    kind, spec = job.options.kind, job.exported.base.spec
    if kind != "adapter":
        card_path = job.tuned.run.adapter_path / _CARD_NAME
        card = card_path.read_text(encoding="utf-8") if card_path.is_file() else ""
        text = export_card(spec, job.name, kind, prepared.main_files, card)
        output.write(_CARD_NAME, text.encode("utf-8"))
    export = Export(
        folder=job.target,
        kind=kind,
        model=spec.name,
        eightgig=__version__,
        files={name: to_json(digest) for name, digest in output.files.items()},
        findings=tuple(job.findings),
        verification=verification,
    )
    record = {name: value for name, value in to_json(export).items() if name != "folder"}
    output.write(RECORD_NAME, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    return export


def _template_finding(job: _Job) -> Finding:
    return Finding(
        severity="note",
        code="export.template",
        message="chat_template.jinja is the one that was trained with "
        f"(data.chat_template: {job.tuned.config.data.chat_template}), not the base model's.",
        why="With another template the model reads other prompts than it was trained on.",
        fix="Nothing to do.",
    )


_STEPS: dict[
    Kind,
    tuple[
        Callable[[_Job], _Prepared],
        Callable[[_Job, _Prepared, OutputFolder], None],
        Callable[[_Job, _Prepared, OutputFolder, References | None], Verification],
    ],
] = {
    "merged": (_prepare_merged, _write_merged, _verify_merged),
    "gguf": (_prepare_gguf, _write_gguf, _verify_gguf),
    "ollama": (_prepare_gguf, _write_gguf, _verify_gguf),
    "gguf-lora": (_prepare_lora, _write_lora, _verify_lora),
    "adapter": (_prepare_adapter, _write_adapter, _verify_adapter),
}
