"""A tokenizer as large as Gemma's, made on the spot: 262,144 tokens, 23 control tokens, half a
million merges.

It is trained on the text files of this Python's libraries, has Gemma's way of cutting text (blanks
become underlines and nothing else is cut; the unknown is bytes) and its control tokens, and a chat
template of the same shape. Its tokens are not Gemma's, but it is as large, as slow, and makes about
as many tokens of a text.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as cut

from tests.chats import GEMMA4_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 262_144
_TEXT_CHARS = 60_000_000
_SUFFIXES = (".py", ".md", ".rst", ".txt", ".html")
_MOST_BYTES = 400_000
_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{{- message.content | trim }}{{ '<turn|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"""


def read_texts() -> Iterator[str]:
    """Pieces of text files of the installed libraries, in a fixed order."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib")}
    read = 0
    for folder in sorted(folders):
        for path in sorted(Path(folder).rglob("*"), key=lambda path: (path.name, str(path))):
            if path.suffix in _SUFFIXES and path.stat().st_size < _MOST_BYTES:
                text = path.read_text("utf-8", "ignore")
                read += len(text)
                yield from (text[start : start + 5_000] for start in range(0, len(text), 5_000))
            if read > _TEXT_CHARS:
                return


def make_wide_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; takes one to two minutes."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(_train(), ensure_ascii=False)),
        bos_token="<bos>",
        eos_token="<turn|>",
        pad_token="<pad>",
    )
    made.chat_template = _TEMPLATE
    return made


def _train() -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = cut.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*GEMMA4_TOKENS, *bytes_],
        min_frequency=1,
        limit_alphabet=6_000,
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_texts(), trainer)
    tokenizer.pre_tokenizer = cut.Split(" ", "merged_with_previous")
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    added = described["added_tokens"]
    described["added_tokens"] = [entry for entry in added if entry["content"] in GEMMA4_TOKENS]
    described["model"]["merges"] = _every_merge(described["model"])
    return described


def _every_merge(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Every pair that makes a token, as where a SentencePiece model was converted."""
    known = model["vocab"]
    made = dict.fromkeys("".join(pair) for pair in model["merges"])
    merges: list[tuple[str, str]] = []
    for token in made:
        pairs = [(token[:end], token[end:]) for end in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in known and pair[1] in known]
        merges += sorted(pairs, key=lambda pair: (known[pair[0]], known[pair[1]]))
    return merges
