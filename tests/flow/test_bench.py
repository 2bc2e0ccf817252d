"""`eightgig bench` on the embedded model's shape: real processes, real steps, on the CPU."""

import dataclasses
import json
from pathlib import Path

import pytest

from eightgig.cli.app import main
from eightgig.cli.bench_view import read_results, show_bench, to_markdown
from eightgig.errors import DoesNotFitError
from eightgig.run import to_json
from eightgig.training.bench_cases import BenchCase, BenchOutcome, BenchResult

ASKED = ["bench", "demo", "--tokens", "48", "--rows", "2", "--steps", "2", "--rank", "4"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_cases_are_timed_shown_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = ["--compare", "memory.host_budget=1MiB,auto"]
    assert main([*ASKED, *compare, "--set", "memory.device=cpu", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)

    # A case that does not fit does not cost the others.
    (failed,) = answer["failed"]
    assert failed["case"] == "demo-2x48, memory.host_budget=1MiB"
    assert "The plan needs" in failed["message"]
    assert failed["fix"]

    (result,) = read_results(tmp_path / "bench.jsonl")
    assert answer["results"] == [to_json(result)]
    assert result.case == "demo-2x48, memory.host_budget=auto"
    assert (result.model, result.tokens, result.micro_batches, result.rank) == ("demo", 48, 2, 4)
    assert result.tokens_per_second > 1
    assert result.copy_wait_ratio is None
    # Importing torch alone takes longer, and holds more memory.
    assert result.seconds_to_first_step is not None
    assert 0.3 < result.seconds_to_first_step < 300
    assert result.reserved_peak_bytes is not None
    assert result.reserved_peak_bytes > 100 << 20
    assert result.model_flops_utilisation is not None
    assert 0 < result.model_flops_utilisation < 1.5
    assert result.last_loss < result.first_loss

    table = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert table == to_markdown([result])
    _shown_beside_the_reason(result, capsys)


def _shown_beside_the_reason(result: BenchResult, capsys: pytest.CaptureFixture[str]) -> None:
    case = BenchCase(name="too large", settings=(), stores="")
    error = DoesNotFitError("Much too large.", why="It is.", fix="Take less.")
    other = dataclasses.replace(result, case="other", copy_wait_ratio=0.256)
    outcomes = [
        BenchOutcome(case=case, result=result),
        BenchOutcome(case=case, error=error),
        BenchOutcome(case=case, result=other),
    ]
    show_bench(outcomes, Path("bench.jsonl"), as_json=False)
    shown = capsys.readouterr().out
    assert f"{result.tokens_per_second:,.0f}" in shown
    assert "25.6%" in shown
    assert "too large: Much too large. Take less." in shown
    with pytest.raises(DoesNotFitError, match="Much too large"):
        show_bench(outcomes[1:2], Path("bench.jsonl"), as_json=False)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--compare", "offload"], 'is not "name=value,value,..."'),
        (["--compare", "offlod=none,down_proj"], "is not the name of one setting"),
        (["--set", "optim=sgd"], '"optim"'),
        (["--output", "notes.txt"], "is not a file of timings"),
        (["--output", "notes.txt/bench.jsonl"], "cannot be written"),
        (["--output", "."], "cannot be written"),
        (["--output", "bench.md"], "cannot hold timings"),
        (["--compare", "rows=1", "--compare", "rows=2"], "is compared twice"),
        (
            ["--compare", "tokens=8", "--compare", "max_length=9"],
            "data.max_length is compared twice",
        ),
        (["--set", "model.name=e2b"], "model.name cannot be set"),
        (["--compare", "model.name=e2b,e4b"], "model.name cannot be set"),
    ],
)
def test_what_cannot_be_timed_is_refused_at_once(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("my notes\n", encoding="utf-8")
    assert main([*ASKED, *more]) == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "my notes\n"
    assert not (tmp_path / "bench.jsonl").exists()
