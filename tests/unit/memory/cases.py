"""Specs, machines and configs that the planner's tests share."""

from __future__ import annotations

import dataclasses
from typing import Any

from eightgig.config import (
    Config,
    DataConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from eightgig.hardware.cards import hardware_from_card
from eightgig.hardware.probe import Hardware, Rates
from eightgig.memory.workload import Workload, build_workload
from eightgig.models.known import known_model_spec
from eightgig.models.spec import DecoderSpec, LayerSpec, ModelSpec, RopeSpec
from eightgig.units import GIB

SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")
GEMMA = "google/gemma-4-{}-it"


def gemma(size: str) -> ModelSpec:
    """One of the five sizes."""
    spec = known_model_spec(GEMMA.format(size))
    assert spec is not None
    return spec


def small_decoder(num_layers: int = 4, **changes: Any) -> DecoderSpec:
    """A decoder of the Llama kind whose numbers can be worked out by hand."""
    rope = RopeSpec(theta=10_000.0, parameters={})
    layers = tuple(
        LayerSpec(
            index=index,
            sliding_window=None,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            intermediate_size=1024,
            rope=rope,
        )
        for index in range(num_layers)
    )
    decoder = DecoderSpec(
        hidden_size=512,
        vocab_size=32_000,
        layers=layers,
        rms_norm_eps=1e-6,
        activation="silu",
        attention_scale=0.125,
        tie_word_embeddings=False,
        max_positions=8192,
    )
    return dataclasses.replace(decoder, **changes)


def config(
    *,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
) -> Config:
    """A config with some settings changed, by group."""
    return Config(
        model=ModelConfig(**{"name": "model", **(model or {})}),
        data=DataConfig(**{"path": "rows.jsonl", **(data or {})}),
        lora=LoraConfig(**(lora or {})),
        train=TrainConfig(**(train or {})),
        memory=MemoryConfig(**(memory or {})),
        run=RunConfig(**(run or {})),
    )


def workload(spec: ModelSpec | DecoderSpec, *, max_length: int = 1024, **groups: Any) -> Workload:
    """The workload of `config(**groups)`."""
    return build_workload(spec, config(**groups), max_length=max_length)


def card(name: str = "RTX 4060", **changes: Any) -> Hardware:
    """A machine with a card of the table."""
    return dataclasses.replace(hardware_from_card(name), **changes)


def processor(**changes: Any) -> Hardware:
    """A machine without a GPU."""
    machine = Hardware(
        device="cpu",
        name="a processor",
        compute_capability=None,
        has_bf16=False,
        vram_total_bytes=0,
        vram_free_bytes=0,
        context_bytes=0,
        display_bytes=0,
        host_total_bytes=16 * GIB,
        host_free_bytes=12 * GIB,
        pin_limit_bytes=0,
        disk_free_bytes=100 * GIB,
        cpu_threads=8,
        rates=None,
    )
    return dataclasses.replace(machine, **changes)


def rates(**changes: Any) -> Rates:
    """Round numbers."""
    made = Rates(
        gemm_flops_per_second=20e12,
        memory_bytes_per_second=200e9,
        host_to_device_bytes_per_second=10e9,
        device_to_host_bytes_per_second=10e9,
        both_ways_bytes_per_second=10e9,
        copy_engines=1,
        is_measured=True,
    )
    return dataclasses.replace(made, **changes)
