"""GGUF files for llama.cpp and all that is built on it: the tuned model, or its adapter alone.

Source: llama.cpp's conversion code, https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eightgig.adapters.files import AdapterFolder
from eightgig.adapters.lora import lora_scale
from eightgig.config import LoraConfig
from eightgig.errors import ExportError
from eightgig.export.folder import ExportProgress, OutputFolder, find_program
from eightgig.export.gguf_file import (
    DIRECT_TYPES,
    HEADER_BYTES,
    GgufTensor,
    gguf_parts,
    load_gguf,
    stored_kind,
)
from eightgig.export.gguf_keys import ARCHITECTURES, add_hyper_parameters, rope_factors
from eightgig.export.gguf_vocab import Vocabulary
from eightgig.export.source import TunedWeights
from eightgig.models.layout import head_tensor_name
from eightgig.models.spec import LayerSpec, ModelSpec

QUANTIZE_PROGRAMS = ("llama-quantize",)
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_LORA_FILE_TYPE = "f32"
_QUANTIZE_SECONDS = 6 * 3600
_SHOWN_CHARACTERS = 200


def base_type(spec: ModelSpec) -> str:
    """The type that holds the base model's weights without loss."""
    return {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[spec.dtype]


def gguf_tensors(weights: TunedWeights, kind: str) -> list[GgufTensor]:
    """The tensors of the decoder under llama.cpp's names.

    Args:
        weights: Base model and adapter.
        kind: One of `DIRECT_TYPES`, for matrices.

    Raises:
        ExportError: The installed gguf library does not know the architecture or a tensor.
    """
    spec = weights.spec
    names = _tensor_names(spec)
    tensors = []
    factors = rope_factors(spec)
    if factors is not None:
        values = torch.tensor(factors)
        tensors.append(
            GgufTensor(
                name="rope_freqs.weight",
                shape=(len(factors),),
                kind="f32",
                blocks=lambda: iter([values]),
            )
        )
    for source, target in names.items():
        _, shape = weights.layout(source)
        shape = shape or (1,)
        tensors.append(
            GgufTensor(
                name=target,
                shape=shape,
                kind=stored_kind(target, shape, kind),
                blocks=_blocks_of(weights, source),
            )
        )
    return tensors


def gguf_bytes(tensors: list[GgufTensor]) -> int:
    """Bytes that a file with `tensors` takes at most."""
    return HEADER_BYTES + sum(tensor.size_bytes for tensor in tensors)


def model_parts(
    spec: ModelSpec,
    tensors: list[GgufTensor],
    vocabulary: Vocabulary,
    *,
    name: str,
    kind: str,
    observe: Callable[[object], None],
) -> Iterator[bytes | memoryview]:
    """The bytes of the GGUF of a whole model.

    Args:
        spec: The base model.
        tensors: From `gguf_tensors`.
        vocabulary: Its tokenizer.
        name: Of the tuned model.
        kind: One of `DIRECT_TYPES`.
        observe: Called with an `ExportProgress` for every block.
    """
    writer = _writer(spec)
    writer.add_type("model")
    _add_origin(writer, spec, name)
    add_hyper_parameters(writer, spec)
    gguf = load_gguf()
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, vocabulary)
    return gguf_parts(writer, tensors, wrote=_progress(tensors, observe))


def adapter_tensors(spec: ModelSpec, adapter: AdapterFolder) -> list[GgufTensor]:
    """The tensors of an adapter under llama.cpp's names."""
    names = _tensor_names(spec)
    tensors = []
    for ours, tensor in adapter.tensors.items():
        module, _, part = ours.rpartition(".")
        source = f"{spec.tensor_prefix}{module}.weight"
        is_b = part == "lora_B"
        data = _arranged(spec, source, tensor) if is_b else tensor
        tensors.append(
            GgufTensor(
                name=f"{names[source]}.lora_{'b' if is_b else 'a'}",
                shape=tuple(tensor.shape),
                kind=_LORA_FILE_TYPE,
                blocks=_blocks_once(data),
            )
        )
    return tensors


def adapter_parts(
    spec: ModelSpec,
    lora: LoraConfig,
    tensors: list[GgufTensor],
    *,
    name: str,
    observe: Callable[[object], None],
) -> Iterator[bytes | memoryview]:
    """The bytes of a GGUF of the adapter alone.

    llama.cpp multiplies by alpha / rank; alpha is chosen so that this is the trained scale, also
    with rank-stabilised LoRA.

    Args:
        spec: The base model.
        lora: The adapter's settings.
        tensors: From `adapter_tensors`.
        name: Of the tuned model.
        observe: Called with an `ExportProgress` for every block.
    """
    writer = _writer(spec)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", lora_scale(lora) * lora.r)
    _add_origin(writer, spec, name)
    return gguf_parts(writer, tensors, wrote=_progress(tensors, observe))


def require_type(kind: str) -> str:
    """`kind` in lower case, once it is clear that it can be made here.

    Raises:
        ExportError: It is none of ours, and llama-quantize is not installed.
    """
    kind = kind.lower()
    if kind in DIRECT_TYPES or find_program(QUANTIZE_PROGRAMS) is not None:
        return kind
    raise ExportError(
        f"A GGUF of type {kind} cannot be made here: llama-quantize is not installed.",
        why=f"eightgig itself writes {', '.join(DIRECT_TYPES)}; llama.cpp's program makes the "
        "others.",
        fix="Install llama.cpp so that llama-quantize is on the PATH, or use --type q8_0.",
    )


