"""How long a step takes, against recorded measurements."""

from dataclasses import replace

import pytest

from utils.notebook import measurements
from utils.planning import random_model
from utils.planning.memory import OURS, Levers
from utils.planning.time import flop, seconds
from utils.presets import PROFILES

RECIPE = replace(PROFILES["llama-2-7b"].recipe, pack_length=0)
CHECKPOINTS = {"none": 0, "all": 1, "offload": 1}  # as records name them
SEVEN_B = random_model.config("llama-2-7b")
RATES = measurements.read("memory_grid_7b")["figures"]["rates"]


def test_times_of_all_levers_within_10_percent_of_those_measured():
    figures = measurements.read("speed_levers_7b")["figures"]
    runs = [r for r in figures["configurations"] if not r["levers"]["compiled"] and not r["levers"]["any_attention"]]
    assert len(runs) >= 20  # torch.compile, and attention that a T4 has not, are not planned
    for run in runs:
        on = {name: bool(run["levers"][name]) for name in ("liger", "fused", "upcast", "dropout", "double_quant")}
        again = CHECKPOINTS.get(run["levers"]["checkpoint"], run["levers"]["checkpoint"])
        recipe = replace(RECIPE, batch_size=run["batch"], max_length=run["length"], gradient_checkpointing=again)
        planned = seconds(SEVEN_B, recipe, figures["rates"], Levers(**on))
        assert 1e3 * sum(planned.values()) == pytest.approx(run["gpu_ms"], rel=0.1), run["setting"]


@pytest.mark.parametrize(("slower", "library"), [("liger", 1), ("fused", 1.74), ("upcast", 1), ("dropout", 1.74)])
def test_every_lever_takes_time_where_numbers_are_moved(slower, library):
    without = replace(OURS, **{slower: not getattr(OURS, slower)})
    fast, slow = (seconds(SEVEN_B, RECIPE, RATES, levers) for levers in (OURS, without))
    assert slow["memory"] > fast["memory"]
    assert slow == fast | {"memory": slow["memory"], "dequantize": pytest.approx(library * fast["dequantize"])}


def test_operations_of_one_row():
    """Two a weight and token, by the weights of the published shape; notebook 09 has torch count the sum."""
    work = flop(SEVEN_B, 16, 10)
    assert work["base"] == work["base, backward"] == 20 * (6_738_415_616 - 2 * 32_000 * 4096 - 65 * 4096)
    assert work["adapters, backward"] == 2 * work["adapters"] == 40 * 39_976_960
    assert work["head"] == work["head, backward"] == 20 * 32_000 * 4096
    assert work["attention, backward"] == 2 * work["attention"] == 8 * 10**2 * 32 * 4096
