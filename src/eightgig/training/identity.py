"""What makes a run the same run: settings, data, model, versions, and how they differ.

A resumed run must agree with its checkpoint in all that decides its numbers. The memory plan is
not among it: how the work is cut to fit a card changes no result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eightgig import __version__
from eightgig.config import Config
from eightgig.errors import Finding, Severity
from eightgig.models.spec import DecoderSpec
from eightgig.run import installed_versions, to_json

_LIBRARIES = ("torch", "transformers", "tokenizers", "bitsandbytes", "numpy")
# Settings that decide no number of a run. Paths and names are judged by what lies there.
_FREE_SETTINGS = ("memory.", "run.", "train.trial", "model.cache_dir", "model.delete_download")
_JUDGED_BY_CONTENT = ("model.name", "model.revision", "data.path", "data.held_out_path")
# Free, too, but the rest of the run then equals the first part only up to rounding.
_ROUNDING_SETTINGS = ("memory.device", "memory.kernels")
VERSION_CODE = "resume.version"
"""Code of the finding that a library is of another version."""

_ABSENT = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """What a resumed run must have in common with its checkpoint.

    Attributes:
        fingerprints: Hashes by name: config, data, held_out, model.
        versions: Versions of eightgig and of the libraries that decide results.
        settings: All settings as JSON, to name what differs.
        cpu_threads: Threads that the layers are computed with; 0 on a GPU, or where not known.
    """

    fingerprints: Mapping[str, str]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    cpu_threads: int = 0


def model_fingerprint(decoder: DecoderSpec, store_key: str) -> str:
    """Hash of what the base model computes: its weights as they were prepared, and its config.

    Args:
        decoder: The stack that config.json describes.
        store_key: Key of the prepared weights (`Manifest.key`), on which the config has no say.
    """
    text = json.dumps([store_key, to_json(decoder)], sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def identify_run(
    config: Config,
    *,
    data_fingerprint: str,
    model_key: str,
    held_out_fingerprint: str = "",
    cpu_threads: int = 0,
) -> RunIdentity:
    """The identity of a run.

    Args:
        config: Its settings.
        data_fingerprint: `Dataset.fingerprint` of the rows trained on.
        model_key: Hash of the base model, `model_fingerprint`.
        held_out_fingerprint: `Dataset.fingerprint` of the rows held out, empty without any.
        cpu_threads: Threads that the layers are computed with, 0 on a GPU.
    """
    settings = to_json(config)
    flat = _flatten(settings)
    deciding = {
        name: value
        for name, value in flat.items()
        if not _is_free(name, flat) and name not in _JUDGED_BY_CONTENT
    }
    text = json.dumps(deciding, sort_keys=True, ensure_ascii=True)
    return RunIdentity(
        fingerprints={
            "config": hashlib.sha256(text.encode("ascii")).hexdigest(),
            "data": data_fingerprint,
            "held_out": held_out_fingerprint,
            "model": model_key,
        },
        versions=library_versions(),
        settings=settings,
        cpu_threads=cpu_threads,
    )


def library_versions() -> dict[str, str]:
    """Versions of eightgig and of the installed libraries that decide results."""
    absent = dict.fromkeys(_LIBRARIES, "not installed")
    return {"eightgig": __version__, **absent, **installed_versions(_LIBRARIES)}


def explain_differences(saved: RunIdentity, current: RunIdentity) -> list[Finding]:
    """Every difference between a checkpoint's run and the run that shall go on from it.

    Args:
        saved: Of the checkpoint.
        current: Of the run as it was called now.

    Returns:
        Findings of severity `error` where the result would be another, and of `note` (of
        `warning` where nobody asked for it) where it would be the same up to rounding; empty when
        nothing that matters differs.
    """
    findings = _setting_differences(saved, current)
    if saved.fingerprints.get("data") != current.fingerprints.get("data"):
        change = _change("data.path", saved, current) or "same name, other rows or other tokens"
        findings.append(
            _difference(
                "resume.data",
                f"The training data changed ({change}).",
                why="Rows already trained on and rows still to come would be of different data.",
                fix="Restore the data file (and tokenizer and chat template), or start a new run.",
            )
        )
    elif saved.fingerprints.get("held_out", "") != current.fingerprints.get("held_out", ""):
        change = (
            _change("data.held_out_path", saved, current) or "same name, other rows or other tokens"
        )
        findings.append(
            _difference(
                "resume.data",
                f"The held-out rows changed ({change}).",
                why="Losses before and after could not be compared, nor the best step be found.",
                fix="Restore the held-out rows, or start a new run.",
            )
        )
    if saved.fingerprints.get("model") != current.fingerprints.get("model"):
        change = (
            _change("model.name", saved, current)
            or _change("model.revision", saved, current)
            or "same name, other weights or another config.json"
        )
        findings.append(
            _difference(
                "resume.model",
                f"The base model changed ({change}).",
                why="The adapter so far was trained on other weights.",
                fix="Use the same weights, or start a new run.",
            )
        )
    for name in sorted(set(saved.versions) | set(current.versions)):
        before, now = saved.versions.get(name, "absent"), current.versions.get(name, "absent")
        if before != now:
            findings.append(
                _difference(
                    VERSION_CODE,
                    f"{name}: {before} -> {now}",
                    why="Another version may compute other numbers or order rows otherwise.",
                    fix=f"Install {name} {before} again, start a new run, or add "
                    "--allow-changed-versions: the rest is then not bit for bit the same run.",
                )
            )
    if saved.cpu_threads and current.cpu_threads and saved.cpu_threads != current.cpu_threads:
        findings.append(
            _difference(
                "resume.threads",
                f"The layers are computed with {current.cpu_threads} threads on the processor; "
                f"so far it was {saved.cpu_threads}.",
                why="Their sums round otherwise: the rest of the run is not bit for bit the same.",
                fix="For the same last digits, stop, set "
                f"OMP_NUM_THREADS={saved.cpu_threads} and resume again.",
                severity="warning",
            )
        )
    return findings


def _setting_differences(saved: RunIdentity, current: RunIdentity) -> list[Finding]:
    before, now = _flatten(saved.settings), _flatten(current.settings)
    findings = []
    for name in sorted(set(before) | set(now)):
        change = _change(name, saved, current)
        if change is None or name in _JUDGED_BY_CONTENT:
            continue
        if not (_is_free(name, before) and _is_free(name, now)):
            findings.append(
                _difference(
                    "resume.config",
                    f"{name}: {change}",
                    why="The rest of the run would not be the run that was begun.",
                    fix=f"Set {name} back to {_show(before.get(name, _ABSENT))}, "
                    "or start a new run.",
                )
            )
        elif name in _ROUNDING_SETTINGS:
            findings.append(
                _difference(
                    "resume.config",
                    f"{name}: {change}",
                    why="The rest of the run is the same up to rounding, not bit for bit.",
                    fix=f"Set {name} back to {_show(before.get(name, _ABSENT))} if that matters.",
                    severity="note",
                )
            )
    return findings


def _difference(
    code: str, message: str, *, why: str, fix: str, severity: Severity = "error"
) -> Finding:
    return Finding(severity=severity, code=code, message=message, why=why, fix=fix)


def _is_free(name: str, flat: Mapping[str, Any]) -> bool:
    """Whether a setting decides no number of the run; `flat` holds all of them."""
    if name == "run.eval_steps":
        # Early stopping counts evaluations.
        return not flat.get("train.early_stopping_patience", 0)
    return name.startswith(_FREE_SETTINGS)


def _change(name: str, saved: RunIdentity, current: RunIdentity) -> str | None:
    """`0.0002 -> 0.0001`, or None when the setting is the same."""
    before = _flatten(saved.settings).get(name, _ABSENT)
    now = _flatten(current.settings).get(name, _ABSENT)
    return None if before == now else f"{_show(before)} -> {_show(now)}"


def _show(value: object) -> str:
    return "(absent)" if value is _ABSENT else str(value)


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"train": {"seed": 1}}` as `{"train.seed": 1}`; settings inside a group are not split."""
    return {
        f"{group}.{name}": value
        for group, values in settings.items()
        if isinstance(values, Mapping)
        for name, value in values.items()
    }
