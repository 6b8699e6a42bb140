"""The figure style: colours that stay apart, bars that show what they were given."""

import itertools

import matplotlib
import pytest
from matplotlib.colors import to_rgb

from utils.notebook import figures


@pytest.fixture
def canvas():
    """A canvas without a window, and matplotlib's settings as they were afterwards."""
    with matplotlib.rc_context():
        matplotlib.use("Agg")
        figures.use()
        yield
        matplotlib.pyplot.close("all")


def luminance(color: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_two_main_colours_differ_in_print_too():
    dark, light = sorted([luminance(figures.BASE), luminance(figures.ADAPTER)])
    assert (light + 0.05) / (dark + 0.05) > 2


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(figures.PALETTE, 2)))
def test_colours_are_far_apart(one, two):
    assert sum((a - b) ** 2 for a, b in zip(to_rgb(one), to_rgb(two), strict=True)) > 0.04


def test_use_sets_the_cycle_and_the_width(canvas):
    assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"] == list(figures.PALETTE)
    assert matplotlib.rcParams["figure.figsize"][0] == figures.WIDTH


def test_bars_read_from_the_top_with_whiskers_and_labels(canvas):
    ax = figures.bars(["base", "adapter"], [0.0, 0.988], [(0.0, 0.007), (0.97, 0.996)], [figures.BASE, figures.ADAPTER])
    widths = [patch.get_width() for patch in ax.patches]
    assert widths == [0.0, 0.988]
    assert ax.yaxis_inverted()
    assert [t.get_text() for t in ax.texts] == ["0.0 %", "98.8 %"]
    whiskers = [tuple(segment[:, 0]) for segment in ax.collections[0].get_segments()]
    assert whiskers == [pytest.approx((0.0, 0.007)), pytest.approx((0.97, 0.996))]


def test_one_interval_a_bar(canvas):
    with pytest.raises(ValueError):
        figures.bars(["base", "adapter"], [0.0, 1.0], [(0.0, 0.1)])
