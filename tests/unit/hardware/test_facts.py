import importlib
import sys
from pathlib import Path

import pytest

from eightgig.hardware import facts as module
from eightgig.hardware.doctor import diagnose, examine
from eightgig.hardware.facts import (
    Answer,
    BitsandbytesFacts,
    Facts,
    StepFacts,
    TorchFacts,
    ask_child,
    gather_facts,
    read_bitsandbytes,
    read_step,
    read_torch,
)
from eightgig.hardware.nvml import NvmlReading, read_nvml
from eightgig.run import from_json, to_json
from tests.unit.hardware.machines import gpu_machine


def _python(code: str) -> Answer:
    return ask_child("", command=(sys.executable, "-c", code))


def test_the_last_line_of_a_child_is_its_answer() -> None:
    answer = _python("print('a library says hello'); print('{\"a\": 1}')")
    assert answer == Answer({"a": 1}, "")


def test_a_child_that_raises_gives_its_last_lines() -> None:
    answer = _python("import nothing_of_this_name")
    assert answer.value is None
    assert "No module named 'nothing_of_this_name'" in answer.error


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals")
def test_a_child_that_crashes_takes_nothing_with_it() -> None:
    answer = _python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert "signal 11" in answer.error


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IMPORT_SECONDS", 0.5)
    assert "no answer within" in _python("import time; time.sleep(60)").error


@pytest.mark.parametrize("code", ["print('no json')", "pass"])
def test_an_unreadable_answer_is_an_error(code: str) -> None:
    assert "unreadable" in _python(code).error


def test_a_child_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    assert "did not start" in ask_child("", command=(str(tmp_path / "missing"),)).error


def test_answers_become_records() -> None:
    assert read_torch(Answer(None, "broken")) == TorchFacts(error="broken")
    assert read_bitsandbytes(Answer(None, "broken")) == BitsandbytesFacts(error="broken")
    assert read_step(Answer(None, "broken"), "cpu") == StepFacts(device="cpu", error="broken")
    step = read_step(
        Answer({"weight": 0.1, "forward": 0.0, "gradient": 0.0, "update": 0.0}, ""), "cuda"
    )
    assert (step.device, step.weight) == ("cuda", 0.1)


def test_facts_survive_json() -> None:
    facts = gpu_machine()
    assert from_json(Facts, to_json(facts)) == facts


def _quick(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Answer]) -> None:
    monkeypatch.setattr(module, "read_nvml", lambda: NvmlReading(error="no driver"))
    monkeypatch.setattr(module, "ask_child", lambda question, *_: answers[question])


def test_a_broken_torch_leaves_the_rest_of_the_examination(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = Answer(None, "ImportError: libtorch_cpu.so: undefined symbol")
    _quick(monkeypatch, {"torch": broken, "bitsandbytes": broken, "nf4_step": broken})
    examination = examine(tmp_path)
    codes = [finding.code for finding in examination.findings]
    assert "doctor.torch_missing" in codes
    assert "doctor.hf_token" in codes
    assert not examination.can_train


def test_the_token_is_noticed_and_never_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = {
        "torch": Answer({"version": "2.13.0"}, ""),
        "bitsandbytes": Answer({"version": "0.50.2"}, ""),
        "nf4_step": Answer({"weight": 0.09, "forward": 0.0, "gradient": 0.0, "update": 0.0}, ""),
    }
    _quick(monkeypatch, good)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    facts = gather_facts(tmp_path)
    assert facts.has_hf_token
    assert "hf_secret_value" not in str(to_json(facts)) + str(to_json(diagnose(facts)))


@pytest.mark.parametrize(("content", "has_token"), [("hf_x", True), ("", False), (None, False)])
def test_a_token_file_counts_when_it_is_not_empty(
    content: str | None, has_token: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    if content is not None:
        (tmp_path / "token").write_text(content, encoding="utf-8")
    assert module._has_hf_token() is has_token


def test_a_compiler_named_by_cc_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "mycc")
    assert module._c_compiler() == str(compiler)
    monkeypatch.delenv("CC")
    assert module._c_compiler() is None


def test_installed_packages_are_listed_without_importing_them() -> None:
    versions = module.installed_versions(module._PACKAGES)
    assert "transformers" in versions
    assert "no-such-package" not in versions


def test_a_package_whose_installation_was_broken_off_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch-2.13.0.dist-info").mkdir()
    (tmp_path / "torch-2.13.0.dist-info" / "METADATA").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    versions = module.installed_versions(module._PACKAGES)
    assert "torch" not in versions
    assert "transformers" in versions


def test_the_token_of_another_user_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "is_file", refuse)
    assert not module._has_hf_token()


def test_an_nvml_package_that_does_not_import_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.import_module

    def broken(name: str, package: str | None = None) -> object:
        if name == "pynvml":
            raise ImportError("DLL load failed")
        return real(name, package)

    monkeypatch.setattr("eightgig.hardware.nvml.importlib.import_module", broken)
    reading = read_nvml()
    assert reading.gpus == ()
    findings = diagnose(gpu_machine(nvml=reading))
    (finding,) = [each for each in findings if each.code == "doctor.nvml_missing"]
    assert "DLL load failed" in finding.message
