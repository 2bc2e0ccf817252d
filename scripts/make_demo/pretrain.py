"""Pretrain the demo model on the generated corpus and write its folder.

    python -m scripts.make_demo.pretrain --tokenizer FOLDER --out FOLDER --seconds 200

Plain Transformers: `Gemma4ForConditionalGeneration` without its vision and audio towers, bf16
autocast over float32 weights, AdamW. The number of steps is set by a measurement after warm-up so
that the run ends in `--seconds`; `--steps` sets it by hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import multiprocessing.pool
import os
import random
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from scripts.make_demo import corpus
from scripts.make_demo.tokenizer import SPECIAL_TOKENS

ROW_TOKENS = 256
ROWS_PER_SHARD = 1024
PAD, EOS, BOS = (SPECIAL_TOKENS.index(token) for token in ("<pad>", "<eos>", "<bos>"))
TURN, TURN_END = (SPECIAL_TOKENS.index(token) for token in ("<|turn>", "<turn|>"))
TOOL_RESPONSE = SPECIAL_TOKENS.index("<|tool_response>")
SLIDING_WINDOW = 64
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"] * 4
PROMPT_WEIGHT, PLAIN_WEIGHT = 0.2, 0.5
# Shard of the corpus that no training step reads.
EVALUATION_SHARD = -2
WARMUP_STEPS = 150
# The layers are compiled by then; the pace is measured twice after it, as workers start slowly.
COMPILED_STEP, PACE_STEPS = 10, (60, 300)
# Stands for the number of steps until the pace is known: the rate only rises until then.
MOST_STEPS = 10**9


def model_config(vocab_size: int) -> dict[str, Any]:
    """config.json in the form of the hub's Gemma 4 E2B, with small sizes and no towers."""
    ids = {token: SPECIAL_TOKENS.index(token) for token in SPECIAL_TOKENS}
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": False,
        "bos_token_id": BOS,
        "dtype": "bfloat16",
        "enable_moe_block": False,
        "eos_token_id": EOS,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 64,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 192,
        "hidden_size_per_layer_input": 64,
        "initializer_range": 0.05,
        "intermediate_size": 192,
        "layer_types": LAYER_TYPES,
        "max_position_embeddings": 2048,
        "model_type": "gemma4_text",
        "moe_intermediate_size": None,
        "num_attention_heads": 4,
        "num_experts": None,
        "num_global_key_value_heads": None,
        "num_hidden_layers": len(LAYER_TYPES),
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 6,
        "pad_token_id": PAD,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
        },
        "sliding_window": SLIDING_WINDOW,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "use_bidirectional_attention": None,
        "use_cache": True,
        "use_double_wide_mlp": True,
        "vocab_size": vocab_size,
        "vocab_size_per_layer_input": vocab_size,
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "audio_token_id": ids["<|audio|>"],
        "boa_token_id": ids["<|audio>"],
        "boi_token_id": ids["<|image>"],
        "dtype": "bfloat16",
        "eoa_token_id": ids["<audio|>"],
        "eoa_token_index": ids["<audio|>"],
        "eoi_token_id": ids["<image|>"],
        "eos_token_id": [EOS, TURN_END],
        "image_token_id": ids["<|image|>"],
        "initializer_range": 0.05,
        "model_type": "gemma4",
        "text_config": text,
        "tie_word_embeddings": True,
        "video_token_id": ids["<|video|>"],
        "vision_config": None,
    }


# --- rows ----------------------------------------------------------------------------------------


