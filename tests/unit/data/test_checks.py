"""What only all rows together show, what texts hold, and how rows are shown to people."""

import os
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightgig.config import DataConfig
from eightgig.data import patterns
from eightgig.data.checks import check_data, histogram, last_trained, order_findings
from eightgig.data.load import load_dataset
from eightgig.data.near import common_pieces, piece_hashes, signature, similar_rows
from eightgig.data.preview import preview_rows
from eightgig.data.rules import RULES, make_finding
from eightgig.data.texts import count_scripts, guess_language
from tests.chats import make_chat_tokenizer
from tests.unit.data.rows import chat_row, pair_row, words, write_lines


@pytest.fixture(scope="module")
def tokenizer():
    return make_chat_tokenizer("llama3")


def check(tmp_path, rows, tokenizer, **config):
    path = write_lines(tmp_path / "rows.jsonl", rows)
    return check_data(DataConfig(path=str(path), **config), tokenizer, workers=0)


def codes(report):
    return [f.code for f in report.findings if f.severity != "note"]


# Rules


def test_every_rule_says_why_and_what_to_do():
    for code, rule in RULES.items():
        assert code.startswith("data.")
        assert rule.why.endswith(".")
        assert rule.fix.endswith((".", ").")) or "iconv" in rule.fix


def test_findings_are_ordered_by_severity_and_what_is_of_all_rows_comes_first():
    found = [
        make_finding("data.few_trained_tokens", "n"),
        make_finding("data.duplicates", "row", file="a", line=9),
        make_finding("data.duplicates", "row", file="a", line=2),
        make_finding("data.duplicates", "all"),
        make_finding("data.json", "e", file="a", line=5),
    ]
    ordered = [(finding.message, finding.line) for finding in order_findings(found)]
    assert ordered == [("e", 5), ("all", None), ("row", 2), ("row", 9), ("n", None)]


# Repetitions


def test_repeated_rows_are_counted_and_name_their_original(tmp_path, tokenizer):
    rows = [chat_row(n) for n in (1, 2, 3, 2, 1, 2)]
    rows[3]["messages"][0]["content"] = rows[3]["messages"][0]["content"].upper() + "  "
    report = check(tmp_path, rows, tokenizer)
    found = [finding for finding in report.findings if finding.code == "data.duplicates"]
    assert found[0].message == "3 of 6 rows repeat earlier ones (50.0%)."
    assert [(f.line, f.message) for f in found[1:]] == [
        (4, "The row says the same as line 2."),
        (5, "The row says the same as line 1."),
        (6, "The row says the same as line 2."),
    ]


def test_more_repeated_rows_than_are_named_are_counted(tmp_path, tokenizer):
    report = check(tmp_path, [chat_row(1), *[chat_row(2)] * 61], tokenizer)
    assert report.summary["counts"]["data.duplicates"] == 60
    assert len([f for f in report.findings if f.code == "data.duplicates" and f.line]) < 60


