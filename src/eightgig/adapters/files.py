"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

Written so that `PeftModel.from_pretrained` loads it onto the Transformers class of the base model;
read from anybody, so everything in it is checked and nothing in it is obeyed: no pickle, no regular
expression, no base model's name.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eightgig.adapters.tensors import (
    TensorFileError,
    read_shapes,
    read_tensors,
    tensor_parts,
)
from eightgig.config import LoraConfig
from eightgig.disk import Disk, StagedFolder, failure_cause
from eightgig.errors import ModelError, RunError
from eightgig.models.spec import MLP_LINEARS, ModelSpec, linear_shapes
from eightgig.units import MIB, format_bytes

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MAX_RANK = 1024
MAX_CONFIG_BYTES = MIB
_MAX_ALPHA = 1 << 20
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Where the same decoder hangs in other Transformers classes and versions of the same model.
_OTHER_PREFIXES = ("model", "model.language_model", "language_model.model", "language_model")
_KEY = re.compile(
    r"base_model\.model\.(?P<prefix>[A-Za-z_.]{1,100})\.layers\.(?P<layer>[0-9]{1,5})"
    r"\.(?P<module>(?:self_attn|mlp)\.[a-z]+_proj)\.lora_(?P<part>[AB])\.weight"
)
# Settings of PEFT that we read, that say nothing about the result once the tensors are there, or
# that have a value of their own which means "not used". Any other must be empty: it would change
# what the tensors mean.
_READ_SETTINGS = frozenset({"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora"})
_HARMLESS_SETTINGS = frozenset(
    {
        "arrow_config", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
        "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
        "layers_to_transform", "megatron_core", "peft_version", "qalora_group_size", "revision",
        "runtime_config", "target_modules", "task_type",
    }
)  # fmt: skip
_NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # The others (pissa, olora, loftq, corda, ...) change the base weights, too.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterFolder:
    """What an adapter folder holds.

    Attributes:
        lora: Its settings; `target_modules` names exactly the linears that it adapts.
        tensors: `layers.{i}.{module}.lora_A` (r, in) and `.lora_B` (out, r), float32.
    """

    lora: LoraConfig
    tensors: Mapping[str, Tensor]


