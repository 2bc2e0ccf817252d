"""Rotary embeddings from a config: the old keys, the new ones, and those per layer type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from eightgig.errors import ModelError
from eightgig.models.families import FULL, SLIDING
from eightgig.models.settings import Settings, is_number
from eightgig.models.spec import RopeSpec

RopeKind = Literal["default", "linear", "llama3", "yarn", "proportional"]

DEFAULT_THETA = 10_000.0

# Numbers that each kind of scaling needs, and those it may have.
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
    "proportional": (),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "proportional": ("factor",),
}


def read_rope(settings: Settings) -> RopeSpec:
    """The one rotary embedding of a family whose layers all share it.

    `rope_scaling` with a `rope_theta` beside it is the old spelling of `rope_parameters`; where
    both stand, Transformers takes the old one.

    Raises:
        ModelError: A kind that is not supported, or numbers that are none.
    """
    parameters = settings.mapping("rope_scaling") or settings.mapping("rope_parameters")
    if any(isinstance(value, Mapping) for value in parameters.values()):
        settings.refuse("rope_parameters", "one set of numbers, not one per layer type")
    outer = {
        key: settings.values[key]
        for key in ("rope_theta", "partial_rotary_factor")
        if settings.values.get(key) is not None
    }
    return _rope_spec(settings, {"rope_theta": DEFAULT_THETA, **outer, **parameters})


def read_ropes_by_layer_type(
    settings: Settings, defaults: Mapping[str, Mapping[str, Any]]
) -> dict[str, RopeSpec]:
    """The rotary embeddings of the sliding and the full layers.

    Gemma 3 configs written before Transformers 5 say `rope_theta`, `rope_local_base_freq` and
    `rope_scaling`, the last for the full layers only.

    Raises:
        ModelError: A kind that is not supported, or numbers that are none.
    """
    given = settings.mapping("rope_parameters")
    old_keys = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}
    specs = {}
    for layer_type, default in defaults.items():
        parameters = given.get(layer_type)
        if not isinstance(parameters, Mapping | None):
            settings.refuse("rope_parameters", f"settings for each of {', '.join(defaults)}")
        old_theta = settings.values.get(old_keys[layer_type])
        theta = default["rope_theta"] if old_theta is None else old_theta
        if parameters is None:
            parameters = {**default, "rope_theta": theta}
        if layer_type == FULL:
            parameters = {**parameters, **settings.mapping("rope_scaling")}
        specs[layer_type] = _rope_spec(settings, {"rope_theta": theta, **parameters})
    return specs


def _rope_spec(settings: Settings, parameters: Mapping[str, Any]) -> RopeSpec:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise ModelError(
            f"{settings.name} scales its rotary embedding by {kind!r}.",
            why=f"Only these kinds are supported: {', '.join(_REQUIRED)}.",
            fix="Choose a model without this scaling; no setting of eightgig replaces it.",
        )
    values = dict(parameters)
    if kind in ("llama3", "yarn"):
        values.setdefault(
            "original_max_position_embeddings", settings.get("max_position_embeddings")
        )
    numbers = {key: values.get(key) for key in _REQUIRED[kind]}
    numbers |= {key: values[key] for key in _OPTIONAL.get(kind, ()) if values.get(key) is not None}
    partial_factor = values.get("partial_rotary_factor")
    checked = {
        **numbers,
        "rope_theta": values["rope_theta"],
        "partial_rotary_factor": 1.0 if partial_factor is None else partial_factor,
    }
    for key, value in checked.items():
        is_flag = key == "truncate" and isinstance(value, bool)
        if not is_flag and (not is_number(value) or value <= 0):
            # Old configs have `rope_scaling` and `rope_theta` instead: what they say is shown.
            said = Settings(name=settings.name, values={"rope_parameters": checked}, defaults={})
            said.refuse("rope_parameters", f"settings with a positive number for `{key}`")
    _check_partial_factor(settings, kind, float(checked["partial_rotary_factor"]))
    return RopeSpec(
        theta=float(checked["rope_theta"]),
        kind=cast("RopeKind", kind),
        partial_factor=float(checked["partial_rotary_factor"]),
        parameters=numbers,
    )


def _check_partial_factor(settings: Settings, kind: str, partial_factor: float) -> None:
    if partial_factor > 1.0 or (kind != "proportional" and partial_factor != 1.0):
        raise ModelError(
            f"{settings.name} rotates {partial_factor:g} of each head by {kind!r} frequencies.",
            why="A part of the head is rotated only by `proportional` frequencies here.",
            fix="Choose a model that rotates whole heads.",
        )
