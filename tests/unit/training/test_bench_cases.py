from pathlib import Path

import pytest

from eightgig.config import read_config
from eightgig.errors import ConfigError, DoesNotFitError, ModelError
from eightgig.hardware.probe import disk_free_bytes
from eightgig.training import bench_cases
from eightgig.training.bench_cases import BenchCase, make_cases, run_cases, store_path


def _cases(*compare: tuple[str, list[str]], settings: tuple[str, ...] = ()) -> list[BenchCase]:
    shared = ["tokens=128", "rows=4", "rank=8", *settings]
    return list(make_cases("demo", shared, compare, timed_steps=3))


def test_nothing_to_compare_is_one_case() -> None:
    (case,) = _cases()
    config = read_config(None, case.settings)
    assert case.name == "demo-4x128"
    assert config.data.max_length == 128
    assert config.train.gradient_accumulation_steps == 4
    assert config.lora.r == 8
    assert case.timed_steps == 3


def test_every_combination_is_a_case() -> None:
    cases = _cases(("offload", ["none", "down_proj+o_proj"]), ("tokens", ["64", "256"]))
    assert [case.name for case in cases] == [
        "demo-4x64, offload=none",
        "demo-4x256, offload=none",
        "demo-4x64, offload=down_proj+o_proj",
        "demo-4x256, offload=down_proj+o_proj",
    ]
    configs = [read_config(None, case.settings) for case in cases]
    assert [config.memory.offload for config in configs] == [(), (), *[("down_proj", "o_proj")] * 2]
    assert [config.data.max_length for config in configs] == [64, 256, 64, 256]


def test_what_is_compared_overrides_what_is_shared() -> None:
    (case,) = _cases(("lora.r", ["32"]), settings=("memory.budget=1GiB",))
    config = read_config(None, case.settings)
    assert config.lora.r == 32
    assert config.memory.budget == 1 << 30


@pytest.mark.parametrize(
    "compare", [("ofload", ["none"]), ("optim", ["sgd"]), ("tokens", ["many"]), ("name", ["x"])]
)
def test_a_wrong_setting_is_refused_before_anything_runs(compare: tuple[str, list[str]]) -> None:
    with pytest.raises(ConfigError):
        _cases(compare)


def test_a_model_that_cannot_be_trained_is_refused() -> None:
    with pytest.raises(ModelError, match="26B"):
        make_cases("26b", [], [], timed_steps=1)


def test_cases_of_one_shape_share_their_weights(tmp_path: Path) -> None:
    def path(model: str, setting: str, *, shares: bool = True) -> Path:
        (case,) = make_cases(
            model, ["tokens=64", setting], [], timed_steps=1, stores=tmp_path, shares_layers=shares
        )
        return store_path(case)

    first = path("12b", "rank=8")
    assert first.parent == tmp_path
    assert first == path("12b", "optim=adamw_8bit") == path("google/gemma-4-12B-it", "rank=8")
    others = [
        path("e4b", "rank=8"),
        path("12b", "quantization=none"),
        path("12b", "rank=8", shares=False),
    ]
    assert len({first, *others}) == 4


def test_weights_that_the_disk_cannot_hold_are_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_cases, "disk_free_bytes", lambda _: 1 << 20)
    assert disk_free_bytes(tmp_path) > 1 << 20
    cases = make_cases("12b", ["tokens=64"], [], timed_steps=1, stores=tmp_path)
    with pytest.raises(DoesNotFitError, match=r"2\.\d+ GiB are needed"):
        next(run_cases(cases))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_is_told_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(
        "raise RuntimeError('libcudart is broken')", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    cases = make_cases("demo", ["tokens=64"], [], timed_steps=1, stores=tmp_path / "stores")
    (outcome,) = run_cases(cases)
    assert outcome.result is None
    assert outcome.error is not None
    assert "ended with code 1" in outcome.error.message
    assert "libcudart is broken" in outcome.error.why