def write_adapter(
    folder: Path,
    *,
    spec: ModelSpec,
    lora: LoraConfig,
    tensors: Mapping[str, Tensor],
    files: Mapping[str, bytes],
    disk: Disk | None = None,
) -> None:
    """Write an adapter in PEFT's format; `folder` appears whole or stays as it was.

    Args:
        folder: Where to write; what stands there is replaced.
        spec: The base model.
        lora: Settings of the adapter.
        tensors: As in `AdapterFolder.tensors`.
        files: Further files by plain name: tokenizer, chat template, model card.
        disk: The operations to write with.

    Raises:
        ModelError: A tensor holds NaN or infinity.
        RunError: The folder cannot be written.
    """
    modules = _adapted_modules(tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problem = _first_problem(spec, shapes, rank=lora.r)
    assert problem is None, problem
    odd = [name for name in files if Path(name).name != name or name == WEIGHTS_NAME]
    assert not odd, f"{odd} are no plain names of further files"
    wrong = first_non_finite(tensors)
    if wrong is not None:
        raise ModelError(
            f"The adapter was not written: {wrong} holds NaN or infinity.",
            why="Such an adapter makes every answer empty or random.",
            fix="Go on from an earlier checkpoint with a lower train.learning_rate.",
        )
    settings = _settings(spec, lora, _targets(spec, modules))
    contents = {**files, CONFIG_NAME: (json.dumps(settings, indent=2) + "\n").encode("utf-8")}
    named = {_peft_key(spec.module_prefix, name): tensor for name, tensor in tensors.items()}
    try:
        staged = StagedFolder(folder, disk or Disk())
        try:
            for name, content in contents.items():
                staged.write(name, [content])
            staged.write(WEIGHTS_NAME, tensor_parts(named))
            staged.publish()
        except OSError:
            staged.discard()
            raise
    except OSError as error:
        raise RunError(
            f"The adapter was not written to {folder}: {failure_cause(error)}.",
            why="Nothing is lost: the last checkpoint holds the same numbers.",
            fix="Free disk space or mend the disk, then run the same command with --resume.",
        ) from error
    with suppress(OSError):
        # The adapter is there; what it replaced takes space and does no harm.
        staged.remove_replaced()


def read_adapter(folder: Path, spec: ModelSpec) -> AdapterFolder:
    """Read an adapter folder written by PEFT or by `write_adapter`.

    Args:
        folder: The folder; a snapshot in the hub's cache is one.
        spec: The base model it shall be put on.

    Raises:
        ModelError: It is missing, damaged, not of this model, or uses what eightgig has not.
    """
    settings = _read_settings(folder)
    lora = _lora_of(folder, settings)
    path = _checked_path(folder, WEIGHTS_NAME)
    try:
        names = _checked_names(folder, spec, rank=lora.r, shapes=read_shapes(path))
        stored = read_tensors(path)
    except (TensorFileError, OSError) as error:
        raise _refusal(folder, f"{WEIGHTS_NAME} cannot be read: {error}") from error
    tensors = _as_float32(folder, {names[key]: tensor for key, tensor in stored.items()})
    return AdapterFolder(lora=_with_targets(lora, spec, tensors), tensors=tensors)


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def _refusal(folder: Path, what: str, *, why: str = "", fix: str = "") -> ModelError:
    return ModelError(
        f"The adapter in {folder} is not usable: {what}.",
        why=why or "An adapter that is only half understood would answer wrongly.",
        fix=fix or "Use a plain LoRA adapter of this base model, as PEFT saves it.",
    )


def _peft_key(module_prefix: str, name: str) -> str:
    return f"base_model.model.{module_prefix}.{name}.weight"


def _checked_names(
    folder: Path, spec: ModelSpec, *, rank: int, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Our name of every key of the file; refuses a file that does not fit the model."""
    modules = _module_shapes(spec)
    prefixes = {spec.module_prefix, *_OTHER_PREFIXES}
    names: dict[str, str] = {}
    for key in shapes:
        match = _KEY.fullmatch(key)
        module = f"layers.{int(match['layer'])}.{match['module']}" if match else ""
        if match is None or match["prefix"] not in prefixes or module not in modules:
            raise _refusal(
                folder,
                f"{key[:120]!r} is no LoRA tensor of the model's decoder",
                why="It was made for another model, or adapts more than the decoder's linears.",
            )
        names[key] = f"{module}.lora_{match['part']}"
    if len(set(names.values())) < len(names):
        raise _refusal(folder, "it holds the same tensor under two names")
    problem = _first_problem(
        spec, {name: tuple(shapes[key]) for key, name in names.items()}, rank=rank
    )
    if problem is not None:
        raise _refusal(folder, problem, why="It was made for another model or rank.")
    return names


def _module_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of every linear that can be adapted: `layers.3.self_attn.q_proj`."""
    return {
        f"layers.{layer.index}.{'mlp' if name in MLP_LINEARS else 'self_attn'}.{name}": shape
        for layer in spec.decoder.layers
        for name, shape in linear_shapes(spec.decoder, layer).items()
    }


def _adapted_modules(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in names})


def _first_problem(
    spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], *, rank: int
) -> str | None:
    """What keeps tensors of these shapes from being an adapter of rank `rank` on this model."""
    if not shapes:
        return "it holds no tensor"
    linears = _module_shapes(spec)
    for module in _adapted_modules(shapes):
        if module not in linears:
            return f"the model has no linear {module}"
        out_size, in_size = linears[module]
        for part, expected in (("lora_A", (rank, in_size)), ("lora_B", (out_size, rank))):
            found = shapes.get(f"{module}.{part}")
            if found is None:
                return f"{module} has no {part}"
            if found != expected:
                return f"{module}.{part} is {found}, expected {expected}"
    return None


