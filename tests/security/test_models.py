"""Hostile model folders."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eightgig.data.formats import Example
from eightgig.data.render import Renderer
from eightgig.data.rules import Notes
from eightgig.data.tokenizer import (
    find_chat_template,
    load_tokenizer,
    render_settings,
    stop_ids,
)
from eightgig.errors import DataError, EightgigError, ModelError
from eightgig.models.checkpoint import read_model_spec
from eightgig.models.hub import find_local_model
from tests.security.watch import SECRET, Watch


class _Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self._place / "PWNED"),)


@pytest.fixture
def model(base_model: Path, tmp_path: Path) -> Path:
    """A copy of a sound model, with a module in it that nobody asked for."""
    folder = tmp_path / "model"
    shutil.copytree(base_model, folder)
    code = f"import os\nos.mkdir({str(tmp_path / 'PWNED')!r})\nclass Evil:\n    pass\n"
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "__init__.py", "setup.py"):
        (folder / name).write_text(code)
    return folder


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _written(folder: Path, tmp_path: Path) -> dict[str, bytes]:
    """What would be in the adapter's folder."""
    target = tmp_path / "written"
    load_tokenizer(folder).save_pretrained(str(target))
    return {path.name: path.read_bytes() for path in target.iterdir()}


TOKENIZER_SETTINGS: dict[str, dict[str, Any]] = {
    "code": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
    "code of another repository": {"auto_map": {"AutoTokenizer": ["a/b--evil.Evil", None]}},
    "code that trusts itself": {
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "trust_remote_code": True,
    },
    "a class that nobody knows": {"tokenizer_class": "EvilTokenizer"},
    "a function for a class": {"tokenizer_class": "os.system"},
    "a module path": {"tokenizer_class": "..evil.Evil"},
    "another file of words": {"vocab_file": "OUTSIDE"},
    "another file of words, relative": {"vocab_file": "../../outside/secret.txt"},
    "another tokenizer file": {"tokenizer_file": "OUTSIDE"},
    "another file of merges": {"merges_file": "OUTSIDE"},
    "another template file": {"chat_template_file": "OUTSIDE"},
    "a template of another folder": {"additional_chat_templates": "OUTSIDE"},
    "another repository": {"name_or_path": "evil/repository", "_name_or_path": "evil/repository"},
    "a GGUF": {"gguf_file": "OUTSIDE"},
    "another folder": {"subfolder": "../outside"},
    "a processor": {"processor_class": "evil.Evil"},
    "a backend": {"backend": "evil", "from_slow": True},
    "many tokens": {"added_tokens_decoder": {str(10**18): {"content": "x"}}},
    "tokens of no number": {"added_tokens_decoder": {"x": {"content": "x"}}},
    "tokens that are lists": {"bos_token": ["<s>"] * 9, "eos_token": {"__type": "evil"}},
}


@pytest.mark.parametrize("settings", TOKENIZER_SETTINGS.values(), ids=TOKENIZER_SETTINGS)
def test_a_tokenizers_settings_run_and_read_nothing(
    settings: dict[str, Any], model: Path, outside: Path, tmp_path: Path
) -> None:
    text = json.dumps(settings).replace("OUTSIDE", str(outside))
    _change(model / "tokenizer_config.json", **json.loads(text))
    try:
        written = _written(model, tmp_path)
    except ModelError:
        return
    assert not any(SECRET.encode() in content for content in written.values())


