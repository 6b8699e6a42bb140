"""A training run rehearsed for a few steps on random weights of the target's shape; no weights are downloaded."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from utils import hardware
from utils.models import adapters
from utils.planning import random_model
from utils.planning.fit import clock
from utils.presets import Recipe
from utils.runtime import Stop
from utils.training import guards, trainer


@dataclass(frozen=True)
class Rehearsal:
    """What was seen. `peak_gib` is torch's peak on a GPU and the process's on a CPU; times are those of one step."""

    recipe: Recipe
    fits: bool
    peak_gib: float = 0.0
    wall_s: tuple[float, ...] = ()
    steps: int = 0  # of the whole run

    def projected(self) -> tuple[float, float, float]:
        """Seconds of the whole run: from the mean of the steps, and 95 % of the means of 1,000 resamples of them."""
        means = np.random.default_rng(0).choice(self.wall_s, (1000, len(self.wall_s))).mean(axis=1)
        return tuple(self.steps * float(s) for s in (np.mean(self.wall_s), *np.percentile(means, (2.5, 97.5))))

    def __str__(self) -> str:
        if not self.fits:
            changes = "\n".join(f"  {i}. {change}" for i, change in enumerate(guards.to_lower(self.recipe), 1))
            return f"It does not fit. What to change, the change that costs least first:\n{changes}"
        whole, low, high = (clock(seconds) for seconds in self.projected())
        step = f"a step        {np.mean(self.wall_s):.2f} s by the clock"
        run = f"{self.steps} steps     {whole} (95 %: {low} to {high})"
        return "\n".join([f"peak memory   {self.peak_gib:.2f} GiB", step, run])


class Watch(TrainerCallback):
    """Takes the time and the peak memory of each step, after some to warm up."""

    def __init__(self, warm: int, timed: int):
        self.warm, self.steps = warm, warm + timed
        self.seconds, self.peaks = [], []  # by the clock, GiB of torch on a GPU

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        hardware.reset_peak()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.peaks.append(hardware.peak())
        if state.global_step > self.warm:
            self.seconds.append(time.perf_counter() - self.began)


def synchronize() -> None:
    """Wait until the GPU has done what it was told; nothing without one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_rows(lengths: Sequence[int], vocabulary: int) -> Dataset:
    """Rows of random token ids, all of them labels."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(3, vocabulary, length).tolist() for length in lengths]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def rehearse(target: str, tokenizer, lengths: Sequence[int], recipe: Recipe) -> Rehearsal:
    """Train `target`'s shape for ten steps with `recipe`: two to warm up, eight by the clock.

    Args:
        target: a name of `random_model.SHAPES`, or a folder or Hub name with a config.json.
        lengths: tokens of each row of the data; as many as ten steps take are drawn, and the longest is among them.
    """
    watch, config = Watch(2, 8), random_model.config(target)
    drawn = np.random.default_rng(0).choice(lengths, watch.steps * recipe.batch_size * recipe.accumulation - 1)
    encoded = random_rows([min(n, recipe.max_length) for n in (max(lengths), *drawn)], config.vocab_size)
    steps = trainer.steps(random_rows(lengths, config.vocab_size), recipe)
    model = adapters.add(random_model.build(config), recipe)
    short = replace(recipe, steps=watch.steps, epochs=watch.steps, warmup_steps=2)
    try:
        trainer.train(model, tokenizer, encoded, short, live=False, callbacks=[watch])
    except Stop as stop:
        if "memory is full" not in str(stop):
            raise
        return Rehearsal(recipe, fits=False, steps=steps)
    finally:
        del model
        hardware.free()
    if not watch.seconds:
        raise Stop("The rehearsal was stopped before a step could be timed. Run it again, and give it three steps")
    peak = max(watch.peaks) if torch.cuda.is_available() else hardware.process_peak()
    return Rehearsal(recipe, True, peak, tuple(watch.seconds), steps)
