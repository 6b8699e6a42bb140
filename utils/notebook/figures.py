"""One look for all figures: colours that colour-blind readers can tell apart, sizes that fit a notebook's column.

The colours are those of Okabe and Ito, "Color Universal Design" (2008). Each has one meaning in all chapters.
"""

from collections.abc import Sequence
from pathlib import Path

BASE = "#E69F00"  # orange: the base model; before training
ADAPTER = "#0072B2"  # blue: base with adapter; after training
OTHER = "#009E73"  # green: a second variant beside the first
THIRD = "#CC79A7"  # purple: a third variant
WRONG = "#D55E00"  # vermilion: what went wrong
REFERENCE = "#595959"  # grey: limits, chance level, the published value
PALETTE = (ADAPTER, BASE, OTHER, THIRD, WRONG, "#56B4E9", REFERENCE)

WIDTH = 8.0  # inches; a notebook's column at 100 dpi


def use() -> None:
    """Set matplotlib's defaults for this kernel. Call it once, before the first figure."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.style.use(Path(__file__).with_name("course.mplstyle"))
    plt.rcParams["axes.prop_cycle"] = cycler(color=PALETTE)


def bars(
    labels: Sequence[str],
    shares: Sequence[float],
    intervals: Sequence[tuple[float, float]] | None = None,
    colors: Sequence[str] | str = ADAPTER,
    title: str = "",
):
    """Horizontal bars of shares between 0 and 1, the first on top, each with its value in per cent; returns the Axes.

    `intervals` has (low, high) of each share, drawn as a whisker; `colors` is one for all, or one a bar.
    """
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(WIDTH, 0.9 + 0.42 * len(labels)))
    reach = None
    if intervals is not None:
        pairs = [(max(0.0, s - low), max(0.0, high - s)) for s, (low, high) in zip(shares, intervals, strict=True)]
        reach = list(zip(*pairs, strict=True))
    whiskers = {"ecolor": "black", "capsize": 3, "lw": 1.4}
    drawn = ax.barh(range(len(labels)), shares, 0.66, xerr=reach, error_kw=whiskers, color=colors, tick_label=labels)
    ax.bar_label(drawn, fmt=lambda share: f"{100 * share:.1f} %", padding=5)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlim=(0, 1.13), title=title)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    return ax
