"""A dequantisation kernel is handed what the plain definition reads for itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eightgig.adapters.lora import layer_groups
from eightgig.engine.weights import WeightReader
from eightgig.models.checkpoint import read_model_spec
from eightgig.ops.choose import choose_ops
from eightgig.quant.manifest import NestedAbsmax
from eightgig.quant.nf4 import code_table_tensors
from eightgig.quant.random_store import random_store
from tests import tiny


def _kernel(*arguments, out):  # type: ignore[no-untyped-def]
    """The contract of `ops.triton_dequant.dequantizer`, without a GPU."""
    assert out.shape[1] % 8 == 0, out.shape
    return lambda: _dequantize(*arguments, out=out)


def _dequantize(codes, absmax, nested_absmax, mean, block_size, nested_block_size, code, nested_code, *, out):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    values = torch.stack([code[(codes >> 4).long()], code[(codes & 15).long()]], dim=1).flatten()
    if nested_absmax is not None:
        scales = nested_absmax.repeat_interleave(nested_block_size)[: len(absmax)]
        absmax = nested_code[absmax.long()] * scales + mean
    values = values * absmax.repeat_interleave(block_size)[: values.numel()]
    out.copy_(values[: out.numel()].view(out.shape))


@pytest.mark.parametrize("intermediate_size", [128, 130])
@pytest.mark.parametrize("is_nested", [True, False])
def test_a_kernel_reads_the_weights_of_the_plain_definition(
    tmp_path: Path, is_nested: bool, intermediate_size: int
) -> None:
    # Of 130 columns, no multiple of 8, the kernel has to be spared.
    settings = {"intermediate_size": intermediate_size}
    folder = tiny.make_model("gemma4_12b", tmp_path / "model", text_settings=settings)
    decoder = read_model_spec(folder).decoder
    store = random_store(decoder, tmp_path / "store", seed=0, alias_layers=False)
    blob, stored = store.blob(0).clone(), store.manifest.layers[0]
    if not is_nested:
        # What follows the codes is read as float32 maxima: four bytes each instead of one.
        spare = torch.rand(1 << 16).view(torch.uint8)
        tensors = {
            name: replace(tensor, nested=None, absmax_offset_bytes=len(blob))
            if isinstance(tensor.nested, NestedAbsmax)
            else tensor
            for name, tensor in stored.tensors.items()
        }
        blob, stored = torch.cat([blob, spare]), replace(stored, tensors=tensors)
    plain, _ = choose_ops(device="cpu", dtype=torch.float32, kernels="plain")
    scratch = []
    for ops in (plain, replace(plain, dequantizer=_kernel)):
        reader = WeightReader(
            [stored],
            [layer_groups(decoder, decoder.layers[0], None)],
            scale=1.0,
            ops=ops,
            code_tables=code_table_tensors(store.manifest.code_tables, torch.device("cpu")),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        weights = [reader.open(blob, 0, None) for _ in range(2)][1]  # the second from its cache
        scratch.append({name: group.scratch.clone() for name, group in weights.groups.items()})
    for name, expected in scratch[0].items():
        assert expected.abs().sum() > 0
        assert torch.equal(scratch[1][name], expected), name
