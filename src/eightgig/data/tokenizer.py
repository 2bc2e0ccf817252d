"""The tokenizer of a model with its chat template, and what rendering needs of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eightgig.errors import DataError, ModelError
from eightgig.run import link_outside
from eightgig.units import MIB, format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN = "none"
"""Value of `data.chat_template` for prompt and completion one behind the other, as they are."""

_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
# Gemma's tokenizer.json has 33 MB.
_MAX_FILE_BYTES = 256 * MIB
# What a normalizer may put in the place of a character, a post-processor around a text.
_MAX_INSERTED_CHARS = 1_000
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
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ModelError(
            f'There is no model folder "{folder}".',
            why="The tokenizer is read from it.",
            fix="Correct `model.name`.",
        )
    _check_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    # The library raises whatever the parsers of its files raise.
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, ArithmeticError,
            RecursionError, StrictDataclassError) as error:  # fmt: skip
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
    _refuse_expansion(folder, tokenizer)
    if chat_template == PLAIN:
        tokenizer.chat_template = None
    elif chat_template is not None:
        tokenizer.chat_template = find_chat_template(chat_template)
    return tokenizer


def _check_files(folder: Path) -> None:
    """Refuse small files that are links to elsewhere, or not small.

    The chat template is written into the adapter's folder, which people upload: a link to a file of
    the user's would go with it.
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix != ".safetensors"]
    link = link_outside(folder, files)
    if link is not None:
        raise ModelError(
            f"{link} is a link to a file outside the model's folder.",
            why="What the model's files say goes into prompts and into the adapter's folder.",
            fix="If the link is yours, put the file itself in its place; otherwise delete it.",
        )
    for path in files:
        is_read = path.suffix in (".json", ".jinja", ".model", ".txt")
        if is_read and path.is_file() and path.stat().st_size > _MAX_FILE_BYTES:
            raise ModelError(
                f"{path} is {format_bytes(path.stat().st_size)} large.",
                why=f"No tokenizer's file has more than {format_bytes(_MAX_FILE_BYTES)}.",
                fix="Download the model again from its publisher.",
            )


def _refuse_expansion(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer that turns a few characters into a great many."""
    backend = tokenizer.backend_tokenizer
    for part in (backend.normalizer, backend.pre_tokenizer):
        # Rust's own JSON of it; nothing is unpickled.
        state = None if part is None else json.loads(part.__getstate__())
        longest = max(_inserted_lengths(state), default=0)
        if longest > _MAX_INSERTED_CHARS:
            raise ModelError(
                f'The tokenizer in "{folder}" replaces text by {longest:,} characters.',
                why="A few rows would fill the memory.",
                fix="Download the model again from its publisher.",
            )


def _inserted_lengths(state: object) -> Iterator[int]:
    if isinstance(state, dict):
        for name, value in state.items():
            if name in ("content", "replacement", "prepend") and isinstance(value, str):
                yield len(value)
            else:
                yield from _inserted_lengths(value)
    elif isinstance(state, list):
        for value in state:
            yield from _inserted_lengths(value)


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
    except (OSError, ValueError, AttributeError, RecursionError) as error:
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
    link = link_outside(folder, [template, folder / _CONFIG_FILE])
    if link is not None:
        raise ValueError(f"{link.name} is a link to a file outside the folder")
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
    except (OSError, ValueError, AttributeError, RecursionError):
        listed = None
    found.update(listed if isinstance(listed, list) else [listed])
    return frozenset(number for number in found if isinstance(number, int))
