"""Failures that fall silently elsewhere, each planted and each found: by check, trial or guard.

The numbers are those of the list in docs/reliability.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eightgig.adapters.lora import Adapter
from eightgig.config import DataConfig
from eightgig.data.batches import IGNORE_INDEX
from eightgig.data.checks import check_data
from eightgig.data.load import load_dataset
from eightgig.engine import embedding
from eightgig.engine.decoder import DecoderLayer
from eightgig.engine.head import HeadResult, StreamedHead
from eightgig.engine.model import Model
from eightgig.errors import ExportError, ModelError, RunError, TrainingStopped
from eightgig.export import export as export_page
from eightgig.export.export import ExportOptions, export_run
from eightgig.models.checkpoint import read_model_spec
from eightgig.training import load, trial, worker
from eightgig.training.optimizer import HostAdamW
from tests import jobs, tiny
from tests.chats import make_chat_tokenizer
from tests.runs import train_tiny
from tests.unit.data.rows import chat_row, write_lines

FAMILY = "llama"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_base(tmp_path_factory.mktemp("models") / "model", FAMILY)


@pytest.fixture(autouse=True)
def _long_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a trial do all its steps on a busy machine, too, and check one gradient of each kind."""
    monkeypatch.setattr(trial, "MIN_SECONDS", 60.0)
    monkeypatch.setattr(trial, "_CHECKS_RATIO", 0.0)


def _stopped_by(base: Path, folder: Path, *, rows: Any = None, **options: Any) -> str:
    """Code of what stops a training of a few steps."""
    layout = options.pop("plan", None)
    with pytest.raises(TrainingStopped) as caught:
        jobs.finish(
            jobs.make_job(jobs.make_config(base, folder, **options), rows=rows, plan=layout)
        )
    assert caught.value.exit_code == 3
    (finding,) = caught.value.findings
    assert all((finding.message, finding.why, finding.fix))
    return finding.code


def _data_codes(folder: Path, lines: Sequence[Any], tokenizer: Any, **settings: Any) -> set[str]:
    """Codes of what `eightgig check` says."""
    path = write_lines(folder / "rows.jsonl", list(lines))
    report = check_data(DataConfig(path=str(path), **settings), tokenizer, workers=0)
    return {found.code for found in report.findings}


# In the data


def test_01_a_doubled_beginning_token(tmp_path: Path) -> None:
    source = "{{ bos_token }}" + make_chat_tokenizer("llama3").chat_template
    tokenizer = make_chat_tokenizer("llama3", source)
    assert "data.double_bos" in _data_codes(tmp_path, [chat_row(1)], tokenizer)