def quantize_file(output: OutputFolder, source: str, target: str, kind: str) -> None:
    """Have llama-quantize make `target` of the file `source`, which is deleted.

    Raises:
        ExportError: It fails.
        OSError: A file cannot be read or deleted.
    """
    program = find_program(QUANTIZE_PROGRAMS)
    assert program is not None, "require_type looked for it"
    command = [program, str(output.path / source), str(output.path / target), kind.upper()]
    done = subprocess.run(  # noqa: S603 - a list of arguments, no shell
        command, capture_output=True, text=True, check=False, timeout=_QUANTIZE_SECONDS
    )
    if done.returncode or not (output.path / target).is_file():
        said = (done.stderr or done.stdout).strip().splitlines()
        last = said[-1][:_SHOWN_CHARACTERS] if said else f"exit code {done.returncode}"
        raise ExportError(
            f"llama-quantize could not make a GGUF of type {kind.upper()}.",
            why=f"It said: {last}.",
            fix="Choose a type that `llama-quantize --help` lists, or --type q8_0.",
        )
    output.adopt(target)
    output.remove(source)


def _writer(spec: ModelSpec) -> Any:
    gguf = load_gguf()
    architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[spec.family], None)
    if architecture is None:
        raise ExportError(
            f"The installed gguf library does not know {spec.family}.",
            why="Names and keys of an architecture come from it.",
            fix='Run pip install --upgrade "eightgig[gguf]", or use --to merged.',
        )
    return gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture])


def _tensor_names(spec: ModelSpec) -> dict[str, str]:
    """Name in the checkpoint -> name in a GGUF, of every tensor of the decoder."""
    gguf = load_gguf()
    _writer(spec)
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[spec.family]]
    known = gguf.get_tensor_name_map(architecture, spec.decoder.num_layers)
    head = head_tensor_name(spec.tensor_prefix)
    names = {}
    for name in spec.tensors:
        if name == head:
            plain = "lm_head.weight"
        elif name.startswith(spec.tensor_prefix):
            plain = "model." + name.removeprefix(spec.tensor_prefix)
        else:
            continue
        if name.endswith(".rotary_emb.inv_freq") or _is_part_of_four_bit(spec, name):
            continue
        # llama.cpp keeps scalars as vectors of one number, named as weights.
        plain += "" if plain.endswith((".weight", ".bias")) else ".weight"
        target = known.get_name(plain, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ExportError(
                f"The installed gguf library does not know the tensor {name}.",
                why=f"It maps the tensors of {spec.family} as its version does.",
                fix='Run pip install --upgrade "eightgig[gguf]", or use --to merged.',
            )
        names[name] = target
    return names


def _is_part_of_four_bit(spec: ModelSpec, name: str) -> bool:
    """Whether `name` describes the 4 bits of another tensor."""
    weight, separator, _ = name.rpartition(".weight.")
    return bool(separator) and f"{weight}.weight" in spec.tensors


def _blocks_of(weights: TunedWeights, name: str) -> Callable[[], Iterator[Tensor]]:
    spec = weights.spec
    offset = spec.decoder.norm_offset if name.endswith("norm.weight") else 0.0

    def blocks() -> Iterator[Tensor]:
        if _heads_to_arrange(spec, name):
            yield _arranged(spec, name, torch.cat(list(weights.blocks(name))))
            return
        for block in weights.blocks(name):
            yield (block + offset if offset else block).reshape(block.shape or (1,))

    return blocks


def _blocks_once(tensor: Tensor) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter([tensor])


def _arranged(spec: ModelSpec, name: str, rows: Tensor) -> Tensor:
    """Rows of Q and K as llama.cpp's graph of Llama wants them.

    It rotates neighbours, Transformers the first half of a head with the second: row 2 i + j of a
    head here is row i + j hd/2 there.
    """
    heads = _heads_to_arrange(spec, name)
    if not heads:
        return rows
    pairs = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _heads_to_arrange(spec: ModelSpec, name: str) -> int:
    """Heads of the Q or K tensor `name` where its rows must be arranged anew, else 0."""
    if ARCHITECTURES[spec.family] != "LLAMA":
        return 0
    layer = _layer_of(spec, name)
    if layer is None:
        return 0
    if ".q_proj." in name:
        return layer.num_heads
    return layer.num_kv_heads if ".k_proj." in name else 0


def _layer_of(spec: ModelSpec, name: str) -> LayerSpec | None:
    start = f"{spec.tensor_prefix}layers."
    if not name.startswith(start):
        return None
    return spec.decoder.layers[int(name.removeprefix(start).split(".", 1)[0])]


def _add_origin(writer: Any, spec: ModelSpec, name: str) -> None:
    writer.add_name(name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, Path(spec.name).name)
    if spec.license is not None:
        writer.add_license(spec.license)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for role, index in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.adds_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.adds_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _progress(
    tensors: list[GgufTensor], observe: Callable[[object], None]
) -> Callable[[int], None]:
    total_bytes = sum(tensor.size_bytes for tensor in tensors)
    done_bytes = 0

    def wrote(size_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += size_bytes
        observe(ExportProgress(work="writing GGUF", done_bytes=done_bytes, total_bytes=total_bytes))

    return wrote
