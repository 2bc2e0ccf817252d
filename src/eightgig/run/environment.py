"""What a run ran on: system, interpreter and the versions that decide results.

Says nothing about who ran it: no host name, no user, no path.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import eightgig

_LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "bitsandbytes",
    "triton",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "jinja2",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """`environment.json`.

    Attributes:
        eightgig, python: Versions.
        system: Operating system and its version.
        machine: Architecture of the processor.
        device: Name of the GPU, or of the processor where that computes.
        versions: Versions of the installed libraries that decide results.
    """

    eightgig: str
    python: str
    system: str
    machine: str
    device: str
    versions: Mapping[str, str]


def describe_environment(*, device: str) -> Environment:
    """This machine and what is installed on it; imports none of the libraries.

    Args:
        device: Name of what computes, as in `Hardware.name`.
    """
    return Environment(
        eightgig=eightgig.__version__,
        python=platform.python_version(),
        system=platform.platform(),
        machine=platform.machine(),
        device=device,
        versions=installed_versions(_LIBRARIES),
    )


def installed_versions(libraries: Iterable[str]) -> dict[str, str]:
    """Versions of those of `libraries` that are installed; imports none of them."""
    from importlib import metadata  # slow, and not needed by what merely names a run

    versions = {}
    for library in libraries:
        try:
            version: str | None = metadata.version(library)
        except (metadata.PackageNotFoundError, KeyError):
            continue
        # None (from 3.15 on an error) where an installation was broken off: there is a folder of
        # that name and nothing in it.
        if version is not None:
            versions[library] = version
    return versions
