"""What hostile texts become in report.html, in its pictures, and in what is masked."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eightgig.run import Run, mask_secrets
from eightgig.web.report import write_report
from tests.security.watch import SECRET

TEXTS = (
    "<script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<iframe src=http://evil.example></iframe>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<base href=http://evil.example>",
    "<form action=http://evil.example><input name=x>",
    "javascript:alert(1)",
    "<a href='javascript:alert(1)'>x</a>",
    "]]><script>alert(1)</script>",
    "--><script>alert(1)</script>",
    "&lt;script&gt;alert(1)&lt;/script&gt;<b>",
    "\u003cscript\u003e",
    "<!--",
    "=HYPERLINK(\"http://evil.example\")",
    "<link rel=stylesheet href=http://evil.example/x.css>",
    "<object data=http://evil.example>",
    "{{ 7*7 }}${7*7}<%= 7*7 %>",
)  # fmt: skip
_ALLOWED_ATTRIBUTES_WITH_ADDRESS = ("#", "data:,", "data:image/")


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.wrong: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            is_address = name in ("href", "src", "action", "data", "srcset", "xlink:href")
            if name.startswith("on") or (
                is_address and not str(value).startswith(_ALLOWED_ATTRIBUTES_WITH_ADDRESS)
            ):
                self.wrong.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


def _hostile_run(folder: Path, text: str) -> Run:
    """A run folder in which every text is `text`."""
    run = Run(folder=folder)
    metrics = [
        {"step": n, "epoch": 1.0, "loss": 2.0 / n, "grad_norm": 1.0, "learning_rate": 1e-3,
         "loss_tokens": 5, "tokens": 9, "tokens_per_second": 10.0, "vram_peak_bytes": 5,
         "seconds": 1.0, text: text}
        for n in range(1, 9)
    ]  # fmt: skip
    events = [
        {"step": 3, "kind": "guard", "values": {"guard": text, "action": text, "message": text}},
        {"step": 4, "kind": "oom", "values": {"cause": text, text: text, "before": text}},
        {"step": 5, "kind": "save", "values": {"failed": text}},
        {"step": 6, "kind": text, "values": {text: text}},
        {"step": 8, "kind": "eval", "values": {"held_out_loss": 1.0, "note": text}},
    ]
    for path, lines in ((run.metrics_path, metrics), (run.events_path, events)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    choice = {"name": text, "value": text, "reason": text, "rejected": text}
    plan = {"fits": True, "budget_bytes": 9, "peak_bytes": 5, "breakdown": {text: 5},
            "choices": [choice], "model": text, "device": text}  # fmt: skip
    run.plan_path.write_text(json.dumps(plan))
    environment = {"eightgig": text, "python": text, "system": text, "machine": text,
                   "device": text, "versions": {text: text}}  # fmt: skip
    run.environment_path.write_text(json.dumps(environment))
    data = {"train": {"rows": 5, "format": text, text: text}, "held_out": {text: text},
            "sample": [[text, True], [text, False]]}  # fmt: skip
    (folder / "data.json").write_text(json.dumps(data))
    measure = {
        "name": text, "first": {"value": 1.0, "low": 0.9, "high": 1.1},
        "second": {"value": 1.0, "low": 0.9, "high": 1.1},
        "difference": {"value": 0.0, "low": -0.1, "high": 0.1}, "p_value": 0.01, "num_rows": 4,
        "is_higher_better": False, "verdict": text,
    }  # fmt: skip
    labels = {"accuracy": 0.5, "macro_f1": 0.4, "confusion": [[5, 3, 2], [4, 6, 0]]}
    evaluation = {
        "loss": measure, "perplexity": measure, "answers": [measure],
        "labels": {"labels": [text, text], "base": labels, "tuned": labels, "accuracy": measure},
        "forgetting": {"source": text, "loss": measure, "num_texts": 2},
        "verdict": {"word": text, "reason": text, "rule": text}, "notes": [text],
        "findings": [{"message": text, "fix": text}],
        "pairs": [{"question": text, "reference": text, "base": text, "tuned": text,
                   "is_base_cut": True, "is_tuned_cut": False}],
        "settings": {text: text},
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    run.config_path.write_text(f"run: {{name: {json.dumps(text)}}}\n")
    return run


@pytest.mark.parametrize("text", TEXTS)
def test_texts_stay_texts(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    page = write_report(_hostile_run(folder, text)).read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(page)
    assert reader.wrong == []
    forbidden = {"script", "iframe", "object", "embed", "form", "input", "base", "a1", "img"}
    assert not reader.tags & forbidden
    assert page.count("<meta") == 3
    assert page.count("<link") == 1
    assert "default-src 'none'" in page
    assert text.strip("<>!-") in reader.text or text in reader.text


SECRETS = (
    SECRET, f"token={SECRET}", f"Bearer {SECRET}", f"https://user:{SECRET}@huggingface.co/a/b",
    f"{{'token': '{SECRET}'}}", f"HF_TOKEN={SECRET}", f"x{SECRET[2:]} {SECRET}\n{SECRET}",
)  # fmt: skip


@pytest.mark.parametrize("text", SECRETS)
def test_a_token_is_masked_in_report_and_log(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run = _hostile_run(folder, text)
    page = write_report(run).read_text(encoding="utf-8")
    assert SECRET not in page
    assert SECRET not in mask_secrets(text)
    for path in folder.iterdir():  # the texts were planted there
        if path != run.report_path and path.suffix not in (".svg", ".png"):
            path.unlink()
