"""Times optimizer steps on random weights of true shapes; appends rows to benchmarks/results.jsonl.

    python benchmarks/steps.py 12b-1x2048 31b-8x2048 --budget 6.75GiB

A case is MODEL-ROWSxTOKENS. `eightgig bench` does the same with a table at its end; here cases have
the names under which they are published.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

from eightgig.run import append_json_line
from eightgig.training.bench_cases import BenchCase, BenchResult, make_cases, run_cases
from eightgig.units import format_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", help="MODEL-ROWSxTOKENS, e.g. 12b-8x2048")
    add_case_options(parser, steps=8, output="results.jsonl")
    options = parser.parse_args()
    cases = [make_case(name, options) for name in options.cases]
    failed, began_seconds = 0, time.time()
    for outcome in run_cases(cases, lambda line: print(line, file=sys.stderr, flush=True)):
        if outcome.result is None:
            failed += 1
            error = outcome.error
            assert error is not None
            print(f"{outcome.case.name}: {error.message} {error.why} {error.fix}", flush=True)
        else:
            append_json_line(options.output, outcome.result)
            print(f"{words(outcome.result)}, took {time.time() - began_seconds:.0f} s", flush=True)
        began_seconds = time.time()
    return 2 if failed else 0


def add_case_options(
    parser: argparse.ArgumentParser, *, steps: int, output: str, budget: str = "6.75GiB"
) -> None:
    """What `make_case` reads, how many steps to time, and the file in this folder for the rows."""
    parser.add_argument("--budget", default=budget)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--set", action="append", default=[], help="setting NAME=VALUE")
    parser.add_argument("--output", type=Path, default=Path("benchmarks", output))
    parser.add_argument("--stores", type=Path, default=Path("/tmp/eightgig-bench"))


def make_case(name: str, options: argparse.Namespace) -> BenchCase:
    model, shape = name.rsplit("-", 1)
    rows, tokens = shape.split("x")
    settings = [
        f"tokens={tokens}",
        f"rows={rows}",
        f"rank={options.rank}",
        f"lora_alpha={2 * options.rank}",
        "lora_dropout=0",
        f"optim={options.optim}",
        f"budget={options.budget}",
        *options.set,
    ]
    (case,) = make_cases(
        model, settings, [], timed_steps=options.steps, stores=options.stores.absolute()
    )
    return dataclasses.replace(case, name=name, commit=commit())


def words(result: BenchResult) -> str:
    return (
        f"{result.case}: {result.tokens_per_second:,.0f} tokens/s "
        f"(predicted {result.predicted_tokens_per_second or 0:,.0f}), "
        f"{format_bytes(result.reserved_peak_bytes or 0)} reserved "
        f"(predicted {format_bytes(result.predicted_peak_bytes or 0)}), "
        f"waiting {result.copy_wait_ratio or 0:.1%}, "
        f"{result.model_flops_utilisation or 0:.1%} of the GEMM rate, "
        f"first step after {result.seconds_to_first_step or 0:.0f} s, "
        f"loss {result.first_loss:.3f} -> {result.last_loss:.3f}, {dict(result.choices)}"
    )


def commit() -> str:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
