"""What `plan` and `check` are asked about: settings, a model without its weights, a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eightgig.config import (
    DEMO_MODEL,
    Config,
    full_setting,
    read_config,
    store_folder,
    text_setting,
)
from eightgig.data.sources import find_sources
from eightgig.demo import demo_model_path
from eightgig.errors import ConfigError, ModelError
from eightgig.hardware.cards import TYPICAL_HOST_BYTES, hardware_from_card
from eightgig.hardware.probe import Hardware, probe
from eightgig.memory.workload import RowLengths
from eightgig.models.count import count_parameters
from eightgig.models.hub import (
    download_small_files,
    find_local_model,
    find_model,
    look_up_hub_model,
)
from eightgig.models.shapes import find_shape, known_shape
from eightgig.models.spec import ModelSpec
from eightgig.units import GIB, format_bytes, parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a plan is made for.

    Attributes:
        config, spec, hardware: As for `make_plan`.
        rows: What is known of the rows, None where they were not read.
        is_prepared: Whether the prepared weights are on the disk already.
        notes: What was assumed, in words.
        config_path, overrides: Where `config` was read.
    """

    config: Config
    spec: ModelSpec
    hardware: Hardware
    rows: RowLengths | None
    is_prepared: bool
    notes: tuple[str, ...] = ()
    config_path: Path | None = None
    overrides: tuple[str, ...] = ()

    def with_values(self, setting: str, values: Sequence[str]) -> dict[str, Config]:
        """The settings with each of `values` put over them.

        Raises:
            ConfigError: There is no such setting, it cannot have such a value, or it decides which
                model is planned for.
        """
        texts = {value: full_setting(f"{setting}={value}") for value in values}
        if any(text.startswith("model.") for text in texts.values()):
            raise ConfigError(
                f'"{setting}" cannot be swept.',
                why="All plans of a sweep are for one model.",
                fix="Call `eightgig plan --model` once for each.",
            )
        return {
            value: read_config(self.config_path, [*self.overrides, text])
            for value, text in texts.items()
        }


@dataclass(frozen=True, slots=True)
class CardOptions:
    """Another machine than this one.

    Attributes:
        vram: Its card: name or memory; None: this machine.
        ram: Its main memory, as a size; None: what is common.
        has_display: Whether the card draws the desktop.
    """

    vram: str | None = None
    ram: str | None = None
    has_display: bool = False


def read_request(
    config_path: Path | None,
    overrides: list[str],
    *,
    model: str | None,
    card: CardOptions,
    max_tokens: int | None,
) -> Asked:
    """What the arguments of `eightgig plan` ask about.

    Args:
        config_path: A config; None: the defaults, for `model`.
        overrides: Settings put over it.
        model: Another model than the config's.
        card: Another machine than this one.
        max_tokens: Another longest row than the config's.

    Raises:
        EightgigError: Something named does not exist or cannot be read.
    """
    overrides = [*overrides]
    if model is not None:
        overrides.append(text_setting("model.name", model))
    if max_tokens is not None:
        overrides.append(f"data.max_length={max_tokens}")
    if config_path is None and model is None:
        raise ConfigError(
            "There is nothing to plan for.",
            why="A plan is made for the model and the settings of a config.",
            fix="Name a config, or a model: eightgig plan --model google/gemma-4-12B-it.",
        )
    if config_path is None:
        overrides = ["data.path=none", *overrides]
    config = read_config(config_path, overrides)
    spec = find_shape(config.model.name, revision=config.model.revision)
    hardware, assumed = _find_machine(config, card)
    rows, is_prepared, note = (None, False, None)
    if config_path is not None and model is not None and _is_shape_alone(config.model.name):
        note = "The rows were not read: of this model only the shape is here."
    elif config_path is not None:
        rows, is_prepared, note = _read_rows(config)
    notes = [*assumed, *([] if note is None else [note]), *_fetching(config, spec)]
    return Asked(
        config=config,
        spec=spec,
        hardware=hardware,
        rows=rows,
        is_prepared=is_prepared,
        notes=tuple(notes),
        config_path=config_path,
        overrides=tuple(overrides),
    )


def _is_shape_alone(name: str) -> bool:
    """Whether `name` stands for the sizes of a model, without weights and tokenizer."""
    if name == DEMO_MODEL:
        return False
    folder = Path(name)
    is_model = folder.is_dir() and any(folder.glob("*.safetensors*"))
    return not is_model and (known_shape(name) is not None or folder.exists())


