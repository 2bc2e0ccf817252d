"""Times optimizer steps on random weights of true shapes; appends rows to benchmarks/results.jsonl.

    python benchmarks/steps.py 12b-1x2048 31b-8x2048 --budget 6.75GiB

A case is MODEL-ROWSxTOKENS. Weights are random, built straight in NF4; layers of one type share
their bytes in host memory but are copied one by one, as real ones are.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path

from eightgig.config import Config, DataConfig, LoraConfig, MemoryConfig, ModelConfig, TrainConfig
from eightgig.hardware.allocator import prepare_allocator
from eightgig.units import format_bytes, parse_bytes

prepare_allocator()

import torch  # noqa: E402

from eightgig.hardware.calibrate import with_measured_rates  # noqa: E402
from eightgig.hardware.probe import probe  # noqa: E402
from eightgig.models.known import known_model_spec  # noqa: E402
from eightgig.models.read import parse_model_spec  # noqa: E402
from eightgig.models.spec import ModelSpec  # noqa: E402
from eightgig.quant.random_store import random_store  # noqa: E402
from eightgig.run import to_json  # noqa: E402
from eightgig.training.bench import BenchCase, bench  # noqa: E402

GEMMA = {"e2b": "E2B", "e4b": "E4B", "12b": "12B", "31b": "31B"}
# The shapes that https://huggingface.co/meta-llama/Llama-3.1-8B and Qwen/Qwen3-14B have.
OTHER_CONFIGS = {
    "llama8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "qwen14b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}


def find_spec(name: str) -> ModelSpec:
    if name in GEMMA:
        spec = known_model_spec(f"google/gemma-4-{GEMMA[name]}")
        assert spec is not None
        return spec
    return parse_model_spec(OTHER_CONFIGS[name], name=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", help="MODEL-ROWSxTOKENS, e.g. 12b-8x2048")
    parser.add_argument("--budget", default="6.75GiB")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], help="memory setting NAME=VALUE")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results.jsonl"))
    parser.add_argument("--stores", type=Path, default=Path("/tmp/eightgig-bench"))
    options = parser.parse_args()
    hardware = with_measured_rates(probe("auto", options.stores))
    print(json.dumps(to_json(hardware.rates)))
    for name in options.cases:
        try:
            run_case(name, options, hardware)
        except Exception:  # noqa: BLE001 - one case that fails must not cost the others
            traceback.print_exc()
        gc.collect()
        torch.cuda.empty_cache()


def run_case(name: str, options: argparse.Namespace, hardware) -> None:  # type: ignore[no-untyped-def]
    model, shape = name.split("-")
    rows, tokens = (int(number) for number in shape.split("x"))
    began_seconds = time.time()
    spec = find_spec(model)
    store = random_store(spec.decoder, options.stores / model, seed=0, alias_layers=True)
    memory = {"budget": parse_bytes(options.budget)} | {
        key: int(value) if value.isdigit() else value
        for key, value in (item.split("=") for item in options.set)
    }
    if "offload" in memory:
        memory["offload"] = tuple(filter(None, str(memory["offload"]).split("+")))
    config = Config(
        model=ModelConfig(name=spec.name),
        data=DataConfig(path="random"),
        lora=LoraConfig(r=options.rank, lora_alpha=2 * options.rank),
        train=TrainConfig(gradient_accumulation_steps=rows, optim=options.optim),
        memory=MemoryConfig(**memory),
    )
    case = BenchCase(name=name, tokens=tokens, timed_steps=options.steps, commit=commit())
    result = bench(case, spec, store, hardware, config)
    with options.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(result)) + "\n")
    predicted = result.predicted_tokens_per_second or 0.0
    print(
        f"{name}: {result.tokens_per_second:,.0f} tokens/s (predicted {predicted:,.0f}), "
        f"{format_bytes(result.reserved_peak_bytes)} reserved "
        f"(predicted {format_bytes(result.predicted_peak_bytes or 0)}), "
        f"waiting {result.copy_wait_ratio:.1%}, loss {result.first_loss:.3f} -> "
        f"{result.last_loss:.3f}, case took {time.time() - began_seconds:.0f} s, "
        f"{result.choices}",
        flush=True,
    )


def commit() -> str:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
