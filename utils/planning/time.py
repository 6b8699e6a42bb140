"""How long a step takes, by operations and bytes over measured rates; and the fastest recipe that fits a GPU."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from utils.hardware import GIB
from utils.planning import memory
from utils.planning.memory import OURS, Levers
from utils.presets import Recipe
from utils.runtime import Stop

ADAM = 6e-6  # seconds of bitsandbytes' 8-bit Adam for one adapter matrix on an H100: too small to fill the GPU
MARGIN = 1.03  # of the planner's peaks: they were within 3 % of those measured


def flop(config, rank: int, length: int) -> dict[str, int]:
    """Floating-point operations of one row of `length` tokens, by part, in the forward and in the backward pass.

    A product of tokens x inputs with inputs x outputs takes 2 operations a token, input and output. Frozen weights need
    no gradient, so their backward pass costs as much as their forward pass and not twice as much; adapters need it.
    Attention counts every pair of positions, as torch's counter does; kernels that know the causal mask do half.
    """
    sizes, layers = memory.shapes(config), config.num_hidden_layers
    base = 2 * length * layers * sum(outputs * inputs for outputs, inputs in sizes.values())
    adapters = 2 * length * layers * rank * sum(map(sum, sizes.values()))
    head = 2 * length * config.hidden_size * config.vocab_size
    attention = 4 * length**2 * layers * sizes["q_proj"][0]
    return {
        "base": base,
        "base, backward": base,
        "adapters": adapters,
        "adapters, backward": 2 * adapters,
        "head": head,
        "head, backward": head,
        "attention": attention,
        "attention, backward": 2 * attention,
    }


def seconds(config, recipe: Recipe, rates: dict, recompute: str | int = "", levers: Levers = OURS) -> dict[str, float]:
    """GPU seconds of a step of one forward and backward pass. With accumulation all but "optimizer" is taken so often.

    Args:
        rates: the figures of the benchmark's `rates` (data/measurements/benchmark), of the GPU in question.
        recompute: see `memory.at_peak`; what is recomputed costs its forward pass again.
    """
    recompute = recompute or ("all" if recipe.gradient_checkpointing else "none")
    layers, batch, length = config.num_hidden_layers, recipe.batch_size, recipe.max_length
    again = sum(memory.recomputed(recompute, i) for i in range(layers)) / layers
    work = flop(config, recipe.rank, length)
    products = work["base"] * (2 + again) + 2 * work["head"]
    # Kernels skip what the causal mask hides; the backward pass computes the scores anew: 5 products for 2.
    attention = work["attention"] / 2 * (3.5 + again)
    sizes = memory.shapes(config)
    hidden, inner = config.hidden_size, config.intermediate_size
    outs, ins = (sum(side) for side in zip(*sizes.values(), strict=True))
    # Times that a number is read or written, a token and layer. An adapter's products are so narrow that they wait for
    # memory: inputs and outputs twice a pass. Norms 4 and 6, rotary 4 and 4, sums 6 and 15; SwiGLU 3 and 5.
    forward, backward = 2 * (outs + ins) + 14 * hidden + 3 * inner, 2 * (outs + ins) + 25 * hidden + 5 * inner
    if not levers.fused:  # a copy of the input, scaling, sum; and on the way back scaling and sum
        forward, backward = forward + 2 * ins + 5 * outs, backward + 3 * ins + 2 * outs
    if not levers.liger:  # fitted to the record speed_levers_7b, as is the factor for fp32
        forward, backward = forward + 16 * hidden, backward + 40 * hidden + 6 * inner
    if levers.dropout:  # the input is read and written, with a mask
        forward, backward = forward + 3 * ins, backward + 3 * ins
    moved = layers * length * levers.element * (forward * (1 + again) + backward) * (1.6 if levers.upcast else 1)
    numbers = layers * sum(outputs * inputs for outputs, inputs in sizes.values())
    return {
        "matmul": batch * products / (rates["matmul_tflops_2048_4096_11008"] * 1e12),
        "attention": batch * attention / (_attention_rate(rates, length) * 1e12),
        "memory": batch * moved / (rates["copy_gb_per_s"] * 1e9),
        "dequantize": numbers * (2 + again) / (rates["dequantize_gweights_per_s"] * 1e9),
        "optimizer": ADAM * len(memory.adapter(config, recipe.rank)),
    }


def _attention_rate(rates: dict, length: int) -> float:
    """TFLOP/s at `length`, between the lengths measured: a short row leaves part of the GPU idle."""
    prefix = "attention_tflops_"
    known = sorted((int(name.removeprefix(prefix)), rate) for name, rate in rates.items() if name.startswith(prefix))
    return float(np.interp(np.log(length), *zip(*((np.log(at), rate) for at, rate in known), strict=True)))


def choose(
    config,
    lengths: Sequence[int],
    recipe: Recipe,
    gib: float,
    rates: dict,
    kinds: Sequence[str | int] = ("none", 4, 2, "all"),
    levers: Levers = OURS,
) -> tuple[Recipe, str | int]:
    """The fastest batch, accumulation and recomputation that fit into `gib` of GPU memory, as planned.

    Rows an optimizer step stay as the recipe has them. The length becomes that of the longest row, in steps of 64, and
    is halved only if nothing else fits: longer rows would then be left out.

    Args:
        rates: see `seconds`; they rank the choices, so those of another GPU serve as well.
        kinds: the kinds of recomputation to choose from, as `memory.at_peak` takes them.

    Returns:
        the recipe, and what to recompute: "none", "all", or n for every n-th layer.

    Raises:
        Stop: not even one row of 64 tokens fits.
    """
    rows = recipe.batch_size * recipe.accumulation
    length = min(recipe.max_length, 64 * -(-max(lengths) // 64))
    sizes = memory.adapter(config, recipe.rank)
    outside = memory.CONTEXT + memory.optimizer(sizes, recipe.optimizer)["optimizer, paged"]
    while length >= 64:
        found = []
        for batch in (n for n in range(1, rows + 1) if rows % n == 0):
            shape = {"batch_size": batch, "accumulation": rows // batch, "max_length": length}
            for kind in kinds:
                tried = replace(recipe, **shape, gradient_checkpointing=kind != "none")
                peak = sum(memory.at_peak(config, tried, kind, levers).values())
                if MARGIN * peak + outside <= gib * GIB:
                    times = seconds(config, tried, rates, kind, levers)
                    pass_s = sum(times.values()) - times["optimizer"]
                    found.append((tried.accumulation * pass_s, batch, tried, kind))
        if found:
            return min(found, key=lambda f: f[:2])[2:]
        length //= 2
    raise Stop(f"Not even one row of 64 tokens fits into {gib} GiB. Take a smaller base")
