"""This machine with its speeds measured, as a plan for a run wants it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from eightgig.hardware.bench import measure_pin_limit, measure_rates
from eightgig.hardware.probe import Hardware


def with_measured_rates(hardware: Hardware) -> Hardware:
    """`hardware` with rates and pin limit measured here and now, in two to three seconds."""
    if hardware.device == "cpu":
        return replace(hardware, rates=measure_rates("cpu", compute_dtype="float32"))
    dtype: Literal["bfloat16", "float16"] = "bfloat16" if hardware.has_bf16 else "float16"
    return replace(
        hardware,
        rates=measure_rates("cuda", compute_dtype=dtype),
        pin_limit_bytes=measure_pin_limit(
            hardware.pin_limit_bytes, host_total_bytes=hardware.host_total_bytes
        ),
    )
