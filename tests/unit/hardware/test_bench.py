"""The questions that only a running torch answers, on the processor."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from eightgig.hardware import bench
from eightgig.hardware.facts import (
    BitsandbytesFacts,
    StepFacts,
    TorchFacts,
    TritonFacts,
)
from eightgig.hardware.probe import USUAL_HOST_BYTES_PER_SECOND
from eightgig.hardware.software_checks import check_step
from eightgig.run import from_json
from eightgig.units import GIB, MIB
from tests.unit.hardware.machines import cpu_machine


def test_a_processor_s_rates_are_positive_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_CPU_GEMM", (16, 32, 64))
    monkeypatch.setattr(bench, "_COPY_BYTES", 1 << 16)
    rates = bench.measure_rates("cpu")
    assert rates.is_measured
    assert rates.copy_engines == 1
    assert min(rates.gemm_flops_per_second, rates.memory_bytes_per_second) > 0
    assert 1e8 < rates.host_bytes_per_second < 1e13
    assert rates.host_bytes_per_second != USUAL_HOST_BYTES_PER_SECOND


@pytest.fixture
def five_processors() -> Iterator[None]:
    """More than the optimizer takes of them, whatever this machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


def processors_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.get_num_threads).result()


@pytest.mark.usefixtures("five_processors")
def test_the_optimizer_s_thread_takes_no_processors_from_other_threads() -> None:
    with bench.optimizer_thread(2) as thread:
        assert processors_of_a_new_thread() == 5
        assert torch.get_num_threads() == 5
        assert thread.submit(torch.get_num_threads).result() == 2


@pytest.mark.usefixtures("five_processors")
def test_measuring_takes_no_processors_from_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_ADAMW_NUMBERS", 1 << 16)
    assert bench._adamw_rate(2) > 0
    assert processors_of_a_new_thread() == 5


def test_a_real_nf4_step_agrees_with_float32() -> None:
    errors = bench.nf4_step("cpu")
    step = StepFacts(device="cpu", **errors)
    assert 0.08 < errors["weight"] < 0.11  # what NF4 loses on normal numbers
    assert errors["update"] < 0.01
    (finding,) = check_step(cpu_machine(step=step))
    assert finding.code == "doctor.nf4_step_ok"


def test_a_wrong_dequantisation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    right = bitsandbytes.matmul_4bit
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *a, **k: right(*a, **k) * 1.1)
    step = StepFacts(device="cpu", **bench.nf4_step("cpu"))
    (finding,) = check_step(cpu_machine(step=step))
    assert finding.code == "doctor.nf4_wrong"
    assert finding.severity == "error"


def test_libraries_describe_themselves() -> None:
    torch = from_json(TorchFacts, bench.torch_facts())
    assert torch.version is not None
    assert torch.version.startswith("2.")
    found = from_json(BitsandbytesFacts, bench.bitsandbytes_facts())
    assert found.version is not None
    assert "bitsandbytes" in found.library
    assert found.available


def test_an_answer_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["torch"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["version"]


def test_a_kernel_is_compiled_and_right_under_the_interpreter() -> None:
    code = "from eightgig.hardware.bench import main; main(['triton', 'cpu'])"
    pytest.importorskip("triton", reason="Triton has no wheel for this system")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    triton = from_json(TritonFacts, json.loads(done.stdout))
    assert triton.is_right
    assert triton.version


class _Pinning:
    """Stands in for torch's pinned allocator: gives so much, and counts what it was given back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed_bytes: int) -> None:
        self.left_bytes = allowed_bytes
        self.given_back = 0
        monkeypatch.setattr(torch, "empty", self._empty)
        monkeypatch.setattr(bench, "_host_cache_release", lambda: self._give_back)

    def _empty(self, size: int, *, dtype: torch.dtype, pin_memory: bool) -> object:
        assert pin_memory
        assert dtype == torch.uint8
        if size > self.left_bytes:
            raise RuntimeError("CUDA error: out of memory")
        self.left_bytes -= size
        return object()

    def _give_back(self) -> None:
        self.given_back += 1


@pytest.mark.parametrize(
    ("rule", "allowed", "limit"),
    [
        (28 * GIB, 64 * GIB, 28 * GIB),  # a gigabyte goes: the rule holds
        (28 * GIB, 600 * MIB, 512 * MIB),  # less goes than the rule says
        (512 * MIB, 3 * GIB, 3 * GIB),  # WSL, which allows more than it is known for
        (512 * MIB, 64 * GIB, 16 * GIB),  # never more than half of the memory
        (512 * MIB, 0, 0),
    ],
)
def test_the_pin_limit_is_what_goes_and_is_given_back(
    rule: int, allowed: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinning = _Pinning(monkeypatch, allowed)
    assert bench.measure_pin_limit(rule, host_total_bytes=32 * GIB) == limit
    assert pinning.given_back == 1


def test_trying_to_pin_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _Pinning(monkeypatch, 64 * GIB)
    assert bench.pinned_bytes(64 * GIB, within_seconds=0.0) == 0


def test_where_nothing_can_be_given_back_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_host_cache_release", lambda: None)
    assert bench.measure_pin_limit(28 * GIB, host_total_bytes=32 * GIB) == 28 * GIB
