"""Preparing a store: checkpoint in, one file per decoder layer out, finished files kept.

Each file is written beside its place, flushed and renamed, the manifest last: a store without one
is unfinished and is gone on with. At any time one tensor and one layer are in memory; the
checkpoint itself is mapped.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

from eightgig.errors import ConfigError, DoesNotFitError, RunError
from eightgig.models.checkpoint import other_tensor_names
from eightgig.models.layout import other_tensor_shapes
from eightgig.models.read import WEIGHT_DTYPES
from eightgig.models.spec import ModelSpec
from eightgig.quant.layout import Quantization
from eightgig.quant.manifest import FORMAT_VERSION, Manifest, StoredBlob, StoredTable
from eightgig.quant.parts import (
    OTHER_FILE,
    Part,
    download_peak_bytes,
    file_bytes,
    in_download_order,
    needed_files,
    own_tables,
    store_key,
    store_parts,
    table_header,
)
from eightgig.quant.source import CheckpointSource
from eightgig.quant.writer import PartWriter, finished_path, read_finished
from eightgig.run import write_json
from eightgig.units import format_bytes

MANIFEST_FILE = "manifest.json"
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """A checkpoint that is fetched file by file and deleted again.

    Attributes:
        folder: Where the files appear: the hub's snapshot folder of one commit.
        fetch: Makes one file, by its name in the folder, be there; returns when it is.
        delete: Removes one file and gives its space back.
    """

    folder: Path
    fetch: Callable[[str], object]
    delete: Callable[[str], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreProgress:
    """How far a preparation is.

    Attributes:
        model: Name of the model.
        done_bytes: Of the checkpoint that are done, those of an earlier attempt included.
        total_bytes: All of them.
    """

    model: str
    done_bytes: int
    total_bytes: int


Progress = Callable[[StoreProgress], None]


def prepare_store(
    spec: ModelSpec,
    checkpoint: Path | Download,
    *,
    cache_dir: Path,
    quantization: Quantization = "nf4",
    device: torch.device,
    progress: Progress | None = None,
) -> Path:
    """Build the store of a model, or what is missing of it.

    Args:
        spec: The model, with the tensors of its checkpoint.
        checkpoint: Its folder, or how to get it file by file; then the store holds the tables, too.
        cache_dir: Folder of all stores.
        quantization: How linears are kept. Those that the checkpoint holds in 4 bit stay as they
            are; with `none` its dense ones stay dense.
        device: Where to quantise.
        progress: Called after each tensor; the first call says what an earlier attempt had done.

    Returns:
        The store's folder.

    Raises:
        DoesNotFitError: The disk has not enough room; nothing was written.
        RunError: Another process is preparing this store.
        ConfigError: `cache_dir` cannot be written.
        ModelError: The checkpoint lacks a tensor or is damaged.
    """
    preparation = _Preparation.of(
        spec, checkpoint, cache_dir, quantization, device=device, progress=progress
    )
    folder = preparation.folder
    if preparation.is_complete:
        return folder
    with _named_failures(spec, cache_dir):
        folder.mkdir(parents=True, exist_ok=True)
        with _only_process(folder):
            if not preparation.is_complete:
                preparation.run()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # slices of other sizes than training will need
    return folder


def check_room(
    spec: ModelSpec, checkpoint: Path | Download, *, cache_dir: Path, quantization: Quantization
) -> None:
    """Refuse what `prepare_store` would refuse for want of room or of a folder to write to.

    Raises:
        DoesNotFitError: The disk has not enough room.
        ConfigError: `cache_dir` cannot be written.
    """
    preparation = _Preparation.of(spec, checkpoint, cache_dir, quantization)
    if not preparation.is_complete:
        with _named_failures(spec, cache_dir):
            cache_dir.mkdir(parents=True, exist_ok=True)
            _, missing = preparation.parts()
            preparation.require_disk_space(missing)


@dataclass(kw_only=True, slots=True)
class _Preparation:
    """One run over the parts of a store.

    Attributes:
        source: The checkpoint, opened when its files are there; None in between.
    """

    spec: ModelSpec
    checkpoint: Path | Download
    source_folder: Path
    folder: Path
    quantization: Quantization
    device: torch.device
    progress: Progress | None
    done_bytes: int = 0
    total_bytes: int = 0
    source: CheckpointSource | None = None

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        checkpoint: Path | Download,
        cache_dir: Path,
        quantization: Quantization,
        *,
        device: torch.device = _CPU,
        progress: Progress | None = None,
    ) -> _Preparation:
        """The preparation of a checkpoint into the folder of its key."""
        copies_tables = isinstance(checkpoint, Download)
        source_folder = checkpoint.folder if isinstance(checkpoint, Download) else checkpoint
        key = store_key(spec, source_folder, quantization, copies_tables=copies_tables)
        return cls(
            spec=spec,
            checkpoint=checkpoint,
            source_folder=source_folder,
            folder=cache_dir / key,
            quantization=quantization,
            device=device,
            progress=progress,
        )

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to do."""
        return (self.folder / MANIFEST_FILE).exists()

    def run(self) -> None:
        """Build what is missing, then write the manifest."""
        parts, missing = self.parts()
        self.require_disk_space(missing)
        self.total_bytes = sum(part.source_bytes for part in parts)
        self._advance(self.total_bytes - sum(part.source_bytes for part in missing))
        self._drop_files(missing)
        for number, part in enumerate(missing):
            self._writer(part).write(part)
            self._drop_files(missing[number + 1 :])
        self._write_manifest(parts)

    def parts(self) -> tuple[Sequence[Part], Sequence[Part]]:
        """All parts, and those that are missing in the order they are made."""
        copies_tables = isinstance(self.checkpoint, Download)
        parts = store_parts(self.spec, self.quantization, copies_tables=copies_tables)
        missing = [part for part in parts if not self._is_done(part)]
        return parts, in_download_order(missing, self.spec) if copies_tables else missing

    def _is_done(self, part: Part) -> bool:
        path = self.folder / part.file
        if not path.exists():
            return False
        if part.kind == "layer":
            finished = read_finished(self.folder, part)
            return finished is not None and path.stat().st_size == finished.blob.size_bytes
        return part.kind == "other" or path.stat().st_size == part.stored_bytes

    def require_disk_space(self, missing: Sequence[Part]) -> None:
        """Compare what the missing parts take with what is free."""
        store_folder = _existing(self.folder)
        needed = {store_folder: sum(part.stored_bytes for part in missing)}
        if isinstance(self.checkpoint, Download):
            present = frozenset(
                file for file in file_bytes(self.spec) if (self.source_folder / file).exists()
            )
            download, both = download_peak_bytes(missing, self.spec, present)
            source_folder = _existing(self.source_folder)
            if source_folder.stat().st_dev == store_folder.stat().st_dev:
                needed = {store_folder: both}
            else:
                needed[source_folder] = download
        for folder, size_bytes in needed.items():
            free_bytes = shutil.disk_usage(folder).free
            if size_bytes > free_bytes:
                shown = self.folder.parent if folder == store_folder else folder
                raise _disk_too_small(self.spec, shown, size_bytes, free_bytes)

    def _writer(self, part: Part) -> PartWriter:
        """What writes `part`, after making sure that the files it needs are there."""
        if isinstance(self.checkpoint, Download):
            for file in part.source_files:
                self.checkpoint.fetch(file)
        if self.source is None:
            self.source = CheckpointSource(self.spec, self.source_folder)
        return PartWriter(
            spec=self.spec,
            source=self.source,
            folder=self.folder,
            quantization=self.quantization,
            device=self.device,
            advance=self._advance,
        )

    def _drop_files(self, missing: Sequence[Part]) -> None:
        """Delete what no missing part needs, where the checkpoint is fetched file by file."""
        if not isinstance(self.checkpoint, Download):
            return
        unneeded = set(file_bytes(self.spec)) - needed_files(missing)
        present = [file for file in sorted(unneeded) if (self.source_folder / file).exists()]
        if present:
            self.source = None  # it maps the files: their space would not come back
        for file in present:
            self.checkpoint.delete(file)

    def _advance(self, size_bytes: int) -> None:
        self.done_bytes += size_bytes
        if self.progress is not None:
            self.progress(
                StoreProgress(
                    model=self.spec.name,
                    done_bytes=self.done_bytes,
                    total_bytes=self.total_bytes,
                )
            )

    def _write_manifest(self, parts: Sequence[Part]) -> None:
        blobs: list[StoredBlob] = []
        code_tables: dict[str, tuple[float, ...]] = {}
        for part in parts:
            if part.kind == "layer":
                finished = read_finished(self.folder, part)
                assert finished is not None, f"{part.file} was written without its description"
                blobs.append(finished.blob)
                code_tables |= finished.code_tables
        tables = {name: self._table(name, parts) for name in own_tables(self.spec)}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            key=self.folder.name,
            source=self.spec.name,
            quantization=self.quantization,
            layers=tuple(blobs),
            embedding=tables["embedding"],
            head=tables.get("head", tables["embedding"]),
            ple=tables.get("ple"),
            other_file=OTHER_FILE,
            code_tables=code_tables,
        )
        write_json(self.folder / MANIFEST_FILE, manifest)
        for part in parts:
            if part.kind == "layer":
                finished_path(self.folder, part).unlink()

    def _table(self, name: str, parts: Sequence[Part]) -> StoredTable:
        rows, columns = other_tensor_shapes(self.spec.decoder)[name]
        file = f"{name}.safetensors"
        if any(part.file == file for part in parts):
            offset_bytes, dtype = len(table_header(self.spec, name)), self.spec.dtype
        else:
            tensor = self.spec.tensors[other_tensor_names(self.spec)[name]]
            file = str((self.source_folder / tensor.file).absolute())
            offset_bytes, dtype = tensor.offset_bytes, WEIGHT_DTYPES[tensor.dtype]
        return StoredTable(file=file, offset_bytes=offset_bytes, shape=(rows, columns), dtype=dtype)


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    lock = filelock.FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RunError(
            f"Another process is preparing {folder.name}.",
            why="Two at once would write the same files.",
            fix="Wait until it is done and run this command again: the result is used by both.",
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _named_failures(spec: ModelSpec, cache_dir: Path) -> Iterator[None]:
    """Turn what the disk refuses into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFitError(
                f"The disk became full while the weights of {spec.name} were prepared.",
                why=f"The store is written to {cache_dir}; something else used the space.",
                fix="Free some space and run the command again: finished layers are kept. "
                "Or set `model.cache_dir` to a folder on another disk.",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ConfigError(
                f"Prepared weights cannot be written to {cache_dir}.",
                why=f"{error.strerror}: {error.filename}.",
                fix="Set `model.cache_dir` to a folder that you may write to.",
            ) from error
        if error.errno == errno.EFBIG:
            raise ConfigError(
                f"Prepared weights cannot be written to {cache_dir}.",
                why=f"Its file system takes no file as large as {error.filename or 'one of them'}.",
                fix="Set `model.cache_dir` to a folder on a disk with another file system "
                "(FAT32 ends at 4 GiB).",
            ) from error
        raise


def _disk_too_small(
    spec: ModelSpec, folder: Path, needed_bytes: int, free_bytes: int
) -> DoesNotFitError:
    return DoesNotFitError(
        f"Preparing {spec.name} needs {format_bytes(needed_bytes)} of disk; "
        f"{format_bytes(free_bytes)} are free.",
        why=f"The files are written below {folder}.",
        fix="Set `model.cache_dir` to a folder on a larger disk, or free "
        f"{format_bytes(needed_bytes - free_bytes)} there.",
    )


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    return folder if folder.exists() else _existing(folder.parent)
