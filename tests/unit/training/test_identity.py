"""Going on with something changed: every difference is named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from eightgig.config import Config, DataConfig, MemoryConfig, ModelConfig
from eightgig.models.spec import DecoderSpec
from eightgig.training.identity import (
    RunIdentity,
    explain_differences,
    identify_run,
    model_fingerprint,
)

CONFIG = Config(model=ModelConfig(name="m"), data=DataConfig(path="data.jsonl"))


def _identify(config: Config = CONFIG, *, data: str = "d", model: str = "m") -> RunIdentity:
    return identify_run(config, data_fingerprint=data, model_key=model)


def _change(group: str, **changes: Any) -> Config:
    return replace(CONFIG, **{group: replace(getattr(CONFIG, group), **changes)})


def _read_back(identity: RunIdentity) -> RunIdentity:
    """As it comes out of a checkpoint."""
    text = json.dumps(
        [dict(identity.fingerprints), dict(identity.versions), dict(identity.settings)]
    )
    fingerprints, versions, settings = json.loads(text)
    return RunIdentity(fingerprints=fingerprints, versions=versions, settings=settings)


def test_the_same_run_has_no_difference() -> None:
    assert explain_differences(_read_back(_identify()), _identify()) == []


DECIDING = {
    "train.learning_rate: 0.0002 -> 0.0001": _change("train", learning_rate=1e-4),
    "train.seed: 42 -> 7": _change("train", seed=7),
    "train.gradient_accumulation_steps: 8 -> 4": _change("train", gradient_accumulation_steps=4),
    "train.num_train_epochs: 3.0 -> 4.0": _change("train", num_train_epochs=4.0),
    "train.optim: adamw_torch -> adamw_8bit": _change("train", optim="adamw_8bit"),
    "lora.r: 16 -> 8": _change("lora", r=8),
    "lora.lora_dropout: 0.0 -> 0.1": _change("lora", lora_dropout=0.1),
    "data.max_length: auto -> 512": _change("data", max_length=512),
    "data.held_out: 0.05 -> 0": _change("data", held_out=0),
    "model.quantization: nf4 -> none": _change("model", quantization="none"),
}


@pytest.mark.parametrize("message", DECIDING)
def test_a_changed_setting_is_named_and_refused(message: str) -> None:
    changed = _identify(DECIDING[message])
    (finding,) = explain_differences(_read_back(_identify()), changed)
    assert finding.severity == "error"
    assert finding.message == message
    assert message.split(": ")[1].split(" -> ")[0] in finding.fix
    assert changed.fingerprints["config"] != _identify().fingerprints["config"]


def test_several_changes_are_all_named() -> None:
    changed = replace(_change("train", seed=7), lora=replace(CONFIG.lora, r=4))
    findings = explain_differences(_identify(), _identify(changed, data="other", model="other"))
    assert [finding.code for finding in findings] == [
        "resume.config", "resume.config", "resume.data", "resume.model",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, memory=MemoryConfig(budget=1 << 30, layer_slots=2, offload=())),
        _change("run", save_steps=3, output_dir="elsewhere", eval_steps=7),
        _change("train", trial=False),
        _change("model", cache_dir="/other/disk", delete_download=True),
        _change("model", name="moved/to/m"),
        _change("data", path="moved/data.jsonl"),
    ],
)
def test_what_decides_no_number_may_change(config: Config) -> None:
    assert explain_differences(_identify(), _identify(config)) == []
    assert _identify(config).fingerprints == _identify().fingerprints


def test_another_device_is_the_same_run_up_to_rounding() -> None:
    (finding,) = explain_differences(_identify(), _identify(_change("memory", device="cpu")))
    assert (finding.severity, finding.message) == ("note", "memory.device: auto -> cpu")


def test_the_distance_of_evaluations_matters_with_early_stopping() -> None:
    before = _change("train", early_stopping_patience=2)
    after = replace(before, run=replace(CONFIG.run, eval_steps=9))
    (finding,) = explain_differences(_identify(before), _identify(after))
    assert (finding.severity, finding.message) == ("error", "run.eval_steps: auto -> 9")


def test_other_data_is_named_with_the_file() -> None:
    other = _identify(_change("data", path="other.jsonl"), data="e")
    (finding,) = explain_differences(_identify(), other)
    assert finding.message == "The training data changed (data.jsonl -> other.jsonl)."
    (finding,) = explain_differences(_identify(), _identify(data="e"))
    assert finding.message == "The training data changed (same name, other rows or other tokens)."


def test_another_model_is_named() -> None:
    other = _identify(_change("model", revision="v2"), model="n")
    (finding,) = explain_differences(_identify(), other)
    assert finding.message == "The base model changed (None -> v2)."


def test_other_held_out_rows_are_named() -> None:
    before = identify_run(CONFIG, data_fingerprint="d", model_key="m", held_out_fingerprint="h")
    (finding,) = explain_differences(before, replace_fingerprint(before, held_out="i"))
    assert finding.message == ("The held-out rows changed (same name, other rows or other tokens).")
    assert finding.severity == "error"


def replace_fingerprint(identity: RunIdentity, **changes: str) -> RunIdentity:
    return replace(identity, fingerprints={**identity.fingerprints, **changes})


def test_the_same_weights_under_another_config_are_another_model() -> None:
    decoder = DecoderSpec(
        hidden_size=4, vocab_size=11, layers=(), rms_norm_eps=1e-6, activation="silu",
        attention_scale=1.0, tie_word_embeddings=True, max_positions=64,
    )  # fmt: skip
    known = model_fingerprint(decoder, "key")
    assert known == model_fingerprint(replace(decoder), "key")
    assert known != model_fingerprint(replace(decoder, rms_norm_eps=1e-5), "key")
    assert known != model_fingerprint(decoder, "other")


def test_another_library_is_named() -> None:
    before = _identify()
    older = replace(before, versions={**before.versions, "torch": "2.11.0"})
    (finding,) = explain_differences(older, before)
    assert finding.message.startswith("torch: 2.11.0 -> ")
    assert finding.severity == "error"
    assert "torch 2.11.0" in finding.fix


def test_another_number_of_threads_is_named_and_no_obstacle() -> None:
    saved = replace(_identify(), cpu_threads=2)
    (finding,) = explain_differences(saved, replace(saved, cpu_threads=8))
    assert finding.severity == "warning"
    assert "8 threads" in finding.message
    assert "so far it was 2" in finding.message
    assert "OMP_NUM_THREADS=2" in finding.fix


@pytest.mark.parametrize(("before", "now"), [(0, 8), (2, 0), (2, 2)])
def test_threads_matter_only_where_both_parts_are_computed_on_the_processor(
    before: int, now: int
) -> None:
    saved = replace(_identify(), cpu_threads=before)
    assert explain_differences(saved, replace(saved, cpu_threads=now)) == []


def test_a_garbled_saved_identity_names_differences_and_does_not_crash() -> None:
    broken = RunIdentity(fingerprints={}, versions={}, settings={"train": 3, "x": [1]})
    assert explain_differences(broken, _identify())
