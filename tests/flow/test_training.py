"""From a config and data to an adapter, through the library, on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from eightgig.adapters.files import read_adapter
from eightgig.config import Config, DataConfig, LoraConfig, ModelConfig, RunConfig, TrainConfig
from eightgig.data.select import TooLong
from eightgig.errors import ConfigError, DataError, DoesNotFitError, ModelError, RunError
from eightgig.finetune import finetune
from eightgig.models.checkpoint import read_model_spec
from eightgig.training import identity, resume, worker
from eightgig.training.step import PreparedStep, make_schedule, prepare_step, run_step
from tests import engines, jobs, tiny

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model("gemma4_e2b", tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(autouse=True)
def _random_weights_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model starts above ln(V), which a guard rightly stops."""
    monkeypatch.setattr("eightgig.training.guards.judge_first_loss", lambda *_: None)


def _config(folder: Path, tmp_path: Path, **run: Any) -> Config:
    tmp_path.mkdir(exist_ok=True)
    data = tmp_path / "data.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"add {a} and {b}"},
                {"role": "assistant", "content": str(a + b)},
            ]
        }
        for a in range(5)
        for b in range(5)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Config(
        model=ModelConfig(name=str(folder), cache_dir=str(tmp_path / "stores")),
        data=DataConfig(path=str(data), held_out=5.0),
        lora=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1),
        train=TrainConfig(max_steps=STEPS, gradient_accumulation_steps=4, learning_rate=5e-3),
        run=RunConfig(name="run", output_dir=str(tmp_path / "runs"), **run),
    )


def _finish(reports: Iterator[Any]) -> list[Any]:
    return list(reports)


def test_a_run_folder_holds_what_the_design_says(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path, save_steps=2, save_epochs=False)
    seen: list[object] = []
    reports = _finish(finetune(config, observe=seen.append))
    run = tmp_path / "runs" / "run"
    (left_out,) = (item for item in seen if str(item).startswith("Left out of "))
    assert "vision" in str(left_out)
    assert "audio" in str(left_out)
    assert [report.step for report in reports] == list(range(1, STEPS + 1))
    assert reports[-1].loss < reports[0].loss
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert list(metrics[0]) == [
        "step", "epoch", "loss", "grad_norm", "learning_rate", "loss_tokens", "tokens",
        "tokens_per_second", "vram_peak_bytes", "seconds",
    ]  # fmt: skip
    plan = json.loads((run / "plan.json").read_text())
    assert plan["fits"] is True
    assert plan["peak_bytes"] == sum(plan["breakdown"].values())
    for name in ("config.yaml", "environment.json", "log.txt", "events.jsonl"):
        assert (run / name).stat().st_size >= 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004",
        "step-000006",
    ]
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert kinds.count("save") == 3
    assert "eval" in kinds


def test_the_adapter_loads_in_peft_with_our_logits(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path)
    config = replace(config, model=replace(config.model, quantization="none"))
    _finish(finetune(config))
    adapter = tmp_path / "runs" / "run" / "adapter"
    names = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
    assert {"tokenizer.json", "chat_template.jinja"} <= names
    theirs = PeftModel.from_pretrained(tiny.load_reference("gemma4_e2b", folder), adapter)
    engine = engines.make_engine(
        folder, tmp_path / "stores", lora=replace(config.lora, lora_dropout=0.0)
    )
    engine.adapter.load(read_adapter(adapter, read_model_spec(folder)).tensors)
    engine.model.ring.invalidate_changing()
    rows = engines.random_rows(engine.spec, [19, 30])
    ours, expected = engines.engine_logits(engine, rows), engines.oracle_logits(theirs, rows)
    assert float((ours - expected).norm() / expected.norm()) <= 1e-4


