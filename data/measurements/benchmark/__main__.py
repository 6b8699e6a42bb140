"""Measure QLoRA training of a 7B shape: memory, GPU time and what each lever buys. Nothing is downloaded.

    python -m utils.benchmark rates     how fast this card multiplies, attends, copies and dequantizes; half a minute
    python -m utils.benchmark grid      peak memory and time over lengths, batches and kinds of checkpointing
    python -m utils.benchmark levers    each lever alone and together; gradients against fp32
    python -m utils.benchmark real      rows as long as Alpaca's, padded and packed; generation in 4 and in 16 bits

Each writes data/measurements/<name>.json (rates_<card>, memory_grid_7b, speed_levers_7b, speed_real_7b), the last three
after every configuration, so that what a time limit leaves undone is missing and the rest is there. The model has
Llama-2-7B's shape and random weights. On CUDA the rules of a T4 hold: fp16, no FlashAttention, no cuDNN attention, and
torch may use 14.12 GiB (a T4's 14.5 less context and paged optimizer); what does not fit is measured again without that
limit, and marked.

GPU time is the time in which the GPU is busy, from torch's profiler: the median of several steps. Wall time stands
beside it; a fast GPU with a slow host waits for launches, and its wall time says nothing about a T4.

--quick runs one or two configurations of the pocket shape, on a CPU too, to see that everything works.
"""

import argparse
import os
import sys
import traceback
from dataclasses import replace

from utils import memory
from utils.benchmark import measure
from utils.benchmark.generation import generation
from utils.benchmark.gradients import compared, fp32_gradients, gradients
from utils.benchmark.measure import Setting
from utils.benchmark.rates import rates
from utils.benchmark.workbench import Bench, llama_restored, public
from utils.benchmark.workloads import ALPACA, FAST, GRID, LEVERS, USUAL


def card_rates(bench: Bench) -> None:
    """What `pace` needs of a card."""
    bench.figures["rates"] = rates(bench.gpu)
    bench.say(f"rates {bench.figures['rates']}")


def grid(bench: Bench) -> None:
    """Peaks and times of the fast recipe, one model for all."""
    setting = replace(FAST, liger=bench.gpu)
    card_rates(bench)
    model = bench.build(bench.recipe, setting)
    bench.figures["configurations"] = []
    wanted = [(kind, *shape) for kind, shapes in GRID.items() for shape in shapes]
    for kind, batch, length in sorted(wanted, key=lambda w: -w[1] * w[2]):
        if bench.late or (kind == "offload" and not bench.gpu):
            bench.figures["missing"].append({"checkpoint": kind, "batch": batch, "length": length, "why": "time"})
            continue
        found = bench.train(model, replace(setting, checkpoint=kind), batch, length)
        if found:
            bench.figures["configurations"].append({k: v for k, v in found.items() if k not in ("kernels", "levers")})
            bench.save()
        if bench.options.quick and len(bench.figures["configurations"]) >= 5:
            break


def levers(bench: Bench) -> None:
    """Each lever; every setting on a fresh model. Gradients at 1 x 1024, with a B that is not zero."""
    card_rates(bench)
    bench.figures |= {"configurations": [], "gradients": []}
    reference = fp32_gradients(bench)
    for setting, shapes, compare in LEVERS:
        if bench.late:
            bench.figures["missing"].append({"setting": setting.name, "why": "time"})
            continue
        if not bench.gpu:
            if (setting.liger and not setting.fused) or setting.checkpoint == "offload" or setting.compiled:
                continue
            setting = replace(setting, liger=False, liger_first=False)
        try:
            lever(bench, setting, shapes[:1] if bench.options.quick else shapes, reference if compare else None)
        except Exception as error:  # one lever that cannot be pulled here does not end the others
            traceback.print_exc(limit=-5)
            bench.figures["missing"].append({"setting": setting.name, "why": public(error)})
        memory.free()
        bench.save()


