"""This machine with its speeds measured, as a plan for a run wants it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from eightgig.hardware.bench import measure_rates
from eightgig.hardware.probe import Hardware


def with_measured_rates(hardware: Hardware) -> Hardware:
    """`hardware` with rates measured here and now, in about two seconds."""
    dtype: Literal["bfloat16", "float16"] = "bfloat16" if hardware.has_bf16 else "float16"
    return replace(
        hardware,
        rates=measure_rates(
            hardware.device, compute_dtype="float32" if hardware.device == "cpu" else dtype
        ),
    )
