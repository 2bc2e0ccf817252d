"""Right gradients pass, a wrong one is found, whatever is wrong about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eightgig.adapters.lora import split_masters
from eightgig.engine.gradients import Gradients
from eightgig.models.checkpoint import read_model_spec
from eightgig.training.selftest import (
    TOLERANCES,
    GradientCheck,
    _Probe,
    check_gradients,
    layer_kinds,
)
from eightgig.training.worker import Worker
from tests import engines, jobs, tiny

FAMILY = "gemma4_e2b"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("models"), {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = jobs.make_base(root / family / "model", family)
        return made[family]

    return base


def _check(base: Path, folder: Path, **lora: Any) -> tuple[GradientCheck, ...]:
    job = jobs.make_job(jobs.make_config(base, folder, lora=lora))
    assert job.engine.adapter is not None
    engines.randomize(job.engine.adapter)
    before = jobs.adapter_of(job)
    worker = Worker(job, say=lambda *_: None, between=lambda: None)
    rows = [job.rows.lengths.argsort()[:1], job.rows.lengths.argsort()[1:5]]
    checks = check_gradients(
        worker,
        job.spec.decoder,
        lambda schedule: [batch for part in rows for batch in schedule.pack(part)],
        step=1,
        deadline_seconds=math.inf,
    )
    assert torch.equal(jobs.adapter_of(job), before)
    worker.close()
    return checks


def _assert_right(checks: tuple[GradientCheck, ...]) -> None:
    assert not any(check.is_wrong for check in checks)
    assert all(abs(c.ratio - 1) < TOLERANCES["float32"] for c in checks if c.ratio is not None)
    assert sum(check.ratio is not None for check in checks) >= 0.9 * len(checks)


def test_right_gradients_pass_with_dropout(bases: Any, tmp_path: Path) -> None:
    checks = _check(bases(FAMILY), tmp_path, lora_dropout=0.2)
    _assert_right(checks)
    names = {check.name for check in checks}
    decoder = read_model_spec(bases(FAMILY)).decoder
    for layer in layer_kinds(decoder):
        assert f"layers.{layer}.mlp.down_proj.lora_A" in names
        assert f"layers.{layer}.self_attn.q_proj.lora_B" in names


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.TRAINABLE_FAMILIES)
def test_right_gradients_pass_in_every_family(bases: Any, tmp_path: Path, family: str) -> None:
    _assert_right(_check(bases(family), tmp_path))


def _too_large(views: Any) -> None:
    views["down"].a.mul_(1.1)


def _noisy(views: Any) -> None:
    grad = views["gate_up"].b["up_proj"]
    noise = torch.randn(grad.shape, generator=torch.Generator().manual_seed(1))
    grad.add_(noise * (0.3 * grad.norm() / noise.norm()))


def _of_other_rows(views: Any) -> None:
    grad = views["o"].b["o_proj"]
    grad.copy_(grad.roll(1, 0))


def _of_wrong_sign(views: Any) -> None:
    views["qkv"].b["q_proj"].neg_()


def _lost(views: Any) -> None:
    views["o"].a.zero_()


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (_too_large, "mlp.down_proj.lora_A"),
        (_noisy, "mlp.up_proj.lora_B"),
        (_of_other_rows, "self_attn.o_proj.lora_B"),
        (_of_wrong_sign, "self_attn.q_proj.lora_B"),
        (_lost, "self_attn.o_proj.lora_A"),
    ],
)
def test_a_wrong_gradient_of_one_tensor_is_found(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, name: str
) -> None:
    real = Gradients.wait
    (layer,) = layer_kinds(read_model_spec(bases("llama")).decoder)

    def spoiled(self: Gradients, index: int) -> torch.Tensor:
        run = real(self, index).clone()
        if index == layer:
            spoil(split_masters(run, self.layers[index]))
        return run

    monkeypatch.setattr(Gradients, "wait", spoiled)
    checks = _check(bases("llama"), tmp_path)
    wrong = [check.name for check in checks if check.is_wrong]
    assert wrong == [f"layers.{layer}.{name}"]


class _Bowl:
    """A model of one tensor, whose loss is `loss` of how far it was moved along `along`."""

    def __init__(self, master: torch.Tensor, along: torch.Tensor, loss: Any) -> None:
        self.plan = engines.make_plan(compute_dtype="bfloat16")
        self._master, self._along, self._loss = master, along, loss

    def adapter_has_changed(self) -> None:
        """Nothing is copied."""

    def batch_loss(self, step: int, batches: Any) -> float:
        return float(self._loss(float((self._master * self._along).sum())))


def _check_bowl(loss: Any, *, norm: float) -> GradientCheck:
    master, grad = torch.zeros(64), torch.zeros(64)
    grad[3] = norm
    worker: Any = _Bowl(master, grad / norm, loss)
    probe = _Probe(worker, None, (), 1)  # type: ignore[arg-type]
    return probe.check("layers.0.mlp.up_proj.lora_B", master, grad)


def test_a_loss_that_bends_is_no_wrong_gradient() -> None:
    norm = 0.14
    # Slopes of 0.66, 0.50 and 0.39 of |g| over the first three moves, as seen on a tiny model.
    check = _check_bowl(lambda moved: 5 + 0.05 * math.asinh(norm / 0.05 * moved), norm=norm)
    assert not check.is_wrong
    assert check.ratio is not None


def test_a_straight_loss_that_rises_otherwise_is_one() -> None:
    check = _check_bowl(lambda moved: 5 + 0.6 * 0.14 * moved, norm=0.14)
    assert check.is_wrong
    assert check.ratio == pytest.approx(0.6)


def test_there_is_one_layer_of_each_kind(bases: Any) -> None:
    decoder = read_model_spec(bases(FAMILY)).decoder
    kinds = layer_kinds(decoder)
    sources = {layer.kv_source for layer in decoder.layers} - {None}
    assert sources <= set(kinds)
    described = {
        (
            decoder.layers[layer].sliding_window,
            decoder.layers[layer].kv_source is None,
            decoder.layers[layer].intermediate_size,
            layer in sources,
        )
        for layer in range(decoder.num_layers)
    }
    assert len(kinds) == len(described)
    llama = read_model_spec(bases("llama")).decoder
    assert len(layer_kinds(llama)) == 1
