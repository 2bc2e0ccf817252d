"""Compares today's formulas with every measured row; needs no GPU and no torch.

    python benchmarks/judge_peaks.py [FILE] [--items]

A row whose prediction is below the measured peak is marked `LOW`. `slack` is what the allocator
reserved beyond what tensors took at a time, `*` a row that no formula may be tuned on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eightgig.memory.calibration import (
    MeasuredPeak,
    judge_peaks,
    judge_speeds,
    predict_items,
    predict_time,
    read_measured_peaks,
)
from eightgig.models.shapes import find_shape
from eightgig.units import MIB


def slack(row: MeasuredPeak) -> str:
    if row.allocated_bytes is None:
        return ""
    return f"{row.measured_bytes / row.allocated_bytes - 1:.1%}"


def speed_words(row: MeasuredPeak, predicted: float) -> str:
    measured = row.measured_tokens_per_second
    return " " * 15 if measured is None else f"{measured:8,.0f} {measured / predicted - 1:+6.1%}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "file", type=Path, nargs="?", default=Path("tests/data/measured_peaks.jsonl")
    )
    parser.add_argument("--items", action="store_true", help="show the predicted items, in MiB")
    options = parser.parse_args()
    rows = read_measured_peaks(options.file)
    items = [predict_items(row, find_shape(row.model)) for row in rows]
    peaks = [sum(each.values()) for each in items]
    speeds = [predict_time(row, find_shape(row.model)).tokens_per_second for row in rows]
    print(f"{'case':56} {'reserved':>9} {'slack':>6} {'excess':>7}  {'tokens/s':>8} {'off':>6}")
    for row, each, peak, speed in zip(rows, items, peaks, speeds, strict=True):
        print(
            f"{row.case + ('' if row.used_for_tuning else ' *'):56} "
            f"{row.measured_bytes / MIB:9,.0f} "
            f"{slack(row):>6} "
            f"{peak / row.measured_bytes - 1:+7.1%}  "
            f"{speed_words(row, speed)}"
            f"{'  LOW' if peak < row.measured_bytes else ''}"
        )
        if options.items:
            sizes = (f"{name} {size / MIB:,.0f}" for name, size in each.items() if size)
            print(f"    {', '.join(sizes)}")
    accuracy, by_speed = judge_peaks(rows, peaks), judge_speeds(rows, speeds)
    print(
        f"{accuracy.num_rows} rows, {accuracy.num_unseen} of them unseen: median excess "
        f"{accuracy.median_excess_ratio:+.1%}, worst {accuracy.worst_excess_ratio:+.1%}, "
        f"{len(accuracy.too_low)} too low; speed: median {by_speed.median_ratio - 1:+.1%}, "
        f"{len(by_speed.off)} further off than 15 %"
    )
    return 0 if accuracy.holds and not by_speed.off else 1


if __name__ == "__main__":
    sys.exit(main())
