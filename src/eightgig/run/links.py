"""Links in folders that came from somebody else: none may lead to a file outside."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from eightgig.errors import RunError


def link_outside(folder: Path, paths: Iterable[Path]) -> Path | None:
    """The first of `paths` in `folder` that is a link to something outside it.

    A snapshot in the hub's cache is links to the blobs beside it; these count as inside.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parents[1] / "blobs")
    for path in paths:
        if path.is_symlink():
            target = path.resolve()
            if not any(target.is_relative_to(place) for place in allowed):
                return path
    return None


def refuse_links(folder: Path) -> None:
    """Check that nothing directly in a run folder or in its checkpoints is a link.

    A run is written into its folder and nowhere else; through a link it would be written, or read,
    elsewhere. The folder itself may be one.

    Raises:
        RunError: Something is.
    """
    for place in (folder, folder / "checkpoints"):
        if not place.is_dir():
            continue
        for path in sorted(place.iterdir()):
            # A linked checkpoint is passed over when one is looked for.
            if path.is_symlink() and not path.name.startswith("step-"):
                raise RunError(
                    f"{path} is a link.",
                    why="A run is written into its own folder; a link would lead it elsewhere.",
                    fix="Put the file itself there, or delete the link; to use another disk, "
                    "set run.output_dir.",
                )
