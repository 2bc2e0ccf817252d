"""What would be uploaded is shown first; the hub's refusals say what to do."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from eightgig.cli.app import main
from eightgig.errors import ExportError
from eightgig.export.push import plan_upload, push


class FakeApi:
    """Stands in for `HfApi`: nothing is sent."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repository: str, **settings: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append((repository, settings))

    def upload_folder(self, **settings: Any) -> SimpleNamespace:
        self.calls.append(("upload", settings))
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "model[1].safetensors").write_bytes(b"123")
    (folder / ".secret").write_bytes(b"x")
    return folder


def test_an_upload_lists_its_files_before_anything_is_sent(adapter: Path) -> None:
    upload = plan_upload(adapter, "me/mine")
    assert upload.files == {"adapter_config.json": 2, "model[1].safetensors": 3}
    assert upload.total_bytes == 5
    assert upload.is_private


def test_exactly_the_listed_files_are_uploaded(adapter: Path) -> None:
    api = FakeApi()
    upload = plan_upload(adapter, "me/mine", is_private=False)
    assert push(upload, api=api) == "https://hub/commit/1"
    (create, settings), (_, sent) = api.calls
    assert create == "me/mine"
    assert settings["private"] is False
    assert settings["exist_ok"] is True
    assert sent["allow_patterns"] == ["adapter_config.json", "model[[]1].safetensors"]
    assert sent["folder_path"] == str(adapter)


def test_the_command_shows_and_sends_nothing_unless_asked(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = FakeApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    assert main(["push", str(adapter), "me/mine"]) == 0
    shown = capsys.readouterr().out
    assert "adapter_config.json" in shown
    assert "Nothing was sent" in shown
    assert api.calls == []
    assert main(["push", str(adapter), "me/mine", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["address"] == "https://hub/commit/1"
    assert len(api.calls) == 2
    assert main(["push", str(adapter), "mine"]) == 2


def test_other_folders_and_names_are_refused(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(ExportError, match="neither an adapter nor an export"):
        plan_upload(tmp_path, "me/mine")
    for name in ("mine", "me/mine/more", "../mine", "me/"):
        with pytest.raises(ExportError, match="no name of a repository"):
            plan_upload(adapter, name)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.LocalTokenNotFoundError("no token"), "No access token"),
        (errors.OfflineModeIsEnabled("offline"), "no network"),
        (ConnectionError("down"), "no network"),
    ],
)
def test_refusals_of_the_hub_say_what_to_do(adapter: Path, error: Exception, words: str) -> None:
    with pytest.raises(ExportError) as caught:
        push(plan_upload(adapter, "me/mine"), api=FakeApi(error))
    assert words in caught.value.why
    assert caught.value.message.startswith("Nothing was uploaded")


def test_a_refused_token_shows_the_hubs_status(adapter: Path) -> None:
    # huggingface_hub 1 stands on httpx and 2 on httpx2.
    library = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0])
    request = library.Request("POST", "https://hub")
    error = errors.HfHubHTTPError("no", response=library.Response(403, request=request))
    with pytest.raises(ExportError) as caught:
        push(plan_upload(adapter, "me/mine"), api=FakeApi(error))
    assert "403" in caught.value.why
    assert "hf auth login" in caught.value.fix
