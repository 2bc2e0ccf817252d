"""Answers against references."""

import random

import pytest

from eightgig.evaluation.texts import is_exact, is_match, longest_common_length, rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "is_equal"),
    [("red", "red", True), (" red\n", "red", True), ("Red", "red", False), ("", "", True)],
)
def test_exact_means_the_same_text(answer: str, reference: str, is_equal: bool) -> None:
    assert is_exact(answer, reference) == is_equal


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Red.", "red"),
        ('"red"', "red"),
        ("a  b\nc", "A b C!"),
        ("\uff32\uff25\uff24", "red"),
        ("Stra\u00dfe", "STRASSE"),
        ('{"b": 1, "a": [2]}', '{"a":[2],"b":1}'),
    ],
)
def test_a_match_forgives_form(answer: str, reference: str) -> None:
    assert is_match(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("-5", "5"), ("$5", "5"), ("red green", "red"), ('{"a": 1}', '{"a": 2}'), ("", "red")],
)
def test_a_match_does_not_forgive_content(answer: str, reference: str) -> None:
    assert not is_match(answer, reference)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # The examples of Lin 2004.
        ("police kill the gunman", 0.75),
        ("the gunman kill police", 0.5),
        ("police killed the gunman", 1.0),
        ("", 0.0),
        ("nothing else", 0.0),
    ],
)
def test_rouge_l_gives_the_published_values(answer: str, expected: float) -> None:
    assert rouge_l(answer, "police killed the gunman") == pytest.approx(expected)


def test_rouge_l_knows_words_of_every_script() -> None:
    assert rouge_l("Кот сидит", "кот спит") == pytest.approx(0.5)
    assert rouge_l("...", "...") == 1.0
    assert rouge_l("...", "!!!") == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_the_common_length_equals_that_of_the_usual_table(seed: int) -> None:
    rng = random.Random(seed)
    first = rng.choices("abcde", k=rng.randrange(1, 90))
    second = rng.choices("abcde", k=rng.randrange(1, 90))
    row = [0] * (len(second) + 1)
    for word in first:
        before, row = row, [0]
        for place, other in enumerate(second):
            best = before[place] + 1 if word == other else max(row[place], before[place + 1])
            row.append(best)
    assert longest_common_length(first, second) == row[-1]
