"""Exports loaded again by the programs they are for, to answer the same prompts.

Merged weights by Transformers, in float32 on the processor; GGUF by llama.cpp, through
llama-cpp-python. Both are given token ids, and say how likely they find each token of an answer.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eightgig.errors import ExportError
from eightgig.export.answers import Answer, log_softmax
from eightgig.models.spec import ModelSpec

_FLOAT32_BYTES = 4
# Beside its weights a model needs room for its work; the rest of the system, too.
_LOAD_FACTOR = 1.25
_CONTEXT_ROOM = 64
# llama-cpp-python keeps a row of logits for every token of a batch.
_BATCH_TOKENS = 128


def transformers_bytes(spec: ModelSpec) -> int:
    """Main memory that Transformers needs for the model in float32."""
    elements = 0
    for tensor in spec.tensors.values():
        count = 1
        for size in tensor.shape:
            count *= size
        elements += count
    return round(elements * _FLOAT32_BYTES * _LOAD_FACTOR)


def score_by_transformers(
    folder: Path,
    spec: ModelSpec,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    exact: Mapping[str, Callable[[], Iterator[Tensor]]],
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Log-probabilities (T, V) at each place of `answers`, by Transformers in float32.

    Args:
        folder: A whole model folder.
        spec: The base model; it names the class.
        prompts: Token ids.
        answers: Token ids of the answer to each.
        exact: By module, what makes rows of its weight as they were before they were rounded.

    Returns:
        Of the weights as they are stored, and of the exact ones in their place.

    Raises:
        ExportError: Transformers cannot load it, or leaves a tensor out.
    """
    import transformers
    from safetensors import SafetensorError

    model_class = getattr(transformers, spec.architecture)
    draws_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ExportError(
            "The merged model was deleted again: Transformers cannot load it.",
            why=str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error),
            fix="Check that the base model itself loads there; if it does, please report this.",
        ) from error
    finally:
        if draws_bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(info["missing_keys"])
    if missing:
        raise ExportError(
            f"The merged model was deleted again: Transformers misses {len(missing)} tensors.",
            why=f"Such as {', '.join(missing[:3])}.",
            fix="Check that the base model itself loads there; if it does, please report this.",
        )
    model.eval()
    with torch.inference_mode():
        stored = [_score(model, *pair) for pair in zip(prompts, answers, strict=True)]
        for module, blocks in exact.items():
            weight, start = model.get_submodule(module).weight, 0
            for block in blocks():
                weight[start : start + len(block)] = block
                start += len(block)
        return stored, [_score(model, *pair) for pair in zip(prompts, answers, strict=True)]


def _score(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> NDArray[np.float32]:
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer)).logits[0]
    return log_softmax(logits.float().numpy())


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCpp:
    """A GGUF loaded by llama.cpp on the processor; a context manager.

    Args:
        path: The GGUF of a model.
        context_tokens: Longest prompt and answer together.
        lora: The GGUF of an adapter that is put on it.

    Raises:
        ExportError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, *, context_tokens: int, lora: Path | None = None) -> None:
        llama_cpp: Any = importlib.import_module("llama_cpp")
        self._library = llama_cpp
        size = context_tokens + _CONTEXT_ROOM
        try:
            self._llama = llama_cpp.Llama(
                model_path=str(path),
                n_ctx=size,
                n_batch=_BATCH_TOKENS,
                n_ubatch=_BATCH_TOKENS,
                n_gpu_layers=0,
                # Its threads wait for each other without sleeping: on a busy machine one for every
                # core took 77 s where half of them took 3 s (2 busy cores, 2026-11).
                n_threads_batch=max(1, (os.cpu_count() or 1) // 2),
                lora_path=None if lora is None else str(lora),
                # The cache in float32: it is the file that is tested.
                type_k=llama_cpp.GGML_TYPE_F32,
                type_v=llama_cpp.GGML_TYPE_F32,
                flash_attn=False,
                verbose=False,
            )
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ExportError(
                f"The GGUF was deleted again: llama.cpp cannot load {path.name}.",
                why=f"{error}".strip()[:300] or "It gives no reason.",
                fix="Update llama-cpp-python; if that changes nothing, please report this.",
            ) from error

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.close()

    @property
    def chat_template(self) -> str | None:
        """The file's chat template, None where it has none."""
        template = self._library.llama_model_chat_template(self._llama.model, None)
        return None if template is None else str(template.decode("utf-8"))

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, control tokens in it read as such, nothing added."""
        ids: list[int] = self._llama.tokenize(text.encode("utf-8"), add_bos=False, special=True)
        return ids

    def is_stop(self, token: int) -> bool:
        """Whether llama.cpp ends an answer at `token`."""
        vocabulary = self._library.llama_model_get_vocab(self._llama.model)
        return bool(self._library.llama_vocab_is_eog(vocabulary, token))

    def ask(self, prompt: Sequence[int], *, num_tokens: int, end_ids: frozenset[int]) -> Answer:
        """The greedy answer to `prompt`; it ends at `end_ids` or where llama.cpp ends it."""
        logits: list[NDArray[np.float32]] = []
        ids: list[int] = []
        self._llama.reset()
        self._llama.eval(list(prompt))
        while True:
            logits.append(self._logits(-1))
            ids.append(int(logits[-1].argmax()))
            if len(ids) == num_tokens or ids[-1] in end_ids or self.is_stop(ids[-1]):
                return Answer(ids=tuple(ids), log_probs=log_softmax(np.stack(logits)))
            self._llama.eval([ids[-1]])

    def score(self, prompt: Sequence[int], answer: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities (T, V) at each place of `answer`, which has at most 128 tokens."""
        self._llama.reset()
        self._llama.eval(list(prompt))
        logits = [self._logits(-1)]
        given = answer[:-1]
        if given:
            self._decode(given, start=len(prompt))
            logits += [self._logits(place) for place in range(len(given))]
        return log_softmax(np.stack(logits))

    def _decode(self, tokens: Sequence[int], *, start: int) -> None:
        """Pass tokens in one batch, with logits behind each of them."""
        library = self._library
        batch = library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for place, token in enumerate(tokens):
                batch.token[place] = token
                batch.pos[place] = start + place
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = 0
                batch.logits[place] = True
            failed = library.llama_decode(self._llama.ctx, batch)
        finally:
            library.llama_batch_free(batch)
        assert not failed, f"llama_decode gives {failed}"

    def _logits(self, place: int) -> NDArray[np.float32]:
        """Logits (V,) behind a token of the last batch; -1: the last one."""
        pointer = self._library.llama_get_logits_ith(self._llama.ctx, place)
        size = self._llama.n_vocab()
        values = np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(size,)
        )
        return values.copy()
