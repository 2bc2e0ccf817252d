"""Time of saving a checkpoint; appends a row to benchmarks/save_results.jsonl.

    python benchmarks/saves.py --model 12b --rank 16 --folder .

Adapter and moments are those of the model's true shape, made by the training's own optimizer and
filled with random numbers. They are saved as training saves them, one save right after the other:
flushed, read back from the disk, older checkpoints deleted. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from prepare_rows import describe_machine

from eightgig.adapters.lora import Adapter, adapter_groups, lora_scale
from eightgig.config import Config, read_config
from eightgig.engine.gradients import Gradients
from eightgig.models.shapes import find_shape
from eightgig.models.spec import ModelSpec
from eightgig.run import Run, append_json_line
from eightgig.training.checkpoint import Checkpoint
from eightgig.training.identity import identify_run, library_versions
from eightgig.training.optimizer import make_optimizer
from eightgig.training.resume import START
from eightgig.training.save import SavedCheckpoint, save_checkpoint


def make_checkpoint(spec: ModelSpec, config: Config) -> Checkpoint:
    cpu = torch.device("cpu")
    adapter = Adapter(
        adapter_groups(spec.decoder, config.lora, spec.module_prefix),
        scale=lora_scale(config.lora),
        dropout=config.lora.lora_dropout,
        dtype=torch.bfloat16,
        device=cpu,
    )
    gradients = Gradients(adapter.layers, device=cpu, place=cpu)
    checkpoint = Checkpoint(
        adapter=dict(adapter.named_tensors()),
        optimizer=make_optimizer(adapter, gradients, config.train).state_tensors(),
        state=START,
        identity=identify_run(config, data_fingerprint="random", model_key="random"),
    )
    generator = torch.Generator().manual_seed(0)
    for tensor in (*checkpoint.adapter.values(), *checkpoint.optimizer.values()):
        tensor.uniform_(generator=generator)
    return checkpoint


def save_often(
    run: Run, checkpoint: Checkpoint, count: int, keep: int
) -> Iterator[SavedCheckpoint]:
    for step in range(1, count + 1):
        state = replace(checkpoint.state, step=step)
        saved = save_checkpoint(run, replace(checkpoint, state=state), keep=keep)
        assert isinstance(saved, SavedCheckpoint), saved.message
        assert len(saved.removed) == int(step > keep), saved.rotation_problem or saved.removed
        yield saved


def file_system(folder: Path) -> str:
    """Its name, such as ext4: memory (tmpfs) would time no disk."""
    places = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    return next(places[str(path)] for path in (folder, *folder.parents) if str(path) in places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="12b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to time")
    parser.add_argument("--machine", help="what to call this machine")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/save_results.jsonl"))
    options = parser.parse_args()
    settings = (f"model.name={options.model}", "data.path=random", f"lora.r={options.rank}")
    spec, config = find_shape(options.model), read_config(None, settings)
    checkpoint, keep = make_checkpoint(spec, config), config.run.save_total_limit
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        saves = list(save_often(Run(folder=Path(folder)), checkpoint, options.saves, keep))
    seconds = [saved.seconds for saved in saves]
    interval_seconds = 60 * config.run.save_minutes
    measured = {
        "what": "save",
        "model": spec.name,
        "rank": config.lora.r,
        "optim": config.train.optim,
        "bytes": saves[-1].size_bytes,
        "saves": len(saves),
        "min_seconds": round(min(seconds), 2),
        "median_seconds": round(statistics.median(seconds), 2),
        "max_seconds": round(max(seconds), 2),
        "interval_seconds": interval_seconds,
        "max_interval_ratio": round(max(seconds) / interval_seconds, 5),
        "file_system": file_system(options.folder.resolve()),
        **describe_machine(options.machine),
        "versions": library_versions(),
    }
    append_json_line(options.output, measured)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
