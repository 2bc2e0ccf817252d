"""Tokenizers and chat templates come from where they should, or say what is missing."""

import contextlib
import json
from pathlib import Path

import pytest

from eightgig.data.tokenizer import (
    PLAIN,
    find_chat_template,
    load_tokenizer,
    render_settings,
    settings_digest,
    stop_ids,
)
from eightgig.errors import DataError, ModelError
from tests.chats import make_chat_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_chat_tokenizer("llama3")


def save(tokenizer, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_a_tokenizer_is_loaded_from_a_folder(tmp_path, tokenizer):
    loaded = load_tokenizer(save(tokenizer, tmp_path))
    assert loaded("Hello")["input_ids"] == tokenizer("Hello")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("source", ["file", "folder", "none"])
def test_another_template_is_taken(tmp_path, tokenizer, source):
    folder = save(tokenizer, tmp_path / "model")
    other = save(make_chat_tokenizer("llama3", "other"), tmp_path / "other")
    (tmp_path / "t.jinja").write_text("other")
    name = {"file": str(tmp_path / "t.jinja"), "folder": str(other), "none": PLAIN}[source]
    expected = None if source == "none" else "other"
    assert load_tokenizer(folder, name).chat_template == expected


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_a_folder_without_tokenizer_files_is_said_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.why == "The folder holds no tokenizer.json."


def test_a_damaged_tokenizer_is_said_so_in_words(tmp_path, tokenizer):
    (save(tokenizer, tmp_path) / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.why.startswith("Its files cannot be read: ")
    assert caught.value.why.endswith(".")


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="There is no model folder"):
        load_tokenizer(tmp_path / "none")


def test_a_folder_with_code_of_its_own_is_not_executed(tmp_path, tokenizer):
    folder = save(tokenizer, tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with contextlib.suppress(ModelError):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "templates",
    ["a template", [{"name": "tool_use", "template": "x"},
                    {"name": "default", "template": "a template"}]],
)  # fmt: skip
def test_a_template_is_found_in_older_folders(tmp_path, templates):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert find_chat_template(str(tmp_path)) == "a template"


@pytest.mark.parametrize("config", ["{}", "no json", '{"chat_template": [{"name": "tool_use"}]}'])
def test_a_folder_without_a_template_is_an_error(tmp_path, config):
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(DataError, match="There is no chat template") as caught:
        find_chat_template(str(tmp_path))
    assert "the tuned sibling" in caught.value.fix


def test_a_sibling_on_the_hub_lends_its_template(tmp_path, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError

    missing = type("Missing", (EntryNotFoundError, OSError), {})
    files = {"chat_template.jinja": "a template"}
    asked = []

    def download(name, filename):
        asked.append((name, filename))
        if filename not in files:
            raise missing(f"{filename} is not in {name}")
        (tmp_path / filename).write_text(files[filename])
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert find_chat_template("google/gemma-it") == "a template"
    files.clear()
    files["tokenizer_config.json"] = json.dumps({"chat_template": "older"})
    assert find_chat_template("google/gemma-it") == "older"
    files.clear()
    with pytest.raises(DataError, match='no chat template in "a/none"'):
        find_chat_template("a/none")
    assert asked[0] == ("google/gemma-it", "chat_template.jinja")


def test_the_one_template_of_several_is_the_default(tokenizer):
    several = make_chat_tokenizer("llama3")
    several.chat_template = {"tool_use": "x", "default": "y"}
    assert render_settings(several).chat_template == "y"
    several.chat_template = None
    assert render_settings(several).chat_template is None


def test_the_settings_follow_what_the_model_was_trained_with():
    bos = {chat: render_settings(make_chat_tokenizer(chat)).bos_id
           for chat in ("llama3", "qwen3", "smollm2", "mistral")}  # fmt: skip
    assert bos["llama3"] is not None
    assert bos["mistral"] is not None
    # SmolLM2 names <|im_start|> as its beginning token and never begins a text with it.
    assert bos["qwen3"] is bos["smollm2"] is None


def test_settings_that_differ_have_different_digests(tokenizer):
    digests = {
        settings_digest(render_settings(tokenizer)),
        settings_digest(render_settings(tokenizer, PLAIN)),
        settings_digest(render_settings(make_chat_tokenizer("llama3", "x"))),
        settings_digest(render_settings(make_chat_tokenizer("qwen3"))),
    }
    assert len(digests) == 4
    assert settings_digest(render_settings(tokenizer)) in digests


@pytest.mark.parametrize(
    ("written", "more"), [("[3, 4]", {3, 4}), ("7", {7}), ("null", set()), ("[", set())]
)
def test_servers_stop_at_the_tokens_of_the_generation_config(tmp_path, tokenizer, written, more):
    folder = save(tokenizer, tmp_path)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {written}}}')
    assert stop_ids(load_tokenizer(folder)) == {tokenizer.eos_token_id} | more
