"""The model card: what the adapter is, how it was made and measured, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from eightgig import __version__
from eightgig.config import DEMO_MODEL
from eightgig.data.preview import preview_row
from eightgig.demo import demo_model_path
from eightgig.disk import failure_cause
from eightgig.errors import RunError
from eightgig.evaluation.statistics import measure_label
from eightgig.run import Run, hide_home, to_json, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from eightgig.data.batches import Dataset
    from eightgig.evaluation.records import Evaluation
    from eightgig.evaluation.statistics import Measure
    from eightgig.training.loop import Job

CARD_NAME = "README.md"
_EVALUATION = re.compile(r"^## Evaluation\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_FOUR_BIT = (
    "It was trained on the base in 4 bit (NF4) and may answer otherwise on 16-bit weights; "
    '`quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_use_double_quant=True)` loads the base in 4 bit here, too.",
    "",
)
_USE = re.compile(r"(?=^## Use\n)|\Z", re.MULTILINE)
_SAMPLE_TOKENS = 1500
# vLLM takes adapters up to a rank that it is told; it knows these.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def model_card(job: Job) -> str:
    """README.md of the adapter folder, with the head that the Hugging Face hub reads."""
    config, spec = job.config, job.spec
    head: dict[str, Any] = {
        "base_model": spec.name,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "sft", "eightgig"],
    }
    if spec.license is not None:
        head["license"] = spec.license
    settings = {name: to_json(getattr(config, name)) for name in ("lora", "train")}
    return hide_home(
        "\n".join(
            [
                "---",
                yaml.safe_dump(head, sort_keys=False).strip(),
                "---",
                "",
                f"# {config.run.name}",
                "",
                f"A LoRA adapter for {spec.name}, trained with eightgig {__version__}.",
                "",
                *_license(spec.license),
                *_data(job),
                *_results(job),
                *_use(job),
                "## Settings",
                "",
                "```json",
                json.dumps(settings, indent=2, ensure_ascii=False),
                "```",
                "",
            ]
        )
    )


def add_evaluation(run: Run, evaluation: Evaluation) -> None:
    """Put the result of `evaluation` into the card of the adapter, in place of an earlier one.

    Measures alone: questions and answers are rows of the data.

    Raises:
        RunError: The card cannot be written.
    """
    path = run.adapter_path / CARD_NAME
    if not path.is_file():
        return
    card = _EVALUATION.sub("", path.read_text(encoding="utf-8"))
    place = _USE.search(card)
    assert place is not None, "every text has an end"
    section = "\n".join(_evaluation(evaluation)) + "\n"
    try:
        write_atomically(path, card[: place.start()] + section + card[place.start() :])
    except OSError as error:
        raise RunError(
            f"The evaluation was not written into {path}: {failure_cause(error)}.",
            why="The model card says how the adapter was measured; evaluation.json has it all.",
            fix="Free disk space, or make the run folder writable, and evaluate again.",
        ) from error


def data_facts(
    rows: Dataset, held_out: Dataset | None, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """`data.json` of a run folder, for the report: summaries, and a row as the model sees it.

    Args:
        rows: Training rows.
        held_out: Held-out rows, None where there are none.
        tokenizer: What they were rendered with.

    Returns:
        `train` and `held_out` summaries, and `sample`: a row of middle length, as
        [text, is trained] of each token.
    """
    middle = int(rows.lengths.argsort(kind="stable")[rows.num_rows // 2])
    tokens = preview_row(rows, middle, tokenizer).tokens[:_SAMPLE_TOKENS]
    facts: dict[str, Any] = {"train": _summary(rows)}
    if held_out is not None:
        facts["held_out"] = _summary(held_out)
    return {**facts, "sample": [[token.text, token.is_trained] for token in tokens]}


def _summary(rows: Dataset) -> dict[str, Any]:
    """The summary without names of files: a report may be shown to others."""
    return {name: value for name, value in rows.summary.items() if name != "files"}


def _license(license_name: str | None) -> list[str]:
    if license_name is None:
        return ["The licence of the base model holds for what is made of it.", ""]
    return [f"The base model's licence ({license_name}) holds for what is made of it.", ""]


def _data(job: Job) -> list[str]:
    """The data in numbers; no row of it, and no name of a file."""
    sets: dict[str, Mapping[str, Any]] = {"trained on": _summary(job.rows)}
    if job.held_out is not None:
        sets["held out"] = _summary(job.held_out)
    lines = [
        f"| {name} | {summary.get('rows', 0):,} | {summary.get('tokens', 0):,} "
        f"| {summary.get('trained_tokens', 0):,} | {summary.get('longest_tokens', 0):,} |"
        for name, summary in sets.items()
    ]
    head = ["| | rows | tokens | tokens with loss | longest row |", "|---|---|---|---|---|"]
    kind = str(job.rows.summary.get("format", "")).strip()
    words = [f"Rows of the form `{kind}`.", ""] if kind else []
    return ["## Data", "", *words, *head, *lines, ""]


def _results(job: Job) -> list[str]:
    losses = [
        (event["step"], event["values"]["held_out_loss"])
        for event in map(json.loads, _lines(job))
        if event["kind"] == "eval"
    ]
    if not losses:
        return []
    table = [f"| {step} | {loss:.4f} |" for step, loss in losses]
    return ["## Held-out loss", "", "| step | loss |", "|---|---|", *table, ""]


def _evaluation(evaluation: Evaluation) -> list[str]:
    verdict, rows = evaluation.verdict, f"{evaluation.num_rows:,} held-out rows"
    measures = [evaluation.loss, evaluation.perplexity, *evaluation.answers]
    if evaluation.labels is not None:
        measures.append(evaluation.labels.accuracy)
    if evaluation.forgetting is not None:
        measures.append(evaluation.forgetting.loss)
    return [
        "## Evaluation",
        "",
        f"Base model and adapter on the same {rows}; {evaluation.num_answers:,} of them were "
        f"answered greedily. The adapter: **{verdict.word}** ({verdict.reason}).",
        "",
        "| measure | base | adapter | difference | 95 % interval | p | adapter is |",
        "|---|---|---|---|---|---|---|",
        *_measure_lines(measures),
        "",
        verdict.rule,
        "",
    ]


def _measure_lines(measures: Iterable[Measure]) -> Iterable[str]:
    for measure in measures:
        change = measure.difference
        yield (
            f"| {measure_label(measure.name)} | {measure.first.value:.3f} "
            f"| {measure.second.value:.3f} | {change.value:+.3f} "
            f"| {change.low:+.3f} to {change.high:+.3f} | {measure.p_value:.2g} "
            f"| {measure.verdict} |"
        )


def _use(job: Job) -> list[str]:
    spec, rank = job.spec, job.config.lora.r
    base = str(demo_model_path()) if spec.name == DEMO_MODEL else spec.name
    is_made_4_bit = job.config.model.quantization == "nf4" and spec.quantization is None
    most = next((known for known in _VLLM_RANKS if known >= rank), rank)
    return [
        "## Use",
        "",
        "With Transformers and PEFT:",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {spec.architecture}, AutoTokenizer",
        "",
        f'base = {spec.architecture}.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
        "```",
        "",
        *(_FOUR_BIT if is_made_4_bit else ()),
        "With vLLM:",
        "",
        "```",
        f"vllm serve {base} --enable-lora --max-lora-rank {most} \\",
        "    --lora-modules tuned=PATH_OF_THIS_FOLDER",
        "```",
        "",
        "For llama.cpp or Ollama: `eightgig export RUN --to gguf`, `gguf-lora` or `ollama`.",
        "",
    ]


def _lines(job: Job) -> list[str]:
    path = job.run.events_path
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
