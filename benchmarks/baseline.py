"""The usual recipe, timed beside ours: Transformers + PEFT + bitsandbytes + TRL's SFTTrainer.

    python benchmarks/baseline.py 12b-1x2048 --config FOLDER --kind recipe
    python benchmarks/baseline.py 12b-1x2048 --config FOLDER --kind best

`recipe`: NF4 with double quantisation, `prepare_model_for_kbit_training`, LoRA r=16 on the seven
linears, gradient checkpointing, paged 8-bit AdamW, TRL's defaults. `best`: the text model alone,
Liger's norms and GeGLU, no float32 copies of the tables, fused AdamW. Weights are random, made
straight in 4 bit. No memory cap: these do not fit an 8 GB card, and what they take is the point.
FOLDER holds the model's config.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from eightgig.models.known import known_model_spec

TARGETS = r".*\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"

LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel")


class Clock(TrainerCallback):
    """Wall-clock seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Remember when."""
        _synchronize()
        self._began = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Note the time it took."""
        _synchronize()
        self.seconds.append(time.perf_counter() - self._began)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def make_model(config_path: Path, kind: str) -> torch.nn.Module:
    """The model on the device, its text linears in NF4 with random codes."""
    import bitsandbytes as bnb
    import transformers
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.quantizers import AutoHfQuantizer

    config = AutoConfig.from_pretrained(config_path)
    if kind == "best":
        from liger_kernel.transformers import monkey_patch

        # Its fused loss is not needed: TRL never makes all logits at once.
        monkey_patch.apply_liger_kernel_to_gemma4_text(fused_linear_cross_entropy=False)
        settings = config.get_text_config().to_dict()
        settings.pop("model_type")
        config, name = Gemma4TextConfig(**settings), "Gemma4ForCausalLM"
    else:
        config.vision_config = config.audio_config = None
        name = config.architectures[0]
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and ".layers." in path:
            weight = torch.randn(module.weight.shape, dtype=torch.bfloat16, device=DEVICE) * 0.02
            linear = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False,
                compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4",
                device="meta",
            )  # fmt: skip
            linear.weight = bnb.nn.Params4bit(
                weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            ).to(DEVICE)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            _materialize(model, path, tensor)
    model.tie_weights()
    model.is_loaded_in_4bit = model.is_quantized = True
    model.hf_quantizer = AutoHfQuantizer.from_config(quantization)
    return prepare_model_for_kbit_training(model) if kind == "recipe" else model


def _materialize(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
    value = torch.ones(tensor.shape, dtype=dtype, device=DEVICE)
    if tensor.ndim > 1:
        value.normal_(0, 0.02)
    if isinstance(tensor, torch.nn.Parameter):
        setattr(module, child, torch.nn.Parameter(value, requires_grad=False))
    else:
        module._buffers[child] = value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("--config", type=Path, required=True, help="folder with config.json")
    parser.add_argument("--kind", choices=("recipe", "best"), default="recipe")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results.jsonl"))
    options = parser.parse_args()
    model_name, shape = options.case.split("-")
    rows, tokens = (int(number) for number in shape.split("x"))
    model = make_model(options.config, options.kind)
    clock = Clock()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(300, vocabulary, (rows, tokens)).tolist()
    is_best = options.kind == "best"
    arguments = SFTConfig(
        output_dir="/tmp/eightgig-baseline",
        max_steps=options.steps + 2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=rows,
        optim="adamw_torch_fused" if is_best else "paged_adamw_8bit",
        bf16=True,
        use_cpu=DEVICE == "cpu",
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=_Tokenizer(),
        callbacks=[clock],
    )
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    spec = known_model_spec(f"google/gemma-4-{model_name.upper()}")
    row = {
        "case": options.case,
        "tool": f"TRL, {options.kind}",
        "model": spec.name if spec is not None else model_name,
        "tokens": tokens,
        "micro_batches": rows,
        "rank": 16,
        "optim": arguments.optim,
        "tokens_per_second": rows * tokens / statistics.median(clock.seconds[2:]),
        "reserved_peak_bytes": torch.cuda.max_memory_reserved() if DEVICE == "cuda" else 0,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "machine": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "versions": {name: version(name) for name in LIBRARIES},
        "date": time.strftime("%Y-%m-%d"),
    }
    with options.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


def _Tokenizer():  # type: ignore[no-untyped-def]  # noqa: N802
    """A tokenizer that is never asked to tokenise."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 3}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


if __name__ == "__main__":
    sys.exit(main())