MODEL_SETTINGS: dict[str, dict[str, Any]] = {
    "code": {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
    "code of another repository": {"auto_map": {"AutoConfig": "a/b--evil.Evil"}},
    "code that trusts itself": {"auto_map": {"AutoConfig": "evil.Evil"}, "trust_remote_code": True},
    "attention kernels": {"attn_implementation": "evil/kernels"},
    "attention kernels inside": {"_attn_implementation_internal": "evil/kernels"},
    "attention kernels by name": {"_attn_implementation": "evil/kernels@main:attention"},
    "generation code": {"custom_generate": "evil/generate"},
    "another repository": {"_name_or_path": "evil/repository", "base_model": "evil/repository"},
    "quantiser code": {"quantization_config": {"quant_method": "evil", "module": "evil"}},
    "a million layers": {"num_hidden_layers": 10**6},
    "fewer than no layers": {"num_hidden_layers": -1},
    "layers of no number": {"num_hidden_layers": "1e9"},
    "huge layers": {"hidden_size": 2**40},
    "a huge vocabulary": {"vocab_size": 2**62},
    "heads that divide nothing": {"num_attention_heads": 0},
    "no family": {"model_type": "evil"},
    "a family that is a list": {"model_type": ["llama"]},
    "a family that is a path": {"model_type": "../../evil"},
    "rotation by infinity": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e999}},
    "a rotation nobody knows": {"rope_parameters": {"rope_type": "evil", "rope_theta": 1.0}},
    "many ends": {"eos_token_id": list(range(200_000))},
    "nested settings": {"text_config": {"text_config": {"auto_map": {"AutoConfig": "evil.Evil"}}}},
}
_REFUSED = {
    "quantiser code", "a million layers", "fewer than no layers", "layers of no number",
    "huge layers", "a huge vocabulary", "heads that divide nothing", "no family",
    "a family that is a list", "a family that is a path", "a rotation nobody knows",
}  # fmt: skip


@pytest.mark.parametrize("name", MODEL_SETTINGS)
def test_a_models_settings_run_and_read_nothing(name: str, model: Path) -> None:
    _change(model / "config.json", **MODEL_SETTINGS[name])
    try:
        read_model_spec(model)
        is_refused = False
    except ModelError:
        is_refused = True
    assert is_refused or name not in _REFUSED
    try:
        load_tokenizer(model)
    except ModelError:
        return


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "config.json",
        "generation_config.json", "special_tokens_map.json", "vocab.json", "tokenizer.model",
    ],
)  # fmt: skip
def test_links_to_files_elsewhere_are_refused(name: str, model: Path, outside: Path) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(outside)
    with pytest.raises(ModelError, match="is a link to a file outside"):
        load_tokenizer(model)


def test_a_linked_folder_is_refused(model: Path, outside: Path) -> None:
    (model / "additional_chat_templates").symlink_to(outside.parent, target_is_directory=True)
    with pytest.raises(ModelError, match="is a link"):
        load_tokenizer(model)


def test_links_inside_the_hubs_cache_are_read(base_model: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/abc", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(base_model, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert load_tokenizer(snapshot).chat_template


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_by_folder_is_not_read_through_a_link(
    name: str, tmp_path: Path, outside: Path
) -> None:
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / name).symlink_to(outside)
    with pytest.raises(DataError, match="no chat template"):
        find_chat_template(str(folder))


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1:9/x", "https://huggingface.co/a/b", "file:///etc/passwd", "a/../b",
             "/etc", "/dev/zero", "a/b\x00c", "a\nb/c"],
)  # fmt: skip
def test_a_template_by_a_strange_name_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="no chat template"):
        find_chat_template(name)