def pack(documents: Iterator[list[int]], num_rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Fill rows with whole documents, the longest that still fits first.

    Returns:
        ids: (num_rows, ROW_TOKENS), uint16, `PAD` where nothing fitted.
        segments: Number of the document within its row, from 1; 0 on padding, uint8.
    """
    wanted = num_rows * ROW_TOKENS
    by_length: list[list[list[int]]] = [[] for _ in range(ROW_TOKENS + 1)]
    total = 0
    while total < wanted:
        document = next(documents)
        if len(document) <= ROW_TOKENS:
            by_length[len(document)].append(document)
            total += len(document)
    ids = np.full((num_rows, ROW_TOKENS), PAD, dtype=np.uint16)
    segments = np.zeros((num_rows, ROW_TOKENS), dtype=np.uint8)
    for row in range(num_rows):
        start, segment, length = 0, 0, ROW_TOKENS
        while length := _longest(by_length, min(length, ROW_TOKENS - start)):
            segment += 1
            ids[row, start : start + length] = by_length[length].pop()
            segments[row, start : start + length] = segment
            start += length
    return ids, segments


def _longest(by_length: list[list[list[int]]], most: int) -> int:
    """Length of the longest waiting document of at most `most` tokens, 0 if there is none."""
    while most and not by_length[most]:
        most -= 1
    return most


def make_shard(task: tuple[str, int, int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows of one shard, in an order that does not follow the packing."""
    path, seed, shard = task
    tokenizer = Tokenizer.from_file(path)
    texts = map(corpus.render, corpus.documents(seed, shard))

    def encoded() -> Iterator[list[int]]:
        while True:
            some = list(itertools.islice(texts, 256))
            for item in tokenizer.encode_batch(some, add_special_tokens=False):
                yield item.ids

    ids, segments = pack(encoded(), ROWS_PER_SHARD)
    order = np.random.default_rng([seed, shard]).permutation(ROWS_PER_SHARD)
    return ids[order], segments[order]


def masks(segments: Tensor) -> dict[str, Tensor]:
    """Who sees whom, (B, 1, T, T) bool: earlier tokens of the same document, within the window."""
    size = segments.shape[1]
    place = torch.arange(size, device=segments.device)
    distance = place[:, None] - place[None, :]
    same = segments[:, :, None] == segments[:, None, :]
    full = (same & (distance >= 0))[:, None]
    return {"full_attention": full, "sliding_attention": full & (distance < SLIDING_WINDOW)}


def target_weights(ids: Tensor, segments: Tensor, model_id: int) -> Tensor:
    """Weight of predicting token t + 1 at t, (B, T - 1): model turns 1, the rest less.

    A chat is a document whose second token opens a turn.
    """
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    is_turn = ids == TURN
    next_ids = torch.roll(ids, -1, dims=1)
    first = torch.where(segments != torch.roll(segments, 1, dims=1), place, 0).cummax(dim=1).values
    last_turn = torch.where(is_turn, place, 0).cummax(dim=1).values
    is_chat = (next_ids == TURN).gather(1, first)
    by_model = is_chat & (is_turn & (next_ids == model_id)).gather(1, last_turn)
    weights = torch.where(by_model, 1.0, torch.where(is_chat, PROMPT_WEIGHT, PLAIN_WEIGHT))
    valid = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return weights[:, 1:] * valid


# --- the model -----------------------------------------------------------------------------------


def build_model(config: dict[str, Any], device: str) -> Any:
    """A fresh model in float32 whose layer scalars are trained, too."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    model = Gemma4ForConditionalGeneration(Gemma4Config.from_dict(config)).float()
    for layer in model.model.language_model.layers:
        # A buffer in Transformers: as a parameter it keeps its name in the checkpoint.
        del layer.layer_scalar
        layer.layer_scalar = torch.nn.Parameter(torch.ones(1))
        # Each sublayer starts with a small say, so that the embedding is heard at the top.
        for name in ("attention_layernorm", "feedforward_layernorm", "per_layer_input_norm"):
            torch.nn.init.constant_(getattr(layer, f"post_{name}").weight, 0.4)
        # Gemma 4 has no 1 / sqrt(head_dim) on the scores: the norms of Q and K hold it.
        attention = layer.self_attn
        for norm in (attention.q_norm, getattr(attention, "k_norm", None)):
            if norm is not None:
                torch.nn.init.constant_(norm.weight, attention.head_dim**-0.25)
    return model.to(device)


def logits_of(model: Any, ids: Tensor, mask: dict[str, Tensor]) -> Tensor:
    """Soft-capped logits of all tokens, (B, T, V)."""
    output = model.model.language_model(input_ids=ids, attention_mask=mask, use_cache=False)
    cap: float = model.config.text_config.final_logit_softcapping
    logits: Tensor = model.lm_head(output.last_hidden_state)
    return torch.tanh(logits / cap) * cap


def weighted_loss(model: Any, ids: Tensor, mask: dict[str, Tensor], weights: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens under their weights."""
    logits = logits_of(model, ids, mask)[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def make_optimizer(model: Any, *, learning_rate: float, fused: bool) -> torch.optim.AdamW:
    """AdamW that decays the matrices of the layers only."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed_tokens" not in name
        (decayed if is_matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear rise, cosine fall to a fiftieth."""
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))