def test_rows_with_other_calls_are_not_the_same(tmp_path, tokenizer):
    def row(city):
        function = {"name": "sun", "arguments": {"city": city}}
        return {"messages": [
            {"role": "user", "content": "Sun?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        ]}  # fmt: skip

    assert "data.duplicates" not in codes(check(tmp_path, [row("Bonn"), row("Ulm")], tokenizer))


def test_the_share_of_common_pieces_is_estimated_well():
    random = np.random.default_rng(0)
    none = np.zeros(0, np.uint64)
    for share in (0.2, 0.5, 0.9):
        errors = []
        for _ in range(20):
            pool = random.integers(0, 2**63, 2_000, dtype=np.uint64)
            both = int(1_000 * share)
            one, other = pool[:1_000], pool[1_000 - both : 2_000 - both]
            truth = both / (2_000 - both)
            alike = (signature(one, none) == signature(other, none)).mean()
            errors.append(alike - truth)
        assert abs(np.mean(errors)) < 0.05


def test_similar_rows_are_found_and_others_not():
    texts = [words(80, n) for n in range(200)]
    texts[150] = texts[20].replace(" ", "  ", 3) + " ba"
    texts[160] = texts[30]
    none = np.zeros(0, np.uint64)
    signatures = np.stack([signature(piece_hashes(text), none) for text in texts])
    keys = np.arange(1, 201, dtype=np.uint64)
    keys[160] = keys[30]
    later, earlier = similar_rows(signatures, keys)
    assert (later.tolist(), earlier.tolist()) == ([150], [20])


def test_what_all_rows_share_does_not_make_them_similar(tmp_path, tokenizer):
    heading = words(200, 1)
    rows = [{"prompt": heading + " " + words(12, n), "completion": words(9, -n % 997)}
            for n in range(2, 60)]  # fmt: skip
    assert codes(check(tmp_path, rows, tokenizer)) == []


def test_few_rows_have_no_boilerplate():
    assert len(common_pieces([piece_hashes("a" * 90)] * 5)) == 0


@pytest.mark.parametrize("text", ["", "a", "1234567", "ß", " \n "])
def test_short_texts_are_like_nothing(text):
    none = np.zeros(0, np.uint64)
    assert not signature(piece_hashes(text), none).any()


def test_held_out_rows_that_resemble_trained_ones_are_said(tmp_path, tokenizer):
    rows = [{"text": words(80, n // 2) + f" {n}"} for n in range(40)]
    report = check(tmp_path, rows, tokenizer, held_out=10)
    assert "data.held_out_near" in codes(report)


# Answers and amounts


@pytest.mark.parametrize(
    ("answers", "is_said"),
    [(["no"] * 18 + ["yes"] * 6, True), (["no"] * 14 + ["yes"] * 10, False),
     (["no"] * 18, False)],
)  # fmt: skip
def test_one_answer_that_dominates_is_said(tmp_path, tokenizer, answers, is_said):
    rows = [{**pair_row(n), "completion": answer} for n, answer in enumerate(answers)]
    report = check(tmp_path, rows, tokenizer)
    assert ("data.dominant_answer" in codes(report)) == is_said
    assert report.summary["answers"][0] == {"answer": "no", "rows": answers.count("no")}


def test_an_answer_frequent_among_free_ones_is_said(tmp_path, tokenizer):
    rows = [{**pair_row(n), **({"completion": "I do not know."} if n % 4 == 0 else {})}
            for n in range(100)]  # fmt: skip
    report = check(tmp_path, rows, tokenizer)
    message = next(f for f in report.findings if f.code == "data.dominant_answer").message
    assert message.startswith('25 of 100 answers are "I do not know." (25%)')


def test_the_summary_says_what_there_is(tmp_path, tokenizer):
    rows = [*(chat_row(n) for n in range(30)), {"messages": []}]
    summary = check(tmp_path, rows, tokenizer).summary
    assert (summary["source_rows"], summary["good_rows"], summary["rows"]) == (31, 30, 30)
    assert summary["counts"]["data.no_messages"] == 1
    assert 0 < summary["trained_share"] < 1
    assert sum(bar["rows"] for bar in summary["histogram"]) == 30
    assert summary["percentiles"]["p50"] <= summary["percentiles"]["p99"]
    assert list(summary["scripts"]) == ["Latin"]


@pytest.mark.parametrize(
    ("lengths", "bars"),
    [([], []), ([0, 63, 64], [2, 1]), ([20_000], [0] * 9 + [1]), ([127, 128], [0, 1, 1])],
)
def test_lengths_are_counted_in_ranges(lengths, bars):
    found = histogram(np.array(lengths, np.int64))
    assert [bar["rows"] for bar in found] == bars
    assert all(bar["below"] is None for bar in found[9:])


def test_the_last_trained_token_of_each_row_is_known(tmp_path, tokenizer, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(n, 1 + n % 3) for n in range(20)])
    train = load_dataset(DataConfig(path=str(path), held_out=0), tokenizer).train
    monkeypatch.setattr("eightgig.data.select._BLOCK_TOKENS", 300)
    assert set(last_trained(train).tolist()) == {tokenizer.eos_token_id}


def test_prompts_that_are_trained_are_said(tmp_path, tokenizer):
    report = check(tmp_path, [chat_row(n) for n in range(20)], tokenizer, train_on="all")
    assert "data.prompts_trained" in [finding.code for finding in report.findings]


# Texts


@pytest.mark.parametrize(
    ("text", "script"),
    [("Hello", "Latin"), ("Größe", "Latin"), ("Привет", "Cyrillic"), ("日本", "Han"),
     ("ひらカナ", "Kana"), ("한국", "Hangul"), ("नमस्ते", "Devanagari"), ("שלום", "Hebrew"),
     ("مرحبا", "Arabic"), ("Ω", "Greek"), ("ไทย", "Thai")],
)  # fmt: skip
def test_scripts_are_told_apart(text, script):
    assert list(count_scripts(text)) == [script]
    assert sum(count_scripts(text).values()) == len(text)


@given(st.text())
def test_letters_are_never_counted_twice(text):
    assert sum(count_scripts(text).values()) <= len(text)


def test_digits_and_signs_are_of_no_script():
    assert count_scripts("12 + 3 = 15! 🙂 @[`{") == {}


@pytest.mark.parametrize(
    ("text", "language"),
    [("This is the answer to the question that you asked for.", "English"),
     ("Das ist die Antwort auf eine Frage, die nicht leicht ist.", "German"),
     ("C'est la réponse pour une question dans le livre que vous lisez.", "French"),
     ("How to do this well?", "English"), ("zuba defi gola", "")],
)  # fmt: skip
def test_languages_are_guessed(text, language):
    assert guess_language(text) == language


@pytest.mark.parametrize(
    "text",
    ["4539 1488 0343 6467", "4539148803436467", "5425-2334-3010-9903", "jo@acme.co",
     "DE89370400440532013000", "GB82 WEST 1234 5698 7654 32"],
)  # fmt: skip
def test_personal_data_is_seen(text):
    assert patterns.find_personal(f"See {text}, please.") is not None


@pytest.mark.parametrize(
    "text",
    ["4539 1488 0343 6468", "0000 0000 0000 0000", "1234567890123456", "@user", "a @ b.c",
     "jo@example.com", "DE00 3704 0044 0532 0130 00", "3.14159265358979312", "ISBN 9783161484100",
     "DE12 IS NO BANK"],
)  # fmt: skip
def test_other_numbers_are_no_personal_data(text):
    assert patterns.find_personal(f"See {text}, please.") is None


@pytest.mark.parametrize(
    "text",
    [
        "{{ x }}",
        "{{user.name}}",
        "{{ first name }}",
        "{input}",
        "[INSERT DATE]",
        "[Your Name]",
        "[Insert today's date]",
        "<YOUR NAME HERE>",
        "Lorem ipsum dolor sit",
    ],
)
def test_placeholders_are_seen(text):
    assert patterns.find_placeholder(f"Dear {text}, hello") == text.removesuffix(" sit")


@pytest.mark.parametrize(
    "text",
    [
        "`{input}`",
        "```\n{{ x }}\n```",
        'f"{input}"',
        "def f({input})",
        "{x}",
        "<b>",
        "[1]",
        "[Your](x)",
    ],
)
def test_code_and_markup_are_no_placeholders(text):
    assert patterns.find_placeholder(text) is None


@pytest.mark.parametrize(
    "text",
    ["{{ .Values.x }}", "{{ range .Items }}", "${{ secrets.TOKEN }}", "{{ x | upper }}",
     "{{#each x}}{{this}}{{/each}}", "curl -H <YOUR_API_KEY>", "{{> header}}"],
)  # fmt: skip
def test_expressions_of_template_languages_are_no_placeholders(text):
    assert patterns.find_placeholder(text) is None


def test_placeholders_in_a_row_about_them_are_meant(tmp_path, tokenizer):
    answer = {"role": "assistant", "content": "Dear {{name}}, thank you."}
    questions = ("Write a template of a letter.", "Write a letter to Mrs Smith.")
    rows = [{"messages": [{"role": "user", "content": text}, answer]} for text in questions]
    report = check(tmp_path, rows, tokenizer)
    found = [f.line for f in report.findings if f.code == "data.placeholder"]
    assert found == [2]


@pytest.mark.parametrize(
    "text",
    ["git clone git@github.com:psf/requests.git", "Ask support@acme.io", "noreply@acme.co"],
)
def test_addresses_of_offices_and_programs_are_not_personal(text):
    assert patterns.find_personal(text) is None


@pytest.mark.parametrize(
    ("text", "is_secret"),
    [("postgres://app:hunter2@db.acme.io/x", True), ("mongodb+srv://a:Xy9_zQ@cluster0.x.net", True),
     ("postgres://user:password@db.acme.io/x", False), ("https://me:${TOKEN}@host/x", False),
     ("redis://me:hunter2@localhost:6379", False), ("amqp://a:<secret>@h", False),
     ("ftp://anna:hunter2@example.com", False)],
)  # fmt: skip
def test_passwords_of_manuals_are_no_secrets(text, is_secret):
    assert (patterns.find_secret(text) is not None) == is_secret


def test_the_same_thanks_at_the_end_of_conversations_dominate_nothing(tmp_path, tokenizer):
    rows = [
        {"messages": [*chat_row(number)["messages"], {"role": "user", "content": "Thanks"},
                      {"role": "assistant", "content": "You're welcome!"}]}
        for number in range(40)
    ]  # fmt: skip
    assert "data.dominant_answer" not in codes(check(tmp_path, rows, tokenizer))


PATTERNS = [value for value in vars(patterns).values() if isinstance(value, re.Pattern)]


@pytest.mark.parametrize("piece", ["a", "A" * 3 + "@", "1 ", "{{", "eyJ", "-", "sk-", "a:b@", "Ã"])
def test_patterns_take_time_in_proportion_to_the_text(piece):
    text = piece * (400_000 // len(piece))
    start = time.process_time()
    for pattern in [*PATTERNS, *(pattern for _, pattern in patterns._SECRETS.values())]:
        pattern.search(text)
    assert time.process_time() - start < 3.0


def test_a_secret_is_never_repeated(tmp_path, tokenizer):
    secret = "hf_" + "aB3" * 12
    rows = [chat_row(1), {"messages": [{"role": "user", "content": secret},
                                       {"role": "assistant", "content": "No."}]}]  # fmt: skip
    report = check(tmp_path, rows, tokenizer)
    assert "data.secret" in codes(report)
    assert not any(secret[:8] in finding.message for finding in report.findings)


# Preview


@pytest.mark.parametrize("chat", ["llama3", "qwen3", "mistral", "smollm2"])
def test_the_preview_is_the_row(tmp_path, chat):
    tokenizer = make_chat_tokenizer(chat)
    turns = [{"role": "user", "content": "Grüße\n\n  日本 🙂"},
             {"role": "assistant", "content": "ß 🙂🙂 the answer" + " x" * 40}]  # fmt: skip
    path = write_lines(tmp_path / "rows.jsonl", ["", {"messages": turns}])
    train = load_dataset(DataConfig(path=str(path), held_out=0), tokenizer).train
    (row,) = preview_rows(train, tokenizer)
    assert (row.file, row.line) == (str(path), 2)
    text = "".join(token.text for token in row.tokens)
    assert text == tokenizer.decode(train.input_ids)
    assert [token.token_id for token in row.tokens] == train.input_ids.tolist()
    trained = "".join(token.text for token in row.tokens if token.is_trained)
    assert trained.strip().removeprefix("<think>\n\n</think>\n\n").startswith("ß 🙂🙂")


def test_the_preview_is_spread_over_the_rows(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(n) for n in range(30)])
    train = load_dataset(DataConfig(path=str(path), held_out=0), tokenizer).train
    assert [row.line for row in preview_rows(train, tokenizer, count=3)] == [1, 11, 21]
    assert len(preview_rows(train, tokenizer, count=99)) == 30


def test_a_check_of_errors_only_has_no_preview(tmp_path, tokenizer):
    report = check(tmp_path, ["{"], tokenizer)
    assert report.preview == ()
    assert report.has_errors


# Speed


@pytest.mark.slow
@pytest.mark.parametrize(("turns", "seconds"), [(1, 20.0), (3, 60.0)])
def test_ten_thousand_rows_are_checked_in_time(tmp_path, turns, seconds):
    tokenizer = make_chat_tokenizer("llama3")
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(n, turns) for n in range(10_000)])
    start = sum(os.times()[:4])
    report = check_data(DataConfig(path=str(path)), tokenizer, workers=2)
    # Two processes: half of the processors' time, which other programs do not lengthen.
    assert (sum(os.times()[:4]) - start) / 2 < seconds
    assert codes(report) == []
