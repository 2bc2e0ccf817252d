"""A model by the name in the config: the embedded one, a folder, or one on the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eightgig.config import DEMO_MODEL, ModelConfig
from eightgig.demo import demo_model_path
from eightgig.models.checkpoint import read_model_spec
from eightgig.models.hub import (
    HubModel,
    disk_needs,
    download_small_files,
    find_local_model,
    find_model,
    look_up_hub_model,
)
from eightgig.models.read import require_trainable
from eightgig.models.space import check_disk
from eightgig.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundModel:
    """A base model that can be trained.

    Attributes:
        spec: What it is.
        folder: Where its config and tokenizer lie, and its weights unless `hub` is set.
        hub: Where its weights are fetched from, file by file; None where they are there.
    """

    spec: ModelSpec
    folder: Path
    hub: HubModel | None = None


def find_base_model(
    config: ModelConfig, *, store_folder: Path, show: Callable[[str], None]
) -> FoundModel:
    """Find, and if need be download, the model of `config`.

    Args:
        config: The group `model`.
        store_folder: Where the prepared weights will go: their bytes count, too.
        show: Called with a line before anything is fetched, and with one that names the parts
            that are left out (vision, audio), where there are any.

    Raises:
        ModelError: Not there, unreachable, unsupported or damaged.
        DoesNotFitError: A disk has too little space.
    """
    if config.name == DEMO_MODEL:
        found = FoundModel(
            spec=read_model_spec(demo_model_path(), name=DEMO_MODEL), folder=demo_model_path()
        )
    elif config.delete_download and find_local_model(config.name) is None:
        hub = look_up_hub_model(config.name, revision=config.revision)
        needs = disk_needs(hub, store_folder=store_folder, deletes_download=True)
        if needs:
            show(check_disk(needs))
        found = FoundModel(spec=hub.spec, folder=download_small_files(hub).path, hub=hub)
    else:
        model = find_model(
            config.name, revision=config.revision, store_folder=store_folder, show=show
        )
        found = FoundModel(spec=read_model_spec(model.path, name=config.name), folder=model.path)
    require_trainable(found.spec)
    if found.spec.skipped_parts:
        show(f"Left out of {config.name}: {', '.join(found.spec.skipped_parts)}.")
    return found
