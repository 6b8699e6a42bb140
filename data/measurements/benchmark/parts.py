"""The parts of the benchmark that make records: what they measure, and in which order."""

import random
import traceback
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from datasets import Dataset
from trl import pack_dataset

from benchmark.bench import Bench, public
from benchmark.generation import generation
from benchmark.gradients import compared, fp32_gradients, gradients
from benchmark.measure import Setting
from benchmark.rates import measured
from utils import hardware
from utils.notebook import measurements
from utils.planning import fit, memory
from utils.planning.rehearsal import random_rows
from utils.presets import PROFILES, Recipe
from utils.training import levers as fast

# Usual is what most tutorials run: prepare_model_for_kbit_training, peft's own forward, and a little dropout (QLoRA's
# own scripts: 0.1 for a 7B, 0.05 for a 65B; the share does not change the time).
FAST, USUAL = Setting(), Setting(dropout=0.05, upcast=True, liger=False, fused=False)
GRID = {  # kind of checkpointing: (batch, length)
    "all": [(1, 512), (8, 512), (1, 1024), (4, 1024), (1, 2048), (2, 2048), (4, 2048), (1, 4096), (2, 4096)]
    + [(1, 8192), (1, 16384)],
    "none": [(1, 512), (2, 512), (4, 512), (1, 1024), (2, 1024), (1, 2048), (2, 2048)],
    2: [(1, 512), (1, 1024), (2, 1024), (1, 2048), (2, 2048), (1, 4096)],
    4: [(1, 1024), (1, 2048)],
    "offload": [(1, 2048), (2, 2048), (8, 512), (1, 4096), (1, 8192), (1, 16384)],
}
ONE, MORE = [(1, 2048)], [(1, 2048), (1, 512), (2, 2048)]
LEVERS = [  # (setting, (batch, length) of each measurement, gradients against fp32?)
    (USUAL, MORE, False),
    (replace(FAST, checkpoint="none"), MORE, True),
    (FAST, MORE + [(1, 4096)], False),
    (replace(FAST, checkpoint=2), [*ONE, (1, 4096)], False),
    (replace(FAST, fused=False, checkpoint="none"), MORE, True),
    (replace(FAST, fused=False), ONE, False),
    (replace(FAST, fused=False, liger=False), ONE, True),
    (replace(USUAL, dropout=0.0), ONE, True),
    (replace(USUAL, dropout=0.0, liger=True), ONE, True),
    (replace(USUAL, dropout=0.0, fused=True), ONE, False),
    (replace(USUAL, upcast=False), ONE, False),
    (replace(USUAL, liger=True), ONE, False),
    (replace(USUAL, checkpoint="none"), ONE, False),
    (replace(FAST, fused=False, compiled=True, checkpoint="none"), ONE, False),
    (replace(FAST, compiled=True, checkpoint="none"), ONE, False),
    (replace(FAST, double_quant=False, checkpoint="none"), ONE, False),
    (replace(FAST, liger=False, checkpoint="none"), ONE, False),
    (replace(FAST, checkpoint="offload"), ONE, False),
    (replace(FAST, liger_first=True, fused=False, checkpoint="none"), ONE, False),
    (replace(FAST, any_attention=True, checkpoint="none"), ONE, False),
    (replace(FAST, any_attention=True), ONE, False),
    (replace(USUAL, any_attention=True), ONE, False),
]


def rates(bench: Bench) -> None:
    """What `utils.planning.time` needs of a card."""
    bench.figures["rates"] = measured(bench.gpu)
    bench.say(f"rates {bench.figures['rates']}")


