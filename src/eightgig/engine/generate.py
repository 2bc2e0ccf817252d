"""Generation with a KV cache; the layers stream as in training.

Prompts of a batch are packed for the first pass; after that every pass makes one token for each
row that has not stopped. All rows share each visit of the weights.
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
from eightgig.engine.model import Model
from eightgig.models.spec import DecoderSpec, LayerSpec
from eightgig.ops.choose import Ops
from eightgig.ops.reference import wide


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


class KvCache:
    """K and V of every layer that makes its own, (rows, K, tokens, hd).

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
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.longest = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        for layer in decoder.layers:
            if layer.has_k_proj:
                shape = (rows, layer.num_kv_heads, tokens, layer.head_dim)
                self._keys[layer.index] = torch.zeros(shape, dtype=dtype, device=device)
                self._values[layer.index] = torch.zeros(shape, dtype=dtype, device=device)

    def of(self, layer: LayerSpec) -> tuple[Tensor, Tensor]:
        """K and V that `layer` attends to."""
        index = layer.index if layer.kv_source is None else layer.kv_source
        return self._keys[index], self._values[index]


def cache_bytes_per_token(decoder: DecoderSpec, item_bytes: int) -> int:
    """Bytes of K and V that one token of one row takes."""
    elements = sum(
        2 * layer.num_kv_heads * layer.head_dim for layer in decoder.layers if layer.has_k_proj
    )
    return elements * item_bytes


def generate(
    model: Model,
    ops: Ops,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling | None = None,
    allowed: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[list[int | None]]:
    """Tokens of all rows, one step at a time.

    Args:
        model: The engine.
        ops: Its operations.
        prompts: Token ids of each row, at least one each.
        max_new_tokens: Steps at most.
        stop_ids: Tokens that end a row; they are yielded, too.
        sampling: None: greedy.
        allowed: Called with step and logits (rows, V), gives logits with forbidden ones at -inf.

    Yields:
        For each row its next token, None once it has stopped.
    """
    sampling = sampling or Sampling()
    generator = torch.Generator(device=model.device).manual_seed(sampling.seed)
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    cache = KvCache(model.decoder, len(prompts), longest, dtype=model.dtype, device=model.device)
    logits = _first_pass(model, ops, cache, prompts)
    is_running = np.ones(len(prompts), dtype=bool)
    for step in range(max_new_tokens):
        if allowed is not None:
            logits = allowed(step, logits)
        ids = _draw(logits, sampling, generator).cpu().numpy()
        yield [int(token) if runs else None for token, runs in zip(ids, is_running, strict=True)]
        is_running &= ~np.isin(ids, list(stop_ids))
        if not is_running.any() or step + 1 == max_new_tokens:
            return
        logits = _next_pass(model, cache, ids)


def _first_pass(model: Model, ops: Ops, cache: KvCache, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Fill the cache with the prompts; logits after the last token of each, (rows, V)."""
    lengths = [len(prompt) for prompt in prompts]
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    batch = _batch(
        np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts]),
        np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        bounds,
    )
    cu_seqlens = torch.from_numpy(bounds).to(model.device)
    scale = model.decoder.attention_scale

    def attend_for(index: int, _: int) -> Attend:
        layer = model.decoder.layers[index]

        def attend(q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor) -> None:
            keys, values = cache.of(layer)
            if k is None or v is None:
                k, v = _packed(keys, lengths), _packed(values, lengths)
            else:
                _fill(keys, k, lengths)
                _fill(values, v, lengths)
            ops.attention(q, k, v, cu_seqlens, max(lengths), scale, layer.sliding_window, out=out)

        return attend

    last = torch.from_numpy(bounds[1:].astype(np.int64) - 1).to(model.device)
    inputs = model.embedding.prepare(batch).result()
    logits = model.next_logits([inputs], attend_for, tokens=[last])
    cache.lengths.copy_(torch.tensor(lengths))
    cache.longest = max(lengths)
    return logits


def _next_pass(model: Model, cache: KvCache, ids: NDArray[np.int64]) -> Tensor:
    """Logits after one more token of each row, (rows, V)."""
    rows = len(ids)
    positions = cache.lengths.cpu().numpy().astype(np.int32)
    batch = _batch(ids.astype(np.int32), positions, np.arange(rows + 1, dtype=np.int32))
    scale = model.decoder.attention_scale
    row = torch.arange(rows, device=model.device)

    def attend_for(index: int, _: int) -> Attend:
        layer = model.decoder.layers[index]

        def attend(q: Tensor, k: Tensor | None, v: Tensor | None, out: Tensor) -> None:
            keys, values = cache.of(layer)
            if k is not None and v is not None:
                keys[row, :, cache.lengths] = k
                values[row, :, cache.lengths] = v
            seen = cache.longest + 1
            out.copy_(
                attend_to_cache(
                    q,
                    keys[:, :, :seen],
                    values[:, :, :seen],
                    cache.lengths,
                    scale,
                    layer.sliding_window,
                )
            )

        return attend

    inputs = model.embedding.prepare(batch).result()
    logits = model.next_logits([inputs], attend_for)
    cache.lengths += 1
    cache.longest += 1
    return logits


def attend_to_cache(
    q: Tensor, keys: Tensor, values: Tensor, places: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention of one new token per row to its cached ones, itself included, (rows, H, hd).

    Args:
        q: (rows, H, hd).
        keys, values: (rows, K, tokens, hd).
        places: Position of each row's new token, (rows,).
        scale: Factor of the scores.
        window: Keys a query sees, itself included; None: all.
    """
    rows, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    queries = wide(q).view(rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = queries @ wide(keys).transpose(-1, -2) * scale  # (rows, K, H/K, tokens)
    at = torch.arange(keys.shape[2], device=q.device)[None]
    hidden = at > places[:, None]
    if window is not None:
        hidden |= at <= places[:, None] - window
    weights = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
    return (weights @ wide(values)).view(rows, num_heads, head_dim).to(q.dtype)


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


def _fill(cache: Tensor, packed: Tensor, lengths: Sequence[int]) -> None:
    for row, part in enumerate(packed.split(list(lengths))):
        cache[row, :, : len(part)] = part.transpose(0, 1)


def _packed(cache: Tensor, lengths: Sequence[int]) -> Tensor:
    rows = [cache[row, :, :length].transpose(0, 1) for row, length in enumerate(lengths)]
    return torch.cat(rows)


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
