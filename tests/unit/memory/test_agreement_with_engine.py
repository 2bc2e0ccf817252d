"""The planner's sizes against those of the modules that allocate; it may not import them."""

import pytest

from eightgig.adapters.lora import adapter_groups, count_trainable
from eightgig.config import LoraConfig
from eightgig.engine.weights import scratch_size
from eightgig.memory.layers import adapted_linears, layer_sizes
from eightgig.memory.speed import copies_per_pass
from eightgig.models.spec import ModelSpec
from eightgig.streaming.belady import copied_items
from tests.unit.memory import cases

SIZES = ["E2B", "E4B", "12B", "31B"]


def _most(spec: ModelSpec, lora: LoraConfig) -> tuple[int, int]:
    groups = adapter_groups(spec.decoder, lora, spec.module_prefix)
    return (
        max(sum(group.master_size for group in layer) for layer in groups),
        max(scratch_size(layer) for layer in groups),
    )


@pytest.mark.parametrize("rank", [5, 8, 16, 64])
@pytest.mark.parametrize("size", SIZES)
def test_adapter_and_scratch_are_as_large_as_planned(size: str, rank: int) -> None:
    spec, lora = cases.gemma(size), LoraConfig(r=rank)
    masters, scratch = _most(spec, lora)
    layers = layer_sizes(spec, lora, "nf4")
    assert masters == max(layer.master_elements for layer in layers)
    # Groups start at aligned places.
    assert max(layer.scratch_elements for layer in layers) <= scratch
    assert scratch - max(layer.scratch_elements for layer in layers) < 4 * 128


@pytest.mark.parametrize("size", SIZES)
def test_trainable_parameters_are_the_adapter_s(size: str) -> None:
    spec, lora = cases.gemma(size), LoraConfig(r=16)
    layers = layer_sizes(spec, lora, "nf4")
    planned = sum(layer.count * group.lora_elements for layer in layers for group in layer.groups)
    assert planned == count_trainable(adapter_groups(spec.decoder, lora, spec.module_prefix))


@pytest.mark.parametrize(
    "targets", [("q_proj", "up_proj"), r".*layers\.[02]\.mlp\..*", "all-linear"]
)
def test_the_same_linears_are_adapted(targets: str | tuple[str, ...]) -> None:
    spec = cases.gemma("E4B")
    groups = adapter_groups(spec.decoder, LoraConfig(target_modules=targets), spec.module_prefix)
    for layer, made in zip(spec.decoder.layers, groups, strict=True):
        names = {linear.name for group in made for linear in group.adapted}
        assert adapted_linears(spec.decoder, layer, targets, spec.module_prefix) == names


def test_copies_are_the_fewest_and_the_ring_copies_no_less() -> None:
    for layers, chunks, slots in ((5, 3, 3), (12, 4, 6), (48, 15, 3), (48, 15, 30)):
        order = [*range(layers), *range(layers, layers + chunks), *reversed(range(layers))]
        ring = len(copied_items(order, slots))
        assert sum(copies_per_pass(layers, chunks, slots)) <= ring <= len(order)