def grid(bench: Bench) -> None:
    """Peaks and times of the fast recipe, one model for all."""
    setting = replace(FAST, liger=bench.gpu)
    rates(bench)
    bench.figures["configurations"] = []
    wanted = [(kind, *shape) for kind, shapes in GRID.items() for shape in shapes if kind != "offload" or bench.gpu]
    wanted = sorted(wanted, key=lambda w: -w[1] * w[2])
    with bench.model(setting) as model:
        for kind, batch, length in wanted[: 5 if bench.options.quick else None]:
            if bench.late(checkpoint=kind, batch=batch, length=length):
                continue
            if found := bench.train(model, replace(setting, checkpoint=kind), batch, length):
                kept = {k: v for k, v in found.items() if k not in ("kernels", "levers")}
                bench.figures["configurations"].append(kept)
                bench.save()


def levers(bench: Bench) -> None:
    """Each lever; every setting on a fresh model. Gradients at 1 x 1024, with a B that is not zero."""
    rates(bench)
    bench.figures |= {"configurations": [], "gradients": []}
    reference = fp32_gradients(bench)
    for setting, shapes, compare in LEVERS:
        if bench.late(setting=setting.name):
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
        bench.save()


def lever(bench: Bench, setting: Setting, shapes: list, reference) -> None:
    with bench.model(setting) as model:
        for batch, length in shapes:
            steps = (2, 4, 4) if (batch, length) == (1, 2048) and not bench.options.quick else None
            if found := bench.train(model, setting, batch, length, steps):
                bench.figures["configurations"].append(found)
        if reference and (found := gradients(bench, model, setting)):
            bench.figures["gradients"].append(compared(setting, *found, *reference))
            bench.say(f"{setting.name:40} gradients {bench.figures['gradients'][-1]['median']:.2%} median")


def real(bench: Bench) -> None:
    """Useful tokens a second on rows as long as Alpaca's, then generation."""
    pack = 128 if bench.options.quick else 2048
    # In tokens of Llama-2's tokenizer, of the 999 rows of data/alpaca_en_demo.json (hiyouga/LLaMA-Factory, commit
    # ff6d4d1) in this course's template: percentiles 0.5, 1.5, ... 99.5. The record hands them on.
    together = alpaca(bench, pack)
    packs = pack_dataset(together, pack, "bfd")
    packed = replace(FAST, packed=True, checkpoint="none", liger=bench.gpu)
    bench.figures |= {"lengths": measurements.read("speed_real_7b")["figures"]["lengths"]}
    bench.figures |= {"pack": pack, "packs": len(packs), "training": [], "generation": []}
    one = replace(bench.recipe, batch_size=1, max_length=pack)
    four = replace(one, batch_size=4)
    way(bench, "usual, padded batches of 4", USUAL, together, four)
    way(bench, "usual, packs", replace(USUAL, packed=True), packs, one)
    way(bench, "fast, padded batches of 4", replace(FAST, liger=bench.gpu), together, four)
    way(bench, "fast, packs", packed, packs, one)
    way(bench, "fast, packs, attended row by row", replace(packed, by_row=True), packs, one)
    generation(bench)


def default(bench: Bench) -> None:
    """The recipe of the profile llama-2-7b as its trainer runs it, on rows as long as Alpaca's; then with a lever less.

    One pack, or batch, a step. Gradients of a pack are compared with those of its rows one at a time in fp32.
    """
    recipe = replace(PROFILES["llama-2-7b"].recipe, accumulation=1)
    if bench.options.quick:
        recipe = replace(recipe, pack_length=128, max_length=128)
    rows = alpaca(bench, recipe.max_length)
    rates(bench)
    bench.figures |= {"lengths": measurements.read("speed_real_7b")["figures"]["lengths"], "pack": recipe.pack_length}
    bench.figures |= {"ways": [], "gradients": None, "equal": equal(bench)}
    plan(bench, recipe, rows)
    without = {
        "one_call": lambda: patch.object(fast, "ONE_CALL", False),
        "kernel": lambda: patch.object(fast, "dequantize", by_library),
        "together": lambda: patch.object(fast, "TOGETHER", ()),
        "liger": lambda: patch.object(fast, "liger"),
    }
    for name, changed, lever in (
        ("default recipe", {}, ()),
        ("without one-call attention", {}, ("one_call",)),
        ("without Triton dequantize", {}, ("kernel",)),
        ("without either", {}, ("one_call", "kernel")),
        ("each adapter by itself", {}, ("together",)),
        ("without Liger", {}, ("liger",)),
        ("packs, every layer recomputed", {"gradient_checkpointing": 1}, ()),
        ("padded rows, nothing recomputed", {"pack_length": 0, "batch_size": 2}, ()),
        ("one row at a time, nothing recomputed", {"pack_length": 0}, ()),
    ):
        if not bench.late(way=name):
            with ExitStack() as stack:
                for one in lever:
                    stack.enter_context(without[one]())
                way(bench, name, None, rows, replace(recipe, **changed), "ways")
    sample = rows.select(range(12))
    reference = fp32_gradients(bench, sample)
    with bench.model(None) as model:
        if reference and (found := gradients(bench, model, None, sample)):
            bench.figures["gradients"] = compared(None, *found, *reference)
            bench.say(f"a pack's gradients {bench.figures['gradients']['median']:.2%} median")


