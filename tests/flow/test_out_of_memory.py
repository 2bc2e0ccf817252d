"""Running out of memory is a detour: same rows, same order, same adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eightgig.config import Config, DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from eightgig.engine.decoder import DecoderLayer
from eightgig.engine.head import StreamedHead
from eightgig.errors import DoesNotFitError
from eightgig.evaluation import loss as evaluation
from eightgig.finetune import finetune
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("gemma4_e2b", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(autouse=True)
def _random_weights_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eightgig.training.guards.judge_first_loss", lambda *_: None)


def _config(folder: Path, tmp_path: Path) -> Config:
    tmp_path.mkdir(exist_ok=True)
    data = tmp_path / "data.jsonl"
    texts = ["count " + " ".join(str(n) for n in range(a, a + 3 + a % 5)) for a in range(24)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Config(
        model=ModelConfig(name=str(folder), cache_dir=str(tmp_path / "stores")),
        data=DataConfig(path=str(data), held_out=4.0),
        lora=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1),
        train=TrainConfig(max_steps=4, gradient_accumulation_steps=5, learning_rate=5e-3),
        run=RunConfig(name="run", output_dir=str(tmp_path / "runs"), save_epochs=False),
    )


def _adapter(tmp_path: Path) -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "runs/run/adapter/adapter_model.safetensors")


def _fail(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, first_call: int, times: int
) -> None:
    """Let calls first_call, first_call + 1, ... (1-based) of a function run out of memory."""
    real = getattr(owner, name)
    calls = {"count": 0}

    def failing(*arguments: Any, **options: Any) -> Any:
        calls["count"] += 1
        if first_call <= calls["count"] < first_call + times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


@pytest.fixture(scope="module")
def untroubled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    tmp_path = tmp_path_factory.mktemp("untroubled")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("eightgig.training.guards.judge_first_loss", lambda *_: None)
        assert len(list(finetune(_config(folder, tmp_path)))) == 4
    return _adapter(tmp_path)


@pytest.mark.parametrize(
    ("owner", "name", "first_call"),
    [
        (DecoderLayer, "forward", 20),
        (StreamedHead, "cross_entropy", 3),
        (DecoderLayer, "backward", 3),
        (DecoderLayer, "backward", 18),
        (evaluation, "pack_rows", 2),
    ],
)
@pytest.mark.parametrize("times", [1, 3])
def test_a_run_ends_with_the_same_adapter(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    untroubled: dict[str, torch.Tensor],
    owner: Any,
    name: str,
    first_call: int,
    times: int,
) -> None:
    _fail(monkeypatch, owner, name, first_call=first_call, times=times)
    reports = list(finetune(_config(folder, tmp_path)))
    assert [report.step for report in reports] == [1, 2, 3, 4]
    events = (tmp_path / "runs/run/events.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in events]
    assert kinds.count("oom") == times
    found = _adapter(tmp_path)
    for tensor_name, tensor in untroubled.items():
        # Tiles and micro-batches cut anew change the order of float32 sums, nothing else.
        torch.testing.assert_close(found[tensor_name], tensor, rtol=1e-4, atol=1e-6)


def test_with_nothing_left_to_give_up_the_run_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail(monkeypatch, DecoderLayer, "backward", first_call=1, times=10_000)
    with pytest.raises(DoesNotFitError, match="Memory ran out in step 1"):
        list(finetune(_config(folder, tmp_path)))


def test_other_errors_are_not_taken_for_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(DecoderLayer, "backward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(finetune(replace(_config(folder, tmp_path))))
