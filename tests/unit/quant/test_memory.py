"""Preparing a large checkpoint needs memory for a tensor and a layer, not for the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eightgig.models.layout import OTHER_SUFFIXES, layer_suffixes, layer_tensor_shapes
from eightgig.models.read import parse_model_spec
from eightgig.units import MIB

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 60_000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
# Prints the most anonymous memory (mapped files do not count) above that before the start.
MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from bitsandbytes import functional
from eightgig.models.checkpoint import read_model_spec
from eightgig.quant.build import prepare_store

def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while True:
        peaks.append(anonymous_bytes())
        time.sleep(0.002)

functional.quantize_4bit(torch.randn(64, 64), compress_statistics=True)
folder, cache_dir = Path(sys.argv[1]), Path(sys.argv[2])
start, peaks = anonymous_bytes(), []
threading.Thread(target=watch, daemon=True).start()
prepare_store(read_model_spec(folder), folder, cache_dir=cache_dir, device=torch.device("cpu"))
print(max(peaks) - start)
"""


def write_sparse_checkpoint(folder: Path, *, odd_bytes: int) -> int:
    """A checkpoint of zeros that takes no room on the disk; returns its bytes.

    Args:
        folder: To make.
        odd_bytes: How far the data lies behind a multiple of 8: tables at odd bytes are copied.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    decoder = parse_model_spec(CONFIG, name="sparse").decoder
    shapes = {
        "model." + OTHER_SUFFIXES["embedding"]: (decoder.vocab_size, decoder.hidden_size),
        "model." + OTHER_SUFFIXES["final_norm"]: (decoder.hidden_size,),
    }
    for layer in decoder.layers:
        suffixes = layer_suffixes(decoder, layer)
        for name, shape in layer_tensor_shapes(decoder, layer).items():
            shapes[f"model.layers.{layer.index}.{suffixes[name]}"] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        size_bytes = 2
        for size in shape:
            size_bytes *= size
        offsets = [end, end + size_bytes]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        end += size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + odd_bytes)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("odd_bytes", [0, 1])
def test_preparing_takes_far_less_memory_than_the_checkpoint(
    odd_bytes: int, tmp_path: Path
) -> None:
    checkpoint_bytes = write_sparse_checkpoint(tmp_path / "model", odd_bytes=odd_bytes)
    assert checkpoint_bytes > 450 * MIB
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    # Measured: 107 to 118 MiB with 1 to 8 layers. Keeping the blobs would add 23 MiB a layer, a
    # table at an odd byte 64 MiB for its slice (256 MiB in all were seen once, on a busy machine),
    # as a whole 234 MiB.
    assert int(result.stdout) < (300 if odd_bytes else 160) * MIB