# --- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: Any, tokenizer: Tokenizer, device: str, *, per_task: int) -> dict[str, Any]:
    """Loss and greedy exact match of unseen chats by kind of task.

    A greedy answer equals the reference exactly if every reference token is the most likely one
    after those before it, so one forward pass tells.
    """
    rng = random.Random(f"eightgig-demo-0-{EVALUATION_SHARD}")
    scores: dict[str, float] = {}
    loss_sum, loss_tokens = 0.0, 0
    for maker, _ in corpus.CHATS:
        rows: list[list[int]] = []
        starts: list[int] = []
        while len(rows) < per_task:
            chat = maker(rng)
            prompt = corpus.render(chat[:-1]) + "<|turn>model\n"
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            row = tokenizer.encode(corpus.render(chat), add_special_tokens=False).ids[:-1]
            if len(row) <= ROW_TOKENS:
                rows.append(row)
                starts.append(len(prompt_ids))
        ids = torch.full((per_task, ROW_TOKENS), PAD)
        segments = torch.zeros_like(ids)
        answer = torch.zeros(per_task, ROW_TOKENS, dtype=torch.bool)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            segments[i, : len(row)] = 1
            answer[i, start : len(row)] = True
        ids, answer, mask = ids.to(device), answer[:, 1:].to(device), masks(segments.to(device))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = logits_of(model, ids, mask)[:, :-1].float()
        right = (logits.argmax(-1) == ids[:, 1:]) | ~answer
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss_sum += float(losses[answer].sum())
        loss_tokens += int(answer.sum())
        scores[maker.__name__] = float(right.all(dim=1).float().mean())
    mean = sum(scores.values()) / len(scores)
    return {"answer_loss": loss_sum / loss_tokens, "exact_match": mean, "by_task": scores}


# --- the run -------------------------------------------------------------------------------------


def save(model: Any, config: dict[str, Any], tokenizer_folder: Path, out: Path) -> None:
    """Write the model folder as it lies on the hub: bf16 weights, configs, tokenizer, template."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    generation = {
        "bos_token_id": BOS,
        "do_sample": False,
        "eos_token_id": [EOS, TURN_END, TOOL_RESPONSE],
        "pad_token_id": PAD,
    }
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer_folder / name, out / name)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200.0, help="of training, after warm-up")
    parser.add_argument("--steps", type=int, default=0, help="instead of --seconds")
    parser.add_argument("--rows", type=int, default=128, help="rows of 256 tokens per step")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--per-task", type=int, default=100, help="chats a task to judge by")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def batches(
    pool: multiprocessing.pool.Pool, path: Path, *, seed: int, rows: int, ahead: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, segments), (rows, ROW_TOKENS) each, int64, from shards made in parallel."""
    tasks = ((str(path), seed, shard) for shard in itertools.count())
    waiting = deque(pool.apply_async(make_shard, (next(tasks),)) for _ in range(ahead))
    while True:
        ids, segments = waiting.popleft().get()
        waiting.append(pool.apply_async(make_shard, (next(tasks),)))
        for start in range(0, ROWS_PER_SHARD, rows):
            part = slice(start, start + rows)
            yield (
                torch.from_numpy(ids[part].astype(np.int64)),
                torch.from_numpy(segments[part].astype(np.int64)),
            )


