"""Running out of memory is a detour: same rows, same order, same masks, same adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eightgig.config import Config
from eightgig.engine.assemble import Engine
from eightgig.engine.decoder import DecoderLayer
from eightgig.engine.head import StreamedHead
from eightgig.errors import DoesNotFitError
from eightgig.evaluation import loss as evaluation
from eightgig.finetune import finetune
from eightgig.memory import ladder
from eightgig.memory.plan import Plan
from eightgig.models.checkpoint import read_model_spec
from eightgig.streaming.ring import Ring
from eightgig.training import loop, memory, worker
from eightgig.training.optimizer import EightBitAdamW
from tests import engines, jobs, tiny_run

FAMILY = "gemma4_e2b"
LAYERS = 7
# A micro-batch of several rows, several of them a visit, and tiles smaller than both.
PLAN = {
    "micro_batch_tokens": 40,
    "micro_batches_per_visit": 2,
    "max_length": 20,
    "mlp_tile_tokens": 32,
    "head_tile_tokens": 16,
}


@dataclass
class Fault:
    """Lets some calls of a function run out of memory."""

    owner: Any
    name: str
    first: int = 1
    times: int = 1
    when: Callable[..., bool] = lambda *_: True

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Returns the numbers of the calls that failed."""
        real, calls, failed = getattr(self.owner, self.name), [0], []

        def failing(*arguments: Any, **options: Any) -> Any:
            if self.when(*arguments):
                calls[0] += 1
                if self.first <= calls[0] < self.first + self.times:
                    failed.append(calls[0])
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return real(*arguments, **options)

        monkeypatch.setattr(self.owner, self.name, failing)
        return failed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = jobs.make_base(tmp_path_factory.mktemp("models") / "model", FAMILY)
    assert read_model_spec(base).decoder.num_layers == LAYERS
    return base


def _run(base: Path, folder: Path, **options: Any) -> tuple[Tensor, list[object], list[float]]:
    """Adapter, what was observed, and losses of a run with dropout."""
    settings = {"lora": {"lora_dropout": 0.1}, "max_steps": 3, "run": {"save_steps": 2}, **options}
    seen: list[object] = []
    config = jobs.make_config(base, folder, **settings)
    job = jobs.make_job(config, held_out=jobs.make_rows(4, seed=5), plan=PLAN, observe=seen.append)
    losses = [report.loss for report in jobs.finish(job, seen.append)]
    return jobs.adapter_of(job), seen, losses


@pytest.fixture(scope="module")
def untroubled(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        optim: _run(base, tmp_path_factory.mktemp(optim), optim=optim)
        for optim in ("adamw_torch", "adamw_8bit")
    }


