"""Training and held-out rows of a config."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from eightgig.config import DataConfig
from eightgig.data.batches import IGNORE_INDEX
from eightgig.data.cache import ArrayWriter
from eightgig.data.checks import check_data
from eightgig.data.chunks import Chunk, ChunkTokens
from eightgig.data.formats import RowShape
from eightgig.data.load import limit_length, load_dataset
from eightgig.data.prepare import Preparation, tokenise
from eightgig.data.raw import RawRow
from eightgig.data.select import select_rows, trained_per_row
from eightgig.data.tokenised import TokenStore
from eightgig.data.tokenizer import PLAIN, render_settings
from eightgig.errors import DataError
from tests.chats import make_chat_tokenizer
from tests.unit.data.rows import chat_row, pair_row, words, write_lines


@pytest.fixture(scope="module")
def tokenizer():
    return make_chat_tokenizer("llama3")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Processes are tested elsewhere; here they would only take time."""
    monkeypatch.setattr("eightgig.data.prepare._count_workers", lambda *_: 0)


def rows_of(dataset):
    return [
        dataset.input_ids[start:end].tolist()
        for start, end in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)
    ]


def make_file(folder: Path, count: int = 40, **columns) -> str:
    rows = [{**chat_row(n), **{key: make(n) for key, make in columns.items()}}
            for n in range(1, count + 1)]  # fmt: skip
    return str(write_lines(folder / "rows.jsonl", rows))


def test_a_share_is_held_out(tmp_path, tokenizer):
    data = load_dataset(DataConfig(path=make_file(tmp_path), held_out=0.1), tokenizer)
    assert (data.train.num_rows, data.held_out.num_rows) == (36, 4)
    assert set(data.train.row_ids) | set(data.held_out.row_ids) == set(range(40))


def test_a_number_of_rows_is_held_out(tmp_path, tokenizer):
    data = load_dataset(DataConfig(path=make_file(tmp_path), held_out=7), tokenizer)
    assert data.held_out.num_rows == 7


def test_nothing_is_held_out_at_0(tmp_path, tokenizer):
    data = load_dataset(DataConfig(path=make_file(tmp_path), held_out=0), tokenizer)
    assert data.held_out is None
    assert data.train.num_rows == 40


def test_the_seed_alone_says_what_is_held_out(tmp_path, tokenizer):
    config = DataConfig(path=make_file(tmp_path), held_out=5)
    first, again, other = (load_dataset(config, tokenizer, seed=s).held_out for s in (1, 1, 2))
    assert first.row_ids.tolist() == again.row_ids.tolist() != other.row_ids.tolist()
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_groups_stay_on_one_side(tmp_path, tokenizer):
    path = make_file(tmp_path, case=lambda n: n % 5)
    data = load_dataset(DataConfig(path=path, held_out=0.3, group_column="case"), tokenizer)
    held = {(row + 1) % 5 for row in data.held_out.row_ids}
    trained = {(row + 1) % 5 for row in data.train.row_ids}
    assert not held & trained
    assert held | trained == set(range(5))