def train_step(
    model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, segments: Tensor, model_id: int
) -> Tensor:
    """One update; returns the loss without waiting for it."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.is_cuda):
        weights = target_weights(ids, segments, model_id)
        loss = weighted_loss(model, ids, masks(segments), weights)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def train(
    model: Any,
    source: Iterator[tuple[Tensor, Tensor]],
    arguments: argparse.Namespace,
    *,
    model_id: int,
    save_model: Callable[[], None],
) -> dict[str, Any]:
    """Train for the asked steps or seconds, saving every minute; returns what was done."""
    device = next(model.parameters()).device
    rate = arguments.learning_rate
    optimizer = make_optimizer(model, learning_rate=rate, fused=device.type == "cuda")
    steps = arguments.steps or MOST_STEPS
    start = last_save = time.perf_counter()
    marks = {0: start}  # step -> when it was done
    tokens = 0
    for step in itertools.count(1):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step - 1, steps, WARMUP_STEPS)
        ids, segments = (part.to(device, non_blocking=True) for part in next(source))
        loss = train_step(model, optimizer, ids, segments, model_id)
        tokens += ids.numel()
        if step in (COMPILED_STEP, *PACE_STEPS) or step % 100 == 0 or step == steps:
            value, now = loss.item(), time.perf_counter()
            last_step = max(marks)
            pace = (now - marks[last_step]) / (step - last_step)
            marks[step] = now
            print(f"step {step} loss {value:.4f} {pace * 1e3:.1f} ms a step, {now - start:.0f} s")
            if step in PACE_STEPS and not arguments.steps:
                left = arguments.seconds - (now - marks[COMPILED_STEP])
                steps = step + max(1, int(left / pace))
                print(f"{steps} steps in all")
            if now - last_save > 60:
                save_model()
                last_save = now
        if step >= steps:
            break
    seconds = round(time.perf_counter() - start, 1)
    return {"steps": step, "tokens": tokens, "seconds": seconds, "final_training_loss": value}


def make_demo_model(
    arguments: argparse.Namespace, pool: multiprocessing.pool.Pool, device: str
) -> None:
    """Build, train, save and judge the model."""
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    path = arguments.tokenizer / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    config = model_config(tokenizer.get_vocab_size())
    model = build_model(config, device)
    layers = model.model.language_model.layers
    if not arguments.no_compile:
        # Layer by layer: six kinds of layers compile faster than a graph of twelve.
        torch._dynamo.config.recompile_limit = 32
        for layer in layers:
            layer.compile(fullgraph=True)

    def save_model() -> None:
        save(model, config, arguments.tokenizer, arguments.out)

    source = batches(
        pool, path, seed=arguments.seed, rows=arguments.rows, ahead=3 * arguments.workers
    )
    model_id = tokenizer.token_to_id("model")
    assert model_id is not None, "`model` is no token of its own"
    done = train(model.train(), source, arguments, model_id=model_id, save_model=save_model)
    save_model()
    for layer in layers:
        layer._compiled_call_impl = None  # other shapes would be compiled anew
    record = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **done,
        "arguments": {
            name: str(value)
            for name, value in vars(arguments).items()
            if not isinstance(value, Path)
        },
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **evaluate(model.eval(), tokenizer, device, per_task=arguments.per_task),
    }
    text = json.dumps(record, indent=1)
    print(text)
    (arguments.out / "training.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    arguments = read_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The workers are forked before CUDA is touched.
    with multiprocessing.get_context("fork").Pool(arguments.workers) as pool:
        make_demo_model(arguments, pool, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
