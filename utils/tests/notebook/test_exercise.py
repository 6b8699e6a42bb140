"""Exercises: three verdicts for the learner, and a failure where a solution is wrong."""

import pytest

from utils.notebook.exercise import check

RIGHT = [(64, 64), (0.33333, 1 / 3), ("nf4", "nf4"), ([1, 2], [1, 2]), (True, True), (6, lambda n: n % 3 == 0)]
WRONG = [(63, 64), (0.33, 1 / 3), (0, 64), (True, 1), ("sixty-four", 64), ("64 or so", lambda n: n > 60)]
WRONG += [([], lambda a: a[0] == 1), ({}, lambda a: a["x"] == 1), (7, lambda n: n % 3 == 0), (False, True)]


@pytest.mark.parametrize(("answer", "right"), RIGHT)
@pytest.mark.parametrize("strict", [True, False])
def test_right(capsys, answer, right, strict):
    check("blocks", answer, right, "count again", strict)
    assert capsys.readouterr().out == "blocks: right\n"


@pytest.mark.parametrize(("answer", "right"), [*WRONG, (None, 64)])
def test_wrong_of_any_kind_gives_the_hint_and_unanswered_asks_for_one(capsys, answer, right):
    check("blocks", answer, right, "count again")
    told = "your turn - replace None above" if answer is None else "not yet: count again"
    assert capsys.readouterr().out == f"blocks: {told}\n"
    with pytest.raises(AssertionError, match="blocks"):
        check("blocks", answer, right, "count again", strict=True)
