"""The engine put together: model, adapter and gradients as a plan says."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from eightgig.adapters.lora import Adapter, adapter_groups, count_trainable, lora_scale
from eightgig.config import Choice, LoraConfig
from eightgig.engine.gradients import Gradients
from eightgig.engine.model import Model, device_of
from eightgig.memory.plan import Plan
from eightgig.models.count import count_parameters
from eightgig.models.spec import DecoderSpec, ModelSpec
from eightgig.ops.choose import Ops, choose_ops
from eightgig.quant.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """What trains and generates.

    Attributes:
        model: The streamed decoder.
        adapter: Its adapter, None for the base model alone.
        gradients: Where its gradients are summed, None without an adapter.
        ops: The operations.
        choices: Which versions of them run, and why.
    """

    model: Model
    adapter: Adapter | None
    gradients: Gradients | None
    ops: Ops
    choices: tuple[Choice, ...]

    def close(self) -> None:
        """Give the memory back."""
        self.model.close()

    def replanned(self, store: Store, plan: Plan) -> Engine:
        """The same adapter on a model laid out as `plan` says; this one must be closed before.

        Host memory is not taken twice: the weights stay where they are.
        """
        old = self.model
        model = Model(
            old.decoder, store, plan, self.ops, self.adapter, host_weights=old.host_weights
        )
        return replace(self, model=model)


def assemble(
    spec: ModelSpec, store: Store, plan: Plan, lora: LoraConfig | None, *, seed: int = 0
) -> Engine:
    """Build the engine of `plan`; the allocator is capped at the plan's budget.

    Args:
        spec: The base model.
        store: Its prepared weights.
        plan: What lies where.
        lora: The adapter, None for the base model alone.
        seed: Of the adapter's start.

    Raises:
        ModelError: `lora.target_modules` matches nothing, or the store is damaged.
        HardwareError: An operation cannot run on this device.
    """
    device, dtype = device_of(plan), getattr(torch, plan.compute_dtype)
    if device.type == "cuda":
        _cap_allocator(device, plan.budget_bytes)
    ops, choices = choose_ops(
        device=plan.device,
        dtype=dtype,
        kernels=plan.kernels,
        head_dims=sorted({layer.head_dim for layer in spec.decoder.layers}),
    )
    adapter = gradients = None
    if lora is not None:
        place = torch.device("cpu") if plan.optimizer_place == "host" else device
        adapter = Adapter(
            adapter_groups(spec.decoder, lora, spec.module_prefix),
            scale=lora_scale(lora),
            dropout=lora.lora_dropout,
            dtype=dtype,
            device=place,
            pin=device.type == "cuda" and place.type == "cpu",
        )
        adapter.initialize(torch.Generator().manual_seed(seed))
        gradients = Gradients(adapter.layers, device=device, place=place)
    model = Model(spec.decoder, store, plan, ops, adapter)
    return Engine(model=model, adapter=adapter, gradients=gradients, ops=ops, choices=choices)


def describe_trainable(engine: Engine, decoder: DecoderSpec) -> str:
    """The usual line: parameters trained, all parameters of the decoder, share."""
    trainable = count_trainable(engine.adapter.layers) if engine.adapter is not None else 0
    total = count_parameters(decoder) + trainable
    share = 100 * trainable / total
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"


def _cap_allocator(device: torch.device, budget_bytes: int) -> None:
    """Let the allocator fail at the budget, rather than spill where a driver would."""
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total_bytes), device)
    # What measuring the rates and preparing the store took is given back, and is no part of the
    # peak that the plan is compared with.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
