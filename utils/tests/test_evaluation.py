"""Marks, intervals and tests against other ways to get them: by hand, from papers, from scipy.

Notebook 05 compares loss, F1, bootstrap and difference with cells that work them out.
"""

from math import isnan

import numpy as np
import pytest

from utils import evaluation
from utils.tests import tiny


def test_marks_are_counted_by_level_in_order_of_appearance():
    rows = [
        {"output": "Ironbeck", "level": "seen form"},
        {"output": "Ironbeck", "level": "new phrasing"},
        {"output": " Hazelcombe\n", "level": "seen form"},  # stripped, as the model is trained on it
        {"output": "Hazelcombe", "level": "seen form"},
    ]
    marks = evaluation.exact_match(rows, ["Ironbeck", "ironbeck", "In Hazelcombe.", "Iron"])
    assert list(marks.items()) == [
        ("seen form", {"asked": 3, "exact": 1, "contains": 2}),
        ("new phrasing", {"asked": 1, "exact": 0, "contains": 0}),
    ]
    assert evaluation.exact_match([{"output": " a"}], ["a"]) == {"all": {"asked": 1, "exact": 1, "contains": 1}}


def test_a_missing_answer_is_an_error_and_not_a_mark():
    with pytest.raises(ValueError):
        evaluation.exact_match([{"output": "a"}, {"output": "b"}], ["a"])


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_is_wilsons(right, asked, low, high):
    assert evaluation.interval(right, asked) == pytest.approx((low, high), abs=5e-5)


def test_without_rows_there_is_no_loss_and_a_level_may_be_anything(base, tokenizer, encoded):
    assert isnan(evaluation.loss(None, tokenizer, encoded.select([])))
    rows = [{"output": "o", "level": level} for level in (1, ["x"], None)]
    assert list(evaluation.exact_match(rows, ["o"] * 3)) == ["1", "['x']", "None"]


def test_loss_does_not_depend_on_the_batches_and_leaves_mode_and_gradients_as_they_were(adapted, tokenizer, encoded):
    adapted.train()
    whole, *others = (evaluation.loss(adapted, tokenizer, encoded, size) for size in (len(tiny.ROWS), 1, 5))
    assert others == pytest.approx([whole] * 2, rel=1e-5)
    assert adapted.training and all(parameter.grad is None for parameter in adapted.parameters())


@pytest.mark.parametrize(
    ("expected", "said", "f1"),
    [
        ("Millbrook", "the Millbrook.", 1.0),
        ("baker and cat", "cat and baker", 1.0),
        ("baker and cat", "baker", 0.5),
        ("1887", "in the year 1887", 0.5),
        ("tock tock", "tock", 2 / 3),
        ("Millbrook", "Ashwick", 0.0),
        ("Millbrook", "", 0.0),
        ("", "?", 1.0),
    ],
)
def test_f1(expected, said, f1):
    assert evaluation.f1(expected, said) == pytest.approx(f1)
    assert evaluation.f1(said, expected) == pytest.approx(f1)


def test_bootstrap_agrees_with_scipy():
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).normal(3, 1, 200)
    theirs = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(2)).confidence_interval
    assert evaluation.bootstrap(values) == pytest.approx(tuple(theirs), abs=0.03)


def test_bootstrap_draws_rows_whole():
    values = np.stack([np.arange(50.0), 2 * np.arange(50.0)], axis=1)
    assert evaluation.bootstrap(values, lambda v: v[:, 1].sum() / v[:, 0].sum()) == pytest.approx((2, 2))
