"""Will it fit, and how long will it take: the fastest recipe for a card and rows, its planned peak and time."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from datasets import Dataset
from trl import pack_dataset

from utils import hardware
from utils.hardware import GIB
from utils.notebook import measurements
from utils.planning import memory
from utils.planning.memory import Levers
from utils.planning.time import seconds
from utils.presets import Recipe
from utils.runtime import Stop
from utils.training import trainer

MARGIN = 1.03  # of the planner's peaks: they were within 3 % of those measured
KINDS = (0, 4, 2, 1)  # recompute no layer, every fourth, every second, all
# What a card's name contains: the largest 16-bit matmul rate (trillion operations a second, without sparsity) and
# bandwidth (GB/s) of Nvidia's data sheets.
SHEETS = {"T4": (65, 320), "L4": (121, 300), "4090": (165, 1008), "A100": (312, 1555), "H100": (989, 3350)}
SHEETS |= {"H200": (989, 4800)}
MEASURED = "H100"  # whose rates are in a record; other cards are taken to reach the same share of their sheets
# A time, from and to. Planned times were within 20 % of those measured; by a data sheet alone, BOLD is a guess.
SURE, BOLD = (0.8, 1.2), (0.8, 2.5)


@dataclass(frozen=True)
class Plan:
    """What `fit` found; printed, it is a table."""

    recipe: Recipe
    card: str  # "" without a GPU
    gib: float  # of memory that the card has; 0 without a GPU
    peak_gib: float  # planned, of torch's memory
    tokens: int  # that the whole run reads
    steps: int
    epochs: float  # how often each row is read; fewer than the recipe's if its limit of steps comes first
    gpu_s: tuple[float, float] | None = None  # of the whole run, from and to; None if nothing is known of the card

    def __str__(self) -> str:
        recipe, layers = self.recipe, {0: "none", 1: "every layer"}
        again = layers.get(recipe.gradient_checkpointing, f"every {recipe.gradient_checkpointing}th layer")
        batch = f"packs of {recipe.pack_length:,} tokens" if recipe.pack_length else f"{recipe.batch_size} rows"
        of = f" of {self.gib:.1f} GiB" if self.card else ""
        some = f"once, {self.epochs:.0%} of them: the limit of steps comes first"
        lines = {
            "card": self.card or "no GPU",
            "a pass reads": f"{batch}, rows of up to {recipe.max_length:,} tokens",
            "recomputed": again,
            "planned peak": f"{self.peak_gib:.2f}{of or ' GiB'}",
            "the run": f"{self.steps:,} steps, {self.tokens:,} tokens",
            "rows are read": "once" if self.epochs == 1 else some if self.epochs < 1 else f"{self.epochs:.3g} times",
            "time": "not predicted for this machine; the training says it after its first steps",
        }
        if self.gpu_s:
            lines["time"] = " to ".join(map(clock, self.gpu_s)) + " of GPU time"
        return "\n".join(f"{name:13} {text}" for name, text in lines.items())


def clock(seconds: float) -> str:
    """Seconds, as a person would say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def fit(config, lengths: Sequence[int], recipe: Recipe) -> Plan:
    """The fastest way to train with `recipe` on this machine, on rows of `lengths` tokens. Stops as `choose` does."""
    if torch.cuda.is_available():
        return on(torch.cuda.get_device_name(), hardware.memory(), config, lengths, recipe)
    levers, padded = Levers(liger=False, fused=False, element=4), replace(recipe, max_length=max(lengths))
    peak = sum(memory.at_peak(config, padded, levers).values()) / GIB
    return Plan(recipe, "", 0.0, peak, *read(lengths, recipe))


def on(card: str, gib: float, config, lengths: Sequence[int], recipe: Recipe) -> Plan:
    """As `fit`, on a GPU of that name with `gib` of memory for a program."""
    known = rates(name := sheet(card) or MEASURED)
    chosen = choose(config, lengths, recipe, gib, known)
    lengths = [n for n in lengths if n <= chosen.max_length]  # longer ones are left out
    found = packs(lengths, chosen)
    tokens, steps, epochs = read(lengths, chosen, len(found) if chosen.pack_length else 0)
    part = epoch(config, chosen, found, known)
    run = epochs * (sum(part.values()) - part["optimizer"]) + steps * part["optimizer"] / len(found)
    low, high = SURE if name == MEASURED else BOLD
    peak = sum(memory.at_peak(config, chosen).values()) / GIB
    return Plan(chosen, card, gib, peak, tokens, steps, epochs, (low * run, high * run) if sheet(card) else None)


