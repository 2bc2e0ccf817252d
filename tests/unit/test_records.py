"""The records that cross module borders are read back from one sample each."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from eightgig.config import Config
from eightgig.data.batches import IGNORE_INDEX, Batch, Dataset
from eightgig.errors import Finding
from eightgig.hardware.probe import Hardware
from eightgig.memory.plan import Plan
from eightgig.models.spec import ModelSpec
from eightgig.quant.manifest import Manifest
from eightgig.run import Event, Run, from_json, to_json
from eightgig.training.checkpoint import CheckpointManifest, TrainingState
from eightgig.training.step import StepReport

SAMPLES = Path(__file__).parents[1] / "data" / "records"
RECORDS = [
    Config, Hardware, ModelSpec, Plan, StepReport, Finding, Run, Event, Manifest,
    CheckpointManifest, TrainingState,
]  # fmt: skip


def _sample(kind: type) -> dict:
    return json.loads((SAMPLES / f"{kind.__name__}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_a_sample_reads_back_as_written(kind: type) -> None:
    sample = _sample(kind)
    record = from_json(kind, sample)
    assert isinstance(record, kind)
    assert to_json(record) == sample


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_records_are_frozen(kind: type) -> None:
    record = from_json(kind, _sample(kind))
    name = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, name, None)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown field 'speed'"):
        from_json(StepReport, {**_sample(StepReport), "speed": 1.0})


def test_a_missing_field_is_refused() -> None:
    sample = _sample(StepReport)
    del sample["loss"]
    with pytest.raises(ValueError, match="missing field 'loss'"):
        from_json(StepReport, sample)


def test_a_wrong_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"StepReport\.step: expected int, found True"):
        from_json(StepReport, {**_sample(StepReport), "step": True})


def _arrays(kind: type) -> dict:
    wide = {"offsets", "row_ids"}
    return {
        name: np.array(value, np.int64 if name in wide else np.int32)
        if isinstance(value, list)
        else value
        for name, value in _sample(kind).items()
    }


def test_a_dataset_knows_its_rows() -> None:
    dataset = Dataset(**_arrays(Dataset))
    assert dataset.num_rows == 2
    assert dataset.lengths.tolist() == [3, 2]


def test_a_batch_knows_its_tokens() -> None:
    batch = Batch(**_arrays(Batch))
    assert batch.num_tokens == 5
    assert batch.num_loss_tokens == 2
    assert batch.max_length == 3
    assert batch.labels[2] == IGNORE_INDEX
