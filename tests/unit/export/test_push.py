"""What would be uploaded is shown first; the hub's refusals say what to do."""

from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Iterator
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


def _http_library() -> str:
    """huggingface_hub 1 stands on httpx and 2 on httpx2."""
    return errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0]


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
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert main(["push", str(adapter), "me/mine"]) == 0
    shown = capsys.readouterr().out
    assert "adapter_config.json" in shown
    assert "Nothing was sent" in shown
    assert api.calls == []
    assert main(["push", str(adapter), "me/mine", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["address"] == "https://hub/commit/1"
    assert len(api.calls) == 2
    assert main(["push", str(adapter), "mine"]) == 2


class FakeHub:
    """Stands in for the hub's server: answers as it does, and keeps what was sent."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.requests: list[tuple[str, str]] = []
        self.created: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}

    def answer(self, request: Any) -> Any:
        """The answer to one request."""
        path, response = request.url.path, self.library.Response
        self.requests.append((request.method, path))
        if request.headers.get("authorization") != "Bearer hf_test":
            return response(401, json={"error": "Invalid username or password."}, request=request)
        body = request.read()
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return response(200, json={"url": "https://huggingface.co/me/mine"}, request=request)
        if path == "/api/models/me/mine/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return response(200, json={"files": files}, request=request)
        if path == "/api/models/me/mine/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            commit = {"commitUrl": "https://huggingface.co/me/mine/commit/1", "commitOid": "1"}
            return response(200, json=commit, request=request)
        return response(200, json={}, request=request)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub at the border of huggingface_hub's own HTTP client; no token is on this machine."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import close_session
    from huggingface_hub.utils._http import default_client_factory

    fake = FakeHub(importlib.import_module(_http_library()))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    close_session()
    set_client_factory(
        lambda: fake.library.Client(transport=fake.library.MockTransport(fake.answer))
    )
    yield fake
    close_session()
    set_client_factory(default_client_factory)


def test_what_arrives_at_the_hub_is_what_was_shown(
    adapter: Path,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (adapter / "chat_template.jinja").write_text("{{ x }}", encoding="utf-8")
    (adapter / "more").mkdir()
    (adapter / "more" / "LICENSE").write_text("MIT", encoding="utf-8")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert main(["push", str(adapter), "me/mine", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert hub.requests == []
    assert main(["push", str(adapter), "me/mine", "--yes"]) == 0
    assert "me/mine/commit/1" in capsys.readouterr().out
    sizes = {name: len(content) for name, content in hub.files.items()}
    assert sizes == shown["upload"]["files"]
    for name, content in hub.files.items():
        assert content == (adapter / name).read_bytes()
    assert set(hub.files) == {
        "adapter_config.json", "chat_template.jinja", "model[1].safetensors", "more/LICENSE",
    }  # fmt: skip
    # huggingface_hub 1 says `private`, 2 says `visibility`.
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert (hub.created["organization"], hub.created["name"]) == ("me", "mine")


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_a_token_that_the_hub_takes_three_lines_say_so(
    adapter: Path,
    hub: FakeHub,
    token: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    assert main(["push", str(adapter), "me/mine", "--yes"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line[:5] for line in lines] == ["error", "why: ", "fix: "]
    assert "Nothing was uploaded to me/mine." in lines[0]
    assert ("No access token" if token is None else "HTTP 401") in lines[1]
    assert "hf auth login" in lines[2]
    assert hub.files == {}
    assert (hub.requests == []) is (token is None)


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
    library = importlib.import_module(_http_library())
    request = library.Request("POST", "https://hub")
    error = errors.HfHubHTTPError("no", response=library.Response(403, request=request))
    with pytest.raises(ExportError) as caught:
        push(plan_upload(adapter, "me/mine"), api=FakeApi(error))
    assert "403" in caught.value.why
    assert "hf auth login" in caught.value.fix
