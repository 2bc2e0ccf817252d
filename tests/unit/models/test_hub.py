"""Hub ids through a hub that lives in a folder: nothing here touches the network."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata
from huggingface_hub.utils._safetensors import TensorInfo

from eightgig.errors import DoesNotFitError, EightgigError, ModelError
from eightgig.models.checkpoint import read_model_spec
from eightgig.models.find import FoundModel
from eightgig.models.headers import read_header
from eightgig.models.hub import (
    delete_file,
    disk_needs,
    download_small_files,
    fetch_file,
    find_local_model,
    find_model,
    look_up_hub_model,
    release_file,
)
from eightgig.quant.build import Download
from eightgig.quant.fetch import checkpoint_of
from tests.tiny import make_model

NAME = "google/tiny-it"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FolderHub:
    """A repository that is a folder, and a cache with the layout of the real one."""

    repository: Path
    cache: Path
    failure: Exception | None = None
    fetched: list[str] = field(default_factory=list)

    @property
    def snapshot(self) -> Path:
        return self.cache / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT

    def model_info(self, name: str, **_: Any) -> Any:
        self._fail()
        siblings = [
            SimpleNamespace(rfilename=path.name, size=path.stat().st_size)
            for path in sorted(self.repository.iterdir())
        ]
        siblings.append(SimpleNamespace(rfilename="original/tokenizer.json", size=1))
        card = SimpleNamespace(license="apache-2.0")
        return SimpleNamespace(sha=COMMIT, siblings=siblings, card_data=card)

    def get_safetensors_metadata(self, name: str, **_: Any) -> SafetensorsRepoMetadata:
        self._fail()
        files = {}
        for path in sorted(self.repository.glob("*.safetensors")):
            data = path.read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            metadata = header.pop("__metadata__", {})
            tensors = {
                key: TensorInfo(
                    dtype=entry["dtype"],
                    shape=entry["shape"],
                    data_offsets=tuple(entry["data_offsets"]),
                )
                for key, entry in header.items()
            }
            files[path.name] = SafetensorsFileMetadata(metadata=metadata, tensors=tensors)
        weight_map = {key: file for file, meta in files.items() for key in meta.tensors}
        return SafetensorsRepoMetadata(
            metadata={}, sharded=len(files) > 1, weight_map=weight_map, files_metadata=files
        )

    def hf_hub_download(self, name: str, file: str, **_: Any) -> str:
        self._fail()
        link = self.snapshot / file
        if not link.exists():
            self.fetched.append(file)
            blob = self.snapshot.parents[1] / "blobs" / f"hash-of-{file}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.repository / file, blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return str(link)

    def snapshot_download(self, name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            if not self.snapshot.exists():
                raise errors.LocalEntryNotFoundError("not in the cache")
            return str(self.snapshot)
        for pattern in options["allow_patterns"]:
            self.hf_hub_download(name, pattern)
        return str(self.snapshot)

    def try_to_load_from_cache(self, name: str, file: str, **_: Any) -> str | None:
        link = self.snapshot / file
        return str(link) if link.exists() else None

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("repositories")
    return {
        "sharded": make_model("gemma4_e2b", root / "sharded", max_shard_size="400KB"),
        "single": make_model("llama", root / "single"),
    }


@pytest.fixture
def make_hub(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], FolderHub]:
    def make(kind: str) -> FolderHub:
        repository = Path(shutil.copytree(originals[kind], tmp_path / "repository"))
        (repository / "consolidated.00.pth").write_bytes(b"pickle")
        hub = FolderHub(repository=repository, cache=tmp_path / "cache")
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
        for function in ("hf_hub_download", "snapshot_download", "try_to_load_from_cache"):
            monkeypatch.setattr(huggingface_hub, function, getattr(hub, function))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
        return hub

    return make


@pytest.fixture
def hub(make_hub: Callable[[str], FolderHub]) -> FolderHub:
    return make_hub("sharded")


def _http_error(kind: type[Exception], status: int) -> Exception:
    """An exception of the hub as it is raised, whichever HTTP library it stands on."""
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("from the hub", response=response)  # type: ignore[call-arg]


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = find_model(str(tmp_path))
    assert (folder.path, folder.commit) == (tmp_path, None)


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "~/no-such", "a/b/c", "missing"])
def test_a_path_without_folder_is_no_hub_id(name: str) -> None:
    with pytest.raises(ModelError, match="There is no model folder"):
        find_local_model(name)


def test_a_hub_id_is_no_folder() -> None:
    assert find_local_model(NAME) is None


def test_a_found_model_is_the_repositorys(hub: FolderHub) -> None:
    folder = find_model(NAME)
    assert folder.commit == COMMIT
    ours, theirs = read_model_spec(folder.path), read_model_spec(hub.repository)
    assert (ours.decoder, ours.tensors) == (theirs.decoder, theirs.tensors)


def test_only_needed_files_are_fetched_and_each_once(hub: FolderHub) -> None:
    find_model(NAME)
    find_model(NAME)
    expected = {path.name for path in hub.repository.iterdir()} - {"consolidated.00.pth"}
    assert sorted(hub.fetched) == sorted(expected)


def test_no_weights_are_fetched_to_look_a_model_up(hub: FolderHub) -> None:
    model = look_up_hub_model(NAME)
    assert set(hub.fetched) == {"config.json", "model.safetensors.index.json"}
    assert model.spec.license == "apache-2.0"
    assert model.spec.skipped_parts == ("vision tower", "audio tower")


@pytest.mark.parametrize("kind", ["sharded", "single"])
def test_tensors_lie_where_they_were_announced(
    make_hub: Callable[[str], FolderHub], kind: str
) -> None:
    hub = make_hub(kind)
    assert dict(look_up_hub_model(NAME).spec.tensors) == {
        name: spec
        for path in hub.repository.glob("*.safetensors")
        for name, spec in read_header(path).items()
    }


def test_bytes_needed_and_free_are_shown_before_anything_is_fetched(
    hub: FolderHub, tmp_path: Path
) -> None:
    shown: list[str] = []

    def show(line: str) -> None:
        assert not any(file.endswith(".safetensors") for file in hub.fetched)
        shown.append(line)

    find_model(NAME, store_folder=tmp_path / "store", show=show)
    assert len(shown) == 1
    assert "the download takes" in shown[0]
    assert "the prepared model takes" in shown[0]
    assert "free" in shown[0]


def test_a_full_disk_is_said_before_anything_is_fetched(
    hub: FolderHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DoesNotFitError, match=r"97\.7 KiB are free"):
        find_model(NAME)
    assert not any(file.endswith(".safetensors") for file in hub.fetched)


def test_deleting_shards_needs_room_for_the_largest_only(hub: FolderHub, tmp_path: Path) -> None:
    model = look_up_hub_model(NAME)
    whole = disk_needs(model, store_folder=None)[0].needed_bytes
    largest = disk_needs(model, store_folder=None, deletes_download=True)[0].needed_bytes
    assert whole == model.download_bytes
    assert largest == max(file.size_bytes for file in model.weight_files) < whole
    # The tables, which otherwise stay in the download, must then be copied.
    kept = disk_needs(model, store_folder=tmp_path)[1].needed_bytes
    copied = disk_needs(model, store_folder=tmp_path, deletes_download=True)[1].needed_bytes
    assert copied > kept


def test_shards_come_one_by_one_and_go(hub: FolderHub) -> None:
    blobs = hub.snapshot.parents[1] / "blobs"
    model = look_up_hub_model(NAME)
    assert len(model.weight_files) > 2
    seen = []
    for file in model.weight_files:
        path = fetch_file(model, file.name)
        seen.append(path.name)
        assert [blob.name for blob in blobs.glob("*.safetensors")] == [f"hash-of-{path.name}"]
        release_file(model, path)
    assert seen == [file.name for file in model.weight_files]
    assert not list(blobs.glob("*.safetensors"))
    assert not list(hub.snapshot.glob("*.safetensors"))


def test_shards_that_were_there_before_stay(hub: FolderHub) -> None:
    first = sorted(hub.repository.glob("*.safetensors"))[0].name
    hub.hf_hub_download(NAME, first)
    model = look_up_hub_model(NAME)
    download = checkpoint_of(FoundModel(spec=model.spec, folder=hub.snapshot, hub=model))
    assert isinstance(download, Download)
    for file in model.weight_files:
        download.fetch(file.name)
        download.delete(file.name)
    assert [path.name for path in hub.snapshot.glob("*.safetensors")] == [first]


def test_a_blob_that_another_snapshot_uses_stays(hub: FolderHub) -> None:
    path = Path(hub.hf_hub_download(NAME, "config.json"))
    other = hub.snapshot.parent / "another-commit" / "config.json"
    other.parent.mkdir()
    other.symlink_to(path.resolve())
    delete_file(path)
    assert not path.exists()
    assert other.exists()


def test_a_file_other_than_announced_is_refused(hub: FolderHub) -> None:
    model = look_up_hub_model(NAME)
    first, second = (file.name for file in model.weight_files[:2])
    shutil.copyfile(hub.repository / second, hub.repository / first)
    with pytest.raises(ModelError, match="not what the hub announced"):
        fetch_file(model, first)


def test_an_index_that_names_files_the_hub_lacks_is_refused(hub: FolderHub) -> None:
    sorted(hub.repository.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match="lacks 1 files on the hub"):
        look_up_hub_model(NAME)


def test_another_family_is_refused_before_headers_are_fetched(
    hub: FolderHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "get_safetensors_metadata", None)
    (hub.repository / "config.json").write_text('{"model_type": "mamba"}', encoding="utf-8")
    with pytest.raises(ModelError, match="is not supported"):
        find_model(NAME)


def test_a_repository_of_pickles_is_refused(hub: FolderHub) -> None:
    for path in hub.repository.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ModelError) as caught:
        find_model(NAME)
    assert "pickles" in caught.value.why


def _failures() -> Iterator[Any]:
    yield pytest.param(
        _http_error(errors.GatedRepoError, 403), "gated", "hf auth login", id="gated"
    )
    yield pytest.param(
        _http_error(errors.RepositoryNotFoundError, 404), "no such model", "hf auth", id="missing"
    )
    yield pytest.param(
        _http_error(errors.RevisionNotFoundError, 404), "no revision", "model.revision", id="rev"
    )
    yield pytest.param(
        _http_error(errors.RemoteEntryNotFoundError, 404), "lacks a file", "config.json", id="file"
    )
    yield pytest.param(errors.EntryNotFoundError("gone"), "lacks a file", "config", id="entry")
    yield pytest.param(
        errors.LocalEntryNotFoundError("x"), "cannot be reached", "hf download", id="not-cached"
    )
    yield pytest.param(
        errors.OfflineModeIsEnabled("x"), "cannot be reached", "hf download", id="offline"
    )
    yield pytest.param(
        errors.HfHubHTTPError.__bases__[0]("no route"), "reached", "hf download", id="network"
    )
    yield pytest.param(ConnectionResetError(), "reached", "hf download", id="connection")
    yield pytest.param(
        _http_error(errors.HfHubHTTPError, 503), "HTTP 503", "hf auth whoami", id="http"
    )
    yield pytest.param(errors.HFValidationError("bad"), "cannot be read", "name", id="validation")
    yield pytest.param(OSError(errno.ENOSPC, "full"), "became full", "HF_HOME", id="disk")


@pytest.mark.parametrize(("failure", "message", "fix"), list(_failures()))
def test_each_failure_of_the_hub_comes_with_what_mends_it(
    hub: FolderHub, failure: Exception, message: str, fix: str
) -> None:
    hub.failure = failure
    with pytest.raises(EightgigError) as caught:
        find_model(NAME, revision="v2")
    assert message in caught.value.message
    assert fix in caught.value.fix
    assert caught.value.why
    assert caught.value.__cause__ is failure


def test_other_failures_of_the_machine_are_not_hidden(hub: FolderHub) -> None:
    hub.failure = PermissionError(errno.EACCES, "denied")
    with pytest.raises(PermissionError):
        find_model(NAME)


def test_a_gated_repository_comes_with_the_page_of_its_licence(hub: FolderHub) -> None:
    hub.failure = _http_error(errors.GatedRepoError, 403)
    with pytest.raises(ModelError) as caught:
        find_model(NAME)
    assert f"https://huggingface.co/{NAME}" in caught.value.fix


def test_without_a_network_the_cached_copy_is_used_and_said(hub: FolderHub) -> None:
    path = find_model(NAME).path
    hub.failure = errors.OfflineModeIsEnabled("offline")
    shown: list[str] = []
    folder = find_model(NAME, show=shown.append)
    assert folder.path == path
    assert folder.commit == COMMIT
    assert "HF_HUB_OFFLINE is set" in shown[0]
    assert "cache is used" in shown[0]


def test_without_a_network_half_a_copy_is_not_used(hub: FolderHub) -> None:
    path = find_model(NAME).path
    sorted(path.glob("*.safetensors"))[0].unlink()
    hub.failure = errors.OfflineModeIsEnabled("offline")
    with pytest.raises(ModelError, match="cannot be reached"):
        find_model(NAME)


def test_small_files_come_without_the_weights(hub: FolderHub) -> None:
    folder = download_small_files(look_up_hub_model(NAME))
    names = {path.name for path in folder.path.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]


def test_headers_of_a_whole_copy_are_not_fetched_again(
    hub: FolderHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = look_up_hub_model(NAME)
    find_model(NAME)
    monkeypatch.setattr(hub, "get_safetensors_metadata", None)
    assert look_up_hub_model(NAME).spec == first.spec


def test_nothing_to_fetch_needs_no_room(hub: FolderHub) -> None:
    find_model(NAME)
    assert disk_needs(look_up_hub_model(NAME), store_folder=None) == []