@pytest.fixture
def only_residency(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ladder of one rung: layers no longer resident, which leaves every number as it was."""
    monkeypatch.setattr(memory, "next_rung", ladder._slots)


def _of_layer(index: int) -> Callable[..., bool]:
    return lambda layer, *_: layer.spec.index == index


_FAULTS = {
    "load, slots": Fault(Ring, "__init__"),
    "head": Fault(StreamedHead, "cross_entropy", first=3),
    "optimizer, first layers": Fault(torch.optim.AdamW, "step", first=1),
    "optimizer, last layers": Fault(torch.optim.AdamW, "step", first=2),
    "optimizer, second step": Fault(torch.optim.AdamW, "step", first=4),
    "evaluation, rows": Fault(evaluation, "pack_rows", first=2),
    "save": Fault(loop, "save_checkpoint"),
    **{
        f"{phase} of layer {n}": Fault(DecoderLayer, phase, call, when=_of_layer(n))
        for phase, call in (("forward", 2), ("backward", 3))
        for n in range(LAYERS)
    },
}
_OFTEN = {f"{phase} of layer {n}" for phase in ("forward", "backward") for n in (1, 2, 4, 5)}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in _OFTEN else ()) for name in _FAULTS],
)
@pytest.mark.usefixtures("only_residency")
def test_a_run_ends_with_the_same_adapter_bit_for_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untroubled: Any, name: str
) -> None:
    failed = _FAULTS[name].plant(monkeypatch)
    adapter, seen, losses = _run(base, tmp_path)
    assert len(failed) == 1
    (values,) = jobs.events(seen, "oom")
    assert (values["layer_slots"], values["before"]) == ("2", "4")
    assert losses == untroubled["adamw_torch"][2]
    assert torch.equal(adapter, untroubled["adamw_torch"][0])


@pytest.mark.parametrize("layer", [0, 3, 6])
@pytest.mark.usefixtures("only_residency")
def test_an_8_bit_optimizer_that_stops_half_way_goes_on_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untroubled: Any, layer: int
) -> None:
    moves: list[int] = []
    real = EightBitAdamW._move

    def counted(self: EightBitAdamW, index: int) -> None:
        real(self, index)
        moves.append(index)

    monkeypatch.setattr(EightBitAdamW, "_move", counted)
    fault = Fault(EightBitAdamW, "_move", 2, when=lambda _, index: index == layer)
    fault.plant(monkeypatch)
    adapter, seen, _ = _run(base, tmp_path, optim="adamw_8bit")
    assert len(jobs.events(seen, "oom")) == 1
    assert moves == [*range(LAYERS)] * 3
    assert torch.equal(adapter, untroubled["adamw_8bit"][0])


@pytest.mark.usefixtures("only_residency")
def test_memory_that_runs_out_while_moments_are_made(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untroubled: Any
) -> None:
    Fault(EightBitAdamW, "_make_moments").plant(monkeypatch)
    adapter, seen, _ = _run(base, tmp_path, optim="adamw_8bit")
    assert len(jobs.events(seen, "oom")) == 1
    assert torch.equal(adapter, untroubled["adamw_8bit"][0])


def _first_gradient(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, list[object]]:
    """The whole gradient of the first step, and what was observed."""
    found: list[Tensor] = []
    real = worker.run_step

    def kept(engine: Engine, *arguments: Any) -> Any:
        result = real(engine, *arguments)
        assert engine.gradients is not None
        found.append(engine.gradients.whole.clone())
        return result

    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_step", kept)
        seen = _run(base, folder, max_steps=1)[1]
    return found[0], seen


@pytest.fixture(scope="module")
def whole_gradient(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return _first_gradient(base, tmp_path_factory.mktemp("whole"), monkeypatch)[0]


@pytest.mark.parametrize(
    ("rung", "tolerance"),
    [("_slots", 0.0), ("_head", 1e-5), ("_visit", 1e-5), ("_mlp", 1e-5), ("_split", 1e-5)],
)
def test_each_rung_keeps_the_gradient(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rung: str,
    tolerance: float,
    whole_gradient: Tensor,
) -> None:
    monkeypatch.setattr(ladder, "_LEAST_HEAD_TOKENS", 4)
    monkeypatch.setattr(ladder, "_LEAST_MLP_TOKENS", 8)
    expected = whole_gradient
    monkeypatch.setattr(memory, "next_rung", getattr(ladder, rung))
    Fault(DecoderLayer, "backward", 2, when=_of_layer(3)).plant(monkeypatch)
    found, seen = _first_gradient(base, tmp_path / "lower", monkeypatch)
    assert len(jobs.events(seen, "oom")) == 1
    error = float((found - expected).norm() / expected.norm())
    assert error <= tolerance


def test_one_rung_after_the_other_until_it_fits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fault(DecoderLayer, "backward", 3, times=3).plant(monkeypatch)
    _, seen, losses = _run(base, tmp_path)
    assert len(losses) == 3
    assert [next(iter(set(values) & set(PLAN) | set(values) & {"layer_slots"}))
            for values in jobs.events(seen, "oom")] == [
        "layer_slots", "micro_batches_per_visit", "micro_batch_tokens"
    ]  # fmt: skip
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert (plan["layer_slots"], plan["micro_batches_per_visit"]) == (2, 1)
    assert plan["micro_batch_tokens"] == 20
    state = json.loads((tmp_path / "run/checkpoints/step-000003/state.json").read_text())
    assert state["rung"] == 3


def test_a_new_layout_takes_no_host_memory_for_weights(base: Path, tmp_path: Path) -> None:
    job = jobs.make_job(jobs.make_config(base, tmp_path), plan=PLAN)
    job.engine.close()
    lower = job.engine.replanned(job.store, replace(job.plan, layer_slots=2))
    pairs = zip(lower.model.host_weights, job.engine.model.host_weights, strict=True)
    assert all(new is old for new, old in pairs)
    lower.close()


def test_a_new_layout_may_itself_find_no_memory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fault(DecoderLayer, "forward", 3).plant(monkeypatch)
    Fault(Engine, "replanned").plant(monkeypatch)
    _, seen, losses = _run(base, tmp_path)
    assert len(losses) == 3
    assert len(jobs.events(seen, "oom")) == 2


def test_with_nothing_left_to_give_up_the_run_says_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fault(DecoderLayer, "backward", times=10_000).plant(monkeypatch)
    with pytest.raises(DoesNotFitError, match="Memory ran out in step 1") as caught:
        _run(base, tmp_path)
    assert "--resume" in caught.value.fix


def test_with_nothing_left_to_give_up_loading_says_so(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fault(Ring, "__init__", times=10_000).plant(monkeypatch)
    with pytest.raises(DoesNotFitError, match="Memory ran out while loading"):
        _run(base, tmp_path)


def test_a_save_without_memory_ends_no_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untroubled: Any
) -> None:
    monkeypatch.setattr(memory, "next_rung", lambda _: None)
    Fault(loop, "save_checkpoint").plant(monkeypatch)
    adapter, seen, _ = _run(base, tmp_path)
    assert "checkpoint.not_saved" in jobs.codes(seen)
    assert any("memory ran out" in values.get("failed", "") for values in jobs.events(seen, "save"))
    assert torch.equal(adapter, untroubled["adamw_torch"][0])


def test_the_systems_own_memory_counts_too(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = evaluation.pack_rows, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return real(*arguments, **options)

    monkeypatch.setattr(evaluation, "pack_rows", failing)
    _, seen, _ = _run(base, tmp_path)
    assert len(jobs.events(seen, "oom")) == 1


def test_other_errors_are_not_taken_for_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(DecoderLayer, "backward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        _run(base, tmp_path)


# The rung is kept


def _config_beside(folder: Path) -> Config:
    return jobs.make_config(folder / "base", folder / "runs")


def _written(folder: Path, plan: Plan, **changes: Any) -> Path:
    from eightgig.run import write_json

    path = folder / "plan.json"
    write_json(path, replace(plan, **changes))
    return path


def test_a_resumed_run_begins_on_the_rungs_it_had_reached(tmp_path: Path) -> None:
    planned = engines.make_plan(**{**PLAN, "layer_slots": 6})
    lower = planned
    for _ in range(2):
        found = ladder.next_rung(lower)
        assert found is not None
        lower = found[0]
    path = _written(tmp_path, lower)
    config = _config_beside(tmp_path)
    kept = ladder.keep_rungs(planned, config, path)
    assert kept == lower
    assert ladder.count_rungs(kept) == 2
    assert ladder.keep_rungs(planned, config, tmp_path / "nothing.json") == planned
    # What is planned lower now stays there.
    few = replace(planned, layer_slots=2, micro_batches_per_visit=1)
    assert ladder.keep_rungs(few, config, path).layer_slots == 2


def test_a_larger_card_is_not_held_to_a_smaller_ones_rungs(tmp_path: Path) -> None:
    planned = engines.make_plan(**PLAN)
    found = ladder.next_rung(planned)
    assert found is not None
    path = _written(tmp_path, found[0])
    larger = replace(planned, budget_bytes=2 * planned.budget_bytes)
    assert ladder.keep_rungs(larger, _config_beside(tmp_path), path) == larger


@pytest.mark.parametrize("text", ["", "[]", '{"budget_bytes": 1}', '{"choices": [{}]}'])
def test_a_damaged_plan_is_passed_over(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    planned = engines.make_plan(**PLAN)
    assert ladder.keep_rungs(planned, _config_beside(tmp_path), path) == planned


def test_the_whole_tool_goes_on_where_memory_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run.make_tame_model(FAMILY, tmp_path / "model")
    settings = ("train.max_steps=2", "memory.device=cpu")
    config = tiny_run.write_config(tmp_path, tiny_run.colour_rows(40), settings)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "next_rung", ladder._slots)
        Fault(DecoderLayer, "backward", 2).plant(patch)
        reports = finetune(config)
        assert next(reports).step == 1
        reports.close()
    seen: list[object] = []
    assert [report.step for report in finetune(config, resume=True, observe=seen.append)] == [1, 2]
    (plan,) = (item for item in seen if isinstance(item, Plan))
    assert plan.layer_slots == 2
    assert jobs.events(seen, "oom") == []
    kept: Mapping[str, Any] = json.loads((tmp_path / "runs/first/plan.json").read_text())
    assert kept["layer_slots"] == 2
    # A new run of the same work begins there, too; one of other work does not.
    for name, setting, is_kept in (
        ("second", "train.seed=7", True),
        ("third", "train.gradient_accumulation_steps=2", False),
        ("fourth", "memory.mlp_tile_tokens=512", False),
    ):
        other = tiny_run.write_config(
            tmp_path, tiny_run.colour_rows(40), (*settings, f"run.name={name}", setting)
        )
        seen.clear()
        reports = finetune(other, observe=seen.append)
        assert next(reports).step == 1
        reports.close()
        (plan,) = (item for item in seen if isinstance(item, Plan))
        assert (plan.layer_slots == 2) == is_kept, name
