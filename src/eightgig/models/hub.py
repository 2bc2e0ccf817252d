"""Finding a model: a local folder as it is, a hub id through huggingface_hub and its cache.

For a hub id, config and headers come first: an unsupported family, a damaged checkpoint or a full
disk is reported before gigabytes are fetched. Then only the files that are needed follow.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightgig.errors import ModelError
from eightgig.models.checkpoint import check_model_spec, read_config, read_model_spec
from eightgig.models.headers import (
    INDEX_FILE,
    SINGLE_FILE,
    no_safetensors_error,
    read_header,
    read_tensor_specs,
    read_weight_map,
)
from eightgig.models.hub_errors import explained_hub_errors
from eightgig.models.read import parse_model_spec
from eightgig.models.space import DiskNeed, check_disk, estimate_store_bytes
from eightgig.models.spec import ModelSpec, TensorSpec

_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template*", INDEX_FILE, "README.md",
    # Not for training: merged exports carry them.
    "*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolder:
    """A model on this machine.

    Attributes:
        name: As the user wrote it.
        path: Folder with config.json, safetensors and tokenizer.
        commit: Of the hub repository, None for a local folder.
    """

    name: str
    path: Path
    commit: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFile:
    """A file of a hub repository that is needed, and whether the cache has it."""

    name: str
    size_bytes: int
    is_cached: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class HubModel:
    """A model on the hub, known by its config and headers.

    Attributes:
        spec: The model; its tensors lie where the downloaded files will have them.
        commit: Commit of the repository.
        files: What is needed of it.
    """

    spec: ModelSpec
    commit: str
    files: tuple[HubFile, ...]

    @property
    def download_bytes(self) -> int:
        """Bytes that the cache does not have yet."""
        return sum(file.size_bytes for file in self.files if not file.is_cached)

    @property
    def weight_files(self) -> tuple[HubFile, ...]:
        """The safetensors files, in order."""
        return tuple(file for file in self.files if file.name.endswith(".safetensors"))


def find_model(
    name: str,
    *,
    revision: str | None = None,
    store_folder: Path | None = None,
    show: Callable[[str], None] = lambda _: None,
) -> ModelFolder:
    """The folder of the model `name`, downloaded if need be.

    Args:
        name: A folder, or a hub id such as `google/gemma-4-12B-it`.
        revision: Branch, tag or commit on the hub.
        store_folder: Where the prepared weights will go: their bytes are checked together with
            the download's. None: only the download is.
        show: Called with one line before anything is fetched: the bytes needed and free.

    Raises:
        ModelError: No such folder or repository, gated, unreachable, unsupported or damaged.
        DoesNotFitError: A disk has too little space.
    """
    if (folder := find_local_model(name)) is not None:
        return folder
    try:
        model = look_up_hub_model(name, revision=revision)
    except ModelError as error:
        cached = _find_cached_model(name, revision=revision)
        if cached is None:
            raise
        show(f"The hub gave no answer ({error.why}) The copy in its cache is used: {cached.path}")
        return cached
    needs = disk_needs(model, store_folder=store_folder)
    if needs:
        show(check_disk(needs))
    return download_model(model)


def find_local_model(name: str) -> ModelFolder | None:
    """The folder `name`, None if it is a hub id.

    Raises:
        ModelError: It looks like a path, and there is no such folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelFolder(name=name, path=path)
    if _HUB_ID.fullmatch(name) is None or path.exists():
        read_config(path)
    return None


def look_up_hub_model(name: str, *, revision: str | None = None) -> HubModel:
    """What the hub says about a model; fetches its config and headers, no weights.

    Raises:
        ModelError: No such repository, gated, unreachable, unsupported or damaged.
    """
    import huggingface_hub

    with explained_hub_errors(name, revision=revision):
        info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
        sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
        commit = str(info.sha)
        weights = _weight_files(name, commit, sizes)
        _refuse_missing(name, [file for file in weights if file not in sizes])
        folder = _fetch(name, commit, "config.json").parent
        config = read_config(folder)
        parse_model_spec(config, name=name)  # another family: said before the headers are fetched
        if all(_is_cached(name, commit, file) for file in weights):
            tensors = read_tensor_specs(folder)
        else:
            metadata = huggingface_hub.HfApi().get_safetensors_metadata(name, revision=commit)
            tensors = _tensor_specs(metadata.files_metadata, sizes, set(weights))
    spec = parse_model_spec(config, name=name, tensors=tensors)
    card = info.card_data
    license_name = getattr(card, "license", None)
    spec = check_model_spec(
        dataclasses.replace(spec, license=license_name if isinstance(license_name, str) else None)
    )
    needed = [*weights, *(file for file in sizes if _is_small_file(file))]
    files = tuple(
        HubFile(name=file, size_bytes=sizes[file], is_cached=_is_cached(name, commit, file))
        for file in needed
    )
    return HubModel(spec=spec, commit=commit, files=files)


def disk_needs(
    model: HubModel, *, store_folder: Path | None, deletes_download: bool = False
) -> list[DiskNeed]:
    """What download and prepared weights will take, for `check_disk`.

    Args:
        model: The model on the hub.
        store_folder: Where the prepared weights will go, None: not counted.
        deletes_download: Shards are fetched and deleted one by one (`release_file`).
    """
    from huggingface_hub import constants

    needs = []
    missing = [file.size_bytes for file in model.files if not file.is_cached]
    if missing:
        needed_bytes = max(missing) if deletes_download else sum(missing)
        cache = Path(constants.HF_HUB_CACHE)
        needs.append(_disk_need("the download", cache, needed_bytes))
    if store_folder is not None:
        store_bytes = estimate_store_bytes(model.spec, copies_tables=deletes_download)
        needs.append(_disk_need("the prepared model", store_folder, store_bytes))
    return needs


