"""`report.html`: complete, self-contained, and safe to open whatever the run folder holds."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from eightgig.cli.app import main
from eightgig.run import Run
from eightgig.web.charts import Chart, describe_chart, draw_chart, nice_ticks, thin
from eightgig.web.facts import Series
from eightgig.web.report import write_report
from tests import tiny, tiny_run
from tests.runs import train_tiny

_VOID = {"meta", "link", "br"}
_EVIL = '<script>alert("x")</script><img src=http://a onerror=alert(1)>'


class Page(HTMLParser):
    """A page taken apart: whether tags balance, which elements there are, what is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def measure(name: str, first: float, second: float) -> dict[str, Any]:
    def around(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    return {
        "name": name, "first": around(first), "second": around(second),
        "difference": around(second - first), "p_value": 0.01, "num_rows": 40,
        "is_higher_better": False, "verdict": "better",
    }  # fmt: skip


EVALUATION = {
    "loss": measure("loss", 2.0, 1.0),
    "perplexity": measure("perplexity", 7.4, 2.7),
    "answers": [measure("exact_match", 0.1, 0.6)],
    "labels": {
        "labels": ["billing", "tech"],
        "base": {"accuracy": 0.5, "macro_f1": 0.4, "confusion": [[5, 3, 2], [4, 6, 0]]},
        "tuned": {"accuracy": 0.9, "macro_f1": 0.9, "confusion": [[9, 1, 0], [1, 9, 0]]},
        "accuracy": measure("accuracy", 0.5, 0.9),
    },
    "null": {
        "loss": measure("loss", 2.0, 1.8), "tuned_loss": measure("loss", 1.8, 1.0),
        "exact_match": measure("exact_match", 0.1, 0.1), "tuned_exact_match": None,
    },
    "forgetting": {"source": "shipped", "loss": measure("loss", 2.5, 2.6), "num_texts": 20},
    "verdict": {"word": "better", "reason": "The loss fell.", "rule": "By the interval."},
    "notes": ["Answers were cut."],
    "findings": [{"message": "It forgot.", "fix": "Train less."}],
    "pairs": [{"question": _EVIL, "reference": "a", "base": "b", "tuned": "c",
               "is_base_cut": True, "is_tuned_cut": False}],
    "settings": {"max_answers": 10},
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run folder with everything in it, and markup where people's texts are."""
    run = Run(folder=tmp_path / "first<b>")
    run.folder.mkdir()
    steps = [
        {
            "step": step,
            "epoch": step / 50,
            "loss": math.nan if step == 30 else 2.0 / step**0.2,
            "grad_norm": 1.0,
            "learning_rate": 2e-4,
            "loss_tokens": 100,
            "tokens": 400,
            "tokens_per_second": 1000.0 + step,
            "vram_peak_bytes": 5 << 30,
            "seconds": 0.4,
        }
        for step in range(1, 101)
    ]
    run.metrics_path.write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"torn')
    events = [
        {"step": step, "kind": "eval", "values": {"held_out_loss": 3.0 - step / 100}}
        for step in (0, 50, 100)
    ]
    events.append({"step": 30, "kind": "guard", "values": {"message": _EVIL}})
    run.events_path.write_text("".join(json.dumps(event) + "\n" for event in events))
    plan = {
        "peak_bytes": 6 << 30, "budget_bytes": 7 << 30, "breakdown": {"layer_slots": 1 << 30},
        "host_breakdown": {}, "choices": [{"name": "slots", "value": "3", "reason": _EVIL}],
    }  # fmt: skip
    run.plan_path.write_text(json.dumps(plan))
    environment = {"device": "A card", "eightgig": "0.1", "versions": {"torch": "2.13"}}
    run.environment_path.write_text(json.dumps(environment))
    run.config_path.write_text(
        f"model:\n  name: some/model\n# {_EVIL}\n# token: hf_AbCdEfGhIjKlMn\n# {Path.home()}/x\n"
    )
    (run.folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    sample = [["<|user|> ", False], [_EVIL, False], ["yes", True], ["</s>", True], ["\n", False]]
    data = {"train": {"rows": 10, "format": "messages"}, "held_out": {"rows": 2}, "sample": sample}
    (run.folder / "data.json").write_text(json.dumps(data))
    return run


def text_of(run: Run) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_the_page_holds_every_part_of_the_run(run: Run) -> None:
    page = Page(text_of(run))
    for words in (
        "Loss in nats", "VRAM against the plan", "some/model", "A card", "held-out perplexity",
        "Confusion matrices", "loss on general text", "Null adapter", "null against tuned",
        "Answers were cut.", "It forgot.",
        "2.000 to 0.796", "3.000 to 2.000", "layer slots", "torch", "messages", "slots",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("svg") == 5
    assert len(page.ids) == len(set(page.ids))


def test_nothing_is_loaded_and_nothing_runs(run: Run) -> None:
    text = text_of(run)
    page = Page(text)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]
    loads = {value for _, name, value in page.attributes if name in ("src", "href")}
    assert all(value.startswith(("#", "data:,")) for value in loads)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy.group(1)
    assert "unsafe" not in policy.group(1)


def test_texts_of_others_stay_texts_and_secrets_stay_secret(run: Run) -> None:
    text = text_of(run)
    assert _EVIL in Page(text).text  # shown, not obeyed
    assert "<script" not in text
    assert "hf_AbC" not in text
    assert str(Path.home()) not in text


def test_every_chart_has_a_title_a_description_and_a_table(run: Run) -> None:
    text = text_of(run)
    page = Page(text)
    charts = text.split("<svg ")[1:]
    for chart in charts:
        labelled = re.search(r'aria-labelledby="([^"]*)"', chart)
        assert labelled is not None
        assert all(name in page.ids for name in labelled.group(1).split())
        assert "<table>" in chart
    assert "lowest 0.796" in text
    assert "1 values of training are not finite." in text
    assert ">NaN<" in text


def test_marked_stretches_are_told_to_those_who_listen(run: Run) -> None:
    text = text_of(run)
    assert '<mark><span class="heard">[trained: </span>yes&lt;/s&gt;' in text
    assert text.count("<mark>") == 1


@pytest.mark.parametrize(
    "keep", [(), ("metrics.jsonl",), ("config.yaml", "events.jsonl"), ("evaluation.json",)]
)
def test_whatever_is_missing_is_left_out(run: Run, keep: tuple[str, ...]) -> None:
    for path in run.folder.iterdir():
        if path.name not in keep:
            path.unlink()
    page = Page(text_of(run))
    assert page.tags.count("h1") == 1


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"step": "x", "loss": []}', "\x00"])
def test_damaged_files_do_not_stop_a_report(run: Run, content: str) -> None:
    for path in run.folder.iterdir():
        path.write_text(content, encoding="utf-8")
    Page(text_of(run))


def test_a_picture_of_the_curves_lies_beside_it(run: Run) -> None:
    write_report(run)
    picture = run.folder / "curves.png"
    if importlib.util.find_spec("matplotlib") is None:
        assert not picture.exists()
    else:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture_and_no_fault(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    write_report(run)
    assert not (run.folder / "curves.png").exists()


def test_a_run_that_was_trained_has_a_report(tmp_path: Path) -> None:
    run = train_tiny(tmp_path)
    page = Page(text_of(run))
    assert "Optimizer steps" in page.text
    assert "Loss in nats" in page.text
    data = json.loads(run.data_path.read_text(encoding="utf-8"))
    assert (data["train"]["rows"], data["held_out"]["rows"]) == (18, 6)
    assert "files" not in data["train"]
    trained = "".join(text for text, is_trained in data["sample"] if is_trained)
    assert trained.startswith("It is")
    assert "A row as the model sees it" in page.text
    assert "VRAM" not in page.text.split("Settings")[0]  # a processor has none


def browse(page: Path, folder: Path, *, width: int) -> tuple[list[str], list[str], bytes]:
    """What chromium says about `page`: lines of its console, addresses asked for, a picture."""
    folder.mkdir()
    log, picture = folder / "net.json", folder / "page.png"
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
            f"--log-net-log={log}", f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},3000", f"--screenshot={picture}", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    asked = re.findall(
        r'"initiator":"([^"]*)"[^\n]*?"url":"([^"]*)"', log.read_text(encoding="utf-8")
    )
    # Chromium asks its makers for the time and the like: those requests have no page behind them.
    return console, [url for page, url in asked if page != "not an origin"], picture.read_bytes()


def test_a_run_that_a_guard_stopped_has_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.make_model("llama", tmp_path / "model")  # random, and too sure of itself
    tiny_run.write_config(tmp_path, tiny_run.colour_rows(60), ())
    assert main(["train", str(tmp_path / "config.yaml")]) == 3
    assert "error: " in capsys.readouterr().err
    page = Page((tmp_path / "runs" / "first" / "report.html").read_text(encoding="utf-8"))
    assert "What else happened" in page.text
    assert "A row as the model sees it" in page.text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_finds_no_fault_and_asks_for_nothing(run: Run, tmp_path: Path) -> None:
    for width in (500, 1200):  # a phone; chromium has no narrower window
        console, asked, picture = browse(write_report(run), tmp_path / f"{width}", width=width)
        assert (console, asked) == ([], [])
        assert len(picture) > 50_000
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://elsewhere.invalid/a"><script>console.error("x")</script>')
    console, asked, _ = browse(bad, tmp_path / "bad", width=500)
    assert len(console) >= 1
    assert asked == ["http://elsewhere.invalid/a"]


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(0.8, 3.1, 4) == [1.0, 2.0, 3.0]
    assert nice_ticks(-1, 1, 4) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert all(len(nice_ticks(0, 10**power)) <= 8 for power in range(-9, 12))


def test_long_curves_are_thinned_to_means_and_keep_their_end() -> None:
    points = [(step, float(step)) for step in range(1, 2052)]
    thinned = thin(points, 100)
    assert len(thinned) == 100
    assert thinned[-1] == (2051.0, 2051.0)
    assert thinned == sorted(thinned)
    assert thin(points[:7], 100) == [(float(step), value) for step, value in points[:7]]


def test_a_constant_or_a_single_point_can_be_drawn() -> None:
    for points in (((1, 0.0),), ((1, 5.0), (2, 5.0)), ((3, -2.0),)):
        chart = Chart(slug="a", title="A", lines=(Series(name="a", points=points),))
        assert "NaN" not in draw_chart(chart).upper().replace("NANO", "")
        assert describe_chart(chart).startswith("a: ")
    empty = Series(name="a", points=((1, math.nan),))
    assert Chart(slug="a", title="A", lines=(empty,)).is_empty
