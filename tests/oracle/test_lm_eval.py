"""Our model in lm-evaluation-harness against the harness's own on the same weights, float32."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny, tiny_run

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

# The harness and what it brings warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")

TEXTS = ("the sky and the grass", "An only thing, then another: ing. " * 4, "on")
PAIRS = (
    ("the sky is", " blue"),
    ("", "the grass is green"),
    ("which colour has blood? ", "red"),
    ("the sky and the grass and on " * 3, "the other thing"),
)


MAX_LENGTH = 96
# One whose texts begin with a token of their own, and one whose texts do not.
FAMILIES = ("llama3", "qwen3")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(family)
    settings = ["train.max_steps=4", "model.quantization=none", f"data.max_length={MAX_LENGTH}"]
    return tiny_run.make_run(root, family=family, settings=settings)


@pytest.fixture(scope="module")
def ours(run: Path) -> Iterator[Any]:
    from eightgig.integrations.lm_eval import open_lm

    with open_lm(run) as lm:
        yield lm


@pytest.fixture(scope="module")
def theirs(family: str, run: Path) -> Any:
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel

    base = tiny.load_reference(family, run.parents[1] / "model")
    tuned = PeftModel.from_pretrained(base, run / "adapter").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HFLM(
            pretrained=tuned,
            tokenizer=tiny.make_tokenizer(family),
            max_length=MAX_LENGTH,
            device="cpu",
            batch_size=1,
        )


def _requests(kind: str, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=number)
        for number, each in enumerate(arguments)
    ]


def test_loglikelihoods_are_the_harness_own(ours: Any, theirs: Any) -> None:
    requests = _requests("loglikelihood", list(PAIRS))
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx(
        [value for value, _ in expected], rel=1e-4
    )
    assert [greedy for _, greedy in found] == [bool(greedy) for _, greedy in expected]


def test_one_token_is_the_likeliest_and_all_together_are_certain(ours: Any) -> None:
    context = ours.tok_encode("which colour has sky?")
    requests = [(("", ""), context, [token]) for token in range(len(ours.tokenizer))]
    found = ours._loglikelihood_tokens(requests)
    values = [value for value, _ in found]
    assert [place for place, (_, greedy) in enumerate(found) if greedy] == [
        values.index(max(values))
    ]
    assert 0.9 < sum(map(math.exp, values)) < 1.001  # the vocabulary has a few more rows


def test_rolling_loglikelihoods_are_the_harness_own(
    ours: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = _requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    # Ours keeps one token less: its windows hold context and all that is predicted.
    monkeypatch.setattr(theirs, "_max_length", ours.max_length - 1)
    # Theirs would predict a second beginning of the text from the first.
    monkeypatch.setattr(theirs, "add_bos_token", False)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-4)


def test_answers_are_the_harness_own(ours: Any, theirs: Any) -> None:
    settings = {"until": ["q"], "max_gen_toks": 6, "do_sample": False}
    arguments = [(text, settings) for text in TEXTS[::2]]
    requests = _requests("generate_until", arguments)
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_the_base_model_answers_when_the_adapter_is_off(ours: Any) -> None:
    requests = _requests("loglikelihood", list(PAIRS))
    tuned = ours.loglikelihood(requests, disable_tqdm=True)
    ours.use_adapter(False)
    base = ours.loglikelihood(requests, disable_tqdm=True)
    ours.use_adapter(True)
    assert base != tuned
    assert ours.loglikelihood(requests, disable_tqdm=True) == tuned


def test_settings_that_are_not_known_are_refused(ours: Any) -> None:
    with pytest.raises(ValueError, match="num_return_sequences"):
        ours.generate_until(_requests("generate_until", [("a", {"num_return_sequences": 2})]))


def test_a_task_runs_from_its_file(ours: Any, tmp_path: Path) -> None:
    rows = [{"q": f"{n}: which colour has sky?", "a": n % 2} for n in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["blue", "green"],
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}],
    }
    done = lm_eval.simple_evaluate(model=ours, tasks=[task], bootstrap_iters=0, verbosity="ERROR")
    assert 0.0 <= done["results"]["colours"]["acc,none"] <= 1.0
    assert done["n-samples"]["colours"]["effective"] == 6