def read(lengths: Sequence[int], recipe: Recipe, packs: int = 0) -> tuple[int, int, float]:
    """(tokens, steps, passes over the rows) of a run on rows of `lengths`, which may be in `packs`."""
    limits = recipe, replace(recipe, steps=0)
    steps, whole = (trainer.arguments(each, len(lengths), "", packs=packs).max_steps for each in limits)
    epochs = recipe.epochs * steps / whole
    return round(epochs * sum(lengths)), steps, epochs


def sheet(card: str) -> str:
    """The name in SHEETS of a card, or ""."""
    return next((known for known in SHEETS if known in re.split(r"[\s-]", card)), "")


def rates(card: str) -> dict[str, float]:
    """What `seconds` wants of a card of SHEETS: measured, or as far from those measured as the data sheets are."""
    known = measurements.read("rates_nvidia_h100_80gb_hbm3")["figures"]["rates"]
    compute, moving = (ours / theirs for ours, theirs in zip(SHEETS[card], SHEETS[MEASURED], strict=True))
    return {name: rate * (moving if name.startswith("copy") else compute) for name, rate in known.items()}


def packs(lengths: Sequence[int], recipe: Recipe) -> list[list[int]]:
    """The rows' lengths of each forward pass of an epoch: of each pack, or of each padded batch."""
    if not recipe.pack_length:
        return [[recipe.max_length] * recipe.batch_size] * ceil(len(lengths) / recipe.batch_size)
    rows = Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})
    return pack_dataset(rows, recipe.pack_length, "bfd")["seq_lengths"]


def epoch(config, recipe: Recipe, passes: list[list[int]], rates: dict) -> dict[str, float]:
    """GPU seconds, by part, of all `passes`; "optimizer" as if each were a step."""
    together = seconds(config, recipe, rates, rows=[row for rows in passes for row in rows])
    return {part: s * (1 if part == "attention" else len(passes)) for part, s in together.items()}


def choose(config, lengths: Sequence[int], recipe: Recipe, gib: float, rates: dict) -> Recipe:
    """The fastest packs (or batches, without `pack_length`) and recomputation that fit into `gib` of GPU memory.

    Rows an optimizer step stay as the recipe has them, and so does a recomputation that it asks for. Packs are at most
    as long as the recipe says, and no shorter than the longest row; batches are as long as that, in steps of 64.
    `max_length` is halved only if nothing else fits: longer rows are then left out.

    Args:
        rates: see `seconds`; they rank the choices, so those of another GPU serve as well.

    Raises:
        Stop: not even one row of 64 tokens fits.
    """
    rows, limit = recipe.batch_size * recipe.accumulation, recipe.max_length
    length = min(limit, 64 * ceil(max(lengths) / 64))
    pages = memory.optimizer(memory.adapter(config, recipe.rank), recipe.optimizer)["optimizer, paged"]
    while length >= 64:
        found, fitting = [], [n for n in lengths if n <= length]
        if recipe.pack_length:
            sizes = {length, *(max(length, recipe.pack_length * n // 4) for n in (1, 2, 3, 4))}
            shapes = [{"pack_length": size, "max_length": min(limit, size)} for size in sizes]
        else:
            batches = [n for n in range(1, rows + 1) if rows % n == 0]
            shapes = [{"batch_size": n, "accumulation": rows // n, "max_length": length} for n in batches]
        for shape in shapes:
            passes = packs(fitting, replace(recipe, **shape)) if fitting else []
            for kind in (recipe.gradient_checkpointing,) if recipe.gradient_checkpointing else KINDS:
                tried = replace(recipe, **shape, gradient_checkpointing=kind)
                peak = sum(memory.at_peak(config, tried).values())
                if passes and MARGIN * peak + memory.CONTEXT + pages <= gib * GIB:
                    times = epoch(config, tried, passes, rates)
                    found.append((sum(times.values()) - times["optimizer"], tried.tokens, tried))
        if found:
            return min(found, key=lambda f: f[:2])[2]
        length = limit = length // 2
    raise Stop(f"Not even one row of 64 tokens fits into {gib:.1f} GiB. Take a smaller base")
