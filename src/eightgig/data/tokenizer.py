"""The tokenizer of a model with its chat template, and what rendering needs of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightgig.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN = "none"
"""Value of `data.chat_template` for prompt and completion one behind the other, as they are."""

_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderSettings:
    """All that decides which tokens a row becomes; plain values, for other processes too.

    Attributes:
        tokenizer_json: The tokenizer, as the library `tokenizers` writes it.
        chat_template: Source of the template; None if the model has none.
        special_tokens: bos_token, eos_token and so on, as templates know them.
        bos_id: Token that plain text begins with; None if it begins with none.
        eos_id: Token that plain text ends with; None if there is none.
        is_plain: Whether prompt and completion are joined without a template.
    """

    tokenizer_json: str
    chat_template: str | None
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None
    is_plain: bool = False


def load_tokenizer(folder: Path, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of the model in `folder`; nothing in the folder is executed.

    Args:
        folder: Local folder of a model.
        chat_template: Template file, folder or hub id of the model whose template is used, or
            `none` for no template; None takes the model's own.

    Raises:
        ModelError: The folder holds no usable tokenizer.
        DataError: `chat_template` names no template.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ModelError(
            f'There is no model folder "{folder}".',
            why="The tokenizer is read from it.",
            fix="Correct `model.name`.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    # The library raises whatever the parsers of its files raise.
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise ModelError(
            f'The tokenizer in "{folder}" cannot be loaded.',
            why=_loading_failure(folder, error),
            fix="Download the model again with its tokenizer.json and tokenizer_config.json.",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f'The model in "{folder}" has no tokenizer.json.',
            why="Trained tokens are found by their place in the text, which only such a "
            "tokenizer knows.",
            fix="Use a model folder with tokenizer.json.",
        )
    if chat_template == PLAIN:
        tokenizer.chat_template = None
    elif chat_template is not None:
        tokenizer.chat_template = find_chat_template(chat_template)
    return tokenizer


def _loading_failure(folder: Path, error: Exception) -> str:
    """Why a tokenizer cannot be loaded, in one line."""
    if not any((folder / file).exists() for file in _TOKENIZER_FILES):
        return "The folder holds no tokenizer.json."
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"Its files cannot be read: {type(error).__name__}: {lines[0].rstrip(': ')}."


def find_chat_template(name: str) -> str:
    """The chat template in a file, a model folder, or a hub repository.

    Raises:
        DataError: There is none.
    """
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        found = _in_folder(path) if path.is_dir() else _on_hub(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "cannot be read"
        raise _no_template(name, reason) from error
    if found is None:
        raise _no_template(name, f"it has neither {_TEMPLATE_FILE} nor one in {_CONFIG_FILE}")
    return found


def _no_template(name: str, reason: str) -> DataError:
    return DataError(
        f'There is no chat template in "{name}".',
        why=f"{reason[:1].upper()}{reason[1:].rstrip('.')}.",
        fix="Set `data.chat_template` to a template file, or to a model that has one, such as "
        "the tuned sibling (google/gemma-4-12B-it for google/gemma-4-12B).",
    )


def _in_folder(folder: Path) -> str | None:
    template = folder / _TEMPLATE_FILE
    if template.is_file():
        return template.read_text(encoding="utf-8")
    config = folder / _CONFIG_FILE
    return _from_config(config) if config.is_file() else None


def _from_config(path: Path) -> str | None:
    found = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _on_hub(name: str) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, _TEMPLATE_FILE)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return _from_config(Path(hf_hub_download(name, _CONFIG_FILE)))


def require_chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The chat template of `tokenizer`.

    Raises:
        DataError: The model has none.
    """
    template = _template_of(tokenizer)
    if template is None:
        raise DataError(
            "The model has no chat template.",
            why="Without one it is not known how a conversation becomes text; base models have "
            "none.",
            fix="Set `data.chat_template` to a template file or to the model's tuned sibling "
            "(google/gemma-4-12B-it for google/gemma-4-12B).",
        )
    return template


def _template_of(tokenizer: PreTrainedTokenizerFast) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template.strip() else None


def render_settings(
    tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None
) -> RenderSettings:
    """What rendering needs of `tokenizer`.

    Args:
        tokenizer: From `load_tokenizer`.
        chat_template: `data.chat_template`; only `none` is read here.
    """
    template = _template_of(tokenizer)
    bos = tokenizer.bos_token
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    # Gemma was never trained without <bos>, yet copies of its tokenizer on the hub forget it; a
    # template that writes the token says the same of its model.
    needs_bos = bos is not None and (
        begins or bos == "<bos>" or (template is not None and "bos_token" in template)
    )
    return RenderSettings(
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        chat_template=template,
        special_tokens=dict(tokenizer.special_tokens_map),
        bos_id=tokenizer.bos_token_id if needs_bos else None,
        eos_id=tokenizer.eos_token_id,
        is_plain=chat_template == PLAIN,
    )


def settings_digest(settings: RenderSettings) -> str:
    """Hash of `settings`."""
    described = dataclasses.asdict(settings)
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Tokens at which a server stops: the tokenizer's and those of generation_config.json."""
    found = {tokenizer.eos_token_id}
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    try:
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        listed = None
    found.update(listed if isinstance(listed, list) else [listed])
    return frozenset(number for number in found if isinstance(number, int))
