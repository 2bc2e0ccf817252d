"""The engine on a tiny model, and Transformers + PEFT on the same one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor

from eightgig.adapters.lora import Adapter, adapter_groups, lora_scale, named_views
from eightgig.config import LoraConfig, ModelConfig
from eightgig.data.batches import IGNORE_INDEX, Batch
from eightgig.engine.gradients import Gradients
from eightgig.engine.model import Model, device_of
from eightgig.memory.plan import Plan
from eightgig.models.checkpoint import read_model_spec
from eightgig.models.spec import ModelSpec
from eightgig.ops.choose import choose_ops
from eightgig.quant.store import Store, open_store
from tests import tiny

CPU = torch.device("cpu")
# Lower ids are control tokens; Transformers looks for images where an image token stands.
_FIRST_TEXT_ID = 32


def make_plan(**changes: Any) -> Plan:
    """A plan for a tiny model: everything resident, one micro-batch a visit."""
    plan = Plan(
        fits=True,
        device="cpu",
        compute_dtype="float32",
        budget_bytes=1 << 30,
        peak_bytes=0,
        breakdown={},
        budget_breakdown={},
        host_bytes=0,
        host_budget_bytes=1 << 30,
        host_breakdown={},
        disk_bytes=0,
        layer_slots=1000,
        resident_layers=0,
        micro_batch_tokens=64,
        micro_batches_per_visit=1,
        max_length=64,
        mlp_tile_tokens=1000,
        head_tile_tokens=1000,
        head_chunk_rows=128,
        checkpoints="device",
        offload=(),
        optimizer_place="host",
        host_weights="mapped",
        kernels="plain",
        choices=(),
    )
    return replace(plan, **changes)


@dataclass(frozen=True)
class Engine:
    """A model of ours with its adapter."""

    spec: ModelSpec
    store: Store
    adapter: Adapter
    model: Model


def make_engine(
    folder: Path,
    cache_dir: Path,
    *,
    lora: LoraConfig | None = None,
    plan: Plan | None = None,
    quantization: str = "none",
    poison: bool = False,
) -> Engine:
    """Our engine on the model in `folder`, with a random adapter (B not zero)."""
    plan = plan or make_plan()
    lora = lora or LoraConfig(r=4, lora_alpha=8)
    spec = read_model_spec(folder)
    config = ModelConfig(name=str(folder), cache_dir=str(cache_dir), quantization=quantization)
    device, model_dtype = device_of(plan), getattr(torch, plan.compute_dtype)
    store = open_store(spec, folder, config, device=device)
    place = CPU if plan.optimizer_place == "host" else device
    adapter = Adapter(
        adapter_groups(spec.decoder, lora, spec.module_prefix),
        scale=lora_scale(lora),
        dropout=lora.lora_dropout,
        dtype=model_dtype,
        device=place,
        pin=device.type == "cuda" and place == CPU,
    )
    randomize(adapter)
    ops, _ = choose_ops(device=plan.device, dtype=model_dtype, kernels=plan.kernels)
    model = Model(spec.decoder, store, plan, ops, adapter, poison=poison)
    return Engine(spec, store, adapter, model)


def randomize(adapter: Adapter, seed: int = 3) -> None:
    """Fill A and B with numbers of usual size."""
    generator = torch.Generator().manual_seed(seed)
    for _, view in adapter.named_tensors():
        view.copy_(torch.randn(view.shape, generator=generator) * 0.05)
    adapter.refresh_all()


def random_rows(spec: ModelSpec, lengths: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Rows of random tokens; about two thirds of them carry loss, the first never does."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = rng.integers(_FIRST_TEXT_ID, spec.decoder.vocab_size, length).astype(np.int32)
        is_trained = rng.random(length) < 0.67
        is_trained[0] = False
        is_trained[-1] = length > 1
        rows.append({"id": number + 10, "ids": ids, "is_trained": is_trained})
    return rows


def pack(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """One micro-batch of `rows`."""
    labels = []
    for row in rows:
        following = np.where(row["is_trained"], row["ids"], IGNORE_INDEX)[1:]
        labels.append(np.append(following, IGNORE_INDEX))
    lengths = [len(row["ids"]) for row in rows]
    return Batch(
        input_ids=np.concatenate([row["ids"] for row in rows]),
        labels=np.concatenate(labels).astype(np.int32),
        row_ids=np.repeat([row["id"] for row in rows], lengths).astype(np.int64),
        positions=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
    )


def engine_gradients(
    engine: Engine, batches: Sequence[Batch], *, seed: int | None = None, step: int = 0
) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of a step, and gradients by adapter tensor."""
    device = engine.model.device
    gradients = Gradients(
        engine.adapter.layers, device=device, place=engine.adapter.masters[0].device
    )
    gradients.begin_step()
    inputs = [
        engine.model.embedding.prepare(batch, seed=seed, step=step).result() for batch in batches
    ]
    loss_tokens = sum(batch.num_loss_tokens for batch in batches)
    losses = engine.model.gradients(inputs, loss_tokens, gradients)
    named: dict[str, Tensor] = {}
    for layer, groups in enumerate(engine.adapter.layers):
        named.update(
            (name, view.clone()) for name, view in named_views(gradients.wait(layer), groups, layer)
        )
    return float(losses.total) / loss_tokens, named


def engine_logits(engine: Engine, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Our logits, rows packed into one micro-batch."""
    return engine.model.logits(engine.model.embedding.prepare(pack(rows)).result())


def make_oracle(
    family: str, folder: Path, engine: Engine, lora: LoraConfig | None = None
) -> torch.nn.Module:
    """Transformers' model in PEFT's wrapper, with the engine's adapter."""
    lora = lora or LoraConfig(r=4, lora_alpha=8)
    base = tiny.load_reference(family, folder)
    peft_config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=0.0,
        target_modules=tiny.peft_targets(family),
        use_rslora=lora.use_rslora,
    )
    wrapped = get_peft_model(base, peft_config)
    parameters = dict(wrapped.named_parameters())
    for name, view in engine.adapter.named_tensors():
        parameters[peft_name(engine.spec, name)].data.copy_(view)
    return wrapped


def peft_name(spec: ModelSpec, name: str) -> str:
    """PEFT's parameter of our adapter tensor."""
    return f"base_model.model.{spec.module_prefix}.{name}.default.weight"


def oracle_logits(oracle: torch.nn.Module, rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """Logits of each row alone, one behind the other."""
    with torch.no_grad():
        parts = [
            oracle(input_ids=torch.from_numpy(row["ids"]).long()[None]).logits[0] for row in rows
        ]
    return torch.cat(parts)


def oracle_gradients(
    oracle: torch.nn.Module, rows: Sequence[Mapping[str, Any]], spec: ModelSpec
) -> tuple[float, dict[str, Tensor]]:
    """Token-mean loss over all rows and its gradients, by our names."""
    oracle.zero_grad()
    losses, count = [], 0
    for row in rows:
        ids = torch.from_numpy(row["ids"]).long()
        labels = torch.where(torch.from_numpy(row["is_trained"]), ids, -100)
        logits = oracle(input_ids=ids[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    loss = torch.stack(losses).sum() / count
    loss.backward()
    prefix = f"base_model.model.{spec.module_prefix}."
    named = {
        name.removeprefix(prefix).removesuffix(".default.weight"): parameter.grad
        for name, parameter in oracle.named_parameters()
        if parameter.grad is not None
    }
    return float(loss.detach()), named
