"""The Gemma 4 sizes known offline equal the published configs and parameter counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from eightgig.errors import ModelError
from eightgig.models.count import (
    count_layer_parameters,
    count_linear_parameters,
    count_parameters,
    parameter_counts,
)
from eightgig.models.known import KNOWN_MODELS, known_model_spec
from eightgig.models.read import parse_model_spec, require_trainable
from eightgig.models.spec import DecoderSpec, ModelSpec

SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")
CONFIGS = Path(__file__).parents[4] / "shared" / "reference" / "configs"

# Counted on Transformers' modules; the sums with the other parts equal the hub's totals.
PUBLISHED = {
    "E2B": {
        "embedding": 402_653_184,
        "ple_table": 2_348_810_240,
        "ple_linears": 41_287_680,
        "attention": 278_396_928,
        "mlp": 1_557_135_360,
        "norms": 285_952,
    },
    "E4B": {
        "embedding": 671_088_640,
        "ple_table": 2_818_572_288,
        "ple_linears": 82_575_360,
        "attention": 587_202_560,
        "mlp": 3_303_014_400,
        "norms": 560_128,
    },
    "12B": {
        "embedding": 1_006_632_960,
        "attention": 2_406_481_920,
        "mlp": 8_493_465_600,
        "norms": 769_792,
    },
    "26B-A4B": {
        "embedding": 738_197_504,
        "attention": 1_110_179_840,
        "mlp": 535_265_280,
        "experts": 22_837_985_280,
        "router": 10_901_760,
        "norms": 612_096,
    },
    "31B": {
        "embedding": 1_409_286_144,
        "attention": 8_477_736_960,
        "mlp": 20_808_990_720,
        "norms": 1_331_456,
    },
}


def _spec(size: str) -> ModelSpec:
    spec = known_model_spec(f"google/gemma-4-{size}")
    assert spec is not None
    return spec


def _decoder(size: str) -> DecoderSpec:
    return _spec(size).decoder


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_equal_the_published_ones(size: str) -> None:
    counts = {part: count for part, count in parameter_counts(_decoder(size)).items() if count}
    assert counts == PUBLISHED[size]


@pytest.mark.parametrize("size", SIZES)
def test_layers_and_the_rest_sum_to_the_whole(size: str) -> None:
    decoder = _decoder(size)
    counts = parameter_counts(decoder)
    layers = sum(count_layer_parameters(decoder, layer) for layer in decoder.layers)
    rest = counts["embedding"] + counts["ple_table"] + decoder.hidden_size
    if decoder.ple_size:
        rest += decoder.num_layers * decoder.ple_size * decoder.hidden_size + decoder.ple_size
    assert count_parameters(decoder) == layers + rest


def test_linear_parameters_are_those_kept_in_four_bit() -> None:
    assert count_linear_parameters(_decoder("12B")) == 2_406_481_920 + 8_493_465_600


@pytest.mark.parametrize("size", SIZES)
def test_known_specs_equal_those_of_the_published_configs(size: str) -> None:
    path = CONFIGS / f"gemma-4-{size}.json"
    if not path.exists():
        pytest.skip("the published configs are not part of this checkout")
    published = parse_model_spec(
        json.loads(path.read_text(encoding="utf-8")), name=f"google/gemma-4-{size}"
    )
    assert _spec(size) == dataclasses.replace(published, license="apache-2.0")


@pytest.mark.parametrize(("size", "sliding", "full"), [("E2B", 13, 14), ("E4B", 22, 23)])
def test_shared_layers_use_the_last_own_layer_of_their_kind(
    size: str, sliding: int, full: int
) -> None:
    shared = [layer for layer in _decoder(size).layers if layer.kv_source is not None]
    assert len(shared) == {"E2B": 20, "E4B": 18}[size]
    for layer in shared:
        assert layer.kv_source == (full if layer.sliding_window is None else sliding)
        assert not layer.has_k_proj
        assert not layer.has_v_proj


def test_only_the_shared_layers_of_e2b_are_twice_as_wide() -> None:
    widths = {
        (layer.kv_source is None, layer.intermediate_size) for layer in _decoder("E2B").layers
    }
    assert widths == {(True, 6_144), (False, 12_288)}


def test_global_layers_of_the_large_sizes_have_no_v_proj() -> None:
    for layer in _decoder("12B").layers:
        assert layer.has_v_proj == (layer.sliding_window is not None)
        assert layer.head_dim == (256 if layer.has_v_proj else 512)
        assert layer.num_kv_heads == (8 if layer.has_v_proj else 1)


def test_the_attention_of_gemma_4_is_not_scaled_and_its_norms_have_no_offset() -> None:
    decoder = _decoder("31B")
    assert (decoder.attention_scale, decoder.norm_offset) == (1.0, 0.0)
    assert decoder.embedding_scale == pytest.approx(5_376**0.5)


def test_parts_that_are_not_trained_are_named() -> None:
    assert _spec("12B").skipped_parts == ("vision embedder", "audio embedder")
    assert _spec("31B").skipped_parts == ("vision tower",)


@pytest.mark.parametrize("name", ["google/gemma-4-12b-IT", "gemma-4-12B-it"])
def test_known_names_are_found_in_any_case_and_without_owner(name: str) -> None:
    spec = known_model_spec(name)
    assert spec is not None
    assert spec.name == "google/gemma-4-12B-it"


@pytest.mark.parametrize("name", ["", "google/gemma-4", "google/gemma-3-4b-it", "gemma-4-12B-itx"])
def test_other_names_are_not_known(name: str) -> None:
    assert known_model_spec(name) is None


def test_experts_are_read_but_cannot_be_trained_yet() -> None:
    spec = _spec("26B-A4B")
    assert spec.decoder.has_experts
    assert (spec.decoder.num_experts, spec.decoder.num_active_experts) == (128, 8)
    with pytest.raises(ModelError, match="cannot be trained yet"):
        require_trainable(spec)


def test_every_other_known_model_can_be_trained() -> None:
    for name in KNOWN_MODELS:
        spec = known_model_spec(name)
        assert spec is not None
        if "26B" not in name:
            require_trainable(spec)
