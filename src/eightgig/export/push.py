"""An adapter or an export to the hub: first what would be uploaded, then the upload."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eightgig.errors import ExportError

# What may lie in such a folder and belongs to nobody else.
_LEFT_OUT = (".DS_Store", "Thumbs.db")
_ADAPTER_MARK = "adapter_config.json"
_EXPORT_MARK = "export.json"
_NOT_LOGGED_IN = "No access token is on this machine."
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """What would be uploaded.

    Attributes:
        folder: From where.
        repository: `user/name` on the hub.
        is_private: Whether a new repository is private.
        files: Bytes of each file, by its path in the folder.
    """

    folder: Path
    repository: str
    is_private: bool
    files: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def plan_upload(folder: Path, repository: str, *, is_private: bool = True) -> Upload:
    """What `push` would upload; nothing is sent.

    Args:
        folder: An adapter or an export.
        repository: `user/name`.
        is_private: Whether a repository that does not exist yet becomes a private one.

    Raises:
        ExportError: The folder is neither, or the name is no repository's.
    """
    if not any((folder / mark).is_file() for mark in (_ADAPTER_MARK, _EXPORT_MARK)):
        raise ExportError(
            f"{folder} is neither an adapter nor an export.",
            why=f"It holds neither {_ADAPTER_MARK} nor {_EXPORT_MARK}; nothing else is uploaded.",
            fix="Name the adapter/ folder of a run, or a folder that eightgig export wrote.",
        )
    if _NAME.fullmatch(repository) is None:
        raise ExportError(
            f'"{repository}" is no name of a repository.',
            why="The hub knows repositories as user/name.",
            fix=f"Write for example: eightgig push {folder} my-name/my-model",
        )
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _LEFT_OUT and not path.name.startswith(".")
    }
    return Upload(folder=folder, repository=repository, is_private=is_private, files=files)


def push(upload: Upload, *, api: Any = None) -> str:
    """Upload what `upload` says; returns the address of the commit.

    Args:
        upload: From `plan_upload`.
        api: A `huggingface_hub.HfApi`; None makes one with the user's token.

    Raises:
        ExportError: No token, no permission, or the hub refuses.
    """
    if api is None:
        import huggingface_hub

        if huggingface_hub.get_token() is None:
            # Without one the hub would be asked, and say no more than HTTP 401.
            raise _refused(upload.repository, _NOT_LOGGED_IN)
        api = huggingface_hub.HfApi()
    with _explained(upload.repository):
        api.create_repo(
            upload.repository, private=upload.is_private, exist_ok=True, repo_type="model"
        )
        commit = api.upload_folder(
            repo_id=upload.repository,
            folder_path=str(upload.folder),
            allow_patterns=[glob.escape(name) for name in upload.files],
            commit_message="Upload with eightgig",
        )
    return str(getattr(commit, "commit_url", commit))


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn what huggingface_hub raises while uploading into ours.

    Raises:
        ExportError: For every failure of the hub or the network.
    """
    from huggingface_hub import errors

    # huggingface_hub 1 stands on httpx and 2 on httpx2; both name it only as a base class.
    network_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise _refused(repository, _NOT_LOGGED_IN) from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = f"The hub says HTTP {status}." if status else "The hub refuses."
        raise _refused(repository, why) from error
    except (
        network_error, ConnectionError, TimeoutError, errors.OfflineModeIsEnabled
    ) as error:  # fmt: skip
        raise ExportError(
            f"Nothing was uploaded to {repository}: the hub cannot be reached.",
            why="There is no network, or HF_HUB_OFFLINE is set.",
            fix="Run the same command where there is a network; what is there is not sent twice.",
        ) from error


def _refused(repository: str, why: str) -> ExportError:
    return ExportError(
        f"Nothing was uploaded to {repository}.",
        why=why,
        fix="Run `hf auth login` with a token that may write, and check the name.",
    )
