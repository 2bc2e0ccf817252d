"""The examples: each can be read, and differs from the first in what its README says."""

import dataclasses
import json
from pathlib import Path

import pytest

from eightgig.cli.app import main
from eightgig.config import Config, read_config

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("first", "recipe", "domain_terms", "instruction_format", "classification")


def _config(name: str) -> Config:
    return read_config(EXAMPLES / name / "config.yaml")


def _changed(config: Config) -> set[str]:
    """Settings that differ from those of the first example, where and what the data are aside."""
    first = dataclasses.asdict(_config("first"))
    return {
        f"{group}.{name}"
        for group, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
        if value != first[group][name]
    } - {"data.path", "data.held_out", "data.max_length", "run.name", "run.output_dir"}


def test_these_are_all_examples() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_a_config_about_20_rows_and_a_readme(name: str) -> None:
    config = _config(name)
    assert config.data.path == str(EXAMPLES / name / "data.jsonl")
    assert config.run.name == name.replace("_", "-")
    lines = (EXAMPLES / name / "data.jsonl").read_text(encoding="utf-8").splitlines()
    assert 18 <= len(lines) <= 24
    assert len(set(lines)) == len(lines)
    for line in lines:
        row = json.loads(line)
        if set(row) == {"prompt", "completion"}:
            assert row["prompt"].strip() and row["completion"].strip()
            continue
        assert set(row) == {"messages"}
        assert row["messages"][-1]["role"] == "assistant"
        assert all(message["content"].strip() for message in row["messages"])
    readme = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    assert f"eightgig train examples/{name}/config.yaml" in readme


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("domain_terms", {"lora.r", "lora.lora_alpha"}),
        ("instruction_format", {"train.num_train_epochs"}),
        ("classification", {"lora.r", "lora.lora_alpha"}),
    ],
)
def test_an_example_differs_from_the_first_in_one_thing(name: str, changed: set[str]) -> None:
    assert _changed(_config(name)) == changed


def test_the_recipe_is_the_usual_one_setting_by_setting() -> None:
    config = _config("recipe")
    assert config.model.name == "google/gemma-4-12B-it"
    assert config.model.quantization == "nf4"
    assert config.data.max_length == 1024
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (16, 32, 0.05)
    assert set(config.lora.target_modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    train = config.train
    assert train.num_train_epochs == 3
    assert train.per_device_train_batch_size == 1
    assert train.gradient_accumulation_steps == 8
    assert train.learning_rate == 2e-4
    assert train.max_grad_norm == 0.3
    assert train.optim == "paged_adamw_8bit"
    assert config.run.save_epochs


def test_tickets_have_one_form() -> None:
    lines = (
        (EXAMPLES / "instruction_format" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    )
    for line in lines:
        ticket = json.loads(json.loads(line)["messages"][-1]["content"])
        assert list(ticket) == ["title", "place", "priority", "due"]


def test_every_label_appears_equally_often() -> None:
    lines = (EXAMPLES / "classification" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    labels = [json.loads(line)["messages"][-1]["content"] for line in lines]
    assert {labels.count(label) for label in labels} == {5}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_fits_an_8_gib_card(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / name / "config.yaml"
    assert main(["plan", str(path), "--vram", "8GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
