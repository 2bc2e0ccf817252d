"""Units at the border: inside, memory is bytes as `int` and time is seconds as `float`."""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_BINARY_UNITS = {"": 1, "B": 1, "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": TIB}
# "8GB" on the box of a graphics card means 8 GiB; as card memory is what people write here, the
# decimal spelling is read the same way.
_CARD_UNITS = {"K": KIB, "KB": KIB, "M": MIB, "MB": MIB, "G": GIB, "GB": GIB, "T": TIB, "TB": TIB}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def format_bytes(size_bytes: float) -> str:
    """`size_bytes` for people: `7.25 GiB`, `310.0 MiB`, `12 B`."""
    for unit_bytes, name, digits in ((TIB, "TiB", 2), (GIB, "GiB", 2), (MIB, "MiB", 1)):
        if abs(size_bytes) >= unit_bytes:
            return f"{size_bytes / unit_bytes:.{digits}f} {name}"
    if abs(size_bytes) >= KIB:
        return f"{size_bytes / KIB:.1f} KiB"
    return f"{int(size_bytes)} B"


def parse_bytes(text: str) -> int:
    """Bytes of `8GiB`, `512 MiB`, `1e9`-free plain numbers, or card sizes such as `8GB`.

    Raises:
        ValueError: `text` is not a size.
    """
    match = _SIZE.fullmatch(text)
    unit = match.group(2).upper() if match else ""
    factor = _BINARY_UNITS.get(unit) or _CARD_UNITS.get(unit)
    if match is None or factor is None:
        raise ValueError(f'"{text}" is not a size; write for example "8GiB" or "512MiB"')
    return int(float(match.group(1)) * factor)


def format_seconds(seconds: float) -> str:
    """`seconds` for people: `3 d 4 h`, `2 h 05 min`, `7 min 10 s`, `3.2 s`."""
    if seconds >= 86_400:
        return f"{int(seconds // 86_400)} d {int(seconds % 86_400 // 3_600)} h"
    if seconds >= 3_600:
        return f"{int(seconds // 3_600)} h {int(seconds % 3_600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{seconds:.1f} s"