def test_resuming_equals_not_stopping_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    whole = _config(folder, tmp_path / "whole", save_steps=2)
    _finish(finetune(whole))
    parts = _config(folder, tmp_path / "parts", save_steps=2)
    stopped = finetune(parts)
    for report in stopped:
        if report.step == 5:
            break
    stopped.close()
    reports = _finish(finetune(parts, resume=True))
    assert [report.step for report in reports] == [5, 6]
    expected = load_file(tmp_path / "whole/runs/run/adapter/adapter_model.safetensors")
    found = load_file(tmp_path / "parts/runs/run/adapter/adapter_model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    lines = (tmp_path / "parts/runs/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


def test_a_finished_run_that_is_resumed_does_no_step(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path)
    _finish(finetune(config))
    path = tmp_path / "runs/run/adapter/adapter_model.safetensors"
    before = path.read_bytes()
    assert _finish(finetune(config, resume=True)) == []
    assert path.read_bytes() == before


def test_a_run_folder_that_is_deleted_meanwhile_is_missed_once(
    folder: Path, tmp_path: Path
) -> None:
    config, seen = _config(folder, tmp_path, save_steps=2), list[Any]()
    run = tmp_path / "runs" / "run"
    for report in finetune(config, observe=seen.append):
        if report.step == 3:
            shutil.rmtree(run)
    found = [item for item in seen if getattr(item, "code", "") == "run.folder_lost"]
    assert [item.severity for item in found] == ["warning"]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert "same command with --resume" in found[0].fix
    assert _finish(finetune(config, resume=True)) == []
    assert (run / "config.yaml").is_file()


def test_an_existing_run_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path)
    _finish(finetune(config))
    with pytest.raises(RunError, match="exists already"):
        _finish(finetune(config))


def test_a_changed_setting_is_refused_on_resume(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path, save_steps=2)
    _finish(finetune(config))
    changed = replace(config, train=replace(config.train, learning_rate=1e-3))
    with pytest.raises(RunError, match=r"train\.learning_rate"):
        _finish(finetune(changed, resume=True))


def test_other_versions_are_refused_by_name_and_can_be_allowed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(folder, tmp_path, save_steps=2)
    reports = finetune(config)
    for report in reports:
        if report.step == 3:
            break
    reports.close()
    real = identity.library_versions
    changed = {"torch": "9.9.9", "bitsandbytes": "not installed"}
    monkeypatch.setattr(identity, "library_versions", lambda: {**real(), **changed})
    with pytest.raises(RunError) as caught:
        _finish(finetune(config, resume=True))
    assert caught.value.exit_code == 2
    assert f"torch: {real()['torch']} -> 9.9.9" in caught.value.message
    assert "bitsandbytes" in caught.value.message
    assert "--allow-changed-versions" in caught.value.fix
    seen: list[Any] = []
    reports = finetune(config, resume=True, allow_changed_versions=True, observe=seen.append)
    assert [report.step for report in reports] == [3, 4, 5, 6]
    found = [(item.code, item.severity) for item in seen if hasattr(item, "severity")]
    assert found == [("resume.version", "warning")] * 2
    # From here on the run is one of these versions.
    assert _finish(finetune(config, resume=True)) == []


def test_another_number_of_threads_is_said_on_resume(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(folder, tmp_path, save_steps=2)
    threads = torch.get_num_threads()
    reports = finetune(config)
    assert [next(reports).step for _ in range(3)] == [1, 2, 3]
    reports.close()
    monkeypatch.setattr(resume.torch, "get_num_threads", lambda: threads + 1)
    seen: list[Any] = []
    reports = finetune(config, resume=True, observe=seen.append)
    assert [report.step for report in reports] == [3, 4, 5, 6]
    (found,) = (item for item in seen if getattr(item, "code", "") == "resume.threads")
    assert found.severity == "warning"
    assert f"OMP_NUM_THREADS={threads} " in found.fix


def test_allowed_versions_allow_nothing_else(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path, save_steps=2)
    reports = finetune(config)
    assert [next(reports).step for _ in range(3)] == [1, 2, 3]
    reports.close()
    changed = replace(config, train=replace(config.train, learning_rate=1e-3))
    with pytest.raises(RunError, match=r"train\.learning_rate"):
        _finish(finetune(changed, resume=True, allow_changed_versions=True))


def test_a_missing_model_leaves_no_run_folder(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path)
    config = replace(config, model=replace(config.model, name=str(tmp_path / "nothing")))
    with pytest.raises(ModelError):
        _finish(finetune(config))
    assert not (tmp_path / "runs").exists()


def test_what_the_store_refuses_leaves_no_run_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(folder, tmp_path)
    with pytest.raises(ConfigError, match="delete_download"):
        _finish(finetune(replace(config, model=replace(config.model, delete_download=True))))
    full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(total=1 << 40, used=0, free=9_000))
    for place in ("eightgig.quant.build.shutil", "eightgig.hardware.probe.shutil"):
        monkeypatch.setattr(place, full)
        with pytest.raises(DoesNotFitError, match="of disk") as caught:
            _finish(finetune(config))
        assert "model.cache_dir" in caught.value.fix
    assert not (tmp_path / "runs").exists()
    assert not list((tmp_path / "stores").glob("*-nf4-*"))


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_rows_that_are_all_too_long_leave_nothing_to_train(
    folder: Path, tmp_path: Path, too_long: TooLong
) -> None:
    config = _config(folder, tmp_path)
    config = replace(config, data=replace(config.data, max_length=2, too_long=too_long))
    with pytest.raises(DataError, match="No row is left to train on") as caught:
        _finish(finetune(config))
    assert "data.max_length" in caught.value.fix
    assert not (tmp_path / "runs" / "run").exists()


