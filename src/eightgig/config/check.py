"""Values that are of the right type and yet cannot be, and settings without effect."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from eightgig.config.paths import looks_like_path
from eightgig.config.settings import AUTO, DEMO_MODEL, Config, DataConfig, TrainConfig
from eightgig.units import MIB

_NO_EFFECT = "A setting that does nothing is refused, so that nobody relies on it."
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_SAFE_NAME = re.compile(r"[^\W_](?:[\w. -]{0,98}[\w-])?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One value that cannot stand.

    Attributes:
        setting: `group.name` of the setting that is named.
        message, why, fix: As in `Finding`.
        involved: Other settings that the judgement rests on.
        code: End of the finding's code.
    """

    setting: str
    message: str
    why: str
    fix: str
    involved: tuple[str, ...] = ()
    code: str = "impossible_value"


def _texts(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rule:
    settings: tuple[str, ...]
    is_possible: Callable[[Any], bool]
    fix: str
    why: str = "Training could not start, or would end in nonsense."


_RULES = (
    _Rule(
        settings=(
            "lora.r",
            "train.per_device_train_batch_size",
            "train.gradient_accumulation_steps",
            "memory.layer_slots",
            "memory.micro_batch_tokens",
            "memory.micro_batches_per_visit",
            "memory.mlp_tile_tokens",
            "run.save_total_limit",
        ),
        is_possible=lambda value: value >= 1,
        fix="Write a whole number of 1 or more.",
    ),
    _Rule(
        settings=(
            "lora.lora_alpha",
            "train.num_train_epochs",
            "train.learning_rate",
            "train.adam_epsilon",
        ),
        is_possible=lambda value: value > 0,
        fix="Write a number above 0.",
    ),
    _Rule(
        settings=(
            "train.weight_decay",
            "train.max_grad_norm",
            "train.warmup_steps",
            "train.seed",
            "train.early_stopping_patience",
            "run.save_steps",
            "run.save_minutes",
            "run.eval_steps",
        ),
        is_possible=lambda value: value >= 0,
        fix="Write 0 or more.",
    ),
    _Rule(
        settings=("lora.lora_dropout", "train.adam_beta1", "train.adam_beta2"),
        is_possible=lambda value: 0 <= value < 1,
        fix="Write a share from 0 to below 1.",
    ),
    _Rule(
        settings=("train.warmup_ratio",),
        is_possible=lambda value: 0 <= value <= 1,
        fix="Write a share from 0 to 1.",
    ),
    _Rule(
        settings=("train.max_steps",),
        is_possible=lambda value: value == -1 or value >= 1,
        fix="Write 1 or more, or -1 to let num_train_epochs decide.",
    ),
    _Rule(
        settings=("run.pause_above_celsius",),
        is_possible=lambda value: value == 0 or 40 <= value <= 110,
        fix="Write degrees from 40 to 110, or 0 for no pause.",
        why="Below 40 °C a card that works would never go on; above 110 °C it is off already.",
    ),
    _Rule(
        settings=("data.max_length",),
        is_possible=lambda value: value >= 2,
        fix='Write a number of tokens of 2 or more, or "auto".',
        why="A token can only be learned from the one before it.",
    ),
    _Rule(
        settings=("data.held_out",),
        is_possible=lambda value: 0 <= value < 1 or value == int(value) >= 1,
        fix="Write a share below 1, such as 0.05, or a whole number of rows.",
        why="Rows are held out by share or by number.",
    ),
    _Rule(
        settings=("memory.budget", "memory.host_budget"),
        is_possible=lambda value: value >= MIB,
        fix='Write it with its unit, such as "8GiB".',
        why="A plain number is a number of bytes.",
    ),
    _Rule(
        settings=("model.name", "data.path", "data.split", "model.cache_dir", "run.output_dir"),
        is_possible=lambda value: (
            bool(_texts(value)) and all(part.strip() for part in _texts(value))
        ),
        fix="Write a name or a path.",
        why="It is empty.",
    ),
)


def find_problems(config: Config) -> list[Problem]:
    """Every value of `config` that cannot be, or does nothing."""
    checks = (_out_of_range, _bad_names, _idle_data, _idle_training, _idle_model)
    return [problem for check in checks for problem in check(config)]


def is_safe_name(name: str) -> bool:
    """Whether `name` can be a folder's name on every system and stays where it is put."""
    return _SAFE_NAME.fullmatch(name) is not None and _RESERVED.fullmatch(name) is None


def _out_of_range(config: Config) -> Iterator[Problem]:
    for rule in _RULES:
        for setting in rule.settings:
            group, _, name = setting.partition(".")
            value = getattr(getattr(config, group), name)
            if value != AUTO and not rule.is_possible(value):
                found = "empty" if isinstance(value, tuple | str) else f"{value:g}"
                yield Problem(
                    setting=setting, message=f'"{name}" is {found}.', why=rule.why, fix=rule.fix
                )


def _bad_names(config: Config) -> Iterator[Problem]:
    if not is_safe_name(config.run.name):
        yield Problem(
            setting="run.name",
            message=f'"name" is "{config.run.name}", which cannot be the name of a folder.',
            why="The run is written into the folder of this name, and nowhere else.",
            fix="Use letters, digits, dots, dashes and underscores; begin with a letter or digit.",
        )
    targets = config.lora.target_modules
    if targets == "all-linear":
        yield Problem(
            setting="lora.target_modules",
            message='"target_modules" is "all-linear".',
            why="A single text is a regular expression over module paths here.",
            fix="Delete the line: the seven linears of every layer are the default.",
        )
    elif isinstance(targets, str):
        yield from _bad_expression(targets)
    elif not targets or not all(name.strip() for name in targets):
        yield Problem(
            setting="lora.target_modules",
            message='"target_modules" names no linear.',
            why="Without one there is nothing to train.",
            fix="List names such as q_proj, or delete the line for all seven.",
        )


def _bad_expression(expression: str) -> Iterator[Problem]:
    try:
        re.compile(expression)
        fault = "empty" if not expression.strip() else ""
    except re.error as error:
        fault = str(error)
    if fault:
        yield Problem(
            setting="lora.target_modules",
            message=f'"target_modules" is not a regular expression: {fault}.',
            why="A single text is a regular expression over module paths.",
            fix="Mend it, or write a list of names such as [q_proj, v_proj].",
        )


def _idle_data(config: Config) -> Iterator[Problem]:
    data, default = config.data, DataConfig(path="")
    has_own_held_out = data.held_out_path is not None
    if has_own_held_out and data.held_out not in (default.held_out, 0):
        yield _idle("data.held_out", "data.held_out_path", "the held-out rows come from that file")
    if data.group_column is not None and has_own_held_out:
        yield _idle("data.group_column", "data.held_out_path", "there is no split to keep it on")
    elif data.group_column is not None and data.held_out == 0:
        yield _idle("data.group_column", "data.held_out", "no row is held out")
    if data.format == "text" and data.train_on == "last_assistant":
        yield _idle("data.train_on", "data.format", "plain text has no turns")
    if data.format == "text" and data.chat_template is not None:
        yield _idle("data.chat_template", "data.format", "plain text is not rendered")
    if data.split != default.split and any(looks_like_path(path) for path in _texts(data.path)):
        yield _idle("data.split", "data.path", "a file has no splits")


def _idle_training(config: Config) -> Iterator[Problem]:
    train, default = config.train, TrainConfig()
    if train.warmup_steps > 0 and train.warmup_ratio not in (default.warmup_ratio, 0):
        yield _idle("train.warmup_ratio", "train.warmup_steps", "the steps decide")
    if train.early_stopping_patience > 0:
        if config.data.held_out == 0 and config.data.held_out_path is None:
            yield _idle("train.early_stopping_patience", "data.held_out", "no row is held out")
        elif config.run.eval_steps == 0:
            why = "the held-out loss is only measured at the end"
            yield _idle("train.early_stopping_patience", "run.eval_steps", why)
    if config.memory.device == "cpu" and config.memory.kernels == "triton":
        yield _idle("memory.kernels", "memory.device", "Triton's kernels need a GPU")


def _idle_model(config: Config) -> Iterator[Problem]:
    model = config.model
    if not (looks_like_path(model.name) or model.name == DEMO_MODEL):
        return
    if model.revision is not None:
        yield _idle("model.revision", "model.name", "a folder has no revisions")
    if model.delete_download:
        yield _idle("model.delete_download", "model.name", "nothing is downloaded")


def _idle(setting: str, other: str, because: str) -> Problem:
    group, _, name = setting.partition(".")
    shown = other.partition(".")[2] if other.startswith(f"{group}.") else other
    return Problem(
        setting=setting,
        message=f'"{name}" has no effect beside this "{shown}": {because}.',
        why=_NO_EFFECT,
        fix=f'Delete one of "{name}" and "{shown}".',
        involved=(other,),
        code="no_effect",
    )