def _find_machine(config: Config, card: CardOptions) -> tuple[Hardware, list[str]]:
    """The machine that is planned for, and what was assumed of it.

    Raises:
        ConfigError: `ram` is no size, or is said of this machine.
        HardwareError: `vram` is no card.
    """
    if card.vram is None:
        if card.ram is not None or card.has_display:
            raise ConfigError(
                "--ram and --display describe another machine, and no card is named.",
                why="Without --vram the plan is for this machine, whose memory is measured.",
                fix='Add --vram "RTX 4060", or set memory.host_budget for this machine.',
            )
        machine = probe(config.memory.device)
        return machine, [_machine_words(machine)]
    machine = hardware_from_card(
        card.vram,
        has_display=card.has_display,
        host_total_bytes=TYPICAL_HOST_BYTES if card.ram is None else _size("--ram", card.ram),
    )
    assumed = [f"{format_bytes(machine.disk_free_bytes)} of free disk"]
    if not card.ram:
        assumed.insert(0, f"{format_bytes(machine.host_total_bytes)} of main memory (see --ram)")
    if not card.has_display:
        assumed.append("no desktop on the card (see --display)")
    return machine, [f"Assumed: {', '.join(assumed)}."]


def _machine_words(machine: Hardware) -> str:
    words = [f"{format_bytes(machine.host_free_bytes)} of main memory are free"]
    words.append(f"{format_bytes(machine.disk_free_bytes)} of disk")
    if machine.device == "cuda":
        words.insert(0, f"{format_bytes(machine.vram_free_bytes)} of VRAM")
    return f"This machine: {', '.join(words)}."


def _size(option: str, text: str) -> int:
    try:
        size_bytes = parse_bytes(text)
        why = f"That is {format_bytes(size_bytes)}; no such machine has less than 1 GiB."
    except ValueError as error:
        size_bytes, why = 0, f"{error}."
    if size_bytes < GIB:
        raise ConfigError(
            f'{option} cannot be "{text}".', why=why, fix=f"Write for example {option} 32GiB."
        )
    return size_bytes


def _fetching(config: Config, spec: ModelSpec) -> list[str]:
    """What the checkpoint takes beside the plan's disk, where it is not on this machine."""
    name = config.model.name
    if name == DEMO_MODEL or Path(name).expanduser().is_dir() or config.model.delete_download:
        return []
    size = format_bytes(2 * count_parameters(spec.decoder))
    return [f"The checkpoint takes about {size} of disk besides, if it is not there yet."]


def read_sweep(text: str, *, option: str = "--sweep") -> tuple[str, list[str]]:
    """Setting and values of `max_length=1024,2048`.

    Raises:
        ConfigError: It has another form.
    """
    key, _, values = text.partition("=")
    words = [word.strip() for word in values.split(",") if word.strip()]
    if not key.strip() or not words:
        raise ConfigError(
            f'{option} {text}: this is not "name=value,value,...".',
            why="It tries each value of one setting.",
            fix=f"Write for example {option} max_length=1024,2048,4096.",
        )
    return key.strip(), words


def find_tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """The tokenizer of the model of `config`; of a hub model no weights are fetched.

    Raises:
        ModelError: No such model, or no usable tokenizer.
        DataError: `data.chat_template` names no template.
    """
    from eightgig.data.tokenizer import load_tokenizer

    return load_tokenizer(_small_files(config), config.data.chat_template)


def _small_files(config: Config) -> Path:
    name, revision = config.model.name, config.model.revision
    if name == DEMO_MODEL:
        return demo_model_path()
    local = find_local_model(name)
    if local is not None:
        return local.path
    try:
        return download_small_files(look_up_hub_model(name, revision=revision)).path
    except ModelError:
        # The copy in the cache where the hub gives no answer; otherwise the same error again.
        return find_model(name, revision=revision).path


def _read_rows(config: Config) -> tuple[RowLengths | None, bool, str | None]:
    """The rows as `train` would see them, where model and data are on this machine.

    Returns:
        What is known of them, whether the model is prepared, and what was assumed instead.
    """
    if config.model.name != DEMO_MODEL and find_local_model(config.model.name) is None:
        return None, False, "The rows were not read: the model is not a folder on this machine."
    sources, faults = find_sources(config.data.path, split=config.data.split)
    if faults or any(source.kind == "datasets" for source in sources):
        return None, False, "The rows were not read: they are not files on this machine."
    from eightgig.data.load import load_dataset
    from eightgig.data.tokenizer import load_tokenizer
    from eightgig.memory.fit import row_lengths
    from eightgig.models.find import find_base_model
    from eightgig.quant.store import is_prepared

    found = find_base_model(
        config.model, store_folder=store_folder(config.model), show=lambda _: None
    )
    tokenizer = load_tokenizer(found.folder, config.data.chat_template)
    rows, held_out, _ = load_dataset(config.data, tokenizer, seed=config.train.seed)
    return row_lengths(config, rows, held_out), is_prepared(found, config.model), None
