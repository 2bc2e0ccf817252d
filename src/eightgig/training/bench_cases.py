"""What `eightgig bench` times: cases, each in a process of its own.

A process each, because the allocator's peak, what is loaded and compiled, and the time to the
first step are those of a process. This module starts them; `bench` is what runs inside.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from eightgig.config import default_cache_dir, full_setting, read_config, text_setting
from eightgig.errors import ConfigError, EightgigError, HardwareError
from eightgig.hardware.probe import Rates, disk_free_bytes
from eightgig.memory.host_estimate import table_bytes
from eightgig.memory.workload import build_workload
from eightgig.models.read import require_trainable
from eightgig.models.shapes import find_shape
from eightgig.models.space import DiskNeed, check_disk
from eightgig.models.spec import ModelSpec
from eightgig.quant.manifest import FORMAT_VERSION
from eightgig.run import from_json, to_json

# Words of the command line for what it times.
_SHORT_NAMES = {"tokens": "max_length", "rows": "gradient_accumulation_steps", "rank": "lora.r"}
_LAST_LINES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchCase:
    """What to time.

    Attributes:
        name: Of the result's row.
        settings: Settings of the run, `group.name=value`: among them the model and
            `data.max_length`, the tokens of each row.
        warmup_steps: Steps before the timed ones.
        timed_steps: Steps whose median counts.
        stores: Folder of the random weights.
        shares_layers: Layers of one type share their bytes in host memory, though each is copied
            to the device on its own: a model that host memory would not hold can be timed. Not for
            weights mapped from disk, which would all come from the page cache.
        commit: Of the code, empty where unknown.
    """

    name: str
    settings: tuple[str, ...]
    warmup_steps: int = 2
    timed_steps: int = 8
    stores: str
    shares_layers: bool = True
    commit: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchResult:
    """One row of a table of timings, and of `benchmarks/results.jsonl`.

    Attributes:
        case: Name, such as `12b-8x2048`.
        tool: What was timed.
        model: Its name.
        tokens: Tokens of each row.
        micro_batches: Rows of an optimizer step.
        rank: LoRA rank, on the seven linears.
        optim: Optimizer.
        lora_dropout: Dropout of adapter inputs.
        budget_bytes: What the allocator may reserve.
        tokens_per_second: Median over the timed steps.
        reserved_peak_bytes: Most the allocator reserved; on a CPU, most main memory that the
            process held, None where the system does not say.
        predicted_peak_bytes: What the plan had said.
        predicted_tokens_per_second: What the plan had said; None where it had not.
        copy_wait_ratio: Share of a step in which the compute stream waited for copies; None on a
            CPU, which copies nothing behind its back.
        model_flops_utilisation: See `memory.flops`.
        seconds_to_first_step: From the start of the process to the end of the first step; None
            where other cases ran before in the same process.
        first_loss, last_loss: Of the same rows, before and after all steps.
        choices: The plan's layout.
        rates: Of the machine, measured just before.
        machine: Name of the GPU or processor.
        versions: Of the libraries that decide results.
        date: Day of the measurement.
        commit: Of the code, empty where unknown.
    """

    case: str
    tool: str
    model: str
    tokens: int
    micro_batches: int
    rank: int
    optim: str
    lora_dropout: float
    budget_bytes: int
    tokens_per_second: float
    reserved_peak_bytes: int | None
    predicted_peak_bytes: int | None
    predicted_tokens_per_second: float | None
    copy_wait_ratio: float | None
    model_flops_utilisation: float | None = None
    seconds_to_first_step: float | None
    first_loss: float
    last_loss: float
    choices: Mapping[str, str]
    rates: Rates | None = None
    machine: str
    versions: Mapping[str, str]
    date: str
    commit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOutcome:
    """How a case ended: with a result, or with the reason why there is none."""

    case: BenchCase
    result: BenchResult | None = None
    error: EightgigError | None = None


def make_cases(
    model: str,
    settings: Sequence[str],
    compare: Sequence[tuple[str, Sequence[str]]],
    *,
    timed_steps: int,
    stores: Path | None = None,
    shares_layers: bool = True,
) -> tuple[BenchCase, ...]:
    """One case for each combination of the values that are compared.

    Args:
        model: As for `find_shape`.
        settings: `name=value` of what all cases share. Names as in a config, or `tokens`, `rows`
            and `rank`; lists as `down_proj+o_proj`, an empty one as `none`.
        compare: Names and their values.
        timed_steps: Steps whose median counts.
        stores: Folder of the random weights; None: in the user's cache folder.
        shares_layers: See `BenchCase`.

    Raises:
        ConfigError: There is no such setting, it cannot have such a value, it is compared twice,
            or it names another model.
        ModelError: No such model, or one that cannot be trained.
    """
    require_trainable(find_shape(model))
    shared = [_setting(text) for text in settings]
    names = [name for name, _ in compare]
    compared = [_setting(f"{name}=").partition("=")[0] for name in names]
    _check_names([text.partition("=")[0] for text in shared], compared)
    cases = []
    for values in itertools.product(*(values for _, values in compare)):
        pairs = list(zip(names, values, strict=True))
        own = [_setting(f"{name}={value}") for name, value in pairs]
        case = BenchCase(
            name="",
            settings=(text_setting("model.name", model), "data.path=random", *shared, *own),
            timed_steps=timed_steps,
            stores=str(stores or default_cache_dir() / "bench"),
            shares_layers=shares_layers,
        )
        config = read_config(None, case.settings)  # wrong values are refused before a case runs
        said = [f"{name}={value}" for name, value in pairs if name not in ("tokens", "rows")]
        name = ", ".join((f"{model}-{config.train.rows_per_step}x{config.data.max_length}", *said))
        cases.append(replace(case, name=name))
    return tuple(cases)


def _check_names(shared: Sequence[str], compared: Sequence[str]) -> None:
    if "model.name" in (*shared, *compared):
        raise ConfigError(
            "model.name cannot be set or compared here.",
            why="The cases would carry the name of the model that the command names.",
            fix="Call `eightgig bench` once for each model; --output appends.",
        )
    twice = [name for number, name in enumerate(compared) if name in compared[:number]]
    if twice:
        raise ConfigError(
            f"{twice[0]} is compared twice.",
            why="Of each pair of values the last one alone would be timed.",
            fix="Give all its values at once: --compare NAME=A,B,C.",
        )


def _setting(text: str) -> str:
    name, has_value, value = text.partition("=")
    return full_setting(f"{_SHORT_NAMES.get(name, name)}{has_value}{value}")


def run_cases(
    cases: Sequence[BenchCase], observe: Callable[[str], None] = lambda _: None
) -> Iterator[BenchOutcome]:
    """Run `cases` one after another, each in a process of its own.

    Random weights are written before, by yet another process, so that they do not count as time
    to the first step: a trained model has its weights prepared, too.

    Args:
        cases: What to time.
        observe: Called with a line before each case.

    Raises:
        DoesNotFitError: The disk has no room for the random weights.
    """
    for number, case in enumerate(cases, start=1):
        if not store_path(case).is_dir():  # written beside it, and renamed
            observe(_check_disk(case))
            prepared = _run_child("prepare", case)
            if isinstance(prepared, EightgigError):
                yield BenchOutcome(case=case, error=prepared)
                continue
        observe(f"{number} of {len(cases)}: {case.name}")
        answer = _run_child("time", case)
        if isinstance(answer, EightgigError):
            yield BenchOutcome(case=case, error=answer)
        else:
            yield BenchOutcome(case=case, result=answer)


def store_path(case: BenchCase) -> Path:
    """Folder of a case's random weights: one for all cases of the same shapes."""
    spec = case_spec(case)
    config = read_config(None, case.settings)
    parts = (
        to_json(spec.decoder), spec.dtype, config.model.quantization, case.shares_layers,
        FORMAT_VERSION,
    )  # fmt: skip
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()
    return Path(case.stores) / f"random-{digest[:16]}"


