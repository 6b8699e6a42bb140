"""A rehearsal runs the trainer that trains; `fit` chooses what the planner says fits."""

import re
from dataclasses import replace

import pytest
import torch

from utils import hardware
from utils.models import loading
from utils.notebook import measurements
from utils.planning import memory, random_model, rehearsal
from utils.planning.time import choose, seconds
from utils.training.levers import fuse_adapters
from utils.training.trainer import arguments

POCKET, SEVEN_B = PROFILES["pocket"], PROFILES["llama-2-7b"].recipe
RATES = {"matmul_tflops_2048_4096_11008": 700, "attention_tflops_2048": 105}  # about those of an H100
RATES |= {"copy_gb_per_s": 2900, "dequantize_gweights_per_s": 790}


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_tokenizer(POCKET.base)


def test_ten_steps_of_the_pocket_shape(tokenizer):
    recipe = replace(POCKET.recipe, batch_size=2, max_length=40)
    seen = rehearsal.rehearse(POCKET.base, tokenizer, [12, 24, 60] * 100, recipe, levers=[fuse_adapters])
    assert seen.fits and len(seen.wall_s) == 6 and seen.peak_gib > 0.1
    assert seen.steps == arguments(recipe, 300, "").max_steps
    whole, low, high = seen.projected()
    assert low <= whole <= high and min(seen.wall_s) * seen.steps <= whole <= max(seen.wall_s) * seen.steps
    assert re.search(r"peak memory +\d+\.\d\d GiB\na step .*\n180 steps", str(seen))


def test_what_does_not_fit_says_what_to_change(tokenizer, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(watch.Watch, "on_step_begin", full)
    seen = rehearsal.rehearse(POCKET.base, tokenizer, [20], replace(POCKET.recipe, batch_size=4))
    assert not seen.fits
    assert str(seen).splitlines()[1] == "  1. batch_size 4 to 2 and accumulation 1 to 2 (the same result)"


def test_other_reasons_to_stop_are_passed_on(tokenizer, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *_, **__: (_ for _ in ()).throw(Stop("The loss is nan")))
    with pytest.raises(Stop, match="nan"):
        rehearsal.rehearse(POCKET.base, tokenizer, [20], replace(POCKET.recipe, batch_size=1))


def test_stopped_at_once_it_says_so(tokenizer, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *_, **__: None)
    with pytest.raises(Stop, match="before a step could be timed"):
        rehearsal.rehearse(POCKET.base, tokenizer, [20], replace(POCKET.recipe, batch_size=1))


@pytest.mark.parametrize(("gib", "length"), [(14.5, 512), (14.5, 4096), (22.5, 2048), (39.5, 2048)])
def test_fit_chooses_what_fits_and_keeps_the_rows_of_a_step(gib, length):
    config = random_model.config("llama-2-7b")
    recipe, checkpoint = choose(config, [length] * 10, replace(SEVEN_B, max_length=8192), gib, RATES, liger=True)
    assert recipe.batch_size * recipe.accumulation == SEVEN_B.batch_size * SEVEN_B.accumulation
    assert recipe.max_length == length and recipe.gradient_checkpointing == (checkpoint != "none")
    assert sum(memory.at_peak(config, recipe, checkpoint).values()) <= (gib - 0.3) * hardware.GIB


def test_the_recipe_of_the_profile_is_what_fit_chooses_for_a_t4():
    """Without Liger, which the course does not install; a recipe can say "all layers" or "none"."""
    config, rates = random_model.config("llama-2-7b"), measurements.read("memory_grid_7b")["figures"]["rates"]
    chosen, checkpoint = choose(config, [1024], SEVEN_B, 14.5, rates, checkpoints=("none", "all"), liger=False)
    assert chosen == SEVEN_B and checkpoint == "none"


def test_more_memory_is_never_slower():
    config, times = random_model.config("llama-2-7b"), []
    for gib in (8, 14.5, 22.5, 79):
        recipe, checkpoint = choose(config, [1024], SEVEN_B, gib, RATES, liger=True)
        times.append(recipe.accumulation * sum(seconds(config, recipe, RATES, checkpoint).values()))
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_fit_shortens_rows_before_it_gives_up():
    config = random_model.config("llama-2-7b")
    recipe, _ = choose(config, [16384], replace(SEVEN_B, max_length=16384), 6, RATES, liger=True)
    assert 64 <= recipe.max_length < 16384
    with pytest.raises(Stop, match="smaller base"):
        choose(random_model.config("llama-2-70b"), [512], SEVEN_B, 14.5, RATES)


@pytest.mark.parametrize(("seconds", "text"), [(12.3, "12 s"), (600, "10 min"), (9000, "2.5 h")])
def test_clock(seconds, text):
    assert rehearsal.clock(seconds) == text


def test_headless(capsys):
    assert rehearsal.main(["pocket", "--length", "24", "--batch", "1", "--rows", "50"]) == 0
    assert "peak memory" in capsys.readouterr().out
    assert rehearsal.main(["no/such/folder"]) == 1
    assert "There is no folder" in capsys.readouterr().out
