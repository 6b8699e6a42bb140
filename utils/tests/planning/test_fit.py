"""The fastest of what fits is chosen, for packs and for batches; and a plan says what it knows."""

from dataclasses import replace

import pytest
from transformers import MistralConfig

from utils import hardware
from utils.notebook import measurements
from utils.planning import fit, memory, random_model
from utils.planning.fit import choose
from utils.planning.time import seconds
from utils.presets import PROFILES
from utils.runtime import Stop

RECIPE = PROFILES["llama-2-7b"].recipe
PADDED = replace(RECIPE, pack_length=0)
SEVEN_B = random_model.config("llama-2-7b")
RATES = measurements.read("memory_grid_7b")["figures"]["rates"]
LENGTHS = measurements.read("speed_real_7b")["figures"]["lengths"]


@pytest.mark.parametrize(("gib", "length"), [(14.5, 512), (14.5, 4096), (22.5, 2048), (39.5, 2048)])
def test_what_is_chosen_fits_and_keeps_the_rows_of_a_step(gib, length):
    recipe = choose(SEVEN_B, [length] * 10, replace(PADDED, max_length=8192), gib, RATES)
    assert recipe.batch_size * recipe.accumulation == RECIPE.batch_size * RECIPE.accumulation
    assert recipe.max_length == length
    assert sum(memory.at_peak(SEVEN_B, recipe).values()) <= (gib - 0.3) * hardware.GIB


def test_more_memory_is_never_slower():
    times = []
    for gib in (8, 14.5, 22.5, 79):
        recipe = choose(SEVEN_B, [1024], PADDED, gib, RATES)
        times.append(recipe.accumulation * sum(seconds(SEVEN_B, recipe, RATES).values()))
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_rows_are_shortened_before_it_gives_up():
    for long in (replace(PADDED, max_length=16384), replace(RECIPE, max_length=16384, pack_length=16384)):
        assert 64 <= choose(SEVEN_B, [16384, 40], long, 5, RATES).max_length < 16384
    with pytest.raises(Stop, match="smaller base"):
        choose(random_model.config("llama-2-70b"), [512], RECIPE, 14.5, RATES)


def test_packs_for_a_t4_and_for_less():
    """A T4 takes the default as it is; with less memory packs become shorter or layers are recomputed."""
    assert choose(SEVEN_B, LENGTHS, RECIPE, 14.5, RATES) == RECIPE
    smaller = choose(SEVEN_B, LENGTHS, RECIPE, 10, RATES)
    assert smaller.pack_length < 2048 or smaller.gradient_checkpointing
    assert smaller.pack_length >= max(LENGTHS)
    assert sum(memory.at_peak(SEVEN_B, smaller).values()) <= 9.7 * hardware.GIB
    assert choose(SEVEN_B, LENGTHS, replace(RECIPE, gradient_checkpointing=1), 14.5, RATES).gradient_checkpointing == 1


def test_a_base_that_gets_no_kernels_of_ligers_is_planned_without_them():
    """Only Llama gets them (`levers.pull`); a Mistral of the same shape keeps more, and so has shorter packs."""
    without = memory.Levers(liger=False)
    plan = fit.on("Tesla T4", 14.5, MistralConfig(), LENGTHS * 30, RECIPE)
    assert plan.recipe.pack_length < RECIPE.pack_length and plan.peak_gib < hardware.T4_GIB
    assert plan.peak_gib == sum(memory.at_peak(MistralConfig(), plan.recipe, without).values()) / hardware.GIB
    assert sum(memory.at_peak(MistralConfig(), RECIPE, without).values()) / hardware.GIB > hardware.T4_GIB
    assert seconds(MistralConfig(), RECIPE, RATES) == seconds(MistralConfig(), RECIPE, RATES, without)


def test_packs_hold_every_row_once():
    found = fit.packs(LENGTHS, RECIPE)
    assert sorted(n for pack in found for n in pack) == sorted(LENGTHS)
    assert all(sum(pack) <= 2048 for pack in found)


@pytest.mark.parametrize("card", ["Tesla T4", "NVIDIA H100 80GB HBM3", "NVIDIA L40S"])
def test_a_plan_says_what_it_knows(card):
    plan = fit.on(card, 14.5, SEVEN_B, LENGTHS * 30, RECIPE)
    assert plan.recipe == RECIPE and plan.tokens == 3 * 30 * sum(LENGTHS) and 11 < plan.peak_gib < 13
    assert ("not predicted" in str(plan)) == (card == "NVIDIA L40S") == (plan.gpu_s is None)
    if card == "Tesla T4":
        assert 20 * 60 < plan.gpu_s[0] < 25 * 60 and 60 * 60 < plan.gpu_s[1] < 75 * 60
        part = fit.on(card, 14.5, SEVEN_B, LENGTHS * 30, replace(RECIPE, steps=plan.steps // 3))
        assert part.epochs == 1 and part.tokens == 30 * sum(LENGTHS)
        assert part.gpu_s[0] == pytest.approx(plan.gpu_s[0] / 3)


def test_a_plan_without_a_gpu():
    pocket = PROFILES["pocket"]
    plan = fit.fit(random_model.config(pocket.base), [20, 50] * 100, pocket.recipe)
    assert plan.recipe == pocket.recipe and plan.steps == 70 and plan.peak_gib < 1
    assert "no GPU" in str(plan) and "70 steps, 70,000 tokens\nrows are read 10 times" in str(plan)
    plan = fit.fit(random_model.config(pocket.base), [20, 50] * 3200, pocket.recipe)  # 180 steps are 0.9 of an epoch
    assert "180 steps, 201,600 tokens\nrows are read once, 90% of them" in str(plan)


@pytest.mark.parametrize(("seconds", "text"), [(12.3, "12 s"), (600, "10 min"), (9000, "2.5 h")])
def test_clock(seconds, text):
    assert fit.clock(seconds) == text
