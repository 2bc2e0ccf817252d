"""Generation with a KV cache; the layers stream as in training.

Prompts of a batch are packed for the first pass; after that every pass makes one token for each
row that has not stopped. All rows share each visit of the weights, and as many rows run together
as a memory limit allows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eightgig.data.batches import IGNORE_INDEX, Batch
from eightgig.engine.decoder import Attend
from eightgig.engine.embedding import HostInputs
from eightgig.engine.model import Model
from eightgig.errors import DoesNotFitError
from eightgig.models.spec import DecoderSpec, LayerSpec
from eightgig.ops.choose import Ops
from eightgig.ops.reference import wide
from eightgig.units import format_bytes

Allowed = Callable[[Sequence[Sequence[int]], Tensor], Tensor]
"""Called with the tokens made so far of each row and the logits (rows, V) of the next ones; gives
logits in which what must not follow is -inf."""

# Copies of one row's logits that exist at a time: pieces, joined, capped, restricted, drawn from.
_LOGIT_COPIES = 6
# Rows that run together at most: beyond that a pass takes longer for every further row.
_MOST_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest.

    Attributes:
        temperature: Divides the logits.
        top_k: Only the likeliest k, 0: all.
        top_p: Only the likeliest that together have this probability.
        seed: Of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerLimits:
    """How far answers go, and how much they may take.

    Attributes:
        max_new_tokens: Tokens of an answer, its stop included.
        stop_ids: Tokens that end an answer.
        memory_bytes: For the cache and whatever else grows with the number of rows.
        micro_batch_tokens: Prompt tokens that pass a layer at a time; None: all.
    """

    max_new_tokens: int
    stop_ids: frozenset[int]
    memory_bytes: int
    micro_batch_tokens: int | None = None


class KvCache:
    """K and V of every layer that makes its own, (rows, K, places, hd).

    A sliding layer has no more places than its window: position p lies at p modulo their number,
    over the one that no query sees any more.

    Args:
        decoder: The stack.
        rows: Rows of the batch.
        tokens: Longest row, prompt and answer.
        dtype: Of K and V.
        device: Where they lie.
    """

    def __init__(
        self,
        decoder: DecoderSpec,
        rows: int,
        tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.lengths = np.zeros(rows, dtype=np.int64)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        for layer in decoder.layers:
            if layer.has_k_proj:
                shape = (rows, layer.num_kv_heads, cached_places(layer, tokens), layer.head_dim)
                self._keys[layer.index] = torch.zeros(shape, dtype=dtype, device=device)
                self._values[layer.index] = torch.zeros(shape, dtype=dtype, device=device)

    def of(self, layer: LayerSpec) -> tuple[Tensor, Tensor]:
        """K and V that `layer` attends to."""
        index = layer.index if layer.kv_source is None else layer.kv_source
        return self._keys[index], self._values[index]

    def fill(self, layer: LayerSpec, rows: slice, k: Tensor, v: Tensor) -> None:
        """Keep the prompts of some rows, packed: `k` and `v` are (N, K, hd)."""
        lengths = self.lengths[rows].tolist()
        for cache, packed in zip(self.of(layer), (k, v), strict=True):
            places = cache.shape[2]
            for row, part in zip(cache[rows], packed.split(lengths), strict=True):
                kept = part[-places:]
                at = torch.arange(len(part) - len(kept), len(part), device=part.device) % places
                row[:, at] = kept.transpose(0, 1)


def cached_places(layer: LayerSpec, tokens: int) -> int:
    """Places that `layer` keeps of a row of `tokens`."""
    return tokens if layer.sliding_window is None else min(layer.sliding_window, tokens)


def row_bytes(decoder: DecoderSpec, prompt_tokens: int, new_tokens: int, item_bytes: int) -> int:
    """Device bytes that one row of a batch takes: its cache, and what its passes need of it.

    Args:
        decoder: The stack.
        prompt_tokens, new_tokens: Of the row.
        item_bytes: Of an element in the compute dtype.
    """
    tokens = prompt_tokens + new_tokens
    cache = attention = 0
    for layer in decoder.layers:
        places = cached_places(layer, tokens)
        elements = 2 * layer.num_kv_heads * layer.head_dim * places
        cache += elements * item_bytes if layer.has_k_proj else 0
        # K, V and two sets of scores in float32.
        attention = max(attention, 4 * (elements + 2 * layer.num_heads * places))
    # Through the first pass: two hidden states, per-layer inputs, angles, K and V of two layers.
    widest = max(2 * layer.num_kv_heads * layer.head_dim for layer in decoder.layers)
    prompt = 2 * 4 * decoder.hidden_size + 3 * 4 * decoder.ple_size * decoder.num_layers
    prompt += 2 * widest * item_bytes + 4 * sum({layer.head_dim for layer in decoder.layers})
    return cache + attention + prompt_tokens * prompt + _LOGIT_COPIES * 4 * decoder.vocab_size


def answer_prompts(
    model: Model,
    ops: Ops,
    prompts: Sequence[Sequence[int]],
    limits: AnswerLimits,
    *,
    sampling: Sampling | None = None,
    allowed: Allowed | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """The answer to each prompt, in batches of similar length under a memory limit.

    Args:
        model: The engine.
        ops: Its operations.
        prompts: Token ids of each row, at least one each.
        limits: How far, and with how much.
        sampling: None: greedy.
        allowed: What may follow, see `Allowed`; the rows it sees are those of a batch.
        progress: Called with the number of answers so far.

    Returns:
        Tokens of each answer; the last is a stop token unless the answer was cut.

    Raises:
        DoesNotFitError: Not even the longest prompt alone fits.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    for places in _batches(model, prompts, limits):
        steps = generate(
            model,
            ops,
            [prompts[place] for place in places],
            max_new_tokens=limits.max_new_tokens,
            stop_ids=limits.stop_ids,
            sampling=sampling,
            allowed=allowed,
            micro_batch_tokens=limits.micro_batch_tokens,
        )
        for tokens in steps:
            for place, token in zip(places, tokens, strict=True):
                if token is not None:
                    answers[place].append(token)
        done += len(places)
        progress(done)
    return answers


