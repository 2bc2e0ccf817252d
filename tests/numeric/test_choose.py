"""Which version of an operation runs, and why."""

import importlib

import pytest
import torch

from eightgig.errors import HardwareError
from eightgig.ops import choose, flash, reference
from eightgig.ops.choose import choose_ops


def _probe(forward, backward=reference.attention_backward) -> str:
    return flash.probe_attention(forward, backward, head_dim=64, device="cpu", dtype=torch.bfloat16)


def test_a_cpu_gets_the_plain_definitions_and_the_reason() -> None:
    ops, (choice,) = choose_ops(device="cpu", dtype=torch.float32, kernels="auto")
    assert ops.attention is reference.attention
    assert ops.dequantizer is None
    assert (choice.name, choice.value) == ("kernels", "plain")
    assert "cpu" in choice.reason


def test_plain_kernels_are_a_choice_with_its_reason() -> None:
    _, (choice,) = choose_ops(device="cpu", dtype=torch.float32, kernels="plain")
    assert choice.reason == "asked for by `kernels: plain`"


def test_triton_where_it_cannot_work_is_an_error_with_why_and_fix() -> None:
    with pytest.raises(HardwareError) as caught:
        choose_ops(device="cpu", dtype=torch.float32, kernels="triton")
    assert "needs a GPU" in caught.value.why
    assert "kernels: auto" in caught.value.fix


@pytest.mark.parametrize("name", ["runtime.errors.PTXASError", "errors.TritonError"])
def test_a_gpu_that_triton_cannot_compile_for_gets_the_plain_definitions(monkeypatch, name) -> None:
    module, _, kind = name.rpartition(".")
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    error = getattr(importlib.import_module(f"{triton.__name__}.{module}"), kind)

    def rms_norm(*_):
        raise error("ptxas does not know sm_999\nand says so at length")

    monkeypatch.setattr("eightgig.ops.triton_norm.rms_norm", rms_norm)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    lacking = choose._why_no_triton("cuda", torch.bfloat16)
    assert lacking.startswith("Triton does not work: ")
    assert lacking.endswith("ptxas does not know sm_999")


def test_the_probe_finds_the_definition_in_order() -> None:
    assert _probe(reference.attention) == ""


def test_the_probe_says_what_an_operator_that_is_not_built_in_says() -> None:
    assert "aten::_flash_attention_forward" in _probe(flash.flash_attention)


def test_the_probe_finds_a_window_that_is_one_token_too_long() -> None:
    def off_by_one(q, k, v, bounds, longest, scale, window):
        return reference.attention(q, k, v, bounds, longest, scale, window + 1)

    assert _probe(off_by_one).startswith("its output is off by")


def test_the_probe_finds_a_wrong_gradient() -> None:
    def halved(*args):
        grad_q, grad_k, grad_v = reference.attention_backward(*args)
        return grad_q, grad_k, grad_v / 2

    assert _probe(reference.attention, halved).startswith("its grad_v is off by")


@pytest.mark.parametrize(
    ("capability", "head_dim", "expected"),
    [
        ((9, 0), 256, ["triton", "flash", "memory-efficient", "plain"]),
        ((9, 0), 64, ["flash", "triton", "memory-efficient", "plain"]),
        ((8, 9), 256, ["flash", "triton", "memory-efficient", "plain"]),
        ((8, 9), 512, ["triton", "memory-efficient", "plain"]),
    ],
)
def test_the_order_of_ways_to_do_attention(monkeypatch, capability, head_dim, expected) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(flash, "probe_attention", lambda *_, **__: "not built in")
    ways = choose._ways_of_attention("cuda", torch.bfloat16, head_dim, "no Triton")
    assert [way.name for way in ways] == expected


def test_every_rejected_way_is_named_with_its_reason(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(flash, "probe_attention", lambda *_, **__: "not built in")
    ways, (choice,) = choose._choose_attention("cuda", torch.bfloat16, [256], "no Triton")
    assert ways[256].name == choice.value == "plain"
    assert choice.rejected == (
        "flash: not built in; triton: no Triton; memory-efficient: not built in"
    )
