"""What `eightgig plan` shows on a terminal of 80 columns, and how it answers wrong questions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eightgig.cli import render
from eightgig.cli.app import main

# As on https://huggingface.co/meta-llama/Llama-3.1-8B and https://huggingface.co/Qwen/Qwen3-14B.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "qwen": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "max_position_embeddings": 40960,
        "max_window_layers": 40,
        "model_type": "qwen3",
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")


@pytest.fixture(autouse=True)
def _narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(render, "_PIPE_COLUMNS", 80)
    for name, config in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _plan(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["plan", *arguments]) == code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (["--model", "google/gemma-4-31B-it", "--vram", "8GiB", "--max-tokens", "2048"], 0),
        (["--model", "./llama", "--vram", "RTX 3050 Laptop GPU", "--ram", "16GiB", "--display"], 0),
        (["--model", "./qwen", "--vram", "6GiB", "--max-tokens", "40960"], 2),
        (["--model", "demo", "--set", "memory.device=cpu"], 0),
    ],
)
def test_a_plan_is_readable_at_80_columns(
    asked: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = _plan(capsys, *asked, code=code).splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line]
    names = ("micro_batch_tokens", "micro_batches_per_visit", "layer_slots", "offload", "optimizer")
    for name in names:
        assert any(line.strip().startswith(f"{name} ") for line in lines), name


@pytest.mark.parametrize("model", ["./llama", "./qwen"])
def test_another_model_needs_its_config_json_alone(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = _plan(capsys, "--model", model, "--vram", "8GiB", "--max-tokens", "2048")
    assert "It fits: " in shown
    plan = json.loads(
        _plan(capsys, "--model", model, "--vram", "8GiB", "--max-tokens", "2048", "--json")
    )
    short = {"./llama": "llama8b", "./qwen": "qwen14b"}[model]
    known = json.loads(
        _plan(capsys, "--model", short, "--vram", "8GiB", "--max-tokens", "2048", "--json")
    )
    assert plan["peak_bytes"] == known["peak_bytes"]


def test_what_is_assumed_of_another_machine_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--model", "e2b", "--vram", "4060", "--max-tokens", "512")
    shown = " ".join(_plan(capsys, *asked).split())
    assert "Assumed: 32.00 GiB of main memory" in shown
    assert "no desktop on the card" in shown
    assert "The checkpoint takes about" in shown
    assert "Each million tokens takes" in shown
    given = " ".join(_plan(capsys, *asked, "--ram", "8GiB", "--display").split())
    assert "Assumed: 200.00 GiB of free disk." in given
    assert "GiB of main memory, " not in given.partition("It fits")[0]
    assert "no desktop" not in given
    plans = [
        json.loads(_plan(capsys, *asked, *more, "--json"))
        for more in ((), ("--ram", "8GiB"), ("--display",))
    ]
    assert plans[1]["host_budget_bytes"] < plans[0]["host_budget_bytes"]
    assert plans[2]["budget_bytes"] == plans[0]["budget_bytes"] - (512 << 20)


def test_margin_programs_and_managed_memory_are_items_of_the_budget(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ("--model", "12b", "--vram", "8GiB", "--set", "train.optim=paged_adamw_8bit")
    shown = _plan(capsys, *asked)
    for item in ("display and other programs", "context", "margin", "managed optimizer"):
        assert f" {item} " in shown
    assert "outside the budget's cap" in " ".join(shown.split())


def test_what_main_memory_cannot_hold_comes_from_disk_at_a_price(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ("--model", "31b", "--vram", "RTX 4070", "--ram", "14GiB", "--max-tokens", "512")
    shown = " ".join(_plan(capsys, *asked).split())
    assert "host_weights mapped: 16.70 GiB do not fit in main memory" in shown
    assert re.search(r"reading them from disk: \d+ s of each step", shown)
    assert "Not counted: 16.70 GiB of files" in shown
    assert "of the time waiting for copies" in shown


def test_a_plan_that_does_not_fit_promises_no_speed_and_advises_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ("--model", "./qwen", "--vram", "6GiB", "--max-tokens", "40960")
    shown = _plan(capsys, *asked, code=2)
    assert "tokens/s" not in shown
    assert shown.index("would fit; longer rows") < shown.index("VRAM at the peak")


def test_experts_are_planned_for_and_called_not_yet(capsys: pytest.CaptureFixture[str]) -> None:
    shown = _plan(capsys, "--model", "google/gemma-4-26B-A4B-it", "--vram", "8GiB")
    assert "It would fit, but cannot be trained yet: " in shown
    assert "It fits" not in shown


@pytest.mark.parametrize(
    ("arguments", "message", "fix"),
    [
        (["--vram", "4060 Ti 12GB"], "neither a card", "GeForce RTX 4060 Ti"),
        (["--vram", "8"], "neither a card", "8GiB"),
        (["--vram", "8GiB", "--ram", "lots"], '--ram cannot be "lots"', "32GiB"),
        (["--vram", "8GiB", "--ram", "32"], '--ram cannot be "32"', "32GiB"),
        (["--vram", "8GiB", "--set", "lora.target_modules=[q]"], "matches no linear", "q_proj"),
        (["--vram", "8GiB", "--set", "lora.target_modules=.*qq"], "matches no linear", "q_proj"),
        (["--vram", "8GiB", "--picture", "."], ". cannot be drawn", "plan.svg"),
        (["--vram", "8GiB", "--picture", "a.svg", "--sweep", "r=8,16"], "one plan", "one of them"),
        (["--ram", "16GiB"], "no card is named", "--vram"),
        (["--vram", "8GiB", "--max-tokens", "300000"], "262,144 positions", "262144"),
        (["--vram", "8GiB", "--picture", "plan.jpg"], "cannot be drawn", "plan.svg"),
        (["--vram", "8GiB", "--sweep", "model.name=e2b,e4b"], "cannot be swept", "--model"),
        (["--vram", "8GiB", "--sweep", "optim=sgd"], '"sgd"', "adamw_torch"),
        (["--vram", "8GiB", "--sweep", "max_length=-5"], "-5", "2 or more"),
    ],
)
def test_a_wrong_question_gets_three_lines(
    arguments: list[str], message: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", "12b", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:4] for line in lines] == ["erro", "why:", "fix:"]
    assert message in lines[0]
    assert fix in lines[2]


@pytest.mark.parametrize("model", ["31b", "google/gemma-4-31B-it", "./llama", "qwen/config.json"])
def test_over_a_config_a_shape_alone_is_a_model_too(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "model: {name: demo}\ndata: {path: rows.jsonl}\nlora: {r: 8}\n"
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    rows = '{"prompt": "a", "completion": "b"}\n' * 4
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    shown = _plan(capsys, "config.yaml", "--model", model, "--vram", "8GiB")
    assert "of this model only the shape is here" in " ".join(shown.split())
    assert "It fits: " in shown


@pytest.mark.parametrize("name", ["mine #1", "a: b", "[x]", "null", '"quoted"', "ünï"])
def test_a_model_s_name_is_text_whatever_yaml_would_make_of_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "llama").rename(tmp_path / name)
    (tmp_path / "qwen").rename(tmp_path / "mine")
    shown = _plan(capsys, "--model", name, "--vram", "8GiB", "--max-tokens", "512")
    # Without blanks: a long path is broken where the line ends.
    assert f"{name} on a card of 8.00 GiB".replace(" ", "") in "".join(shown.split())


def test_a_sweep_takes_every_kind_of_setting(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--model", "e2b", "--vram", "8GiB", "--max-tokens", "512", "--json")
    for setting, values, name in (
        ("budget", ["2GiB", "4GiB"], "budget_bytes"),
        ("checkpoints", ["host", "device"], "checkpoints"),
        ("offload", ["none", "down_proj+o_proj"], "offload"),
        ("max_length", ["256", "1024"], "max_length"),
    ):
        answer = json.loads(_plan(capsys, *asked, "--sweep", f"{setting}={','.join(values)}"))
        assert [point["value"] for point in answer["points"]] == values
        first, second = (point["plan"][name] for point in answer["points"])
        assert first != second


def _work_seconds(command: list[str]) -> float:
    """Processor time of a process: others share this machine."""
    before = os.times()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


@pytest.mark.parametrize("size", SIZES)
def test_a_plan_takes_less_than_a_second_and_no_torch(size: str) -> None:
    code = (
        "import sys; from eightgig.cli.app import main\n"
        "assert main(['plan', '--model', sys.argv[1], '--vram', '8GiB', '--json']) == 0\n"
        "sys.exit(bool({'torch', 'transformers', 'bitsandbytes'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, f"google/gemma-4-{size}-it"]
    # A loaded machine takes longer for the same work: the best of three.
    assert any(_work_seconds(command) < 1.0 for _ in range(3))
