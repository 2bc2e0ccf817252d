"""A prepared model on disk: one file per decoder layer, tables mapped where they lie.

`open_store` is the door: it finds the store of a model or has it built (`quant.build`).
"""

from __future__ import annotations

import hashlib
import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor

from eightgig.config import ModelConfig, store_folder
from eightgig.errors import ConfigError, ModelError
from eightgig.models.spec import ModelSpec
from eightgig.quant.build import MANIFEST_FILE, Download, Progress, check_room, prepare_store
from eightgig.quant.layout import ITEM_BYTES
from eightgig.quant.manifest import FORMAT_VERSION, Manifest, StoredTable
from eightgig.quant.mapping import map_file, tensor_bytes
from eightgig.quant.nf4 import dtype_of
from eightgig.quant.parts import store_key
from eightgig.run import from_json

if TYPE_CHECKING:
    from eightgig.models.find import FoundModel


class Store:
    """The prepared weights of one model, mapped read-only: writing to a tensor ends the process.

    Attributes:
        folder: Where the store lies.
        manifest: What it holds.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._maps: dict[Path, Tensor] = {}
        self._checked: set[str] = set()

    @classmethod
    def open(cls, folder: Path) -> Store:
        """The store in `folder`, after a check of its manifest and of the sizes of its files.

        Raises:
            ModelError: There is none, of another version, or a file is missing or too short.
        """
        store = cls(folder, _read_manifest(folder))
        manifest = store.manifest
        sizes = {folder / blob.file: blob.size_bytes for blob in manifest.layers}
        sizes[folder / manifest.other_file] = 1
        for table in filter(None, (manifest.embedding, manifest.head, manifest.ple)):
            path = store._table_path(table)
            sizes[path] = max(sizes.get(path, 0), table.offset_bytes + _table_bytes(table))
        for path, size_bytes in sizes.items():
            found_bytes = path.stat().st_size if path.is_file() else 0
            is_blob = path.suffix == ".blob"
            if found_bytes < size_bytes or (is_blob and found_bytes != size_bytes):
                raise _damaged(
                    folder, f"{path} has {found_bytes:,} bytes instead of {size_bytes:,}"
                )
        return store

    @property
    def embedding(self) -> Tensor:
        """The token embedding, (V, D), in the checkpoint's dtype."""
        return self._table(self.manifest.embedding)

    @property
    def head(self) -> Tensor:
        """The output embedding, (V, D); the same memory as `embedding` when tied."""
        return self._table(self.manifest.head)

    @property
    def ple(self) -> Tensor | None:
        """The per-layer embedding, (V, L * ple_size); None where there is none."""
        return None if self.manifest.ple is None else self._table(self.manifest.ple)

    def blob(self, index: int) -> Tensor:
        """Layer `index` as it is in the file, uint8 (size_bytes,)."""
        return self._map(self.folder / self.manifest.layers[index].file)

    def check(self, index: int) -> None:
        """Compare layer `index` with its checksum; what was right once is not read again.

        Raises:
            ModelError: The file has changed since it was written.
        """
        blob = self.manifest.layers[index]
        if blob.file in self._checked:
            return
        if hashlib.sha256(tensor_bytes(self.blob(index))).hexdigest() != blob.sha256:
            raise _damaged(self.folder, f"{blob.file} does not match its checksum")
        self._checked.add(blob.file)

    def other(self) -> dict[str, Tensor]:
        """What stands outside the layers: `final_norm` (float32, with the family's offset), and
        with a per-layer embedding `ple_model_projection` and `ple_model_norm`.

        Raises:
            ModelError: The file is damaged.
        """
        path = self.folder / self.manifest.other_file
        try:
            tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise _damaged(self.folder, f"{path.name}: {error}") from error
        return tensors

    def _table(self, table: StoredTable) -> Tensor:
        data = self._map(self._table_path(table))
        part = data[table.offset_bytes : table.offset_bytes + _table_bytes(table)]
        return part.view(dtype_of(table.dtype)).view(table.shape)

    def _table_path(self, table: StoredTable) -> Path:
        return self.folder / table.file  # an absolute path replaces the folder

    def _map(self, path: Path) -> Tensor:
        if path not in self._maps:
            self._maps[path] = map_file(path)
        return self._maps[path]


def open_store(
    spec: ModelSpec,
    checkpoint: Path | Download,
    config: ModelConfig,
    *,
    device: torch.device | str,
    progress: Progress | None = None,
) -> Store:
    """The store of a model, prepared first if it is not there.

    Args:
        spec: The model, with the tensors of its checkpoint.
        checkpoint: Its folder; with `delete_download` how to get it file by file.
        config: Where stores are kept, and how linears are.
        device: Where to quantise.
        progress: See `prepare_store`.

    Raises:
        ConfigError: `delete_download` is set, and the checkpoint is a folder of one's own; or the
            cache folder cannot be written.
        DoesNotFitError: The disk has not enough room.
        RunError: Another process is preparing this store.
        ModelError: The checkpoint, or the store found, is damaged.
    """
    _refuse_deletion(spec, checkpoint, config)
    folder = prepare_store(
        spec,
        checkpoint,
        cache_dir=store_folder(config),
        quantization=config.quantization,
        device=torch.device(device),
        progress=progress,
    )
    return Store.open(folder)


def check_store(spec: ModelSpec, checkpoint: Path | Download, config: ModelConfig) -> None:
    """Refuse at once what `open_store` would refuse before its first byte, see there."""
    _refuse_deletion(spec, checkpoint, config)
    cache_dir = store_folder(config)
    check_room(spec, checkpoint, cache_dir=cache_dir, quantization=config.quantization)


def is_prepared(found: FoundModel, config: ModelConfig) -> bool:
    """Whether `open_store` would find the store of `found` complete."""
    key = store_key(
        found.spec, found.folder, config.quantization, copies_tables=found.hub is not None
    )
    return (store_folder(config) / key / MANIFEST_FILE).exists()


def _refuse_deletion(spec: ModelSpec, checkpoint: Path | Download, config: ModelConfig) -> None:
    if config.delete_download and isinstance(checkpoint, Path):
        raise ConfigError(
            f"`model.delete_download` cannot be used with {spec.name}.",
            why="It deletes what was downloaded; this model is a folder of yours.",
            fix="Remove `model.delete_download`, or set `model.name` to a hub id.",
        )


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    try:
        values = json.loads(path.read_bytes())
    except OSError:
        raise _damaged(folder, f"{path.name} cannot be read") from None
    except ValueError:
        raise _damaged(folder, f"{path.name} is no JSON") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise _damaged(folder, f"its format is {version}, this eightgig reads {FORMAT_VERSION}")
    try:
        return from_json(Manifest, values)
    except ValueError as error:
        raise _damaged(folder, f"{path.name}: {error}") from None


def _table_bytes(table: StoredTable) -> int:
    return prod(table.shape) * ITEM_BYTES[table.dtype]


def _damaged(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"The prepared weights in {folder} cannot be used.",
        why=f"{why}.",
        fix=f"Delete the folder {folder} and run the command again: it is prepared anew.",
    )
