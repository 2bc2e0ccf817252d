import json
from pathlib import Path

import pytest

from eightgig.errors import ModelError
from eightgig.models import hub
from eightgig.models.count import count_parameters
from eightgig.models.shapes import SHAPES, find_shape

BILLIONS = {"e2b": 5, "e4b": 8, "12b": 12, "26b": 25, "31b": 31, "llama8b": 8, "qwen14b": 15}


@pytest.mark.parametrize("name", SHAPES)
def test_short_names_have_the_sizes_they_say(name: str) -> None:
    parameters = count_parameters(find_shape(name).decoder)
    assert parameters == pytest.approx(BILLIONS[name] * 1e9, rel=0.1)


def test_a_folder_comes_before_a_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 300,
        "max_position_embeddings": 128,
    }
    (tmp_path / "12b").mkdir()
    (tmp_path / "12b" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert find_shape("12b").decoder.hidden_size == 64
    assert find_shape("12b/config.json").decoder.hidden_size == 64


def test_where_the_hub_has_no_answer_the_known_names_are_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str, **_: object) -> None:
        raise ModelError(f"{name} cannot be reached.", why="No network.", fix="Go online.")

    monkeypatch.setattr("eightgig.models.shapes.look_up_hub_model", fail)
    assert hub.look_up_hub_model is not fail
    with pytest.raises(ModelError) as error:
        find_shape("some/model")
    assert error.value.fix.startswith("Go online. Known without files or network: ")
    assert "e2b, e4b, 12b" in error.value.fix


def test_a_name_that_is_nothing_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match="There is no model folder nosuch") as error:
        find_shape("nosuch")
    assert "12b, 26b, 31b, llama8b" in error.value.fix
