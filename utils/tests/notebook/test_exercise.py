"""Exercises: three verdicts for the learner, and a failure where a solution is wrong."""

import pytest

from utils.notebook.exercise import check


def verdict(capsys, answer, right) -> str:
    check("blocks", answer, right, "count again")
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (64, 64),
        (0.33333, 1 / 3),
        ("nf4", "nf4"),
        ([1, 2], [1, 2]),
        (True, True),
        (6, lambda n: n % 3 == 0),
    ],
)
def test_right(capsys, answer, right):
    assert verdict(capsys, answer, right) == "blocks: right\n"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (63, 64),
        (0.33, 1 / 3),
        (0, 64),
        (True, 1),
        ("sixty-four", 64),
        ("64 or so", lambda n: n > 60),
        ([], lambda a: a[0] == 1),
        ({}, lambda a: a["x"] == 1),
        (7, lambda n: n % 3 == 0),
        (False, True),
    ],
)
def test_wrong_of_any_kind_gives_the_hint(capsys, answer, right):
    assert verdict(capsys, answer, right) == "blocks: not yet: count again\n"


def test_unanswered(capsys):
    assert verdict(capsys, None, 64) == "blocks: your turn - replace None above\n"


@pytest.mark.parametrize("answer", [None, 63])
def test_a_solution_must_be_right(answer):
    with pytest.raises(AssertionError, match="blocks"):
        check("blocks", answer, 64, "count again", strict=True)


def test_a_right_solution_passes(capsys):
    check("blocks", 64, 64, "count again", strict=True)
    assert capsys.readouterr().out == "blocks: right\n"