def _batches(
    model: Model, prompts: Sequence[Sequence[int]], limits: AnswerLimits
) -> Iterator[list[int]]:
    """Numbers of prompts that run together, longest first."""
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    while order:
        longest = len(prompts[order[0]])
        needed = row_bytes(model.decoder, longest, limits.max_new_tokens, model.dtype.itemsize)
        count = min(limits.memory_bytes // needed, _MOST_ROWS)
        if count < 1:
            raise DoesNotFitError(
                f"Answering a prompt of {longest:,} tokens needs {format_bytes(needed)}; "
                f"{format_bytes(max(0, limits.memory_bytes))} are left for it.",
                why="Keys and values of every token are kept while an answer is made.",
                fix="Ask for shorter answers, or lower memory.layer_slots.",
            )
        yield order[:count]
        order = order[count:]


def generate(
    model: Model,
    ops: Ops,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling | None = None,
    allowed: Allowed | None = None,
    micro_batch_tokens: int | None = None,
    has_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Tokens of all rows, one step at a time.

    Args:
        model: The engine.
        ops: Its operations.
        prompts: Token ids of each row, at least one each.
        max_new_tokens: Steps at most.
        stop_ids: Tokens that end a row; they are yielded, too.
        sampling: None: greedy.
        allowed: What may follow, see `Allowed`.
        micro_batch_tokens: Prompt tokens that pass a layer at a time; None: all.
        has_cache: Whether K and V are kept; otherwise each step computes every token again, which
            is the definition that the cache is compared with.

    Yields:
        For each row its next token, None once it has stopped.
    """
    assert all(len(prompt) for prompt in prompts), "a prompt without tokens"
    sampling = sampling or Sampling()
    generator = torch.Generator(device=model.device).manual_seed(sampling.seed)
    made: list[list[int]] = [[] for _ in prompts]
    parts = _prompt_parts(prompts, micro_batch_tokens)
    cache = None
    if has_cache:
        longest = max(len(prompt) for prompt in prompts) + max_new_tokens
        cache = KvCache(
            model.decoder, len(prompts), longest, dtype=model.dtype, device=model.device
        )
    logits = _first_pass(model, ops, prompts, parts, cache)
    is_running = np.ones(len(prompts), dtype=bool)
    for step in range(1, max_new_tokens + 1):
        if allowed is not None:
            logits = allowed(made, logits)
        ids = _draw(logits, sampling, generator).cpu().numpy()
        for row, token in zip(made, ids.tolist(), strict=True):
            row.append(token)
        yield [row[-1] if runs else None for row, runs in zip(made, is_running, strict=True)]
        is_running &= ~np.isin(ids, list(stop_ids))
        if step == max_new_tokens or not is_running.any():
            return
        if cache is not None:
            logits = _next_pass(model, cache, ids)
        else:
            rows = [[*prompt, *row] for prompt, row in zip(prompts, made, strict=True)]
            logits = _first_pass(model, ops, rows, _prompt_parts(rows, micro_batch_tokens), None)


def _prompt_parts(prompts: Sequence[Sequence[int]], micro_batch_tokens: int | None) -> list[slice]:
    """Neighbouring prompts that make one micro-batch."""
    limit = micro_batch_tokens or sum(len(prompt) for prompt in prompts)
    starts, tokens = [0], 0
    for row, prompt in enumerate(prompts):
        if tokens and tokens + len(prompt) > limit:
            starts.append(row)
            tokens = 0
        tokens += len(prompt)
    return [slice(*pair) for pair in zip(starts, [*starts[1:], len(prompts)], strict=True)]


def _first_pass(
    model: Model,
    ops: Ops,
    prompts: Sequence[Sequence[int]],
    parts: Sequence[slice],
    cache: KvCache | None,
) -> Tensor:
    """Logits after the last token of each prompt, (rows, V); the prompts fill the cache."""
    batches = [_pack(prompts[part]) for part in parts]
    bounds = [torch.from_numpy(batch.cu_seqlens).to(model.device) for batch in batches]
    last = [each[1:].long() - 1 for each in bounds]
    inputs = _gather(model, batches)
    if cache is None:
        return model.next_logits(inputs, None, tokens=last)
    cache.lengths[:] = [len(prompt) for prompt in prompts]
    filled = cache
    # Layers that share K and V need those of the whole prompt, which a sliding cache has not.
    shared: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    sources = {layer.kv_source for layer in model.decoder.layers}
    scale = model.decoder.attention_scale

    def attend_for(index: int, number: int) -> Attend:
        layer, batch = model.decoder.layers[index], batches[number]

        def attend(q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor) -> None:
            if k is None or v is None:
                assert layer.kv_source is not None
                k, v = shared[layer.kv_source, number]
            else:
                filled.fill(layer, parts[number], k, v)
                if index in sources:
                    shared[index, number] = (k, v)
            window = layer.sliding_window
            ops.attention(q, k, v, bounds[number], batch.max_length, scale, window, out=out)

        return attend

    return model.next_logits(inputs, attend_for, tokens=last)


def _next_pass(model: Model, cache: KvCache, ids: NDArray[np.int64]) -> Tensor:
    """Logits after one more token of each row, (rows, V)."""
    rows = len(ids)
    positions = cache.lengths.astype(np.int32)
    batch = _batch(ids.astype(np.int32), positions, np.arange(rows + 1, dtype=np.int32))
    scale, row = model.decoder.attention_scale, torch.arange(rows, device=model.device)
    at, most = torch.from_numpy(cache.lengths.copy()).to(model.device), int(positions.max()) + 1

    def attend_for(index: int, _: int) -> Attend:
        layer = model.decoder.layers[index]

        def attend(q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor) -> None:
            keys, values = cache.of(layer)
            if k is not None and v is not None:
                place = at % keys.shape[2]
                keys[row, :, place] = k
                values[row, :, place] = v
            out.copy_(attend_to_cache(q, keys[:, :, :most], values[:, :, :most], at, scale))

        return attend

    logits = model.next_logits(_gather(model, [batch]), attend_for)
    cache.lengths += 1
    return logits


def attend_to_cache(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """Attention of one new token per row to its cached ones, itself included, (rows, H, hd).

    Args:
        q: (rows, H, hd).
        keys, values: (rows, K, places, hd), the new token's among them. Places behind its position
            are not filled yet; once all are filled they are exactly what it sees.
        positions: Position of each row's new token, (rows,).
        scale: Factor of the scores.
    """
    rows, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    queries = wide(q).view(rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = queries @ wide(keys).transpose(-1, -2) * scale  # (rows, K, H/K, places)
    is_empty = torch.arange(keys.shape[2], device=q.device) > positions[:, None]
    weights = scores.masked_fill(is_empty[:, None, None], float("-inf")).softmax(-1)
    return (weights @ wide(values)).view(rows, num_heads, head_dim).to(q.dtype)


def _gather(model: Model, batches: Sequence[Batch]) -> list[HostInputs]:
    futures = [model.embedding.prepare(batch) for batch in batches]
    return [future.result() for future in futures]


def _pack(prompts: Sequence[Sequence[int]]) -> Batch:
    """Prompts one behind the other."""
    lengths = [len(prompt) for prompt in prompts]
    return _batch(
        np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts]),
        np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        np.cumsum([0, *lengths]).astype(np.int32),
    )


def _batch(
    ids: NDArray[np.int32], positions: NDArray[np.int32], cu_seqlens: NDArray[np.int32]
) -> Batch:
    """A micro-batch without labels."""
    return Batch(
        input_ids=ids,
        labels=np.full(len(ids), IGNORE_INDEX, dtype=np.int32),
        row_ids=np.zeros(len(ids), dtype=np.int64),
        positions=positions,
        cu_seqlens=cu_seqlens,
    )


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token per row, (rows,)."""
    if sampling.temperature <= 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    # A token stays while those before it have not reached top_p; the first always stays.
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0)
    drawn = torch.multinomial(ordered, 1, generator=generator)
    return order.gather(1, drawn)[:, 0]
