"""Losses of 20 optimizer steps equal those of TRL's SFTTrainer in float32."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from eightgig.config import TrainConfig
from eightgig.engine.assemble import Engine
from eightgig.engine.gradients import Gradients
from eightgig.training.optimizer import HostAdamW
from eightgig.training.schedule import learning_rate
from eightgig.training.step import prepare_step, run_step
from tests import engines, tiny

# TRL 1.16 uses names that Transformers 5.2x deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STEPS = 20
ROWS_PER_STEP = 4
TRAIN = TrainConfig(
    max_steps=STEPS,
    gradient_accumulation_steps=ROWS_PER_STEP,
    learning_rate=2e-3,
    max_grad_norm=0.3,
    warmup_ratio=0.1,
)


class InOrder(SFTTrainer):
    """Rows in the order of the data set."""

    def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:  # type: ignore[type-arg]
        return torch.utils.data.SequentialSampler(self.train_dataset)


def _our_losses(engine: engines.Engine, rows: list[dict]) -> list[float]:  # type: ignore[type-arg]
    gradients = Gradients(engine.adapter.layers, device=engines.CPU, place=engines.CPU)
    whole = Engine(
        model=engine.model, adapter=engine.adapter, gradients=gradients, ops=None, choices=()
    )
    optimizer = HostAdamW(engine.adapter, gradients, TRAIN)
    losses = []
    for step in range(1, STEPS + 1):
        part = rows[(step - 1) * ROWS_PER_STEP : step * ROWS_PER_STEP]
        batches = [engines.pack(part[:1]), engines.pack(part[1:])]
        loss, norm = run_step(whole, prepare_step(whole, batches, step=step, seed=None))
        losses.append(loss)
        scale = min(1.0, TRAIN.max_grad_norm / (norm + 1e-6))
        optimizer.start_step(learning_rate(step, STEPS, TRAIN), scale)
        engine.model.ring.invalidate_changing()
    return losses


@pytest.mark.parametrize("family", ["gemma4_e2b", "gemma4_12b", "llama"])
def test_twenty_steps_have_the_losses_of_trl(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.make_model(family, tmp_path / "model")
    plan = engines.make_plan(micro_batches_per_visit=2, layer_slots=3)
    engine = engines.make_engine(folder, tmp_path / "stores", plan=plan)
    oracle = engines.make_oracle(family, folder, engine)
    # Left as it is, the Trainer averages the means of single rows on Gemma 4.
    monkeypatch.setattr(type(oracle.base_model.model), "accepts_loss_kwargs", True, raising=False)
    lengths = [5 + 7 * number % 23 for number in range(STEPS * ROWS_PER_STEP)]
    rows = engines.random_rows(engine.spec, lengths)
    dataset = Dataset.from_list(
        [
            {
                "input_ids": row["ids"].tolist(),
                "labels": [
                    int(token) if trained else -100
                    for token, trained in zip(row["ids"], row["is_trained"], strict=True)
                ],
            }
            for row in rows
        ]
    )
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ROWS_PER_STEP,
        learning_rate=TRAIN.learning_rate,
        lr_scheduler_type=TRAIN.lr_scheduler_type,
        warmup_steps=math.ceil(TRAIN.warmup_ratio * STEPS),
        max_grad_norm=TRAIN.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=None,
    )
    trainer = InOrder(
        model=oracle,
        args=arguments,
        train_dataset=dataset,
        processing_class=tiny.make_tokenizer(family),
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ours = _our_losses(engine, rows)
    assert len(theirs) == STEPS
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        assert mine == pytest.approx(other, abs=1e-4), step
