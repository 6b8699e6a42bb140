"""A rehearsal runs the trainer that trains, and says what it saw or what to change."""

import re
from dataclasses import replace

import pytest
import torch

from utils.planning import rehearsal
from utils.runtime import Stop
from utils.tests import tiny
from utils.training import trainer

RECIPE = replace(tiny.RECIPE, steps=180, batch_size=2, max_length=40)


def test_ten_steps(base, tokenizer):
    recipe = replace(RECIPE, gradient_checkpointing=2)
    seen = rehearsal.rehearse(base, tokenizer, [12, 24, 60] * 200, recipe)
    assert seen.fits and len(seen.wall_s) == 8 and seen.peak_gib > 0.1
    assert seen.steps == trainer.arguments(recipe, 600, "").max_steps == 180
    whole, low, high = seen.projected()
    assert low <= whole <= high and whole == pytest.approx(180 * sum(seen.wall_s) / 8)
    assert re.search(r"peak memory +\d+\.\d\d GiB\na step .*\n180 steps", str(seen))


def test_what_does_not_fit_says_what_to_change(base, tokenizer, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rehearsal.Watch, "on_step_begin", full)
    seen = rehearsal.rehearse(base, tokenizer, [20], replace(RECIPE, batch_size=4))
    assert not seen.fits
    assert str(seen).splitlines()[1] == "  1. batch_size=2, accumulation=2 (the same result)"


@pytest.mark.parametrize("reason", ["The loss is nan", ""])
def test_other_ends_are_passed_on_or_explained(base, tokenizer, monkeypatch, reason):
    def train(*_, **__):
        if reason:
            raise Stop(reason)

    monkeypatch.setattr(trainer, "train", train)  # without a reason: stopped by its user before the third step
    with pytest.raises(Stop, match=reason or "before a step could be timed"):
        rehearsal.rehearse(base, tokenizer, [20], RECIPE)
