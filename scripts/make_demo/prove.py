"""Fine-tune the demo model with Transformers and PEFT: the yardstick for `eightgig demo`.

    python -m scripts.make_demo.prove --model src/eightgig/demo/model \
        --data src/eightgig/demo/data/tickets.jsonl

Trains LoRA on the rows that are not held out and prints exact match on the held-out rows before
and after, in float32 on the CPU. `--nf4` first rounds the frozen linears of the layers to NF4.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
LINEARS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def round_to_nf4(weight: Tensor, *, block: int = 64) -> Tensor:
    """The weight as it comes back from NF4 with one float32 scale a block."""
    blocks = weight.float().reshape(-1, block)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(blocks / scale, middles)
    return (levels[nearest] * scale).reshape(weight.shape).to(weight.dtype)


def tokenize_rows(rows: list[dict[str, Any]], tokenizer: Any) -> list[tuple[list[int], int]]:
    """(ids, length of the prompt) of each row; the end of turn is the last id."""
    out = []
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        out.append((ids, start))
    return out


def collate(rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """Rows padded on the right, prompt and padding without loss."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = ids[i, start : len(row)]
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@torch.no_grad()
def answers(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[str]:
    """Greedy answers to the rows' prompts."""
    out: list[str] = []
    for start in range(0, len(rows), 20):
        prompts = [
            tokenizer.apply_chat_template(
                row["messages"][:-1], tokenize=False, add_generation_prompt=True
            )
            for row in rows[start : start + 20]
        ]
        inputs = tokenizer(
            prompts,
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            max_new_tokens=48, do_sample=False,
        )  # fmt: skip
        texts = tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        out.extend(text.strip() for text in texts)
    return out


@torch.no_grad()
def held_out_loss(model: Any, rows: list[tuple[list[int], int]]) -> float:
    """Mean loss of the answer tokens."""
    batch = collate(rows)
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:]))


def report(title: str, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[str]:
    """Print loss and exact match."""
    start = time.perf_counter()
    model.eval()
    texts = answers(model, tokenizer, rows)
    right = sum(t == row["messages"][-1]["content"] for t, row in zip(texts, rows, strict=True))
    loss = held_out_loss(model, tokenize_rows(rows, tokenizer))
    seconds = time.perf_counter() - start
    print(
        f"{title}: loss {loss:.3f}, exact match {right}/{len(rows)} = {right / len(rows):.1%} "
        f"({seconds:.0f} s)",
        flush=True,
    )
    return texts


def train(model: Any, rows: list[tuple[list[int], int]], arguments: argparse.Namespace) -> None:
    """Plain AdamW over shuffled rows, loss normalised by the labelled tokens of the step."""
    rng = random.Random(arguments.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, weight_decay=0.0)
    steps = math.ceil(len(rows) / arguments.batch) * arguments.epochs
    warmup = max(1, round(0.05 * steps))
    start, step, tokens = time.perf_counter(), 0, 0
    model.train()
    for epoch in range(arguments.epochs):
        order = rng.sample(range(len(rows)), len(rows))
        for begin in range(0, len(order), arguments.batch):
            batch = collate([rows[i] for i in order[begin : begin + arguments.batch]])
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            share = min((step + 1) / warmup, 1.0)
            fall = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * (share if step < warmup else fall)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            tokens += int(batch["attention_mask"].sum())
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, step {step}/{steps}, "
            f"{tokens / seconds:,.0f} tokens/s, {seconds:.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--show", type=int, default=5)
    arguments = parser.parse_args()

    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Gemma4ForConditionalGeneration

    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = Gemma4ForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    if arguments.nf4:
        for name, module in model.model.language_model.layers.named_modules():
            if isinstance(module, torch.nn.Linear) and "per_layer" not in name:
                module.weight.data = round_to_nf4(module.weight.data)
    lines = arguments.data.read_text(encoding="utf-8").splitlines()
    rows = random.Random(arguments.seed).sample([json.loads(line) for line in lines], len(lines))
    held_out, training = rows[: arguments.held_out], rows[arguments.held_out :]
    before = report("before", model, tokenizer, held_out)
    config = LoraConfig(r=arguments.r, lora_alpha=arguments.alpha, target_modules=LINEARS)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    train(model, tokenize_rows(training, tokenizer), arguments)
    after = report("after", model, tokenizer, held_out)
    for row, old, new in list(zip(held_out, before, after, strict=True))[: arguments.show]:
        print(f"\n{row['messages'][1]['content']}\n  wanted {row['messages'][2]['content']}")
        print(f"  before {old}\n  after  {new}")


if __name__ == "__main__":
    main()
