"""Measure QLoRA training of a 7B shape: memory, GPU time and what each lever buys. Nothing is downloaded.

    python data/measurements/benchmark rates     how fast this card multiplies, attends, copies, dequantizes; a minute
    python data/measurements/benchmark grid      peak memory and time over lengths, batches, kinds of recomputation
    python data/measurements/benchmark levers    each lever alone and together; gradients against fp32
    python data/measurements/benchmark real      rows as long as Alpaca's, padded and packed; generation, 4 and 16 bits
    python data/measurements/benchmark default   the recipe as everybody's trainer runs it, on such rows; a lever less

Each writes data/measurements/<name>.json (rates_<card>, memory_grid_7b, speed_<part>_7b), all but the first after every
configuration, so that what a time limit leaves undone is missing and the rest is there. The model has Llama-2-7B's
shape and random weights. On CUDA the rules of a T4 hold: fp16, no FlashAttention, no cuDNN attention, and torch may use
14.12 GiB (a T4's 14.5 less context and paged optimizer); what does not fit is measured again without that limit, and
marked.

GPU time is the time in which the GPU is busy, from torch's profiler: the median of several steps. Wall time stands
beside it; a fast GPU with a slow host waits for launches, and its wall time says nothing about a T4.

Two parts take a folder:

    python data/measurements/benchmark random_model llama-2-7b outputs/random-llama-2-7b    random weights, 13.5 GB
    python data/measurements/benchmark unsloth outputs/random-llama-2-7b

The first writes a model that loads like a real one, with a tokenizer and rows.jsonl, as long as Alpaca's. The second
measures the same step in Unsloth (speed_unsloth_7b), in an environment of its own: see unsloth_speed.py. With --real it
takes rows as long as Alpaca's, which the part real takes for ours (speed_unsloth_real_7b).

--quick runs one or two configurations of the pocket shape, on a CPU too, to see that everything works.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# In the place of this folder, so that its modules are those of the package `benchmark`, and of nobody else's name.
sys.path[:1] = [str(ROOT), str(ROOT / "data" / "measurements")]

from utils import runtime  # noqa: E402

PARTS = ("rates", "grid", "levers", "real", "default", "random_model", "unsloth")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python data/measurements/benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("more", nargs="*", help="random_model: a target and a folder; unsloth: the folder")
    parser.add_argument("--quick", action="store_true", help="the pocket shape, a few configurations: does it work?")
    parser.add_argument("--real", action="store_true", help="unsloth: rows as long as Alpaca's, in four ways")
    parser.add_argument("--minutes", type=float, default=6.5, help="start no configuration after this time")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "measurements", help="folder of the record")
    options = parser.parse_args()
    if len(options.more) != {"random_model": 2, "unsloth": 1}.get(options.part, 0):
        parser.error(f"{options.part}: too few or too many arguments; see --help")
    runtime.quiet()
    if options.part == "random_model":
        from benchmark import random_weights

        random_weights.write(*options.more)
        return 0
    import torch

    gpu = torch.cuda.is_available()
    if options.part == "unsloth":
        from benchmark import unsloth_speed

        unsloth_speed.real(options) if options.real else unsloth_speed.main(options)
        return 0
    if not gpu and not options.quick:
        parser.error("no GPU: only --quick runs without one")
    if gpu:
        os.environ.setdefault("QLORA_CAPABILITY", "7.5")
    from benchmark import parts
    from benchmark.bench import Bench

    bench = Bench(options)
    getattr(parts, options.part)(bench)
    bench.save()
    if (left := max(bench.figures["left_over_gib"], default=0.0)) > 0.01:
        print(f"Earlier configurations left {left:.2f} GiB on the GPU: the peaks of this record are too high")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