def test_rows_that_say_the_same_stay_on_one_side(tmp_path, tokenizer):
    rows = [chat_row(n // 4) for n in range(40)]
    config = DataConfig(path=str(write_lines(tmp_path / "rows.jsonl", rows)), held_out=0.3)
    data = load_dataset(config, tokenizer)
    assert not {row // 4 for row in data.held_out.row_ids} & {
        row // 4 for row in data.train.row_ids
    }


def test_parts_of_one_conversation_stay_on_one_side(tmp_path):
    qwen = make_chat_tokenizer("qwen3")
    rows = [chat_row(n, turns=3) for n in range(10)]
    config = DataConfig(path=str(write_lines(tmp_path / "rows.jsonl", rows)), held_out=3)
    data = load_dataset(config, qwen)
    assert (data.train.num_rows, data.held_out.num_rows) == (21, 9)
    assert not set(data.train.row_ids) & set(data.held_out.row_ids)
    assert [finding.code for finding in data.findings] == ["data.split_per_turn"]
    assert data.findings[0].message.endswith("So it is with 9 other rows.")


def test_one_group_is_trained_on_whole(tmp_path, tokenizer):
    path = make_file(tmp_path, case=lambda _: "a")
    data = load_dataset(DataConfig(path=path, group_column="case"), tokenizer)
    assert data.held_out is None
    assert [finding.code for finding in data.findings] == ["data.held_out_skipped"]


def test_a_held_out_file_loses_rows_that_are_trained_on(tmp_path, tokenizer):
    held = write_lines(tmp_path / "held.jsonl", [chat_row(3), chat_row(99)])
    config = DataConfig(path=make_file(tmp_path), held_out_path=str(held))
    data = load_dataset(config, tokenizer)
    assert data.train.num_rows == 40
    assert data.held_out.row_ids.tolist() == [1]
    (finding,) = data.findings
    assert (finding.code, finding.file, finding.line) == ("data.leak", str(held), 1)


def test_an_error_in_a_row_stops_and_names_all(tmp_path, tokenizer):
    rows = [chat_row(1), {"messages": []}, chat_row(2), "{"]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_dataset(DataConfig(path=str(path)), tokenizer)
    assert caught.value.message == (
        f'{path}:2: The column "messages" is an empty list. 1 more error.'
    )
    assert [finding.line for finding in caught.value.findings] == [2, 4]


def test_an_error_in_the_held_out_file_stops(tmp_path, tokenizer):
    held = write_lines(tmp_path / "held.jsonl", ["{"])
    config = DataConfig(path=make_file(tmp_path), held_out_path=str(held))
    with pytest.raises(DataError, match=r"held\.jsonl:1: "):
        load_dataset(config, tokenizer)


def test_no_file_is_an_error(tmp_path, tokenizer):
    with pytest.raises(DataError, match="There is no file"):
        load_dataset(DataConfig(path=str(tmp_path / "none.jsonl")), tokenizer)


def test_more_held_out_than_there_is_stops(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"held_out` is 40, and there are 40 rows"):
        load_dataset(DataConfig(path=make_file(tmp_path), held_out=40), tokenizer)


def test_rows_keep_their_lines_and_files(tmp_path, tokenizer):
    first = write_lines(tmp_path / "a.jsonl", ["", chat_row(1), "", chat_row(2)])
    second = write_lines(tmp_path / "b.jsonl", [chat_row(3)])
    config = DataConfig(path=(str(first), str(second)), held_out=0)
    train = load_dataset(config, tokenizer).train
    assert [train.place(row) for row in range(3)] == [
        (str(first), 2),
        (str(first), 4),
        (str(second), 1),
    ]


def test_the_summary_counts(tmp_path, tokenizer):
    train = load_dataset(DataConfig(path=make_file(tmp_path), held_out=0), tokenizer).train
    trained = int(np.count_nonzero(train.labels != IGNORE_INDEX))
    assert train.summary["rows"] == 40
    assert train.summary["tokens"] == len(train.input_ids)
    assert train.summary["trained_tokens"] == trained
    assert train.summary["longest_tokens"] == train.lengths.max()
    assert train.summary["format"] == "messages"


# Plain text, and no template


def test_plain_text_is_trained_whole(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "Hello you"}])
    train = load_dataset(DataConfig(path=str(path), held_out=0), tokenizer).train
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert rows_of(train) == [[bos, *tokenizer("Hello you", add_special_tokens=False)["input_ids"],
                               eos]]  # fmt: skip
    assert train.labels.tolist() == [IGNORE_INDEX, *train.input_ids[1:]]


def test_prompt_and_completion_are_joined_without_a_template(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "Hi ", "completion": "you"}])
    config = DataConfig(path=str(path), held_out=0, chat_template=PLAIN)
    train = load_dataset(config, tokenizer).train
    assert tokenizer.decode(train.input_ids) == "<|begin_of_text|>Hi you<|eot_id|>"
    trained = train.labels[train.labels != IGNORE_INDEX]
    assert tokenizer.decode(trained) == "you<|eot_id|>"


def test_a_prompt_keeps_its_tokens_without_a_template(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "a\n", "completion": "\nb"}])
    config = DataConfig(path=str(path), held_out=0, chat_template=PLAIN)
    (row,) = rows_of(load_dataset(config, tokenizer).train)
    prompt = tokenizer("a\n", add_special_tokens=False)["input_ids"]
    assert row[1 : len(prompt) + 1] == prompt


def test_conversations_need_a_template(tmp_path):
    bare = make_chat_tokenizer("llama3")
    bare.chat_template = None
    with pytest.raises(DataError) as caught:
        load_dataset(DataConfig(path=make_file(tmp_path)), bare)
    assert "The model has no chat template. So it is with 39 other rows." in caught.value.message
    assert "`data.chat_template`" in caught.value.fix
    assert len(caught.value.findings) == 1