def download_model(model: HubModel) -> ModelFolder:
    """Fetch the needed files that the cache lacks; resumes what was begun.

    Raises:
        ModelError: The hub cannot be reached or refuses.
        DoesNotFitError: The disk became full.
    """
    return _download(model, model.files)


def download_small_files(model: HubModel) -> ModelFolder:
    """Fetch everything but the weights, for those who take these one by one (`fetch_file`).

    Raises:
        ModelError: The hub cannot be reached or refuses.
        DoesNotFitError: The disk became full.
    """
    return _download(model, [file for file in model.files if file not in model.weight_files])


def fetch_file(model: HubModel, file_name: str) -> Path:
    """One file of the model, from the cache or the hub.

    Raises:
        ModelError: The hub cannot be reached or refuses, or the file's header is not the one that
            the hub announced.
        DoesNotFitError: The disk became full.
    """
    with explained_hub_errors(model.spec.name):
        path = _fetch(model.spec.name, model.commit, file_name)
    if file_name.endswith(".safetensors"):
        announced = {
            name: spec for name, spec in model.spec.tensors.items() if spec.file == file_name
        }
        if not announced.items() <= read_header(path).items():
            raise ModelError(
                f"{path} is not what the hub announced.",
                why="Its header differs from the one that was read before the download.",
                fix="Delete the file and start again.",
            )
    return path


def release_file(model: HubModel, path: Path) -> None:
    """Delete a file of `fetch_file`; one that was in the cache before stays: it may be needed."""
    if path.name not in {file.name for file in model.files if file.is_cached}:
        delete_file(path)


def delete_file(path: Path) -> None:
    """Remove a file from the hub's cache, with its blob unless another snapshot uses that."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    snapshots = path.parent.parent
    if blob != path and not any(link.resolve() == blob for link in snapshots.glob("*/*")):
        blob.unlink(missing_ok=True)


def _download(model: HubModel, files: Sequence[HubFile]) -> ModelFolder:
    import huggingface_hub

    name = model.spec.name
    with explained_hub_errors(name):
        folder = huggingface_hub.snapshot_download(
            name,
            revision=model.commit,
            allow_patterns=[glob.escape(file.name) for file in files],
        )
    return ModelFolder(name=name, path=Path(folder), commit=model.commit)


def _fetch(name: str, commit: str, file_name: str) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.hf_hub_download(name, file_name, revision=commit))


def _weight_files(name: str, commit: str, sizes: Mapping[str, int]) -> list[str]:
    """The safetensors files of the checkpoint, in order."""
    if SINGLE_FILE in sizes:
        return [SINGLE_FILE]
    if INDEX_FILE in sizes:
        return sorted(set(read_weight_map(_fetch(name, commit, INDEX_FILE)).values()))
    raise no_safetensors_error(sizes.keys(), name)


def _refuse_missing(name: str, missing: list[str]) -> None:
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} files on the hub, such as {missing[0]}.",
            why=f"Its {INDEX_FILE} says that they hold weights.",
            fix="Choose another revision (`model.revision`) or another copy of the model.",
        )


def _tensor_specs(
    files: Mapping[str, Any], sizes: Mapping[str, int], weights: set[str]
) -> dict[str, TensorSpec]:
    """Where tensors will lie: data ends with the file, so it starts that much before its end."""
    specs: dict[str, TensorSpec] = {}
    for file_name in sorted(weights & files.keys()):
        tensors = files[file_name].tensors
        data_bytes = max((info.data_offsets[1] for info in tensors.values()), default=0)
        start_bytes = sizes[file_name] - data_bytes
        specs |= {
            name: TensorSpec(
                file=file_name,
                dtype=str(info.dtype),
                shape=tuple(info.shape),
                offset_bytes=start_bytes + info.data_offsets[0],
                size_bytes=info.data_offsets[1] - info.data_offsets[0],
            )
            for name, info in tensors.items()
        }
    return specs


def _is_small_file(file_name: str) -> bool:
    is_named = any(fnmatch.fnmatchcase(file_name, pattern) for pattern in _SMALL_FILES)
    return is_named and "/" not in file_name


def _is_cached(name: str, commit: str, file_name: str) -> bool:
    import huggingface_hub

    return isinstance(huggingface_hub.try_to_load_from_cache(name, file_name, revision=commit), str)


def _find_cached_model(name: str, *, revision: str | None) -> ModelFolder | None:
    """A whole copy in the hub's cache, for when the hub is out of reach."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
        read_model_spec(Path(folder), name=name)
    except (errors.LocalEntryNotFoundError, ModelError):
        return None
    return ModelFolder(name=name, path=Path(folder), commit=Path(folder).name)


def _disk_need(purpose: str, folder: Path, needed_bytes: int) -> DiskNeed:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return DiskNeed(
        purpose=purpose,
        folder=folder,
        needed_bytes=needed_bytes,
        free_bytes=shutil.disk_usage(existing).free,
        disk=existing.stat().st_dev,
    )
