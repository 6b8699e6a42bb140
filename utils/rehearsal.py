"""A training run rehearsed: the same trainer on a model of the target's shape with random weights, for a few steps.

    python -m utils.rehearsal llama-2-7b --length 1024 --batch 2 --rows 2000
    python -m utils.rehearsal pocket --data my.jsonl

Nothing is downloaded but a target's configuration and tokenizer, and for the names of `stand_in.SHAPES` not even these.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from utils import fast, guards, leftovers, memory, stand_in, training
from utils.benchmark import measure
from utils.benchmark.watch import Watch
from utils.profile import PROFILES, Recipe
from utils.runtime import Stop


@dataclass(frozen=True)
class Rehearsal:
    """What was seen. `peak_gib` is torch's peak on a GPU and the process's on a CPU; times are those of one step."""

    recipe: Recipe
    fits: bool
    peak_gib: float = 0.0
    wall_s: tuple[float, ...] = ()
    gpu_s: tuple[float, ...] = ()  # empty without a GPU
    steps: int = 0  # of the whole run

    def projected(self) -> tuple[float, float, float]:
        """Seconds of the whole run: from the mean of the steps, and 95 % of the means of 1,000 resamples of them."""
        draw, count = random.Random(0), len(self.wall_s)
        means = sorted(sum(draw.choices(self.wall_s, k=count)) / count for _ in range(1000))
        return self.steps * sum(self.wall_s) / count, self.steps * means[25], self.steps * means[974]

    def __str__(self) -> str:
        if not self.fits:
            changes = "\n".join(f"  {i}. {change}" for i, change in enumerate(guards.to_lower(self.recipe), 1))
            return f"It does not fit. What to change, the change that costs least first:\n{changes}"
        whole, low, high = self.projected()
        lines = [f"peak memory   {self.peak_gib:.2f} GiB"]
        lines += [f"a step        {sum(self.wall_s) / len(self.wall_s):.2f} s by the clock"]
        if self.gpu_s:
            lines[-1] += f", {sum(self.gpu_s) / len(self.gpu_s):.2f} s of it on the GPU"
        lines += [f"{self.steps} steps     {clock(whole)} (95 %: {clock(low)} to {clock(high)})"]
        return "\n".join(lines)


def clock(seconds: float) -> str:
    """Seconds, as a person would say them."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def rehearse(
    target: str,
    tokenizer,
    lengths: Sequence[int],
    recipe: Recipe,
    checkpoint: str | int = "",
    levers: Sequence[Callable] = (),
) -> Rehearsal:
    """Train `target`'s shape for ten steps with `recipe`: two to warm up, six by the clock, two in the profiler.

    Args:
        target: a name of `stand_in.SHAPES`, or a folder or Hub name with a config.json.
        lengths: tokens of each row of the data; as many as ten steps take are drawn, and the longest is among them.
        checkpoint: n recomputes every n-th layer only; else the recipe decides.
        levers: functions of utils.fast that are called with the model before the trainer is made.
    """
    from datasets import Dataset

    from utils import loading

    watch = Watch(2, 6, 2)
    config = stand_in.config(target)
    longest, draw = min(max(lengths), recipe.max_length), random.Random(0)
    wanted = [longest] + [
        min(draw.choice(lengths), longest) for _ in range(watch.steps * recipe.batch_size * recipe.accumulation - 1)
    ]
    encoded = Dataset.from_list([measure.rows(1, n, config.vocab_size, seed=i)[0] for i, n in enumerate(wanted)])
    steps = training.arguments(recipe, len(lengths), "").max_steps
    model = loading.add_adapter(stand_in.make(config), recipe)
    for lever in levers:
        lever(model)
    callbacks = [watch, *([fast.CheckpointEvery(checkpoint)] if isinstance(checkpoint, int) else [])]
    short = replace(recipe, steps=watch.steps, epochs=watch.steps, warmup_steps=2)
    try:
        training.train(model, tokenizer, encoded, short, live=False, callbacks=callbacks)
    except Stop as stop:
        if "memory is full" not in str(stop):
            raise
        return Rehearsal(recipe, fits=False, steps=steps)
    finally:
        watch.close()
        leftovers.clear(model, everything=True)
        del model
        memory.free()
    if not watch.seconds:
        raise Stop("The rehearsal was stopped before a step could be timed. Run it again, and give it three steps")
    gpu = tuple(times.busy / 1e3 for times in watch.times)
    peak = max(m[-1] for m in watch.memory) if gpu else memory.process_peak()
    return Rehearsal(recipe, True, peak, tuple(watch.seconds), gpu, steps)


def main(arguments: list[str] | None = None) -> int:
    from utils import dataset, loading, runtime

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help=f"pocket, {', '.join(stand_in.SHAPES)}, a folder or a Hub name")
    parser.add_argument("--data", help="a file or Hub name; default: --rows rows of --length tokens")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--length", type=int, help="tokens a row, at most (default: the profile's)")
    parser.add_argument("--batch", type=int, help="rows a forward pass (default: the profile's)")
    options = parser.parse_args(arguments)
    runtime.quiet()
    pocket = PROFILES["pocket"]
    recipe = (pocket if options.target == "pocket" else PROFILES["llama-2-7b"]).recipe
    recipe = replace(
        recipe, max_length=options.length or recipe.max_length, batch_size=options.batch or recipe.batch_size
    )
    target = pocket.base if options.target == "pocket" else options.target
    try:
        tokenizer = loading.load_tokenizer(pocket.base if target in stand_in.SHAPES else target)
        lengths = [recipe.max_length] * options.rows
        if options.data:
            encoded, _ = dataset.encode(tokenizer, dataset.read(options.data), recipe.max_length)
            lengths = [len(ids) for ids in encoded["input_ids"]]
        print(rehearse(target, tokenizer, lengths, recipe))
    except Stop as stop:
        print(stop)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