def lever(bench: Bench, setting: Setting, shapes: list, reference) -> None:
    with llama_restored():
        model = bench.build(bench.recipe, setting)
        for batch, length in shapes:
            steps = (2, 4, 4) if (batch, length) == (1, 2048) and not bench.options.quick else None
            if found := bench.train(model, setting, batch, length, steps):
                bench.figures["configurations"].append(found)
        if reference and (found := gradients(bench, model, setting)):
            bench.figures["gradients"].append(compared(setting, *found, *reference))
            bench.say(f"{setting.name:40} gradients {bench.figures['gradients'][-1]['median']:.2%} median")


def real(bench: Bench) -> None:
    """Useful tokens a second on rows as long as Alpaca's, then generation."""
    import random

    from datasets import Dataset
    from trl import pack_dataset

    pack = 128 if bench.options.quick else 2048
    lengths = [min(n, pack) for n in ALPACA] * 2
    random.Random(0).shuffle(lengths)
    ids = [measure.rows(1, n, bench.config.vocab_size, seed=i)[0] for i, n in enumerate(lengths)]
    together = Dataset.from_list(ids)
    packs = pack_dataset(together, pack, "bfd")
    packed = replace(FAST, packed=True, checkpoint="none", liger=bench.gpu)
    ways = [  # (name, setting, rows, batch)
        ("usual, padded batches of 4", USUAL, together, 4),
        ("usual, packs", replace(USUAL, packed=True), packs, 1),
        ("fast, padded batches of 4", replace(FAST, liger=bench.gpu), together, 4),
        ("fast, packs", packed, packs, 1),
        ("fast, packs, attended row by row", replace(packed, by_row=True), packs, 1),
    ]
    bench.figures |= {"lengths": ALPACA, "pack": pack, "packs": len(packs), "training": [], "generation": []}
    for name, setting, encoded, batch in ways:
        recipe = replace(bench.recipe, batch_size=batch, max_length=pack)
        steps = (1, 1, 2) if bench.options.quick else (2, 2, 20 if batch > 1 else 10)
        with llama_restored():
            model = bench.build(recipe, setting)
            bench.cap(True)
            found = bench.attempt(model, encoded, recipe, setting, steps)
            del model
        memory.free()
        if isinstance(found, str):
            bench.figures["missing"].append({"way": name, "why": found})
            bench.say(f"{name}: {found}")
            continue
        useful = sum(found["useful_tokens"][-steps[2] :])
        gpu = sum(found["gpu_ms_steps"]) / 1e3
        found |= {
            "way": name,
            "useful_tokens_profiled": useful,
            "useful_tokens_per_gpu_s": useful / gpu if gpu else None,
        }
        bench.figures["training"].append({k: v for k, v in found.items() if k != "kernels"})
        bench.say(f"{name}: {useful / gpu if gpu else 0:.0f} useful tokens a GPU second")
        bench.save()
    generation(bench)


def main(arguments: list[str] | None = None) -> int:
    from pathlib import Path

    from utils import runtime

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("rates", "grid", "levers", "real"))
    parser.add_argument("--quick", action="store_true", help="the pocket shape, a few configurations: does it work?")
    parser.add_argument("--minutes", type=float, default=6.5, help="start no configuration after this time")
    parser.add_argument("--out", type=Path, default=None, help="folder of the record (default data/measurements)")
    options = parser.parse_args(arguments)
    os.environ.setdefault("QLORA_CAPABILITY", "7.5")
    import torch

    if not torch.cuda.is_available():
        del os.environ["QLORA_CAPABILITY"]
        if not options.quick:
            parser.error("no GPU: only --quick runs without one")
    runtime.quiet()
    bench = Bench(options)
    {"rates": card_rates, "grid": grid, "levers": levers, "real": real}[options.part](bench)
    bench.save()
    if (left := max(bench.figures["left_over_gib"], default=0.0)) > 0.01:
        print(f"Earlier configurations left {left:.2f} GiB on the GPU: the peaks of this record are too high")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
