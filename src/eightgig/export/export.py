"""A finished run handed on: written beside its place, tested, and only then put there.

Read `export_run` top to bottom; each line is one part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eightgig import __version__
from eightgig.adapters.files import read_adapter
from eightgig.config import store_folder
from eightgig.disk import STAGING_SUFFIX, Disk, staging_path
from eightgig.errors import ExportError, Finding, ModelError
from eightgig.evaluation.tuned_run import TunedRun, open_run
from eightgig.export import ollama
from eightgig.export.card import export_card
from eightgig.export.folder import (
    RECORD_NAME,
    OutputFolder,
    check_room,
    output_folder,
    small_files_bytes,
)
from eightgig.export.forms import FORMS
from eightgig.export.job import KINDS as KINDS
from eightgig.export.job import ExportOptions as ExportOptions
from eightgig.export.job import Job, Observe, Prepared
from eightgig.export.job import Kind as Kind
from eightgig.export.merge import precision_findings
from eightgig.export.source import TunedWeights
from eightgig.export.verify import (
    References,
    Verification,
    make_references,
    rounding_finding,
    unverified_finding,
    why_not_verified,
)
from eightgig.models.find import FoundModel, find_base_model
from eightgig.quant.fetch import checkpoint_of
from eightgig.quant.parts import file_bytes
from eightgig.run import hide_home, to_json

_EXPORTS_FOLDER = "export"
_CARD_NAME = "README.md"
_SMALL_BYTES = 1 << 20


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
    for left in _left_over(job):
        observe(left)
    form = FORMS[options.kind]
    with _checkpoint(job):
        job.find(*precision_findings(job.weights))
        prepared = form.prepare(job)
        needed_bytes = prepared.needed_bytes + small_files_bytes(job.exported.base.folder)
        with output_folder(job.target, needed_bytes=needed_bytes + _SMALL_BYTES) as output:
            references = _references(job)
            form.write(job, prepared, output)
            verification = None
            if options.is_verified:
                verification = replace(
                    form.verify(job, prepared, output, references), weights=job.weight_check
                )
                job.find(*_findings(verification))
            export = _finish(job, prepared, output, verification)
    if options.ollama_name is not None:
        observe(f"Creating {options.ollama_name} in Ollama")
        ollama.create_model(job.target, options.ollama_name)
    return export


def _left_over(job: Job) -> Iterator[Finding]:
    """What killed exports of other forms left; that of this form is deleted by itself."""
    exports = job.tuned.run.folder / _EXPORTS_FOLDER
    for path in sorted(exports.glob(f"*{STAGING_SUFFIX}")):
        if path != staging_path(job.target):
            yield Finding(
                severity="note",
                code="export.left_over",
                message="Another export is writing this, or was killed.",
                why="It takes space, and is of no use unless that export ends.",
                fix="Delete it if no other export is running.",
                file=str(path),
            )


def _findings(verification: Verification) -> tuple[Finding, ...]:
    if not verification.is_verified:
        return (unverified_finding(verification),)
    rounding = rounding_finding(verification)
    return () if rounding is None else (rounding,)


def _references(job: Job) -> References | None:
    """What the export is compared with; None where it is not asked to answer."""
    options = job.options
    if not options.is_verified or options.kind == "adapter" or why_not_verified(options.kind):
        return None
    return make_references(job.tuned, job.exported, job.target, job.observe)


def _open_job(folder: Path, options: ExportOptions, observe: Observe) -> Job:
    _check_options(options)
    tuned = open_run(folder, observe)
    exported = tuned if options.base is None else _with_base(tuned, options.base, observe)
    name: str = options.kind
    if options.gguf_type is not None:
        name += f"-{options.gguf_type.lower()}"
    target = (options.output or tuned.run.folder / _EXPORTS_FOLDER / name).absolute()
    return Job(
        tuned=tuned,
        exported=exported,
        options=options,
        weights=TunedWeights(exported.base.spec, exported.base.folder, exported.adapter),
        target=target,
        observe=observe,
    )


def _check_options(options: ExportOptions) -> None:
    """Refuse what has no effect, and a missing Ollama before minutes of work.

    Raises:
        ExportError: Such an option.
    """
    kind = options.kind
    for name, is_given, kinds in (
        ("--type", options.gguf_type is not None, ("gguf", "ollama")),
        ("--ollama-name", options.ollama_name is not None, ("ollama",)),
        ("--base", options.base is not None, ("merged", "gguf", "gguf-lora", "ollama")),
    ):
        if is_given and kind not in kinds:
            raise ExportError(
                f"{name} has no effect on --to {kind}.",
                why=f"It is for {' and '.join(f'--to {each}' for each in kinds)}.",
                fix=f"Leave {name} out, or choose another form.",
            )
    if options.ollama_name is not None:
        ollama.require_program(options.ollama_name)


@contextmanager
def _checkpoint(job: Job) -> Iterator[None]:
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
    try:
        found = find_base_model(config, store_folder=store_folder(config), show=observe)
    except ModelError as error:
        fix = error.fix.replace("`model.name`", "--base")
        raise ModelError(error.message, why=error.why, fix=fix) from error
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


def _finish(
    job: Job, prepared: Prepared, output: OutputFolder, verification: Verification | None
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
    text = hide_home(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    output.write(RECORD_NAME, text.encode())
    return export
