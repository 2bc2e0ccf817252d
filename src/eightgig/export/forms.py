"""The forms that a run can be exported in: how each is prepared, written and tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from eightgig.adapters.files import CONFIG_NAME, WEIGHTS_NAME, AdapterFolder, read_adapter
from eightgig.data.tokenizer import load_tokenizer
from eightgig.errors import Finding
from eightgig.export import gguf, ollama
from eightgig.export.folder import OutputFolder, copy_model_files
from eightgig.export.gguf_file import DIRECT_TYPES, load_gguf
from eightgig.export.gguf_keys import check_architecture
from eightgig.export.gguf_vocab import Vocabulary, read_vocabulary
from eightgig.export.job import Job, Kind, Prepared
from eightgig.export.merge import config_without_quantization, merged_bytes, write_merged
from eightgig.export.source import TunedWeights
from eightgig.export.verify import (
    References,
    Verification,
    verify_gguf,
    verify_merged,
    why_not_verified,
)
from eightgig.export.weight_check import MergedCheck, check_gguf
from eightgig.quant.fetch import checkpoint_of

_OLLAMA_TYPE = "q8_0"


@dataclass(frozen=True, slots=True)
class Form:
    """One form of export.

    Attributes:
        prepare: Decides everything, before anything is written.
        write: Writes its files.
        verify: Loads them again and compares; without references where nothing can load them.
    """

    prepare: Callable[[Job], Prepared]
    write: Callable[[Job, Prepared, OutputFolder], None]
    verify: Callable[[Job, Prepared, OutputFolder, References | None], Verification]


def _prepare_merged(job: Job) -> Prepared:
    spec = job.weights.spec
    files = tuple(sorted({tensor.file for tensor in spec.tensors.values()}))
    return Prepared(needed_bytes=merged_bytes(job.weights), main_files=files)


def _write_merged(job: Job, _: Prepared, output: OutputFolder) -> None:
    base = job.exported.base
    check = MergedCheck(output.path, job.defined) if job.options.is_verified else None
    write_merged(
        output,
        job.weights,
        checkpoint_of(base),
        job.observe,
        check=check.check_file if check is not None else lambda _: None,
    )
    job.weight_check = None if check is None else check.result()
    if base.spec.quantization is not None:
        output.write("config.json", config_without_quantization(base.folder))
    template = _trained_template(job)
    if template is not None:
        job.find(_template_finding())
    copy_model_files(output, base.folder, template=template, skip=tuple(output.files))


def _verify_merged(
    job: Job, _: Prepared, output: OutputFolder, references: References | None
) -> Verification:
    assert references is not None
    return verify_merged(output.path, job.exported, job.defined, references, job.observe)


def _prepare_gguf(job: Job) -> Prepared:
    load_gguf()
    is_ollama = job.options.kind == "ollama"
    spec = job.weights.spec
    kind = job.options.gguf_type or (_OLLAMA_TYPE if is_ollama else gguf.base_type(spec))
    kind = gguf.require_type(kind)
    job.find(*check_architecture(spec))
    direct = kind if kind in DIRECT_TYPES else gguf.base_type(spec)
    tensors = gguf.gguf_tensors(job.weights, direct)
    size_bytes = gguf.gguf_bytes(tensors)
    return Prepared(
        # llama-quantize reads one file and writes another, which is not larger.
        needed_bytes=size_bytes if direct == kind else 2 * size_bytes,
        main_files=(f"{job.name}-{kind}.gguf",),
        kind=kind,
        direct_kind=direct,
        tensors=tuple(tensors),
        vocabulary=_vocabulary(job),
    )


def _vocabulary(job: Job) -> Vocabulary:
    spec = job.weights.spec
    return read_vocabulary(
        job.tuned.tokenizer,
        vocab_size=spec.decoder.vocab_size,
        stop_ids=job.tuned.stop_ids,
        is_gemma4=spec.family == "gemma4",
    )


def _write_gguf(job: Job, prepared: Prepared, output: OutputFolder) -> None:
    (name,) = prepared.main_files
    direct = name if prepared.kind == prepared.direct_kind else "unquantised.gguf"
    _write_model(job, prepared, output, direct, job.weights)
    if job.options.is_verified:
        job.observe("Reading the numbers again")
        job.weight_check = check_gguf(
            output.path / direct,
            gguf.gguf_tensors(job.defined, "f32"),
            num_adapted=len(job.weights.adapted_names),
        )
    if direct != name:
        job.observe(f"llama-quantize makes {prepared.kind}")
        gguf.quantize_file(output, direct, name, prepared.kind)
    if job.options.kind == "ollama":
        _write_modelfile(job, prepared, output)


def _write_model(
    job: Job, prepared: Prepared, output: OutputFolder, name: str, weights: TunedWeights
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


def _write_modelfile(job: Job, prepared: Prepared, output: OutputFolder) -> None:
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
    job: Job, prepared: Prepared, output: OutputFolder, references: References | None
) -> Verification:
    if references is None:
        return Verification(is_verified=False, program=why_not_verified(job.options.kind) or "")
    job.observe("Loading the GGUF with llama.cpp")
    path = output.path / prepared.main_files[0]
    return verify_gguf(path, job.exported, references, prepared.kind)


def _prepare_lora(job: Job) -> Prepared:
    load_gguf()
    spec = job.weights.spec
    job.find(*check_architecture(spec))
    adapter = job.exported.adapter
    tensors = gguf.adapter_tensors(spec, adapter)
    parts = gguf.adapter_parts(spec, adapter.lora, tensors, name=job.name, observe=job.observe)
    needed_bytes = gguf.gguf_bytes(tensors)
    direct = gguf.base_type(spec)
    if job.options.is_verified and why_not_verified(job.options.kind) is None:
        # llama.cpp tests the adapter on a GGUF of the base model, which is deleted again.
        needed_bytes += gguf.gguf_bytes(gguf.gguf_tensors(job.weights, direct))
    return Prepared(
        needed_bytes=needed_bytes,
        main_files=(f"{job.name}-lora.gguf",),
        kind=direct,
        direct_kind=direct,
        tensors=tuple(tensors),
        vocabulary=_vocabulary(job),
        parts=parts,
    )


def _write_lora(job: Job, prepared: Prepared, output: OutputFolder) -> None:
    assert prepared.parts is not None
    output.write(prepared.main_files[0], prepared.parts)
    if job.options.is_verified:
        job.weight_check = check_gguf(
            output.path / prepared.main_files[0], prepared.tensors, num_adapted=0
        )


def _verify_lora(
    job: Job, prepared: Prepared, output: OutputFolder, references: References | None
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


def _prepare_adapter(job: Job) -> Prepared:
    files = [path for path in job.tuned.run.adapter_path.iterdir() if path.is_file()]
    return Prepared(
        needed_bytes=sum(path.stat().st_size for path in files), main_files=(WEIGHTS_NAME,)
    )


def _write_adapter(job: Job, _: Prepared, output: OutputFolder) -> None:
    for path in sorted(job.tuned.run.adapter_path.iterdir()):
        if path.is_file():
            output.copy(path)


def _verify_adapter(
    job: Job, _: Prepared, output: OutputFolder, __: References | None
) -> Verification:
    read_adapter(output.path, job.tuned.base.spec)
    names = f"{CONFIG_NAME} and {WEIGHTS_NAME}"
    return Verification(is_verified=True, program=f"read back: {names} fit the base model")


def _trained_template(job: Job) -> str | None:
    """The chat template that was trained with, where the exported base model has another."""
    trained = job.tuned.tokenizer.chat_template
    if trained is None or trained == load_tokenizer(job.exported.base.folder).chat_template:
        return None
    return str(trained)


def _template_finding() -> Finding:
    return Finding(
        severity="note",
        code="export.template",
        message="chat_template.jinja is the one that was trained with, not the base model's.",
        why="With another template the model reads other prompts than it was trained on.",
        fix="Nothing to do.",
    )


_GGUF = Form(_prepare_gguf, _write_gguf, _verify_gguf)
FORMS: Mapping[Kind, Form] = MappingProxyType(
    {
        "merged": Form(_prepare_merged, _write_merged, _verify_merged),
        "gguf": _GGUF,
        "ollama": _GGUF,
        "gguf-lora": Form(_prepare_lora, _write_lora, _verify_lora),
        "adapter": Form(_prepare_adapter, _write_adapter, _verify_adapter),
    }
)