def test_a_report_that_cannot_be_written_leaves_no_run_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match="tensorboard is not installed"):
        _finish(finetune(_config(folder, tmp_path, report_to="tensorboard")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "name", ["lock", "log.txt", "environment.json", "data.json", "metrics.jsonl", "events.jsonl"]
)
def test_what_a_run_cannot_begin_without_is_said_to_be_unwritable(
    folder: Path, tmp_path: Path, name: str
) -> None:
    config = _config(folder, tmp_path)
    (tmp_path / "runs" / "run" / name).mkdir(parents=True)
    with pytest.raises(RunError, match="run cannot be written: Is a directory"):
        next(finetune(config, resume=True))


def test_no_room_for_temporary_files_costs_a_resume_and_no_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(folder, tmp_path)
    reports = finetune(config)
    for _ in range(STEPS):
        next(reports)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
        patch.setattr(
            "eightgig.disk.Disk.free_bytes", lambda _, path: 1000 if path == tmp_path else 1 << 40
        )
        with pytest.raises(RunError, match=r"The tokenizer needs .* 1000 B are free") as caught:
            next(reports)
    assert "--resume" in caught.value.fix
    assert list(finetune(config, resume=True)) == []
    assert (tmp_path / "runs" / "run" / "adapter" / "tokenizer.json").is_file()


def test_a_step_that_is_not_finite_leaves_the_adapter_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(folder, tmp_path)
    real_step = worker.run_step

    def broken_at_3(engine: Any, prepared: Any, between: Any) -> tuple[float, float]:
        loss, norm = real_step(engine, prepared, between)
        return (float("nan"), norm) if prepared.step == 3 else (loss, norm)

    monkeypatch.setattr(worker, "run_step", broken_at_3)
    seen: list[Any] = []
    reports = _finish(finetune(config, observe=seen.append))
    assert len(reports) == STEPS
    codes = [item.code for item in seen if hasattr(item, "code")]
    assert codes == ["guard.non_finite"]
    adapter = load_file(tmp_path / "runs/run/adapter/adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizers_train_and_resume(folder: Path, tmp_path: Path, optim: str) -> None:
    results = []
    for name in ("whole", "parts"):
        config = _config(folder, tmp_path / name, save_steps=2)
        config = replace(config, train=replace(config.train, optim=optim))
        reports = finetune(config)
        if name == "parts":
            for report in reports:
                if report.step == 3:
                    break
            reports.close()
            reports = finetune(config, resume=True)
        _finish(reports)
        results.append(load_file(tmp_path / name / "runs/run/adapter/adapter_model.safetensors"))
    whole, parts = results
    for tensor_name, tensor in whole.items():
        assert torch.equal(parts[tensor_name], tensor), tensor_name


def test_float16_keeps_the_gradients_of_steps_with_many_loss_tokens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the mean over so many tokens each is smaller than the least number of float16.
    monkeypatch.setattr(PreparedStep, "loss_tokens", 1 << 24)
    gradients, norms = {}, {}
    for dtype in ("float32", "float16"):
        config = jobs.make_config(folder, tmp_path / dtype)
        job = jobs.make_job(config, plan={"compute_dtype": dtype})
        schedule = make_schedule(config, job.rows, job.plan.micro_batch_tokens)
        prepared = prepare_step(job.engine, schedule.batches(1), step=1, seed=None)
        norms[dtype] = run_step(job.engine, prepared)[1]
        assert job.engine.gradients is not None
        gradients[dtype] = job.engine.gradients.whole.clone()
        job.engine.close()
    expected = gradients["float32"]
    assert torch.dist(gradients["float16"], expected) < 0.01 * torch.linalg.vector_norm(expected)
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.01)
