"""Stores of random weights: true shapes, sane sizes, small when layers are aliased."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eightgig.models.spec import linear_shapes
from eightgig.quant.layout import layer_layout
from eightgig.quant.random_store import random_store
from eightgig.quant.store import Store
from tests.tiny import TRAINABLE_FAMILIES
from tests.unit.quant.checkpoints import stored_numbers
from tests.unit.quant.test_layout import make_decoder


def without_means(store: Store, index: int) -> dict[str, tuple[object, ...]]:
    tensors = store.manifest.layers[index].tensors
    return {
        name: (stored.shape, stored.offset_bytes, stored.absmax_offset_bytes, stored.dtype)
        for name, stored in tensors.items()
    }


@pytest.mark.parametrize("alias_layers", [True, False])
@pytest.mark.parametrize("family", TRAINABLE_FAMILIES)
def test_the_layout_is_that_of_a_prepared_store(
    family: str, alias_layers: bool, tmp_path: Path
) -> None:
    decoder = make_decoder(family)
    store = random_store(decoder, tmp_path, seed=1, alias_layers=alias_layers)
    for index, layer in enumerate(decoder.layers):
        tensors, size_bytes = layer_layout(decoder, layer, dtype="bfloat16")
        assert store.blob(index).numel() == size_bytes
        assert without_means(store, index) == {
            name: (stored.shape, stored.offset_bytes, stored.absmax_offset_bytes, stored.dtype)
            for name, stored in tensors.items()
        }
        store.check(index)
    assert store.embedding.shape == (decoder.vocab_size, decoder.hidden_size)
    assert (store.ple is None) == (decoder.ple_size == 0)
    assert store.other()["final_norm"].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_weights_are_of_the_size_that_keeps_activations(
    quantization: str, dtype: str, tmp_path: Path
) -> None:
    decoder = make_decoder("qwen3")
    store = random_store(
        decoder, tmp_path, quantization=quantization, dtype=dtype, seed=1, alias_layers=False
    )
    for name, shape in linear_shapes(decoder, decoder.layers[0]).items():
        numbers = stored_numbers(store, 0, name).double()
        rms = numbers.square().mean().sqrt() * shape[1] ** 0.5
        assert 0.6 < rms < 1.5, name
        assert abs(numbers.mean()) * shape[1] ** 0.5 < 0.2, name
    rms = store.embedding.double().square().mean().sqrt() * decoder.hidden_size**0.5
    assert 0.6 < rms < 1.5


def test_aliased_layers_share_files_and_others_do_not(tmp_path: Path) -> None:
    decoder = make_decoder("gemma4_12b")  # sliding and global layers
    aliased = random_store(decoder, tmp_path / "a", seed=1, alias_layers=True)
    assert len(list((tmp_path / "a").glob("*.blob"))) == 2
    assert aliased.blob(0).data_ptr() == aliased.blob(1).data_ptr()
    assert aliased.blob(0).numel() != aliased.blob(2).numel()
    own = random_store(decoder, tmp_path / "b", seed=1, alias_layers=False)
    assert len(list((tmp_path / "b").glob("*.blob"))) == decoder.num_layers
    assert not torch.equal(own.blob(0), own.blob(1))
    assert torch.equal(own.blob(0), aliased.blob(0))


def test_the_seed_decides_the_numbers(tmp_path: Path) -> None:
    decoder = make_decoder("llama")
    stores = [
        random_store(decoder, tmp_path / str(number), seed=seed, alias_layers=False)
        for number, seed in enumerate((1, 1, 2))
    ]
    assert torch.equal(stores[0].blob(3), stores[1].blob(3))
    assert torch.equal(stores[0].head, stores[1].head)
    assert not torch.equal(stores[0].blob(3), stores[2].blob(3))
    assert not torch.equal(stores[0].head, stores[0].embedding)


def test_the_per_layer_embedding_of_an_aliased_store_takes_no_room(tmp_path: Path) -> None:
    decoder = make_decoder("gemma4_e4b")
    random_store(decoder, tmp_path, seed=1, alias_layers=True)
    assert (tmp_path / "ple").stat().st_size > 50_000
    assert (tmp_path / "ple").stat().st_blocks == 0