def _targets(spec: ModelSpec, modules: list[str]) -> str | list[str]:
    """`target_modules` by which PEFT finds exactly `modules` on the Transformers class."""
    names = sorted({module.rpartition(".")[2] for module in modules})
    every = [module for module in _module_shapes(spec) if module.rpartition(".")[2] in names]
    if len(every) > len(modules):
        paths = "|".join(re.escape(module) for module in modules)
        return rf"(?:.*\.)?{re.escape(spec.module_prefix)}\.(?:{paths})"
    if "language_model" not in spec.module_prefix:
        return names
    # Vision and audio towers have linears of the same names.
    short = "|".join(name.removesuffix("_proj") for name in names)
    return rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({short})_proj"


def _settings(spec: ModelSpec, lora: LoraConfig, targets: str | list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.name,
        "revision": None,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": targets,
        "use_rslora": lora.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "auto_mapping": None,
    }


def _checked_path(folder: Path, name: str) -> Path:
    """Path of a file of the folder; links may lead to the hub's cache of it, nowhere else."""
    path = folder / name
    if not path.exists():
        pickled = sorted(folder.glob("adapter_model*.bin")) if folder.is_dir() else []
        if pickled and name == WEIGHTS_NAME:
            raise _refusal(
                folder,
                f"its weights are a pickle ({pickled[0].name})",
                why="A pickle can run any program when it is opened.",
                fix="Have it saved again with safetensors (PEFT does so by default).",
            )
        raise _refusal(folder, f"{name} is missing", why="PEFT's adapters have this file.")
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parents[1] / "blobs")
    resolved = path.resolve()
    if not resolved.is_file() or not any(resolved.is_relative_to(root) for root in allowed):
        raise _refusal(folder, f"{name} is no regular file inside the folder")
    return resolved


def _read_settings(folder: Path) -> dict[str, Any]:
    path = _checked_path(folder, CONFIG_NAME)
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_CONFIG_BYTES:
            raise _refusal(folder, f"{CONFIG_NAME} has {format_bytes(size_bytes)}")
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise _refusal(folder, f"{CONFIG_NAME} cannot be read ({type(error).__name__})") from error
    if not isinstance(settings, dict):
        raise _refusal(folder, f"{CONFIG_NAME} is no JSON object")
    return settings


def _lora_of(folder: Path, settings: Mapping[str, Any]) -> LoraConfig:
    """The settings we know; refuses every other that is in use."""
    if settings.get("peft_type") != "LORA":
        raise _refusal(folder, f"its peft_type is {settings.get('peft_type')!r}, not LORA")
    for name in sorted(set(settings) - _READ_SETTINGS - _HARMLESS_SETTINGS):
        value = settings[name]
        if value and value not in _NEUTRAL_VALUES.get(name, ()):
            raise _refusal(folder, f"it uses {name} ({str(value)[:60]!r})")
    r = _whole_number(settings.get("r"), MAX_RANK)
    alpha = _whole_number(settings.get("lora_alpha"), _MAX_ALPHA)
    dropout = settings.get("lora_dropout", 0.0)
    use_rslora = settings.get("use_rslora", False)
    if r is None:
        raise _refusal(folder, f"its r is not a whole number from 1 to {MAX_RANK}")
    if alpha is None:
        raise _refusal(folder, f"its lora_alpha is not a whole number from 1 to {_MAX_ALPHA}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise _refusal(folder, "its lora_dropout is not a number from 0 to 1")
    if not isinstance(use_rslora, bool):
        raise _refusal(folder, "its use_rslora is neither true nor false")
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=float(dropout), use_rslora=use_rslora)


def _whole_number(value: Any, highest: int) -> int | None:
    """`value` as an int from 1 to `highest`; None when it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if 1 <= value <= highest and value == int(value) else None


def _as_float32(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise _refusal(folder, f"{name} is {tensor.dtype}")
    wrong = first_non_finite(tensors)
    if wrong is not None:
        raise _refusal(folder, f"{wrong} holds NaN or infinity")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _with_targets(lora: LoraConfig, spec: ModelSpec, names: Iterable[str]) -> LoraConfig:
    targets = _targets(spec, _adapted_modules(names))
    return dataclasses.replace(
        lora, target_modules=targets if isinstance(targets, str) else tuple(targets)
    )
