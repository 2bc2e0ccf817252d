"""The form of JSON answers, from references."""

import pytest

from eightgig.evaluation.answers import choose_scores
from eightgig.evaluation.schema import describe_schema, infer_schema

REFERENCES = [
    {"name": "A", "age": 3, "tags": ["x"]},
    {"name": "B", "age": 2.5, "tags": [], "more": {"ok": True}},
]


@pytest.mark.parametrize(
    "value",
    [
        {"name": "C", "age": 1, "tags": ["y", "z"]},
        {"name": "C", "age": 1, "tags": [], "more": {"ok": False}},
    ],
)
def test_values_of_the_same_form_fit(value: object) -> None:
    assert infer_schema(REFERENCES).accepts(value)


@pytest.mark.parametrize(
    "value",
    [
        {"name": "C", "age": 1},
        {"name": "C", "age": "1", "tags": []},
        {"name": "C", "age": True, "tags": []},
        {"name": "C", "age": 1, "tags": [1]},
        {"name": "C", "age": 1, "tags": [], "other": 1},
        {"name": "C", "age": 1, "tags": [], "more": {}},
        {"name": None, "age": 1, "tags": []},
        [],
        "text",
    ],
)
def test_values_of_another_form_do_not(value: object) -> None:
    assert not infer_schema(REFERENCES).accepts(value)


def test_lists_that_were_always_empty_must_be_empty() -> None:
    schema = infer_schema([{"a": []}])
    assert schema.accepts({"a": []})
    assert not schema.accepts({"a": [1]})


def test_a_schema_is_described_in_a_line() -> None:
    described = describe_schema(infer_schema(REFERENCES))
    assert described == "{age: number, more?: {ok: boolean}, name: string, tags: [string]}"
    assert describe_schema(infer_schema([None, 1])) == "null | number"


def test_json_measures_apply_where_references_are_json() -> None:
    chosen = choose_scores(['{"a": 1}', '{"a": 2}'])
    assert {"json_valid", "schema_match"} <= set(chosen.scores)
    valid, fits = chosen.scores["json_valid"], chosen.scores["schema_match"]
    assert (valid('{"a": 7}', ""), fits('{"a": 7}', "")) == (1.0, 1.0)
    assert (valid('{"b": 7}', ""), fits('{"b": 7}', "")) == (1.0, 0.0)
    assert (valid('{"a": NaN}', ""), fits("{", "")) == (0.0, 0.0)
    assert (valid('```{"a": 1}```', ""), valid("7", "")) == (0.0, 0.0)


@pytest.mark.parametrize("references", [["yes", "no"], ["1", "2"], ['{"a": 1}', "no"], []])
def test_json_measures_do_not_apply_elsewhere(references: list[str]) -> None:
    chosen = choose_scores(references)
    assert set(chosen.scores) == {"exact_match", "normalised_match", "rouge_l"}
    assert chosen.schema is None
