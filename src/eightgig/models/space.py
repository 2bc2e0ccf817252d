"""Bytes on disk: what a download and its prepared form take, against what is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eightgig.errors import DoesNotFitError
from eightgig.models.count import count_linear_parameters, count_parameters, parameter_counts
from eightgig.models.spec import ModelSpec
from eightgig.units import format_bytes

# NF4 with double quantisation: half a byte, an 8-bit maximum per 64 parameters, a float32 per 256
# of those: 0.5159, and padding.
NF4_BYTES_PER_PARAMETER = 0.516
_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskNeed:
    """Bytes that one purpose takes on one disk.

    Attributes:
        purpose: In words, for example "the download".
        folder: Where the bytes go.
        needed_bytes: How many more there will be.
        free_bytes: What is free there now.
        disk: What tells disks apart (`st_dev`): needs on one disk add up.
    """

    purpose: str
    folder: Path
    needed_bytes: int
    free_bytes: int
    disk: int


def estimate_store_bytes(
    spec: ModelSpec, *, quantization: Literal["nf4", "none"] = "nf4", copies_tables: bool = False
) -> int:
    """Bytes of the prepared weights.

    Args:
        spec: The model.
        quantization: How linears are kept.
        copies_tables: Embedding, head and per-layer table are copied; otherwise they stay in the
            checkpoint's own files.
    """
    counts = parameter_counts(spec.decoder)
    item_bytes = _DTYPE_BYTES[spec.dtype]
    linears = count_linear_parameters(spec.decoder)
    tables = counts["embedding"] + counts["head"] + counts["ple_table"]
    # Norms, biases and the like are kept in float32.
    small = count_parameters(spec.decoder) - linears - tables
    linear_bytes = NF4_BYTES_PER_PARAMETER if quantization == "nf4" else item_bytes
    table_bytes = tables * item_bytes if copies_tables else 0
    return round(linears * linear_bytes) + 4 * small + table_bytes


def check_disk(needs: Sequence[DiskNeed]) -> str:
    """Compare what is needed with what is free, disk by disk.

    Returns:
        One line that says both, to be shown before anything is written.

    Raises:
        DoesNotFitError: A disk has less than its needs add up to.
    """
    for disk in dict.fromkeys(need.disk for need in needs):
        here = [need for need in needs if need.disk == disk]
        needed_bytes = sum(need.needed_bytes for need in here)
        free_bytes = min(need.free_bytes for need in here)
        if needed_bytes > free_bytes:
            raise DoesNotFitError(
                f"{format_bytes(needed_bytes)} are needed on the disk of {here[0].folder}; "
                f"{format_bytes(free_bytes)} are free.",
                why=_listed(here) + ".",
                fix=f"Free {format_bytes(needed_bytes - free_bytes)} there, or choose other disks: "
                "`model.cache_dir` for the prepared weights, the environment variable HF_HOME for "
                "downloads; `model.delete_download: true` deletes each part once it is prepared.",
            )
    return "; ".join(
        f"{need.purpose} takes {format_bytes(need.needed_bytes)} in {need.folder} "
        f"({format_bytes(need.free_bytes)} free)"
        for need in needs
    )


def _listed(needs: Sequence[DiskNeed]) -> str:
    return "; ".join(f"{need.purpose} takes {format_bytes(need.needed_bytes)}" for need in needs)
