"""The settings: one frozen dataclass per group, one sentence per setting.

Names are those of TRL/Transformers and PEFT where a setting is theirs. `auto` means that the
planner decides and says why; a number binds it. The sentence beneath a field is its help
everywhere: on the command line, in the example file and in the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

Auto = Literal["auto"]
AUTO: Auto = "auto"

DEMO_MODEL = "demo"

SIZE = "size"
"""Marks settings that are bytes inside and may be written `8GiB`."""
Size = Annotated[int, SIZE]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One decision that eightgig took: what, why, and the best alternative not taken."""

    name: str
    value: str
    reason: str
    rejected: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which base model, and where its prepared form is kept."""

    name: str
    """Hub id (google/gemma-4-12B-it) or folder of the base model; `demo` is the embedded one."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    quantization: Literal["nf4", "none"] = "nf4"
    """How frozen weights are kept: 4-bit NF4 with double quantisation, or as in the checkpoint."""
    cache_dir: str | Auto = AUTO
    """Folder for prepared weights; auto is ~/.cache/eightgig (or XDG_CACHE_HOME)."""
    delete_download: bool = False
    """Prepare a hub checkpoint shard by shard and delete each downloaded shard afterwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which rows are trained on, and how they become tokens."""

    path: str | tuple[str, ...]
    """File, list of files, glob, or `datasets` name (owner/name:subset) with the training rows."""
    split: str = "train"
    """Split of a `datasets` name."""
    format: Literal["auto", "messages", "prompt_completion", "sharegpt", "alpaca", "text"] = "auto"
    """Shape of the rows; auto detects it and says so."""
    columns: Mapping[str, str] | None = None
    """Names of your columns where they differ: expected name -> your name."""
    chat_template: str | None = None
    """Template file, or model whose template is used, where the base model has none."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which tokens carry loss: every assistant turn, the last one, or all tokens."""
    max_length: int | Auto = AUTO
    """Longest row in tokens; auto takes the longest row that fits the memory budget."""
    too_long: Literal["refuse", "drop", "truncate"] = "refuse"
    """What happens to rows longer than max_length; nothing is cut silently."""
    packing: bool = True
    """Put several rows into one micro-batch without padding and without leakage."""
    held_out: float = 0.05
    """Rows kept for evaluation: a share below 1 or a number of rows; 0 keeps none."""
    held_out_path: str | None = None
    """File with rows for evaluation, instead of a split."""
    group_column: str | None = None
    """Column whose equal values stay on one side of the split (a conversation id, for example)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """The adapter; names as in PEFT."""

    r: int = 16
    """Rank of the update matrices."""
    lora_alpha: int = 32
    """Scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of adapter inputs dropped in training."""
    target_modules: str | tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linear names, or one regular expression over the decoder's module paths."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    init_adapter: str | None = None
    """Folder of a PEFT adapter to go on from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The optimisation; names as in TRL and Transformers."""

    num_train_epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int = -1
    """Optimizer steps in all; overrides num_train_epochs when positive."""
    per_device_train_batch_size: int = 1
    """Rows per forward and backward before packing; times accumulation = rows per step."""
    gradient_accumulation_steps: int = 8
    """Batches of per_device_train_batch_size rows per optimizer step."""
    learning_rate: float = 2e-4
    """Highest learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the learning rate rises."""
    warmup_steps: int = 0
    """Steps of warm-up, instead of warmup_ratio; 0 leaves it to warmup_ratio."""
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch"
    """AdamW in float32 on the host, or bitsandbytes' 8-bit AdamW on the GPU (paged or not)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 switches clipping off."""
    seed: int = 42
    """Seed of the row order, the split, the adapter's start and dropout."""
    trial: bool | Auto = AUTO
    """Try up to 100 rows before the run; auto does so for runs predicted above 10 minutes."""
    early_stopping_patience: int = 0
    """Evaluations without a better held-out loss before stopping; 0 never stops."""

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, however they are packed."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """Budgets, and what is spent on what."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute; auto takes the GPU if there is one."""
    budget: Size | Auto = AUTO
    """Bytes the CUDA allocator may reserve (8GiB, 6750MiB); auto measures the card."""
    host_budget: Size | Auto = AUTO
    """Bytes of host memory for weights, checkpoints and optimizer; auto measures."""
    layer_slots: int | Auto = AUTO
    """Decoder layers (and head chunks) held on the GPU at a time; all of them = resident."""
    micro_batch_tokens: int | Auto = AUTO
    """Tokens of packed rows per forward and backward."""
    micro_batches_per_visit: int | Auto = AUTO
    """Micro-batches that share one visit of a layer's weights."""
    mlp_tile_tokens: int | Auto = AUTO
    """Tokens per tile of the MLP, whose intermediate is the largest activation."""
    checkpoints: Literal["auto", "device", "host"] = AUTO
    """Where layer inputs wait for the backward pass."""
    offload: tuple[str, ...] | Auto = AUTO
    """Outputs kept in host memory instead of recomputed: down_proj, o_proj, attention, ..."""
    host_weights: Literal["auto", "pinned", "mapped"] = AUTO
    """Prepared layers in pinned host memory, or mapped from disk."""
    kernels: Literal["auto", "triton", "plain"] = AUTO
    """Fused kernels, or plain PyTorch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where the run is written and how often."""

    name: str = "run"
    """Name of the run's folder."""
    output_dir: str = "runs"
    """Folder that holds the runs."""
    save_steps: int = 0
    """Checkpoint every so many optimizer steps; 0 does not."""
    save_minutes: float = 10.0
    """Checkpoint when this much time has passed since the last; 0 does not."""
    save_epochs: bool = True
    """Checkpoint at the end of each epoch."""
    save_total_limit: int = 3
    """Checkpoints kept; the newest stay."""
    eval_steps: int | Auto = AUTO
    """Held-out loss every so many steps; auto is ten times a run, 0 only at the end."""
    pause_above_celsius: int = 0
    """Wait while the GPU is hotter than this; 0 never waits."""
    report_to: Literal["none", "tensorboard"] = "none"
    """Write TensorBoard files beside metrics.jsonl."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a run."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    run: RunConfig = RunConfig()
