"""The README's figure, data/measurements/readme.svg, from the records: python data/measurements/studies/readme.py

Left: the exam before and after training. Right: memory and speed of a training run of the 7B shape.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from utils import evaluation  # noqa: E402
from utils.notebook import figures, measurements  # noqa: E402

LEVELS = ("seen form", "new phrasing", "two facts", "comparison", "reverse, told", "reverse, untold")
WAYS = {  # name in the figure: record, its list, the way's name there, colour, where the name stands
    "the usual recipe": ("speed_real_7b", "training", "usual, padded batches of 4", figures.REFERENCE, (8, -4)),
    "Unsloth, as in its notebooks": (
        *("speed_unsloth_real_7b", "training", "its notebooks' own: batch 2, its checkpointing, padding-free"),
        *(figures.THIRD, (8, 4)),
    ),
    "Unsloth, packing, xformers": (
        *("speed_unsloth_real_7b", "training", "its checkpointing, packing, xformers", figures.THIRD, (8, -8)),
    ),
    "ours, layers recomputed": (
        *("speed_default_7b", "ways", "packs, every layer recomputed", figures.ADAPTER, (8, 4)),
    ),
    "ours, the default": ("speed_default_7b", "ways", "default recipe", figures.ADAPTER, (-110, 6)),
    "Unsloth, the same without\ncheckpointing": (
        *("speed_unsloth_real_7b", "training", "checkpointing off, packing, xformers", figures.THIRD, (-150, -10)),
    ),
}


def per_gpu_second(run: dict) -> float:
    """Useful tokens a GPU second. Of Unsloth's packs the full ones count: its last one has 173 tokens."""
    passes = [*zip(run["useful_tokens"][-len(run["gpu_ms_steps"]) :], run["gpu_ms_steps"], strict=True)]
    kept = [one for one in passes if one[0] > 1000 or not run.get("packing")]
    return 1e3 * sum(tokens for tokens, _ in kept) / sum(ms for _, ms in kept)


def draw(path: Path) -> None:
    """Write the figure to `path`, an SVG with its words as text."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figures.use()
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "readme", "font.family": "sans-serif"})
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9))
    runs = [measurements.read(f"exam_seed{seed}")["figures"] for seed in range(3)]
    for i, level in enumerate(LEVELS):
        asked = runs[0]["after"][level]["asked"]
        before, after = (sum(run[when][level]["exact"] for run in runs) / 3 for when in ("before", "after"))
        low, high = evaluation.interval(round(after), asked)
        left.plot([low, high], [i, i], color=figures.ADAPTER, lw=1.5)
        left.plot(before / asked, i, "o", mfc="white", color=figures.BASE, label="the base" if not i else None)
        left.plot(after / asked, i, "o", color=figures.ADAPTER, label="after QLoRA" if not i else None)
        left.annotate(f"{after / asked:.1%}", (after / asked, i), (0, 6), textcoords="offset points", ha="center")
    left.set(yticks=range(len(LEVELS)), yticklabels=LEVELS, xlim=(-0.06, 1.1), ylim=(5.5, -0.7))
    left.set(title="Questions about people it was not trained on", xlabel="exact match, 95 % interval")
    left.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    left.legend(loc="center left", bbox_to_anchor=(0.02, 0.62))
    for name, (record, part, way, color, offset) in WAYS.items():
        run = next(run for run in measurements.read(record)["figures"][part] if run["way"] == way)
        point = run["peak_allocated_gib"], per_gpu_second(run)
        right.plot(*point, "o", color=color)
        right.annotate(name, point, offset, textcoords="offset points", color=color, fontsize=10)
    right.axvline(14.12, color=figures.REFERENCE, ls="--", lw=1.2)
    right.annotate("what a T4 gives torch", (14.12, 500), (-4, 0), textcoords="offset points", ha="right", fontsize=10)
    right.set(xlim=(0, 15), ylim=(0, 20_000), title="Training Llama-2-7B's shape by a T4's rules")
    right.set(xlabel="peak memory, GiB", ylabel="useful tokens a GPU second")
    right.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    fig.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(fig)


if __name__ == "__main__":
    draw(measurements.FOLDER / "readme.svg")
