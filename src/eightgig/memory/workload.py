"""What a run asks for, before anything is decided: a model, an adapter, an optimizer step.

`estimate` turns a workload and a layout into bytes, `speed` into seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eightgig.config import Config
from eightgig.memory.layers import LayerSize, layer_sizes
from eightgig.models.spec import DecoderSpec, ModelSpec

ComputeDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLengths:
    """What is known of the rows.

    Attributes:
        longest_tokens: Longest row that must pass, held-out rows included.
        mean_tokens: Mean length of the training rows.
        num_rows: Training rows per epoch.
        loss_share: Share of tokens that carry loss, 0 to 1.
        step_tokens: Most tokens an optimizer step can have; None: as many rows as it has, each
            of the longest.
        step_loss_tokens: Most loss tokens an optimizer step can have; None: all of its tokens.
    """

    longest_tokens: int
    mean_tokens: float
    num_rows: int
    loss_share: float = 1.0
    step_tokens: int | None = None
    step_loss_tokens: int | None = None


def measure_rows(
    lengths: Sequence[int], loss_tokens: Sequence[int], rows_per_step: int
) -> RowLengths:
    """`RowLengths` of rows of `lengths` tokens, `loss_tokens` of which carry loss.

    The bounds of a step take its longest rows, so they hold for every order of the rows.

    Raises:
        ValueError: There are no rows.
    """
    if not len(lengths):
        raise ValueError("there are no rows to measure")
    total = int(sum(lengths))
    return RowLengths(
        longest_tokens=int(max(lengths)),
        mean_tokens=total / len(lengths),
        num_rows=len(lengths),
        loss_share=float(sum(loss_tokens)) / max(1, total),
        step_tokens=int(sum(sorted(lengths)[-rows_per_step:])),
        step_loss_tokens=int(sum(sorted(loss_tokens)[-rows_per_step:])),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A model, an adapter and an optimizer step.

    Attributes:
        decoder: The model.
        layers: Its kinds of layers.
        optim: As in the config.
        compute_dtype: In which layers compute.
        has_device: Whether they compute on a GPU; otherwise all is main memory.
        max_length: Longest row.
        row_tokens: Mean row.
        rows_per_step: Rows of an optimizer step.
        step_tokens, step_loss_tokens: Most that one optimizer step can have.
        loss_share: Mean share of tokens with loss.
        is_packed: Whether several rows share a micro-batch.
        has_dropout: Whether adapter inputs are dropped in training.
    """

    decoder: DecoderSpec
    layers: tuple[LayerSize, ...]
    optim: str
    compute_dtype: ComputeDtype
    has_device: bool
    max_length: int
    row_tokens: float
    rows_per_step: int
    step_tokens: int
    step_loss_tokens: int
    loss_share: float
    is_packed: bool
    has_dropout: bool

    @property
    def element_bytes(self) -> int:
        """Of the compute dtype."""
        return 4 if self.compute_dtype == "float32" else 2

    @property
    def stream_bytes(self) -> int:
        """Of an element of the residual stream: float16 layers add up in float32."""
        return 2 if self.compute_dtype == "bfloat16" else 4

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.decoder.num_layers

    @property
    def lora_elements(self) -> int:
        """Trainable parameters."""
        return sum(
            layer.count * group.lora_elements for layer in self.layers for group in layer.groups
        )

    @property
    def master_elements(self) -> int:
        """Trainable parameters, with ranks rounded up."""
        return sum(layer.count * layer.master_elements for layer in self.layers)

    @property
    def mean_step_tokens(self) -> float:
        """Tokens of an ordinary optimizer step."""
        return self.rows_per_step * self.row_tokens

    def most_rows(self, micro_batch_tokens: int) -> int:
        """Most rows that can share a micro-batch: all of a step, if they are short."""
        return min(self.rows_per_step, micro_batch_tokens) if self.is_packed else 1


def build_workload(
    spec: ModelSpec | DecoderSpec,
    config: Config,
    *,
    max_length: int,
    rows: RowLengths | None = None,
    compute_dtype: ComputeDtype = "bfloat16",
    has_device: bool = True,
) -> Workload:
    """The workload of training `spec` as `config` says, on rows of up to `max_length` tokens."""
    decoder = spec.decoder if isinstance(spec, ModelSpec) else spec
    train = config.train
    step_tokens = train.rows_per_step * max_length
    if rows is not None and rows.step_tokens is not None:
        step_tokens = max(max_length, min(step_tokens, rows.step_tokens))
    step_loss_tokens = step_tokens
    if rows is not None and rows.step_loss_tokens is not None:
        step_loss_tokens = max(1, min(step_tokens, rows.step_loss_tokens))
    return Workload(
        decoder=decoder,
        layers=layer_sizes(spec, config.lora, config.model.quantization),
        optim=train.optim,
        compute_dtype=compute_dtype,
        has_device=has_device,
        max_length=max_length,
        row_tokens=float(max_length) if rows is None else min(rows.mean_tokens, max_length),
        rows_per_step=train.rows_per_step,
        step_tokens=step_tokens,
        step_loss_tokens=step_loss_tokens,
        loss_share=1.0 if rows is None else rows.loss_share,
        is_packed=config.data.packing,
        has_dropout=config.lora.lora_dropout > 0,
    )
