"""A found model as something that `open_store` can prepare."""

from __future__ import annotations

from pathlib import Path

from eightgig.models.find import FoundModel
from eightgig.models.hub import fetch_file, release_file
from eightgig.quant.build import Download


def checkpoint_of(found: FoundModel) -> Path | Download:
    """The model's folder, or how its files are fetched one by one and deleted again."""
    hub = found.hub
    if hub is None:
        return found.folder
    return Download(
        folder=found.folder,
        fetch=lambda name: fetch_file(hub, name),
        delete=lambda name: release_file(hub, found.folder / name),
    )
