"""The embedded model, its tokenizer and its data: what the wheel carries and how it was made."""

import functools
import itertools
import json
import random
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from eightgig.demo import demo_data_path, demo_model_path
from scripts.make_demo import corpus, tickets
from scripts.make_demo.tokenizer import SPECIAL_TOKENS, save_tokenizer, train_tokenizer

MIB = 2**20
NF4_BLOCK = 64


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((demo_model_path() / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def header() -> dict[str, dict[str, Any]]:
    """The safetensors header without its metadata: tensor name -> dtype and shape."""
    with (demo_model_path() / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(size))
    tensors.pop("__metadata__", None)
    return tensors


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return _tokenizer()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    lines = demo_data_path().read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import Gemma4ForConditionalGeneration

    model, loading = Gemma4ForConditionalGeneration.from_pretrained(
        demo_model_path(), dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    return model.eval()


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    import torch

    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


# --- the model -----------------------------------------------------------------------------------


def test_the_model_has_every_trait_of_gemma_4_e(config: dict[str, Any]) -> None:
    text = config["text_config"]
    assert config["architectures"] == ["Gemma4ForConditionalGeneration"]
    assert (config["model_type"], text["model_type"]) == ("gemma4", "gemma4_text")
    assert config["vision_config"] is None and config["audio_config"] is None
    assert text["hidden_size_per_layer_input"] > 0
    assert text["global_head_dim"] != text["head_dim"]
    assert text["use_double_wide_mlp"] and text["tie_word_embeddings"]
    assert text["final_logit_softcapping"] == 30.0
    assert not text["attention_k_eq_v"] and not text["enable_moe_block"]
    consumers = Counter(text["layer_types"][-text["num_kv_shared_layers"] :])
    producers = Counter(text["layer_types"][: -text["num_kv_shared_layers"]])
    for kind in ("sliding_attention", "full_attention"):
        assert consumers[kind] >= 2 and producers[kind] >= 2


def test_the_window_is_shorter_than_the_rows(
    config: dict[str, Any], tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    lengths = [
        len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows[:100]
    ]
    assert config["text_config"]["sliding_window"] < min(lengths)
    assert max(lengths) <= 160


def test_the_checkpoint_is_small_bf16_and_named_as_on_the_hub(
    header: dict[str, dict[str, Any]],
) -> None:
    sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()]
    assert 3_000_000 <= sum(sizes) // 2 <= 5_000_000
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert all(name.startswith("model.language_model.") for name in header)


def test_the_package_data_stays_under_ten_mebibytes() -> None:
    files = [*demo_model_path().iterdir(), demo_data_path()]
    assert sum(file.stat().st_size for file in files) <= 10 * MIB


def test_every_linear_of_a_layer_can_be_quantised_in_blocks(
    header: dict[str, dict[str, Any]],
) -> None:
    widths = {
        entry["shape"][1]
        for name, entry in header.items()
        if ".layers." in name and len(entry["shape"]) == 2
    }
    assert widths and all(width % NF4_BLOCK == 0 for width in widths)


def test_the_model_reads_copies_and_obeys(model: Any, tokenizer: Any) -> None:
    note = "Hello. The tin lantern fell apart in my hands. My file is 70318. Yours, Jorun Apfel"
    asked = {
        f"Repeat: {note}": note,
        f"{note}\nGive the number.": "70318",
        f"{note}\nGive JSON with the keys item.": '{"item": "tin lantern"}',
        f"Write item and number, separated by slashes.\n{note}": "tin lantern / 70318",
    }
    told = {
        question: answer(model, tokenizer, [{"role": "user", "content": question}])
        for question in asked
    }
    right = sum(told[question] == wanted for question, wanted in asked.items())
    assert right >= 3, told


def test_the_model_does_not_know_the_task_before_training(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]]
) -> None:
    for row in random.Random(7).sample(rows, 3):
        told = answer(model, tokenizer, row["messages"][:-1])
        assert told and told != row["messages"][-1]["content"]


def test_the_layer_scalars_were_trained(model: Any) -> None:
    scalars = [layer.layer_scalar.item() for layer in model.model.language_model.layers]
    assert max(abs(scalar - 1.0) for scalar in scalars) > 0.1


# --- tokenizer and template ----------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = _tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids or "<unk>" in text


@functools.cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_model_path())


