"""Everything the terminal shows but the course of a training: errors, findings, plans, tables.

Results go to standard output, all else to standard error, so that `--json` stays clean.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eightgig.cli.console import SafeConsole, open_output, without_control_codes
from eightgig.config import Config
from eightgig.errors import EightgigError, Finding
from eightgig.run import Run, mask_secrets, to_json
from eightgig.units import format_bytes

if TYPE_CHECKING:
    from eightgig.export.export import Export
    from eightgig.export.push import Upload
    from eightgig.export.verify import Verification
    from eightgig.hardware.doctor import Examination
    from eightgig.hardware.facts import Facts
    from eightgig.hardware.nvml import Gpu
    from eightgig.hardware.probe import Hardware
    from eightgig.training.step import StepReport

SEVERITY_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_PIPE_COLUMNS = 140
_REPORT_AT = "https://github.com/eightgig/eightgig/issues"


def show_line(text: str, style: str = "") -> None:
    """One line of a result."""
    show_text(Text(text, style=style))


def show_wrapped(text: str | Text, style: str = "") -> None:
    """Prose of a result, in the width of the terminal; not for what is to be copied."""
    prose = Text(text, style=style) if isinstance(text, str) else text
    _output().print(prose, highlight=False)


def show_text(text: Text) -> None:
    """Text of a result, in its colours."""
    _write(_output(), text)


def show_piece(text: str) -> None:
    """A part of a line that somebody else wrote: control codes are for terminals, not for it."""
    safe = Text(without_control_codes(text))
    _output().print(safe, soft_wrap=True, highlight=False, end="")


def show_table(table: Table) -> None:
    """A table of a result."""
    _output().print(table)


def show_note(text: str) -> None:
    """One line that is no result."""
    _write(_output(stderr=True), Text(text, style="dim"))


def show_json(value: Any, *, is_needed: bool = True) -> None:
    """`value` (a record or plain JSON) as one line; JSON knows no NaN: such a number is null.

    See `SafeConsole` for `is_needed`.
    """
    text = json.dumps(_finite(to_json(value)), allow_nan=False)
    print(text, file=open_output(is_needed=is_needed), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_error(error: EightgigError, *, as_json: bool = False) -> None:
    """What happened, why, what to do; with `as_json` on standard output, too."""
    if as_json:
        parts = {"message": error.message, "why": error.why, "fix": error.fix}
        show_json({"error": {**parts, "findings": error.findings}})
    console = _output(stderr=True)
    _write(console, Text.assemble(("error: ", SEVERITY_STYLES["error"]), error.message))
    if len(error.findings) > 1:
        for finding in error.findings:
            _write(console, Text.assemble("  ", _finding_text(finding)))
    _write(console, Text.assemble(("why:   ", "bold"), error.why))
    _write(console, Text.assemble(("fix:   ", "bold"), error.fix))


def show_fault() -> None:
    """The traceback of the error being handled, and where to report it."""
    console = _output(stderr=True)
    _write(console, Text(mask_secrets(traceback.format_exc().rstrip())))
    _write(console, Text(f"This is a fault of eightgig. Please report it: {_REPORT_AT}", "bold"))


def show_findings(findings: Iterable[Finding]) -> None:
    """Each finding with its place, why it matters and what to do."""
    console = _output()
    for finding in findings:
        head = (f"{finding.severity}: ", SEVERITY_STYLES[finding.severity])
        _write_prose(console, Text.assemble(head, _finding_text(finding, with_fix=False)))
        _write_prose(console, Text.assemble(("  why: ", "dim"), finding.why))
        _write(console, Text.assemble(("  fix: ", "dim"), finding.fix))


def show_examination(examination: Examination, *, as_json: bool) -> None:
    """What the doctor saw, every finding with its fix, and the verdict."""
    facts, findings = examination.facts, examination.findings
    if as_json:
        show_json({"can_train": examination.can_train, "findings": findings, "facts": facts})
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, words in _machine_rows(facts):
        table.add_row(Text(name, style="dim"), Text(words))
    show_table(table)
    show_findings(findings)
    if examination.can_train:
        place = "" if facts.gpu is not None else ", on its processor: small models"
        show_line(f"This machine can train{place}.", "bold green")
    else:
        show_line("Training cannot work here until the errors above are mended.", "bold red")


def show_new_config(
    path: Path, values: Mapping[str, object], machine: Hardware, *, as_json: bool
) -> None:
    """What `init` wrote, and what comes next."""
    if as_json:
        show_json({"config": str(path), "settings": values, "machine": machine})
        return
    show_line(f"Wrote {path}", "bold green")
    show_line(f"  machine: {machine_words(machine)}")
    for setting, value in values.items():
        show_line(f"  {setting}: {value}")
    show_line(f"Next: eightgig check {path}, eightgig plan {path}, eightgig train {path}")


def show_trained(config: Config, report: StepReport | None, *, as_json: bool) -> None:
    """Where the adapter lies, and what comes next; `report` is None where no step was left."""
    run = Run(folder=Path(config.run.output_dir, config.run.name))
    if as_json:
        done = {} if report is None else {"step": report.step, "loss": report.loss}
        show_json({"run": str(run.folder), "adapter": str(run.adapter_path), **done})
        return
    if report is None:
        show_line("No step was left to train.")
    show_line(f"Adapter: {run.adapter_path}", "bold green")


def show_export(export: Export, *, as_json: bool) -> None:
    """What was written, and how it was tested."""
    if as_json:
        show_json(export)
        return
    for name, file in export.files.items():
        show_line(f"{format_bytes(file['size_bytes']):>12}  {name}")
    test = export.verification
    if test is not None:
        if test.is_verified:
            against = f" against {test.reference}" if test.reference else ""
            show_line(f"Tested{against}: {test.program}.", "green")
        for line in _test_words(test):
            show_line(f"  {line}")
    show_line(f"Exported: {export.folder}", "bold green")


def show_upload(upload: Upload, address: str | None, *, as_json: bool) -> None:
    """What was uploaded, or would be; `address` is None where nothing was sent."""
    if as_json:
        show_json({"upload": upload, "total_bytes": upload.total_bytes, "address": address})
        return
    for name, size_bytes in upload.files.items():
        show_line(f"{format_bytes(size_bytes):>12}  {name}")
    kind = "private" if upload.is_private else "public"
    if address is None:
        size = format_bytes(upload.total_bytes)
        show_line(f"{size} would go to {upload.repository}; a new repository would be {kind}.")
        show_line("Nothing was sent. To upload it, add --yes.")
    else:
        show_line(f"Uploaded: {address}", "bold green")


def machine_words(machine: Hardware) -> str:
    """The machine in one line."""
    vram = (
        f" with {format_bytes(machine.vram_total_bytes)} of VRAM"
        if machine.device == "cuda"
        else ""
    )
    return f"{machine.name}{vram}, {format_bytes(machine.host_total_bytes)} of main memory"


def _test_words(test: Verification) -> Iterator[str]:
    """How well an export agreed, in lines."""
    if test.weights is not None:
        yield (
            f"{test.weights.num_tensors} tensors read back: no number is further off than its type "
            "rounds."
        )
    found, allowed = test.agreement, test.tolerance
    if found is not None and allowed is not None:
        yield (
            f"{found.num_same_answers} of {found.num_prompts} greedy answers to {test.prompts} "
            f"are the same, and {found.num_same_tokens} of {found.num_tokens} choices of a token."
        )
        yield (
            f"Their distributions differ by {found.divergence:.2g} nats a token; "
            f"{allowed.divergence:g} are allowed ({allowed.reason})."
        )
    if test.reading is not None:
        yield f"With the numbers before rounding they differ by {test.reading.divergence:.2g} nats."
    if test.effect is not None:
        yield f"Training moved these answers by {test.effect:.2g} nats a token."
    if test.trained_loss is not None and test.exported_loss is not None:
        yield (
            f"Held-out loss: {test.trained_loss:.4f} as trained, {test.exported_loss:.4f} with "
            "the exported weights."
        )


def _finding_text(finding: Finding, *, with_fix: bool = True) -> str:
    text = finding.place + finding.message
    return f"{text} {finding.fix}" if with_fix else text


def _machine_rows(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "system", facts.system + (" (WSL)" if facts.is_wsl else "")
    if facts.gpu is None:
        yield "GPU", "none; the processor computes"
    else:
        vram = f"{format_bytes(facts.gpu.total_bytes)}, {format_bytes(facts.gpu.free_bytes)} free"
        yield "GPU", f"{facts.gpu.name}, {vram}"
        yield from _card_rows(facts.gpu)
    free, total = format_bytes(facts.host_free_bytes), format_bytes(facts.host_total_bytes)
    yield "main memory", f"{total}, {free} free"
    yield "disk", f"{format_bytes(facts.disk_free_bytes)} free for prepared weights"
    yield from facts.versions.items()
    if facts.bitsandbytes.library:
        yield "its library", Path(facts.bitsandbytes.library).name
    rates = facts.rates
    if rates is not None:
        yield "matrix products", f"{rates.gemm_flops_per_second / 1e12:.1f} TFLOP/s"
        copies = (rates.host_to_device_bytes_per_second, rates.device_to_host_bytes_per_second)
        yield "copies", " in, ".join(f"{format_bytes(rate)}/s" for rate in copies) + " out"


def _card_rows(gpu: Gpu) -> Iterator[tuple[str, str]]:
    """What the driver tells of its link, heat and power."""
    if gpu.max_pcie_generation and gpu.pcie_lanes:
        yield "PCIe", f"{gpu.max_pcie_generation}.0 x{gpu.pcie_lanes}"
    state = []
    if gpu.temperature_celsius is not None:
        state.append(f"{gpu.temperature_celsius} degrees Celsius")
    if gpu.power_limit_watts:
        state.append(f"limit {gpu.power_limit_watts:.0f} W")
    if state:
        yield "heat and power", ", ".join(state)


def _output(*, stderr: bool = False) -> Console:
    console = SafeConsole(stderr=stderr, is_needed=not stderr)
    if console.is_terminal:
        return console
    # A file or a pipe has no width; tables squeezed into 80 columns are hard to read there.
    return SafeConsole(stderr=stderr, width=_PIPE_COLUMNS, is_needed=not stderr)


def _write_prose(console: Console, text: Text) -> None:
    """Wrapped between words for people; one line for programs."""
    console.print(text, soft_wrap=not console.is_terminal, highlight=False)


def _write(console: Console, text: Text) -> None:
    # Not wrapped and not guessed at: paths and commands must be there to copy.
    console.print(text, soft_wrap=True, highlight=False)