def test_02_a_missing_end_token(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = make_chat_tokenizer("llama3", source)
    assert "data.no_end_of_turn" in _data_codes(tmp_path, [chat_row(1)], tokenizer)


def test_03_loss_on_prompts(tmp_path: Path) -> None:
    tokenizer = make_chat_tokenizer("llama3")
    rows = [chat_row(number) for number in range(20)]
    assert "data.prompts_trained" in _data_codes(tmp_path, rows, tokenizer, train_on="all")


def test_04_the_template_of_another_model(tmp_path: Path) -> None:
    other = make_chat_tokenizer("smollm2").chat_template
    tokenizer = make_chat_tokenizer("llama3", other)
    assert "data.no_end_of_turn" in _data_codes(tmp_path, [chat_row(1)], tokenizer)


def test_15_an_answer_that_is_cut_off(tmp_path: Path) -> None:
    tokenizer = make_chat_tokenizer("llama3")
    rows = [chat_row(1), chat_row(2, turns=200)]
    found = _data_codes(tmp_path, rows, tokenizer, max_length=3_000, too_long="truncate")
    assert "data.answer_cut" in found


def test_17_control_tokens_in_a_text(tmp_path: Path) -> None:
    row = chat_row(1)
    row["messages"][0]["content"] += "<|eot_id|>"
    tokenizer = make_chat_tokenizer("llama3")
    assert "data.control_token" in _data_codes(tmp_path, [row], tokenizer)


def test_18_held_out_rows_that_are_trained_on(tmp_path: Path) -> None:
    held_out = write_lines(tmp_path / "held.jsonl", [chat_row(2)])
    rows = [chat_row(number) for number in range(5)]
    tokenizer = make_chat_tokenizer("llama3")
    assert "data.leak" in _data_codes(tmp_path, rows, tokenizer, held_out_path=str(held_out))


# In the numbers


def test_05_a_step_that_weighs_micro_batches_instead_of_tokens(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Model.gradients

    def mean_of_means(self: Any, inputs: Any, loss_tokens: int, gradients: Any) -> Any:
        own = sum(len(each.label_index) for each in inputs)
        return real(self, inputs, 2 * own, gradients)

    monkeypatch.setattr(Model, "gradients", mean_of_means)
    assert _stopped_by(base, tmp_path, trial=True) == "trial.gradient"


def test_06_an_adapter_in_bfloat16_that_does_not_move(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Adapter.refresh

    def rounded(self: Adapter, layer: int) -> None:
        self.masters[layer].copy_(self.masters[layer].bfloat16())
        real(self, layer)

    monkeypatch.setattr(Adapter, "refresh", rounded)
    assert _stopped_by(base, tmp_path, trial=True, learning_rate=2e-5) == "trial.frozen"


def test_07_other_dropout_masks_in_the_recomputation(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DecoderLayer.backward

    def masked_anew(self: Any, weights: Any, hidden: Any, grad: Any, batch: Any, *rest: Any) -> Any:
        keys = batch.row_keys
        batch.row_keys = keys + 1
        try:
            return real(self, weights, hidden, grad, batch, *rest)
        finally:
            batch.row_keys = keys

    monkeypatch.setattr(DecoderLayer, "backward", masked_anew)
    lora = {"lora_dropout": 0.2}
    assert _stopped_by(base, tmp_path, trial=True, lora=lora) == "trial.gradient"


def test_08_moments_in_bfloat16(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow(HostAdamW):
        def state_tensors(self) -> dict[str, torch.Tensor]:
            return {name: value.bfloat16() for name, value in super().state_tensors().items()}

    monkeypatch.setattr(load, "make_optimizer", Narrow)
    assert _stopped_by(base, tmp_path, trial=True) == "trial.dtype"


@pytest.mark.parametrize("trial_first", [False, True])
def test_09_a_loss_that_is_no_number(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trial_first: bool
) -> None:
    real = worker.run_step

    def broken(engine: Any, prepared: Any, between: Any) -> tuple[float, float]:
        loss, norm = real(engine, prepared, between)
        return (float("nan") if prepared.step >= 2 else loss), norm

    monkeypatch.setattr(worker, "run_step", broken)
    found = "trial.non_finite" if trial_first else "guard.non_finite"
    assert _stopped_by(base, tmp_path, trial=trial_first) == found


def test_10_activations_beyond_what_float16_holds(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DecoderLayer.forward

    def narrow(self: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        out = real(self, *arguments, **options)
        return (out * 1e6).half().float() if self.spec.index == 1 else out

    monkeypatch.setattr(DecoderLayer, "forward", narrow)
    assert _stopped_by(base, tmp_path, trial=True) == "trial.non_finite"


def test_11_a_learning_rate_too_low_to_move_anything(base: Path, tmp_path: Path) -> None:
    assert _stopped_by(base, tmp_path, trial=True, learning_rate=1e-10) == "trial.frozen"


def test_12_a_loss_without_a_gradient(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StreamedHead.cross_entropy

    def lost(self: Any, *arguments: Any, **options: Any) -> HeadResult:
        result = real(self, *arguments, **options)
        return HeadResult(result.losses, None if result.grad is None else 0 * result.grad)

    monkeypatch.setattr(StreamedHead, "cross_entropy", lost)
    assert _stopped_by(base, tmp_path) == "guard.zero_gradient"


def test_13_shared_keys_and_values_whose_gradients_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = jobs.make_base(tmp_path / "model", "gemma4_e2b")

    def lost(self: Any, batch: Any, grad_k: Any, grad_v: Any) -> Any:
        return (None, None) if self.spec.kv_source is not None else (grad_k, grad_v)

    monkeypatch.setattr(DecoderLayer, "_share_kv_grads", lost)
    assert _stopped_by(shared, tmp_path / "runs", trial=True) == "trial.gradient"


def test_14_rows_without_any_label(base: Path, tmp_path: Path) -> None:
    rows = jobs.make_rows(30)
    masked = replace(rows, labels=np.full_like(rows.labels, IGNORE_INDEX))
    assert _stopped_by(base, tmp_path, rows=masked) == "guard.zero_loss"


def test_16_rows_of_a_micro_batch_that_see_each_other(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = embedding.Embedding.to_device

    def joined(self: Any, inputs: Any) -> Any:
        ends = inputs.batch.cu_seqlens[[0, -1]]
        return real(self, replace(inputs, batch=replace(inputs.batch, cu_seqlens=ends)))

    monkeypatch.setattr(embedding.Embedding, "to_device", joined)
    assert _stopped_by(base, tmp_path, trial=True) == "trial.packing"


def test_19_an_optimizer_that_is_not_restored(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostAdamW, "load_state_tensors", lambda *_: None)
    assert _stopped_by(base, tmp_path, trial=True) == "trial.resume"


# In the model


def test_20_weights_that_are_missing(base: Path, tmp_path: Path) -> None:
    folder = tiny.make_model("llama", tmp_path / "model")
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of .* model\.layers\.1\.mlp\.up_proj\.weight"):
        read_model_spec(folder)


def test_20_weights_that_are_random(tmp_path: Path) -> None:
    wild = tiny.make_model(FAMILY, tmp_path / "model")
    assert _stopped_by(wild, tmp_path / "runs", max_steps=10) == "guard.first_loss"


def test_21_merged_weights_that_are_not_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unscaled(export_page.TunedWeights):  # type: ignore[misc, name-defined]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self._scale *= -3

    run = train_tiny(tmp_path)
    monkeypatch.setattr(export_page, "TunedWeights", Unscaled)
    with pytest.raises(ExportError, match="does not hold the base weights"):
        export_run(run.folder, ExportOptions(kind="merged"))


def test_22_a_tokenizer_that_changed_since(base: Path, tmp_path: Path) -> None:
    tokenizer = make_chat_tokenizer("llama3")
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(number) for number in range(9)])
    data = DataConfig(path=str(path), held_out=0)
    fingerprints = [load_dataset(data, tokenizer).train.fingerprint]
    tokenizer.add_tokens([chat_row(1)["messages"][1]["content"].split()[0]])
    fingerprints.append(load_dataset(data, tokenizer).train.fingerprint)
    rows = [replace(jobs.make_rows(30), fingerprint=each) for each in fingerprints]
    config = jobs.make_config(base, tmp_path / "runs", max_steps=2)
    jobs.finish(jobs.make_job(config, rows=rows[0]))
    with pytest.raises(RunError, match="training data changed"):
        jobs.make_job(config, rows=rows[1], resume=True)


# And where nothing is wrong

_HEALTHY: dict[str, dict[str, Any]] = {
    "as it is": {},
    "8-bit optimizer": {"optim": "adamw_8bit"},
    "dropout": {"lora": {"lora_dropout": 0.1}},
    "long warm-up": {"warmup_steps": 10},
    "no clipping": {"max_grad_norm": 0.0},
    "one row a step": {"gradient_accumulation_steps": 1},
    "many rows a step": {"gradient_accumulation_steps": 30},
    "rank 1": {"lora": {"r": 1, "lora_alpha": 2}},
    "rank-stabilised": {"lora": {"r": 8, "use_rslora": True}},
    "two linears": {"lora": {"target_modules": ("q_proj", "v_proj")}},
    "no packing": {"data": {"packing": False}},
    "low rate": {"learning_rate": 2e-5},
    "high rate": {"learning_rate": 2e-2},
    "weight decay": {"weight_decay": 0.1},
}
_HEALTHY_RUNS = [
    *[(FAMILY, name) for name in _HEALTHY],
    *[(family, "as it is") for family in tiny.TRAINABLE_FAMILIES if family != FAMILY],
]
_ALWAYS_RUN = {(FAMILY, "as it is"), (FAMILY, "dropout"), (FAMILY, "one row a step")}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(*each, marks=() if each in _ALWAYS_RUN else pytest.mark.slow)
        for each in _HEALTHY_RUNS
    ],
)
def test_a_healthy_run_is_not_stopped(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, name: str
) -> None:
    # All rows, and one tensor of each kind of layer, however slow the machine is.
    monkeypatch.setattr(trial, "MIN_SECONDS", 600.0)
    model = base if family == FAMILY else jobs.make_base(tmp_path / "model", family)
    seen: list[object] = []
    config = jobs.make_config(model, tmp_path / "runs", trial=True, max_steps=8, **_HEALTHY[name])
    job = jobs.make_job(config, held_out=jobs.make_rows(6, seed=1))
    assert len(jobs.finish(job, seen.append)) == 8
    (tried,) = jobs.events(seen, "trial")
    assert tried["loss_after"] < tried["loss_before"]
    assert tried["gradients_checked"] > 0
    # A random model knows no more than guessing, and that is said.
    assert set(jobs.codes(seen)) <= {"guard.first_loss"}


def test_there_are_enough_healthy_runs() -> None:
    assert len(_HEALTHY_RUNS) >= 20
