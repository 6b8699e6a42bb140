"""Scores and tests against other ways to get them: by hand, from scipy, from one forward pass."""

import numpy as np
import pytest
import torch

from utils import evaluation
from utils.data import template
from utils.models import loading
from utils.tests import tiny


@pytest.mark.parametrize(
    ("expected", "said", "f1"),
    [
        ("Millbrook", "Millbrook", 1.0),
        ("Millbrook", "the Millbrook.", 1.0),
        ("baker and cat", "cat and baker", 1.0),
        ("baker and cat", "baker", 0.5),
        ("1887", "in the year 1887", 0.5),
        ("tock tock", "tock", 2 / 3),
        ("Millbrook", "Ashwick", 0.0),
        ("Millbrook", "", 0.0),
        ("", "Millbrook", 0.0),
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
    low, high = evaluation.bootstrap(values, lambda v: v[:, 1].sum() / v[:, 0].sum())
    assert low == pytest.approx(2) and high == pytest.approx(2)


def test_bootstrap_is_the_same_each_time():
    values = np.random.default_rng(3).normal(size=20)
    assert evaluation.bootstrap(values) == evaluation.bootstrap(values) != evaluation.bootstrap(values, seed=1)


def test_a_paired_difference_is_sharper_than_an_unpaired_one():
    rng = np.random.default_rng(0)
    before = rng.random(300) < 0.5
    after = before ^ (rng.random(300) < 0.02)
    found, low, high = evaluation.difference(before, after)
    assert found == pytest.approx(after.mean() - before.mean())
    assert low <= found <= high and high - low < 0.06
    assert evaluation.difference(before, before) == (0, 0, 0)


def test_mcnemar_counts_what_changed():
    before, after = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1]
    assert evaluation.mcnemar(before, after) == (1, 3, pytest.approx(2 * (1 + 4) / 16))
    assert evaluation.mcnemar(before, before) == (0, 0, 1.0)
    assert evaluation.mcnemar([0] * 10, [1] * 10)[2] == pytest.approx(2 / 2**10)
    with pytest.raises(ValueError, match="argument 2"):
        evaluation.mcnemar([1], [1, 0])


@pytest.fixture(scope="module")
def model(base):
    return loading.load_base(base)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return [t for row in tiny.ROWS for t in template.encode(tokenizer, row)["input_ids"]][:100]


def test_one_window_is_one_forward_pass(model, ids):
    losses = evaluation.token_losses(model, ids, window=200, stride=100)
    assert losses.shape == (99,)
    assert losses.mean().item() == pytest.approx(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item())


@pytest.mark.parametrize(("window", "stride"), [(40, 10), (40, 39), (33, 32), (100, 50), (2, 1)])
def test_windows_score_each_token_once(model, ids, window, stride):
    losses = evaluation.token_losses(model, ids, window, stride)
    assert losses.shape == (99,)
    whole = evaluation.token_losses(model, ids, 200, 100)
    assert torch.allclose(losses[: window - 1], whole[: window - 1], atol=1e-4)
    assert (window < len(ids)) == (not torch.allclose(losses, whole, atol=1e-4))


def test_each_token_sees_what_it_should(model, ids):
    window, stride = 40, 10
    losses = evaluation.token_losses(model, ids, window, stride)
    for place in (45, 73, 99):  # the last token of a window sees all of it, the first new one window - stride
        end = min(len(ids), window + stride * -(-(place + 1 - window) // stride))
        piece = torch.tensor([ids[end - window if end < len(ids) else 60 : place + 1]])
        logits = model(piece).logits[0, -2].log_softmax(-1)
        assert -logits[ids[place]].item() == pytest.approx(losses[place - 1].item(), abs=1e-4)


def test_agrees_with_the_exam_on_one_text(model, tokenizer, ids):
    labelled = [{"input_ids": ids, "labels": ids}]
    whole = evaluation.token_losses(model, ids, 200, 100)
    assert evaluation.loss(model, tokenizer, labelled) == pytest.approx(whole.mean().item(), rel=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(10, 0), (10, 10), (10, 11)])
def test_a_stride_that_leaves_tokens_out_is_refused(model, ids, window, stride):
    with pytest.raises(ValueError, match="take 1 to 9"):
        evaluation.token_losses(model, ids, window, stride)
