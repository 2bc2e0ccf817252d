"""The demo model's tokenizer: a small byte-level BPE with Gemma 4's control tokens.

python -m scripts.make_demo.tokenizer FOLDER
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from scripts.make_demo import corpus

VOCAB_SIZE = 1024
TRAINING_DOCUMENTS = 60_000
# Shard of the corpus that no pretraining step reads.
TOKENIZER_SHARD = -1

# In the order of Gemma 4's vocabulary; there the later ones lie further up.
SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>",
    "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
    '<|"|>', "<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>",
    "<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>",
)  # fmt: skip

CHAT_TEMPLATE = """\
{#- Gemma 4's turns, without tools, thinking and media. #}
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {%- if role not in ['system', 'developer', 'user', 'model'] -%}
        {{- raise_exception('The demo model has no turns of the role ' ~ role ~ '.') -}}
    {%- endif -%}
    {{- '<|turn>' ~ ('system' if role == 'developer' else role) ~ '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {{- part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def train_tokenizer() -> Tokenizer:
    """Learn the merges from the corpus; every byte is a token, so any text has an encoding."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = itertools.islice(corpus.documents(0, TOKENIZER_SHARD), TRAINING_DOCUMENTS)
    tokenizer.train_from_iterator((_plain(corpus.render(item)) for item in source), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos>:1 $B:1",
        special_tokens=[("<bos>", SPECIAL_TOKENS.index("<bos>"))],
    )
    return tokenizer


def _plain(text: str) -> str:
    """The text with line breaks for control tokens, so that no merge spans one."""
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\n")
    return text


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<turn|>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    save_tokenizer(train_tokenizer(), Path(sys.argv[1]))