def test_texts_need_no_template(tmp_path):
    bare = make_chat_tokenizer("llama3")
    bare.chat_template = None
    path = write_lines(tmp_path / "rows.jsonl", [{"text": words(9, n)} for n in range(9)])
    assert load_dataset(DataConfig(path=str(path), held_out=0), bare).train.num_rows == 9


def test_a_template_that_is_no_template_is_an_error(tmp_path):
    broken = make_chat_tokenizer("llama3", "{% for %}")
    with pytest.raises(DataError, match="no valid Jinja"):
        load_dataset(DataConfig(path=make_file(tmp_path)), broken)


def test_only_the_completion_of_a_pair_is_trained(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", [pair_row(1)])
    train = load_dataset(DataConfig(path=str(path), held_out=0), tokenizer).train
    trained = train.labels[train.labels != IGNORE_INDEX]
    assert tokenizer.decode(trained) == pair_row(1)["completion"] + "<|eot_id|>"


def test_answers_in_a_prompt_are_not_trained(tmp_path, tokenizer):
    turns = chat_row(1, turns=2)["messages"]
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": turns[:3], "completion": turns[3:]}])
    train = load_dataset(DataConfig(path=str(path), held_out=0), tokenizer).train
    trained = train.labels[train.labels != IGNORE_INDEX]
    assert tokenizer.decode(trained) == turns[3]["content"] + "<|eot_id|>"


def test_an_answer_without_weight_is_not_trained(tmp_path, tokenizer):
    turns = chat_row(1, turns=2)["messages"]
    turns[1]["weight"] = 0
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": turns}])
    train = load_dataset(DataConfig(path=str(path), held_out=0), tokenizer).train
    trained = train.labels[train.labels != IGNORE_INDEX]
    assert tokenizer.decode(trained) == turns[3]["content"] + "<|eot_id|>"


# Long rows


def long_file(folder: Path) -> str:
    long = {"messages": [{"role": "user", "content": words(200, 1)},
                         {"role": "assistant", "content": words(200, 2)}]}  # fmt: skip
    return str(write_lines(folder / "rows.jsonl", [chat_row(1), long, chat_row(2)]))


def test_long_rows_are_refused_with_the_length_they_need(tmp_path, tokenizer):
    config = DataConfig(path=long_file(tmp_path), held_out=0)
    longest = load_dataset(config, tokenizer).train.lengths.max()
    with pytest.raises(DataError) as caught:
        load_dataset(config, tokenizer, max_length=500)
    assert f"1 of 3 rows are longer than 500 tokens; the longest has {longest:,}." in str(
        caught.value
    )
    assert f"data.max_length: {longest}" in caught.value.fix
    assert caught.value.findings[1].line == 2


def test_long_rows_are_dropped(tmp_path, tokenizer):
    config = DataConfig(path=long_file(tmp_path), held_out=0, too_long="drop")
    data = load_dataset(config, tokenizer, max_length=500)
    assert data.train.row_ids.tolist() == [0, 2]
    assert [finding.code for finding in data.findings] == ["data.dropped"]


def test_long_rows_are_cut_at_their_end(tmp_path, tokenizer):
    config = DataConfig(path=long_file(tmp_path), held_out=0, too_long="truncate")
    whole = rows_of(load_dataset(config, tokenizer).train)
    middle = len(whole[1]) * 3 // 4
    data = load_dataset(config, tokenizer, max_length=middle)
    assert rows_of(data.train) == [whole[0], whole[1][:middle], whole[2]]
    assert [finding.code for finding in data.findings] == ["data.truncated", "data.answer_cut"]
    assert data.findings[1].line == 2


def test_a_row_whose_answer_is_cut_off_is_left_out(tmp_path, tokenizer):
    config = DataConfig(path=long_file(tmp_path), held_out=0, too_long="truncate")
    data = load_dataset(config, tokenizer, max_length=300)
    assert data.train.row_ids.tolist() == [0, 2]


def test_nothing_left_to_train_on_is_an_error(tmp_path, tokenizer):
    config = DataConfig(path=make_file(tmp_path), held_out=0, too_long="drop")
    with pytest.raises(DataError, match="No row is left to train on"):
        load_dataset(config, tokenizer, max_length=5)


def test_rows_that_fit_stay_the_same_object(tmp_path, tokenizer):
    train = load_dataset(DataConfig(path=make_file(tmp_path), held_out=0), tokenizer).train
    assert limit_length(train, 10_000, "refuse", []) is train


def test_chosen_rows_keep_their_tokens(tmp_path, tokenizer):
    train = load_dataset(DataConfig(path=make_file(tmp_path), held_out=0), tokenizer).train
    chosen = np.array([7, 3, 30])
    assert rows_of(select_rows(train, chosen)) == [rows_of(train)[row] for row in chosen]


def test_many_tokens_are_chosen_block_by_block(tmp_path, tokenizer, monkeypatch):
    train = load_dataset(DataConfig(path=make_file(tmp_path), held_out=0), tokenizer).train
    chosen = np.arange(39, -1, -3)
    expected = rows_of(select_rows(train, chosen))
    monkeypatch.setattr("eightgig.data.select._BLOCK_TOKENS", 100)
    monkeypatch.setattr("eightgig.data.select._MEMORY_BYTES", 0)
    selected = select_rows(train, chosen, cache_dir=tmp_path / "cache")
    assert rows_of(selected) == expected
    assert isinstance(selected.input_ids, np.memmap)


def test_trained_tokens_are_counted_row_by_row(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("eightgig.data.select._BLOCK_TOKENS", 100)
    rows = [chat_row(number, 1 + number % 3) for number in range(12)]
    config = DataConfig(path=str(write_lines(tmp_path / "rows.jsonl", rows)), held_out=0)
    train = load_dataset(config, tokenizer).train
    is_trained = (train.labels != IGNORE_INDEX).astype(int)
    expected = np.add.reduceat(is_trained, train.offsets[:-1])
    assert trained_per_row(train).tolist() == expected.tolist()


# Cache


def test_tokens_are_found_again(tmp_path, tokenizer, monkeypatch):
    config = DataConfig(path=make_file(tmp_path), held_out=0)
    first = load_dataset(config, tokenizer, cache_dir=tmp_path / "cache")
    monkeypatch.setattr("eightgig.data.prepare.ChunkRenderer", None)
    again = load_dataset(config, tokenizer, cache_dir=tmp_path / "cache")
    assert rows_of(first.train) == rows_of(again.train)
    assert first.train.fingerprint == again.train.fingerprint
    assert first.train.place(5) == again.train.place(5)


def test_tokens_are_the_same_on_disk_and_in_memory(tmp_path, tokenizer):
    config = DataConfig(path=make_file(tmp_path), held_out=0.2)
    kept = load_dataset(config, tokenizer, cache_dir=tmp_path / "cache")
    held = load_dataset(config, tokenizer)
    for one, other in zip(kept[:2], held[:2], strict=True):
        assert one.fingerprint == other.fingerprint
        assert np.array_equal(one.labels, other.labels)


def test_a_check_leaves_its_tokens_for_the_training(tmp_path, tokenizer, monkeypatch):
    rows = [*(chat_row(n) for n in range(9)), {"prompt": "Hi", "completion": "jo@acme.co"}]
    rows[9] = {"messages": [{"role": "user", "content": "Hi <|eot_id|>"},
                            {"role": "assistant", "content": "jo@acme.co"}]}  # fmt: skip
    config = DataConfig(path=str(write_lines(tmp_path / "rows.jsonl", rows)), held_out=0)
    expected = load_dataset(config, tokenizer)
    report = check_data(config, tokenizer, cache_dir=tmp_path / "cache", workers=0)
    assert {"data.personal", "data.control_token"} <= set(report.summary["counts"])
    assert report.summary["languages"]
    monkeypatch.setattr("eightgig.data.prepare.ChunkRenderer", None)
    data = load_dataset(config, tokenizer, cache_dir=tmp_path / "cache")
    assert data.train.fingerprint == expected.train.fingerprint
    assert data.findings == expected.findings
    assert [finding.code for finding in data.findings] == ["data.control_token"]


@pytest.mark.parametrize("change", ["content", "template", "train_on", "group_column"])
def test_what_decides_about_tokens_is_part_of_the_key(tmp_path, change):
    path = make_file(tmp_path, case=lambda n: n)
    config = {"path": path, "held_out": 0}
    tokenizer = make_chat_tokenizer("llama3")
    load_dataset(DataConfig(**config), tokenizer, cache_dir=tmp_path / "cache")
    if change == "content":
        Path(path).write_text(Path(path).read_text().replace("de", "da", 1))
    elif change == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("2024", "2025")
    else:
        config[change] = {"train_on": "all", "group_column": "case"}[change]
    load_dataset(DataConfig(**config), tokenizer, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_a_damaged_cache_is_made_again(tmp_path, tokenizer):
    config = DataConfig(path=make_file(tmp_path), held_out=0)
    first = load_dataset(config, tokenizer, cache_dir=tmp_path / "cache")
    expected = rows_of(first.train)
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    with (folder / "labels.bin").open("ab") as file:
        file.write(b"more")
    again = load_dataset(config, tokenizer, cache_dir=tmp_path / "cache")
    assert rows_of(again.train) == expected


def test_rows_with_errors_leave_nothing_behind(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(1), "{"])
    with pytest.raises(DataError):
        load_dataset(DataConfig(path=str(path)), tokenizer, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_only_the_last_used_tokens_are_kept(tmp_path, tokenizer):
    for number in range(8):
        path = write_lines(tmp_path / f"{number}.jsonl", [chat_row(number)])
        config = DataConfig(path=str(path), held_out=0)
        load_dataset(config, tokenizer, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 6


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, tokenizer):
    (tmp_path / "cache").write_text("a file, not a folder")
    config = DataConfig(path=make_file(tmp_path))
    with pytest.raises(DataError, match="cannot be written") as caught:
        load_dataset(config, tokenizer, cache_dir=tmp_path / "cache")
    assert "model.cache_dir" in caught.value.fix


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    config = DataConfig(path=make_file(tmp_path))
    monkeypatch.setattr("eightgig.data.cache.Path.open", _open_full(Path.open))
    with pytest.raises(DataError, match="cannot be written") as caught:
        load_dataset(config, tokenizer, cache_dir=tmp_path / "cache")
    assert "No space left on device" in caught.value.why
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


class _FullFile:
    def write(self, data):
        raise OSError(28, "No space left on device")

    def close(self):
        raise OSError(28, "No space left on device")


def _open_full(real):
    def open_file(path, mode="r", *args, **options):
        return _FullFile() if mode == "wb" else real(path, mode, *args, **options)

    return open_file


def test_leftovers_of_programs_that_ended_early_are_deleted(tmp_path, tokenizer):
    stale, recent = (tmp_path / "cache" / "tokens" / name for name in ("a.1.tmp", "b.2.tmp"))
    for folder in (stale, recent):
        folder.mkdir(parents=True)
    os.utime(stale, (0, 0))
    load_dataset(DataConfig(path=make_file(tmp_path)), tokenizer, cache_dir=tmp_path / "cache")
    assert not stale.exists()
    assert recent.exists()


def test_a_check_holds_what_it_compares_and_no_tokens(tmp_path):
    rows = tuple(RawRow(line=line, data=b"{}") for line in range(1, 5))
    shape = RowShape(format="messages", columns={})
    store = TokenStore((), ArrayWriter(tmp_path / "tokens"))
    tracemalloc.start()
    for _ in range(8):
        tokens = ChunkTokens(
            input_ids=np.arange(100_000, dtype=np.int32),
            is_trained=np.ones(100_000, np.bool_),
            lengths=np.full(4, 25_000),
            origins=np.arange(4),
            content_keys=np.arange(1, 5, dtype=np.uint64),
            group_keys=np.arange(1, 5, dtype=np.uint64),
            answer_keys=np.arange(1, 5, dtype=np.uint64),
            signatures=np.ones((4, 64), np.uint32),
            findings=(),
            answers={},
            scripts={},
            languages={},
        )
        store.add(Chunk(file="rows.jsonl", shape=shape, rows=rows), tokens)
    del tokens
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held_bytes < 400_000, "one chunk of the eight has 500,000"
    store.close()
    assert len(store.finish().input_ids) == 800_000


def test_progress_is_told(tmp_path, tokenizer):
    told = []
    config = DataConfig(path=make_file(tmp_path, count=200))
    load_dataset(config, tokenizer, progress=lambda rows, share: told.append((rows, share)))
    assert [rows for rows, _ in told] == [64, 128, 192, 200]
    assert told[-1][1] == 1.0


def test_boilerplate_is_looked_for_only_where_texts_are(tmp_path, tokenizer):
    config = DataConfig(path=make_file(tmp_path))
    tokens = tokenise(config, config.path, render_settings(tokenizer), Preparation(workers=0))
    assert tokens.texts is None
