"""How long a step takes, against recorded measurements; and that the fastest of what fits is chosen."""

from dataclasses import replace

import pytest

from utils import hardware
from utils.notebook import measurements
from utils.planning import memory, random_model
from utils.planning.memory import OURS, Levers
from utils.planning.time import choose, flop, seconds
from utils.presets import PROFILES
from utils.runtime import Stop

RECIPE = PROFILES["llama-2-7b"].recipe
SEVEN_B = random_model.config("llama-2-7b")
RATES = measurements.read("memory_grid_7b")["figures"]["rates"]
USUAL = Levers(liger=False, fused=False, upcast=True, dropout=True)


def test_times_of_all_levers_within_15_percent_of_those_measured():
    figures = measurements.read("speed_levers_7b")["figures"]
    # torch.compile, and attention that a T4 has not, are not planned.
    runs = [r for r in figures["configurations"] if not r["levers"]["compiled"] and not r["levers"]["any_attention"]]
    assert len(runs) >= 25
    for run in runs:
        on = {name: bool(run["levers"][name]) for name in ("liger", "fused", "upcast", "dropout", "double_quant")}
        recipe = replace(RECIPE, batch_size=run["batch"], max_length=run["length"])
        planned = seconds(SEVEN_B, recipe, figures["rates"], run["levers"]["checkpoint"], Levers(**on))
        assert 1e3 * sum(planned.values()) == pytest.approx(run["gpu_ms"], rel=0.15), run["setting"]


@pytest.mark.parametrize("slower", ["liger", "fused", "upcast", "dropout"])
def test_every_lever_takes_time_where_numbers_are_moved(slower):
    without = replace(OURS, **{slower: not getattr(OURS, slower)})
    fast, slow = (seconds(SEVEN_B, RECIPE, RATES, levers=levers) for levers in (OURS, without))
    assert slow["memory"] > fast["memory"] and slow | {"memory": 0} == fast | {"memory": 0}


def test_operations_of_one_row():
    """Two a weight and token, by the weights of the published shape; notebook 09 has torch count the sum."""
    work = flop(SEVEN_B, 16, 10)
    assert work["base"] == work["base, backward"] == 20 * (6_738_415_616 - 2 * 32_000 * 4096 - 65 * 4096)
    assert work["adapters, backward"] == 2 * work["adapters"] == 40 * 39_976_960
    assert work["head"] == work["head, backward"] == 20 * 32_000 * 4096
    assert work["attention, backward"] == 2 * work["attention"] == 8 * 10**2 * 32 * 4096


@pytest.mark.parametrize(("gib", "length"), [(14.5, 512), (14.5, 4096), (22.5, 2048), (39.5, 2048)])
def test_what_is_chosen_fits_and_keeps_the_rows_of_a_step(gib, length):
    recipe, kind = choose(SEVEN_B, [length] * 10, replace(RECIPE, max_length=8192), gib, RATES)
    assert recipe.batch_size * recipe.accumulation == RECIPE.batch_size * RECIPE.accumulation
    assert recipe.max_length == length and recipe.gradient_checkpointing == (kind != "none")
    assert sum(memory.at_peak(SEVEN_B, recipe, kind).values()) <= (gib - 0.3) * hardware.GIB


def test_levers_reach_the_memory_and_the_time():
    """Two rows, every fourth layer recomputed, would fit, too; with the times of OURS they would be faster."""
    recipe, kind = choose(SEVEN_B, [1024], RECIPE, 24, RATES, levers=USUAL)
    assert (recipe.batch_size, kind) == (1, "none")
    pairs = {2: 4, 1: "none"}  # both fit, and this is how long a step of 16 rows takes
    both = [replace(recipe, batch_size=batch, accumulation=16 // batch) for batch in pairs]
    for levers, faster in ((USUAL, 1), (OURS, 2)):
        passes = [seconds(SEVEN_B, r, RATES, pairs[r.batch_size], levers) | {"optimizer": 0} for r in both]
        times = {r.batch_size: r.accumulation * sum(p.values()) for r, p in zip(both, passes, strict=True)}
        assert min(times, key=times.get) == faster


def test_more_memory_is_never_slower():
    times = []
    for gib in (8, 14.5, 22.5, 79):
        recipe, kind = choose(SEVEN_B, [1024], RECIPE, gib, RATES)
        times.append(recipe.accumulation * sum(seconds(SEVEN_B, recipe, RATES, kind).values()))
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_rows_are_shortened_before_it_gives_up():
    recipe, _ = choose(SEVEN_B, [16384], replace(RECIPE, max_length=16384), 6, RATES)
    assert 64 <= recipe.max_length < 16384
    with pytest.raises(Stop, match="smaller base"):
        choose(random_model.config("llama-2-70b"), [512], RECIPE, 14.5, RATES)
