"""What a key was meant to be: settings under their names in other tools, and near misses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

# What Transformers, TRL, PEFT, Unsloth, Axolotl and LLaMA-Factory call our settings.
_SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        word: setting
        for setting, words in {
            "model.name": "base_model model_name model_name_or_path model_id pretrained_model",
            "model.revision": "model_revision revision_of_model",
            "model.quantization": "load_in_4bit quantization_bit quant_method quantize",
            "model.cache_dir": "model_cache_dir cache",
            "data.path": (
                "dataset dataset_name dataset_path datasets data_files data_path file files "
                "train_file train_dataset training_file"
            ),
            "data.split": "dataset_split train_split",
            "data.format": "dataset_format data_format type",
            "data.columns": "column_mapping field_mapping",
            "data.chat_template": "template chat_template_path chat_template_jinja",
            "data.train_on": (
                "train_on_inputs train_on_responses_only train_on_prompt assistant_only_loss "
                "completion_only_loss mask_prompt"
            ),
            "data.max_length": (
                "max_seq_length max_seq_len sequence_len seq_len seq_length cutoff_len "
                "context_length block_size max_tokens model_max_length"
            ),
            "data.too_long": "truncation overflow",
            "data.packing": "sample_packing pack",
            "data.held_out": (
                "val_set_size val_size eval_size test_size validation_split eval_split heldout"
            ),
            "data.held_out_path": (
                "eval_file test_file validation_file eval_dataset test_datasets val_file"
            ),
            "lora.r": "lora_r lora_rank rank",
            "lora.lora_alpha": "alpha",
            "lora.lora_dropout": "dropout",
            "lora.target_modules": "lora_target lora_target_modules modules target_module",
            "lora.use_rslora": "rslora rs_lora peft_use_rslora",
            "lora.init_adapter": "lora_model_dir adapter_name_or_path adapter",
            "train.num_train_epochs": "epochs num_epochs n_epochs max_epochs",
            "train.max_steps": "steps num_steps iters train_steps",
            "train.per_device_train_batch_size": (
                "batch_size micro_batch_size train_batch_size per_device_batch_size"
            ),
            "train.gradient_accumulation_steps": (
                "gradient_accumulation grad_accum grad_accumulation_steps accumulation_steps "
                "grad_accumulation"
            ),
            "train.learning_rate": "lr peak_lr",
            "train.lr_scheduler_type": "lr_scheduler scheduler lr_schedule scheduler_type",
            "train.warmup_ratio": "warmup",
            "train.optim": "optimizer optimizer_type",
            "train.adam_epsilon": "adam_eps epsilon eps",
            "train.max_grad_norm": "grad_clip clip_grad_norm gradient_clipping max_gradient_norm",
            "train.seed": "random_seed random_state data_seed",
            "train.early_stopping_patience": "patience early_stopping",
            "memory.device": "device_map accelerator",
            "memory.budget": "vram vram_budget gpu_memory max_memory memory_budget",
            "memory.host_budget": "ram ram_budget cpu_memory",
            "memory.offload": "activation_offloading offload_activations",
            "run.name": "run_name",
            "run.output_dir": "output output_path save_dir adapter_path",
            "run.save_steps": "save_every steps_per_save checkpoint_steps",
            "run.save_epochs": "save_strategy saves_per_epoch",
            "run.eval_steps": "eval_strategy evals_per_epoch steps_per_eval eval_every",
            "run.report_to": "use_tensorboard tensorboard",
        }.items()
        for word in words.split()
    }
)

# What is always so here, and therefore has no setting.
_ALWAYS: Mapping[str, str] = MappingProxyType(
    {
        word: fact
        for words, fact in {
            "gradient_checkpointing gradient_checkpointing_kwargs use_gradient_checkpointing": (
                "layers are always recomputed in the backward pass"
            ),
            "bf16 fp16 tf32 torch_dtype dtype bnb_4bit_compute_dtype": (
                "the compute type follows the GPU"
            ),
            "bnb_4bit_quant_type bnb_4bit_use_double_quant double_quantization": (
                "4-bit weights are always NF4 with double quantisation"
            ),
            "logging_steps log_every steps_per_report": "every optimizer step is logged",
            "task_type bias lora_bias": "adapters are made for causal language models, no biases",
            "dataloader_num_workers dataset_num_proc dataloader_pin_memory": (
                "rows are tokenised once, before training"
            ),
            "flash_attention attn_implementation sdp_attention": (
                "attention is chosen by the GPU and the head size"
            ),
            "trust_remote_code": "code from model repositories is never executed",
        }.items()
        for word in words.split()
    }
)


def suggest(
    key: str, group: str | None, groups: Mapping[str, tuple[str, ...]], *, is_dotted: bool = False
) -> str:
    """One sentence on what to write instead of the unknown `key`.

    Args:
        key: The key as written.
        group: Group it stands in, None at the top of the file.
        groups: Settings by group.
        is_dotted: Name settings with their group, as on the command line.
    """
    word = key.strip().lower().replace("-", "_").replace(" ", "_")
    settings = [f"{name}.{setting}" for name, names in groups.items() for setting in names]
    if fact := _ALWAYS.get(word.rpartition(".")[2]):
        return f"Delete the line: {fact}."
    meant = _same_setting(word, group, settings)
    if meant is None and group is None and (near := _near(word, groups, 0.75)):
        return f'Write "{near}".'
    meant = meant or _near_setting(word, group, settings)
    if meant is None:
        known = groups.get(group or "") or tuple(groups)
        return f"Delete the line, or write one of {', '.join(known)}."
    if is_dotted:
        return f'Write "{meant}".'
    meant_group, _, name = meant.partition(".")
    return f'Write "{name}".' if meant_group == group else f'Write "{name}" under "{meant_group}".'


def nearest(text: str, options: tuple[str, ...]) -> str | None:
    """The one of `options` that `text` was probably meant to be."""
    return _near(text.lower(), options, 0.6)


def _same_setting(word: str, group: str | None, settings: list[str]) -> str | None:
    """The setting that `word` is a known name of."""
    if word in settings:  # written with its group: "lora.r"
        return word
    bare = word.rpartition(".")[2]
    elsewhere = [setting for setting in settings if setting.endswith(f".{bare}")]
    if f"{group}.{bare}" in elsewhere:
        return f"{group}.{bare}"
    # `name` and `path` say nothing without their group.
    return elsewhere[0] if len(elsewhere) == 1 else _SYNONYMS.get(bare)


def _near_setting(word: str, group: str | None, settings: list[str]) -> str | None:
    """The setting whose name, or name elsewhere, `word` is a misspelling of."""
    bare = word.rpartition(".")[2]
    everywhere = {setting.partition(".")[2]: setting for setting in reversed(settings)}
    here = {name: item for name, item in everywhere.items() if item.startswith(f"{group}.")}
    for names, cutoff in ((here, 0.7), (everywhere, 0.7), (_SYNONYMS, 0.8)):
        if near := _near(bare, names, cutoff):
            return names[near]
    return None


def _near(word: str, options: Iterable[str], cutoff: float) -> str | None:
    near = difflib.get_close_matches(word, list(options), n=1, cutoff=cutoff)
    return near[0] if near else None