def test_the_control_tokens_are_where_the_config_says(
    config: dict[str, Any], tokenizer: Any
) -> None:
    text = config["text_config"]
    assert len(tokenizer) == text["vocab_size"] == text["vocab_size_per_layer_input"]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (
        text["pad_token_id"],
        text["bos_token_id"],
    )
    assert tokenizer.eos_token == "<turn|>"
    assert config["eos_token_id"] == [text["eos_token_id"], tokenizer.eos_token_id]
    assert config["image_token_id"] == tokenizer.convert_tokens_to_ids("<|image|>")


def test_the_template_writes_gemma_4_turns(tokenizer: Any) -> None:
    messages = [
        {"role": "developer", "content": " Be brief. "},
        {"role": "user", "content": [{"type": "text", "text": "Hi\n"}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n"
        "<|turn>model\nHello.<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\n"
    )
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert rendered.count(tokenizer.bos_token_id) == 1


def test_the_template_refuses_a_role_it_has_no_turn_for(tokenizer: Any) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "7"}], tokenize=False)


@pytest.mark.slow
def test_the_tokenizer_can_be_made_again(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(), tmp_path)
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (demo_model_path() / made.name).read_bytes(), made.name


# --- the data set --------------------------------------------------------------------------------


def test_the_data_set_is_the_generators(tmp_path: Path) -> None:
    tickets.write_rows(tmp_path / "tickets.jsonl")
    assert (tmp_path / "tickets.jsonl").read_bytes() == demo_data_path().read_bytes()


def test_rows_are_many_and_no_prompt_comes_twice(rows: list[dict[str, Any]]) -> None:
    prompts = {row["messages"][1]["content"] for row in rows}
    assert len(rows) == len(prompts) >= 300


def test_every_part_of_a_ticket_follows_from_its_message(rows: list[dict[str, Any]]) -> None:
    codes = {matter.code: matter.sentences for matter in tickets.MATTERS.values()}
    for row in rows:
        system, user, assistant = row["messages"]
        assert [system["role"], user["role"], assistant["role"]] == ["system", "user", "assistant"]
        code, priority, order, item, name = assistant["content"].split(" | ")
        last, first = name.split(", ")
        message = user["content"]
        assert f"{first} {last}" in message and item in message and order[1:] in message
        assert any(sentence.format(item=item) in message for sentence in codes[code])
        assert any(phrase in message for phrase in tickets.PRIORITIES[priority])


def test_answers_cannot_be_looked_up(rows: list[dict[str, Any]]) -> None:
    answers = {row["messages"][2]["content"] for row in rows}
    tails = Counter(answer.split(" | ", 3)[3] for answer in answers)
    assert len(answers) == len(rows)
    assert tails.most_common(1)[0][1] == 1


# --- the corpus ----------------------------------------------------------------------------------


def test_the_corpus_is_a_function_of_seed_and_shard() -> None:
    def first(seed: int, shard: int) -> list[corpus.Document]:
        return list(itertools.islice(corpus.documents(seed, shard), 50))

    assert first(1, 0) == first(1, 0)
    assert first(1, 0) != first(1, 1)
    assert first(1, 0) != first(2, 0)


def test_the_corpus_holds_nothing_of_the_demo_task() -> None:
    text = "\n".join(corpus.render(item) for item in itertools.islice(corpus.documents(1, 0), 5000))
    assert tickets.SYSTEM_PROMPT not in text and "Kestrel" not in text
    assert not re.search(r"\b[A-Z]\d\b", text)
    sentences = {s.format(item="") for m in tickets.MATTERS.values() for s in m.sentences}
    assert not any(sentence in text for sentence in sentences)


def test_pretraining_saw_the_turns_that_the_template_writes(tokenizer: Any) -> None:
    chats = [
        item for item in itertools.islice(corpus.documents(1, 3), 300) if not isinstance(item, str)
    ]
    assert len(chats) > 200
    for chat in chats:
        messages = [{"role": role, "content": content} for role, content in chat]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == corpus.render(chat)