def alpaca(bench: Bench, longest: int) -> Dataset:
    """200 rows as long as Alpaca's, of random tokens."""
    lengths = [min(n, longest) for n in measurements.read("speed_real_7b")["figures"]["lengths"]] * 2
    random.Random(0).shuffle(lengths)
    return random_rows(lengths, bench.config.vocab_size)


def plan(bench: Bench, recipe: Recipe, rows: Dataset) -> None:
    """What `utils.planning.fit` says of the default recipe, with the rates of this card."""
    packs = fit.packs([len(row) for row in rows["input_ids"]], recipe)
    parts = fit.epoch(bench.config, recipe, packs, bench.figures["rates"])
    peak = sum(memory.at_peak(bench.config, recipe).values()) / hardware.GIB
    bench.figures["planned"] = {"peak_gib": peak, "gpu_ms": 1e3 * sum(parts.values()) / len(packs)}
    bench.say(f"planned {bench.figures['planned']}")


def by_library(weight, state):
    return dequantize_4bit(weight.view(-1, 1), state)


def equal(bench: Bench) -> dict:
    """How many values of our dequantize kernel equal those of bitsandbytes, bit for bit, by dtype."""
    found, device = {}, "cuda" if bench.gpu else "cpu"
    for dtype in (torch.float16, torch.bfloat16):
        same = count = 0
        for outputs, inputs in {*memory.shapes(bench.config).values(), (64, 96)}:
            for nested in (True, False):
                draw = torch.randn(outputs, inputs, device=device, dtype=dtype) / 50
                packed, state = quantize_4bit(draw, quant_type="nf4", compress_statistics=nested)
                same += int((fast.dequantize(packed, state) == by_library(packed, state)).sum())
                count += draw.numel()
        found[str(dtype).removeprefix("torch.")] = {"equal": same, "of": count}
    bench.say(f"dequantized {found}")
    return found


def way(
    bench: Bench, name: str, setting: Setting | None, encoded: Dataset, recipe: Recipe, into: str = "training"
) -> None:
    """Train on rows or packs in one way, and record how many useful tokens a second that is."""
    steps = (1, 1, 2) if bench.options.quick else (4, 6, 20 if recipe.batch_size > 1 else 10)
    with bench.model(setting) as model:
        bench.cap(True)
        found = bench.attempt(model, encoded, recipe, setting, steps)
    if isinstance(found, str):
        bench.figures["missing"].append({"way": name, "why": found})
        bench.say(f"{name}: {found}")
        return
    useful = sum(found["useful_tokens"][-steps[2] :])
    gpu = sum(found["gpu_ms_steps"]) / 1e3
    found |= {"way": name, "useful_tokens_profiled": useful, "useful_tokens_per_gpu_s": useful / gpu if gpu else None}
    bench.figures[into].append({k: v for k, v in found.items() if k != "kernels" or name == "default recipe"})
    bench.say(f"{name}: {useful / gpu if gpu else 0:.0f} useful tokens a GPU second")
    bench.save()
