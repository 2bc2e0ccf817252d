"""From a finished run to files that others load: tested, or refused with nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from eightgig.cli.app import main
from eightgig.errors import DoesNotFitError, EightgigError, ExportError, ModelError, RunError
from eightgig.export import export as page
from eightgig.export import verify
from eightgig.export.answers import Agreement
from eightgig.export.export import Export, ExportOptions, Kind, export_run
from eightgig.export.source import TunedWeights
from eightgig.export.verify import Verification
from eightgig.models.checkpoint import read_model_spec
from eightgig.run import Run, write_json
from tests import tiny
from tests.runs import make_calm, train_tiny
from tests.unit.export.adapters import peft_logits, transformers_logits, write_random_adapter
from tests.unit.export.faulty import FAULTS
from tests.unit.quant.checkpoints import quantize_checkpoint

IDS = torch.arange(40, 64)[None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on a base in NF4, as they are by default."""
    folder = tmp_path_factory.mktemp("trained")
    return train_tiny(folder, "llama", dtype="bfloat16", overrides=("model.quantization=nf4",))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in float32, whose exports must be exact."""
    return train_tiny(tmp_path_factory.mktemp("exact"), "llama")


@pytest.fixture
def run(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of that run, with nothing exported; llama.cpp counts as missing."""
    monkeypatch.setattr(verify, "has_llama_cpp", lambda: False)
    shutil.copytree(trained.folder, tmp_path / "first")
    return Run(folder=tmp_path / "first")


def export(run: Run, kind: Kind, **options: object) -> tuple[Export, list[object]]:
    heard: list[object] = []
    done = export_run(run.folder, ExportOptions(kind=kind, **options), heard.append)  # type: ignore[arg-type]
    return done, heard


def base_of(trained: Run) -> Path:
    return trained.folder.parents[1] / "base"


def fails(run: Run, options: ExportOptions, kind: type[EightgigError]) -> EightgigError:
    """The error of an export, after a look that nothing was written."""
    with pytest.raises(kind) as caught:
        export_run(run.folder, options)
    left = run.folder / "export"
    assert not left.exists() or list(left.iterdir()) == []
    assert all((caught.value.message, caught.value.why, caught.value.fix))
    return caught.value


def test_merged_weights_are_tested_against_the_trained_model(trained: Run, run: Run) -> None:
    done, _ = export(run, "merged")
    tested = done.verification
    assert tested is not None
    assert tested.is_verified
    assert tested.program == "Transformers"
    assert tested.prompts == "held-out rows"
    assert tested.agreement is not None
    assert tested.agreement.num_prompts == 6
    # The difference that the 4 bits of the training make is measured.
    assert tested.trained_loss is not None
    assert tested.exported_loss is not None
    assert 0 < abs(tested.trained_loss - tested.exported_loss) < 0.2
    expected = peft_logits("llama", base_of(trained), run.adapter_path, IDS)
    found = transformers_logits("llama", done.folder, IDS)
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
    written = json.loads((done.folder / "export.json").read_text(encoding="utf-8"))
    assert written["verification"]["agreement"]["is_within"] is True
    assert written["files"]["model.safetensors"]["size_bytes"] > 0
    assert sorted(path.name for path in done.folder.iterdir()) == sorted(
        [*done.files, "export.json"]
    )
    assert [path.name for path in (run.folder / "export").iterdir()] == ["merged"]