DAMAGED: dict[str, bytes] = {
    "deeply nested": b'{"a":' * 100_000,
    "a deep list": b"[" * 100_000,
    "a list": b"[]",
    "a number": b"1e999999",
    "a pickle": pickle.dumps({"a": 1}),
    "nothing": b"",
    "zeros": b"\0" * 4096,
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_files_that_are_no_json_are_refused(content: bytes, name: str, model: Path) -> None:
    (model / name).write_bytes(content)
    with pytest.raises(ModelError):
        read_model_spec(model)
        load_tokenizer(model)


def test_a_deep_generation_config_stops_nothing(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    (model / "generation_config.json").write_bytes(b"[" * 100_000)
    assert stop_ids(tokenizer)


def test_a_huge_tokenizer_file_is_not_read(model: Path) -> None:
    os.truncate(model / "tokenizer.json", 300 << 20)
    with pytest.raises(ModelError, match="large"):
        load_tokenizer(model)


@pytest.mark.parametrize("kind", ["Replace", "Prepend"])
def test_a_tokenizer_that_blows_text_up_is_refused(kind: str, model: Path) -> None:
    path = model / "tokenizer.json"
    value = json.loads(path.read_text())
    huge = "a" * 1_000_000
    value["normalizer"] = {
        "Replace": {"type": "Replace", "pattern": {"String": "a"}, "content": huge},
        "Prepend": {"type": "Prepend", "prepend": huge},
    }[kind]
    path.write_text(json.dumps(value))
    with pytest.raises(ModelError, match="replaces text by 1,000,000 characters"):
        load_tokenizer(model)


def test_a_pattern_that_takes_too_many_steps_costs_the_row_alone(model: Path) -> None:
    slow = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    _change(model / "tokenizer.json", pre_tokenizer=slow)
    renderer = Renderer(render_settings(load_tokenizer(model)))
    found = []
    for text in ("a" * 60 + "b", "It shines."):
        notes = Notes(file="rows.jsonl", line=1)
        rows = renderer.render(Example(text=text), notes)
        found.append((len(rows), [finding.code for finding in notes.findings]))
    assert found == [(0, ["data.rendering_limit"]), (1, [])]


PICKLES = ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "model.pkl")


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("is_zip", [False, True])
def test_pickles_are_refused_unread(name: str, is_zip: bool, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    data = pickle.dumps(_Payload(tmp_path))
    if is_zip:
        with zipfile.ZipFile(model / name, "w") as archive:
            archive.writestr("archive/data.pkl", data)
    else:
        (model / name).write_bytes(data)
    with pytest.raises(ModelError):
        read_model_spec(model)


def test_a_pickle_by_the_name_of_safetensors_is_refused(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(_Payload(tmp_path)))
    with pytest.raises(ModelError):
        read_model_spec(model)


def _header(text: bytes, size: int | None = None, data: bytes = b"") -> bytes:
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def _tensor(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return _header(json.dumps({"a": entry}).encode(), data=b"\0" * 8)


HEADERS: dict[str, bytes] = {
    "a size beyond the file": _header(b"{}", 2**40),
    "the largest size": _header(b"{}", 2**64 - 1),
    "99 MB of blanks": _header(b"{}" + b" " * 99_000_000),
    "deeply nested": _header(b'{"a":' * 100_000),
    "a deep shape": _header(b'{"a":{"dtype":"F32","shape":' + b"[" * 50_000),
    "negative offsets": _tensor(data_offsets=[-8, 0]),
    "offsets backwards": _tensor(data_offsets=[8, 0]),
    "offsets beyond the file": _tensor(data_offsets=[0, 2**60], shape=[2**58]),
    "offsets that wrap around": _tensor(data_offsets=[2**64 - 8, 2**64]),
    "offsets of no number": _tensor(data_offsets=["0", "8"]),
    "offsets of a fraction": _tensor(data_offsets=[0.5, 8.5]),
    "three offsets": _tensor(data_offsets=[0, 4, 8]),
    "a negative size": _tensor(shape=[-2]),
    "a product that wraps around": _tensor(shape=[2**32, 2**32, 2]),
    "a true size": _tensor(shape=[True, True]),
    "10,000 dimensions": _tensor(shape=[1] * 10_000),
    "a type nobody knows": _tensor(dtype="EVIL"),
    "a type that is a list": _tensor(dtype=["F32"]),
    "infinity": _header(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}'),
    "half of a character": _header(b'{"a\xff":{}}'),
    "no bytes": b"",
    "seven bytes": b"\0" * 7,
    "a name twice": _header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        data=b"\0" * 8,
    ),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_hostile_headers_are_refused(content: bytes, model: Path) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError):
        read_model_spec(model)


def test_an_index_cannot_lead_outside(model: Path, outside: Path, watch: Watch) -> None:
    watch.places.append(str(outside.parent.resolve()))
    shutil.copyfile(model / "model.safetensors", outside.parent / "model.safetensors")
    (model / "model.safetensors").unlink()
    for name in ("../outside/model.safetensors", str(outside.parent / "model.safetensors")):
        index = {"weight_map": {"model.norm.weight": name}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError):
            read_model_spec(model)


HUB_NAMES = (
    "https://huggingface.co/a/b", "http://127.0.0.1:9/a", "https://user:word@host/a", "a/../b",
    "a/b/c", "a/b@main", "file:///etc", "hf://a/b", "a/b?x=1", "a/b#c", "C:\\x", "\\\\host\\share",
    "-rf/x", "a/-b", "./x", "~root/x", "a/b\n", "a/b\x00", "a//b", "/etc/passwd", "a/..",
    "\uff41/\uff42",
    "$(id)/b", "a/b;id", "a/`id`", "a b/c",
)  # fmt: skip


@pytest.mark.parametrize("name", HUB_NAMES)
def test_a_name_that_is_none_of_the_hubs_is_never_asked_for(name: str) -> None:
    with pytest.raises(EightgigError):
        find_local_model(name)