def case_spec(case: BenchCase) -> ModelSpec:
    """The shape that a case trains."""
    model = read_config(None, case.settings).model
    return find_shape(model.name, revision=model.revision)


def _check_disk(case: BenchCase) -> str:
    """Words that say how much is written where.

    Raises:
        DoesNotFitError: The disk has not enough room.
    """
    spec, config, folder = case_spec(case), read_config(None, case.settings), Path(case.stores)
    work = build_workload(spec, config, max_length=1)
    layers = sum(
        kind.blob_bytes * (1 if case.shares_layers else kind.count) for kind in work.layers
    )
    tables = table_bytes(work)
    if case.shares_layers:
        tables = {"embedding": tables["embedding"]}  # see `random_store`
    folder.mkdir(parents=True, exist_ok=True)
    need = DiskNeed(
        purpose=f"A folder of random weights of {spec.name}",
        folder=folder,
        needed_bytes=layers + sum(tables.values()),
        free_bytes=disk_free_bytes(folder),
        disk=folder.stat().st_dev,
    )
    return check_disk([need])


def _run_child(
    work: Literal["prepare", "time"], case: BenchCase
) -> BenchResult | EightgigError | None:
    """What `python -m eightgig.training.bench` answers in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="eightgig-bench-") as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", "eightgig.training.bench", work, str(answer)]
        asked = json.dumps(to_json(case))
        done = subprocess.run(command, input=asked, text=True, capture_output=True, check=False)  # noqa: S603 - ourselves
        if not answer.exists():
            last = [line for line in done.stderr.splitlines() if line.strip()][-_LAST_LINES:]
            return HardwareError(
                f"The process that timed {case.name} ended with code {done.returncode}.",
                why=" / ".join(last) or "It said nothing: the system may have ended it.",
                fix="Run `eightgig doctor`; if it finds nothing, time a smaller case.",
            )
        values = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in values:
        parts = values["error"]
        return EightgigError(parts["message"], why=parts["why"], fix=parts["fix"])
    return None if work == "prepare" else from_json(BenchResult, values)