def test_the_card_of_an_export_keeps_what_the_adapters_says(run: Run) -> None:
    done, _ = export(run, "merged", is_verified=False)
    card = (done.folder / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model_relation"] == "finetune"
    assert "## Held-out loss" in card
    assert "## Data" in card
    assert "PeftModel" not in card
    assert done.verification is None


def test_a_gguf_that_nothing_here_can_load_is_written_and_says_so(run: Run) -> None:
    done, heard = export(run, "gguf")
    assert set(done.files) == {"first-bf16.gguf", "README.md"}
    assert done.verification is not None
    assert not done.verification.is_verified
    (finding,) = done.findings
    assert finding.code == "export.not_verified"
    assert "verify-gguf" in finding.message
    assert finding in heard
    # Nothing is asked where there is nothing to compare with.
    assert not any("Asking" in str(item) for item in heard)


def test_ollama_gets_a_gguf_and_a_modelfile(run: Run) -> None:
    done, _ = export(run, "ollama")
    assert set(done.files) == {"first-q8_0.gguf", "Modelfile", "README.md"}
    text = (done.folder / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./first-q8_0.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|eot_id|>"' in text


def test_adapters_alone_are_exported_for_llama_cpp_and_as_they_are(run: Run) -> None:
    lora, _ = export(run, "gguf-lora")
    assert set(lora.files) == {"first-lora.gguf", "README.md"}
    plain, _ = export(run, "adapter")
    assert plain.verification is not None
    assert plain.verification.is_verified
    for name in plain.files:
        assert (plain.folder / name).read_bytes() == (run.adapter_path / name).read_bytes()


def test_an_export_can_go_elsewhere_and_replaces_an_earlier_one(run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        done, _ = export(run, "adapter", output=tmp_path / "out")
    assert done.folder == tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_merged_weights_too_large_for_transformers_are_read_by_our_engine(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "transformers_bytes", lambda _: 1 << 60)
    done, _ = export(run, "merged")
    assert done.verification is not None
    assert done.verification.is_verified
    assert done.verification.program == "eightgig's engine"
    assert [path.name for path in (run.folder / "export").iterdir()] == ["merged"]


def test_without_the_data_the_models_are_asked_questions_of_our_own(run: Run) -> None:
    config = yaml.safe_load(run.config_path.read_text(encoding="utf-8"))
    config["data"]["path"] = str(run.folder / "gone.jsonl")
    run.config_path.write_text(yaml.safe_dump(config), encoding="utf-8")
    done, _ = export(run, "merged")
    assert done.verification is not None
    assert done.verification.is_verified
    assert done.verification.prompts == "questions of eightgig"


def test_a_template_that_was_trained_with_goes_along(run: Run, tmp_path: Path) -> None:
    config = yaml.safe_load(run.config_path.read_text(encoding="utf-8"))
    template = tmp_path / "other.jinja"
    template.write_text("{{ bos_token }}{{ messages[-1]['content'] }}", encoding="utf-8")
    config["data"]["chat_template"] = str(template)
    run.config_path.write_text(yaml.safe_dump(config), encoding="utf-8")
    (run.adapter_path / "chat_template.jinja").write_text(template.read_text(), encoding="utf-8")
    done, _ = export(run, "merged", is_verified=False)
    assert (done.folder / "chat_template.jinja").read_text() == template.read_text()
    assert [finding.code for finding in done.findings] == ["export.template"]


def test_an_unfinished_run_is_not_exported(run: Run) -> None:
    shutil.rmtree(run.adapter_path)
    error = fails(run, ExportOptions(kind="merged"), RunError)
    assert "no adapter" in error.message
    assert "--resume" in error.fix


def test_another_base_model_is_refused(run: Run, tmp_path: Path) -> None:
    other = tiny.make_model("qwen3", tmp_path / "other")
    error = fails(run, ExportOptions(kind="merged", base=str(other)), ExportError)
    assert "another model" in error.message


def test_base_weights_that_changed_since_are_refused(
    trained: Run, run: Run, tmp_path: Path
) -> None:
    other = shutil.copytree(base_of(trained), tmp_path / "base")
    tiny.make_model("llama", other, dtype="bfloat16", seed=7)
    config = yaml.safe_load(run.config_path.read_text(encoding="utf-8"))
    config["model"]["name"] = str(other)
    run.config_path.write_text(yaml.safe_dump(config), encoding="utf-8")
    error = fails(run, ExportOptions(kind="merged"), ExportError)
    assert "held-out loss" in error.message
    assert "changed since" in error.why


def test_an_adapter_of_another_model_is_refused(run: Run, tmp_path: Path) -> None:
    other = read_model_spec(tiny.make_model("qwen3", tmp_path / "other"))
    write_random_adapter(tmp_path / "adapter", other)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, run.adapter_path / name)
    fails(run, ExportOptions(kind="merged"), ModelError)


def test_a_disk_without_room_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eightgig.disk.Disk.free_bytes", lambda *_: 1000)
    error = fails(run, ExportOptions(kind="merged"), DoesNotFitError)
    assert "1000 B are free" in error.message


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("kind", "gguf_type"), [("merged", None), ("gguf", "f32"), ("gguf", "f16"), ("gguf", "q8_0")]
)
def test_wrong_numbers_are_deleted_again_whatever_they_are_rounded_to(
    run: Run,
    kind: Kind,
    gguf_type: str | None,
    fault: type[TunedWeights],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page, "TunedWeights", fault)
    error = fails(run, ExportOptions(kind=kind, gguf_type=gguf_type), ExportError)
    assert "does not hold the base weights with the adapter added" in error.message
    assert "times as far off as rounding" in error.why
    if fault.__name__ in ("OneLinearLess", "Transposed"):
        assert "q_proj" in error.why or "attn_q" in error.why


def rewriting(name: str, change: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Change a file of merged exports behind their writing."""

    def write(job: page.Job, prepared: page.Prepared, output: page.OutputFolder) -> None:
        form.write(job, prepared, output)
        path = output.path / name
        text = path.read_text(encoding="utf-8")
        assert change(text) != text
        path.write_text(change(text), encoding="utf-8")

    form = page.FORMS["merged"]
    monkeypatch.setattr(page, "FORMS", {"merged": replace(form, write=write)})


def test_right_numbers_that_are_read_otherwise_are_deleted_again(
    exact: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turn_faster(text: str) -> str:
        config = json.loads(text)
        config["rope_parameters"]["rope_theta"] = 3.0
        return json.dumps(config)

    rewriting("config.json", turn_faster, monkeypatch)
    error = fails(exact, ExportOptions(kind="merged"), ExportError)
    assert "answers otherwise" in error.message
    assert "nats a token" in error.why


@pytest.mark.parametrize(
    ("name", "old", "words"),
    [
        ("chat_template.jinja", "start_header_id", "another chat template"),
        ("tokenizer.json", "<|eot_id|>", "cuts the prompts into other tokens"),
    ],
)
def test_another_template_or_tokenizer_is_deleted_again(
    run: Run, name: str, old: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewriting(name, lambda text: text.replace(old, "x"), monkeypatch)
    assert words in fails(run, ExportOptions(kind="merged"), ExportError).message


@pytest.mark.parametrize(("divergence", "effect", "is_said"), [
    (0.02, 0.66, False), (0.2, 0.66, True), (5e-5, 0.0, False), (0.01, 0.0, True),
])  # fmt: skip
def test_a_training_too_small_for_the_bits_of_its_export_is_said(
    divergence: float, effect: float, is_said: bool
) -> None:
    agreement = Agreement(
        num_prompts=1,
        num_same_answers=1,
        num_tokens=1,
        num_same_tokens=1,
        divergence=divergence,
        prompt_divergence=divergence,
        is_within=True,
        worst="",
    )
    tested = Verification(is_verified=True, program="x", agreement=agreement, effect=effect)
    finding = verify.rounding_finding(tested)
    assert (finding is not None) is is_said
    if finding is not None:
        assert "training moved the same answers by" in finding.message
        assert "--to adapter" in finding.fix


def test_the_template_of_the_training_goes_with_other_base_weights(
    trained: Run, run: Run, tmp_path: Path
) -> None:
    copy = shutil.copytree(base_of(trained), tmp_path / "original")
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + "{# another #}", encoding="utf-8")
    done, _ = export(run, "merged", base=str(copy))
    assert "export.template" in [finding.code for finding in done.findings]
    assert "another" not in (done.folder / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "merged", "--type", "q8_0"], "--type has no effect on --to merged"),
        (["--to", "gguf-lora", "--type", "f16"], "--type has no effect on --to gguf-lora"),
        (["--to", "gguf", "--ollama-name", "mine"], "--ollama-name has no effect on --to gguf"),
        (["--to", "adapter", "--base", "other"], "--base has no effect on --to adapter"),
        (["--to", "merged", "--base", "nowhere"], "There is no model folder"),
        (["--to", "ollama", "--ollama-name", "mine"], "Ollama is not installed"),
    ],
)
def test_options_without_effect_and_missing_programs_are_refused_before_any_work(
    run: Run,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["export", str(run.folder), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:5] for line in lines[-3:]] == ["error", "why: ", "fix: "]
    assert words in lines[-3]
    assert "model.name" not in lines[-1]
    assert not (run.folder / "export").exists()


def test_a_model_is_created_in_ollama_by_its_own_program(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport json, os, pathlib, sys\n"
        f"seen = {{'arguments': sys.argv[1:], 'files': sorted(os.listdir())}}\n"
        f"pathlib.Path({str(tmp_path / 'seen.json')!r}).write_text(json.dumps(seen))\n",
        encoding="utf-8",
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    assert main(["export", str(run.folder), "--to", "ollama", "--ollama-name", "mine"]) == 0
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert seen["arguments"] == ["create", "mine", "-f", "Modelfile"]
    # The export is whole and at its place when Ollama reads it.
    assert seen["files"] == ["Modelfile", "README.md", "export.json", "first-q8_0.gguf"]


def test_only_unquantised_weights_by_the_base_option_are_another_base(
    trained: Run, run: Run, tmp_path: Path
) -> None:
    copy = shutil.copytree(base_of(trained), tmp_path / "original")
    done, _ = export(run, "merged", base=str(copy))
    assert done.model == str(copy)
    assert done.verification is not None
    assert done.verification.is_verified


def test_what_cannot_be_loaded_names_the_loaders_reason(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(job: page.Job, prepared: page.Prepared, output: page.OutputFolder) -> None:
        form.write(job, prepared, output)
        (output.path / "model.safetensors").write_bytes(b"12345678")

    form = page.FORMS["merged"]
    monkeypatch.setattr(page, "FORMS", {"merged": replace(form, write=write)})
    error = fails(run, ExportOptions(kind="merged"), ExportError)
    assert "Transformers cannot load it" in error.message


def test_the_command_writes_an_export_and_says_where(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run.folder), "--to", "gguf", "--type", "q8_0"]) == 0
    shown = capsys.readouterr()
    target = run.folder / "export" / "gguf-q8_0"
    assert f"Exported: {target}" in shown.out
    assert (target / "first-q8_0.gguf").is_file()
    assert main(["export", str(run.folder), "--to", "adapter", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "adapter"


def test_the_command_gives_three_lines_where_it_cannot(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run.adapter_path)
    assert main(["export", str(run.folder), "--to", "merged"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:5] for line in lines[-3:]] == ["error", "why: ", "fix: "]
    assert not (run.folder / "export").exists()


def test_damaged_lines_of_events_do_not_stop_an_export(run: Run) -> None:
    with run.events_path.open("a", encoding="utf-8") as file:
        file.write('{"torn')
    write_json(run.folder / "notes.json", {})
    done, _ = export(run, "merged")
    assert done.verification is not None
    assert done.verification.is_verified


def test_a_run_on_a_4_bit_checkpoint_says_what_is_lost_and_takes_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "has_llama_cpp", lambda: False)
    original = tmp_path / "base"  # where `train_tiny` makes the same model again
    tiny.make_model("llama", original, dtype="bfloat16")
    make_calm(original)
    base = tmp_path / "four-bit"
    quantize_checkpoint(
        original,
        base,
        is_quantized=lambda name: name.endswith("_proj.weight"),
        quant_type="nf4",
        compress_statistics=True,
    )
    for path in original.iterdir():
        if not (base / path.name).exists():
            shutil.copy(path, base / path.name)
    overrides = (f"model.name={base}", "model.quantization=nf4")
    run = train_tiny(tmp_path, "llama", dtype="bfloat16", overrides=overrides)
    done, _ = export(run, "merged")
    assert [finding.code for finding in done.findings] == ["export.from_4_bit"]
    assert done.verification is not None
    assert done.verification.is_verified
    assert read_model_spec(done.folder).quantization is None
    better, _ = export(run, "merged", base=str(original), output=tmp_path / "better")
    assert better.findings == ()
    assert better.verification is not None
    assert better.verification.is_verified
    assert better.verification.exported_loss != done.verification.exported_loss
