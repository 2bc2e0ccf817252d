"""Answers that are labels."""

import pytest
import torch

from eightgig.evaluation.labels import LabelTrie, find_labels, score_labels

LABELS = {"a": (1, 2, 9), "ab": (1, 3, 9), "c": (4, 9)}


def _rows(counts: dict[str, int]) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, (ord(name[0]), 9)) for name, count in counts.items() for _ in range(count)]


def test_a_few_answers_that_return_are_labels() -> None:
    labels = find_labels(_rows({"yes": 9, "no": 5}), ["no", "yes"])
    assert labels == {"no": (ord("n"), 9), "yes": (ord("y"), 9)}


@pytest.mark.parametrize(
    ("counts", "held_out"),
    [
        ({"yes": 9}, ["yes"]),
        ({"yes": 9, "no": 5}, ["perhaps"]),
        ({"yes": 4, "no": 2}, ["yes"]),
        ({'{"a": 1}': 9, '{"a": 2}': 9}, ['{"a": 1}']),
        ({}, []),
    ],
    ids=["one label", "an unknown label", "too few rows", "JSON", "no rows"],
)
def test_other_answers_are_none(counts: dict[str, int], held_out: list[str]) -> None:
    assert find_labels(_rows(counts), held_out) is None


def test_long_answers_are_no_labels() -> None:
    rows = [(name, tuple(range(30))) for name in ("long", "other") for _ in range(9)]
    assert find_labels(rows, ["long"]) is None


def test_the_usual_tokens_of_a_label_are_taken() -> None:
    rows = [*_rows({"yes": 9, "no": 5}), ("yes", (7, 7, 9))]
    found = find_labels(rows, [])
    assert found is not None
    assert found["yes"] == (ord("y"), 9)


def test_only_tokens_that_go_on_with_a_label_are_allowed() -> None:
    trie = LabelTrie(LABELS)
    made = [[], [1], [1, 2], [4, 9], [4, 9, 5]]
    logits = trie.allowed(made, torch.zeros(5, 10))
    following = [torch.isfinite(row).nonzero().flatten().tolist() for row in logits]
    assert following == [[1, 4], [2, 3], [9], list(range(10)), list(range(10))]


def test_scores_are_those_of_the_confusion_matrix() -> None:
    references = ["a", "a", "a", "b", "b", "c"]
    answers = ["a", "a", "b", "b", "a", "b"]
    scores = score_labels(["a", "b", "c", "d"], references, answers)
    assert scores.confusion == ((2, 1, 0, 0), (1, 1, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0))
    assert scores.accuracy == pytest.approx(3 / 6)
    # F1 of a: 2*2/(3+3), of b: 2*1/(2+3), of c: 0; d occurs nowhere and does not count.
    assert scores.macro_f1 == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
