"""How long a step takes, by operations and bytes over measured rates."""

from collections.abc import Sequence

import numpy as np

from utils.planning import memory
from utils.planning.memory import Levers
from utils.presets import Recipe

ADAM = 6e-6  # seconds of bitsandbytes' 8-bit Adam for one adapter matrix on an H100: too small to fill the GPU


def flop(config, rank: int, length: int) -> dict[str, int]:
    """Floating-point operations of one row of `length` tokens, by part, in the forward and in the backward pass.

    A product of tokens x inputs with inputs x outputs takes 2 operations a token, input and output. Frozen weights need
    no gradient, so their backward pass costs as much as their forward pass and not twice as much; adapters need it.
    Attention counts every pair of positions, as torch's counter does; kernels that know the causal mask do half.
    """
    sizes, layers = memory.shapes(config), config.num_hidden_layers
    forward = {
        "base": 2 * length * layers * sum(outputs * inputs for outputs, inputs in sizes.values()),
        "adapters": 2 * length * layers * rank * sum(map(sum, sizes.values())),
        "head": 2 * length * config.hidden_size * config.vocab_size,
        "attention": 4 * length**2 * layers * sizes["q_proj"][0],
    }
    trained = ("adapters", "attention")  # of attention both factors have gradients
    ways = (("", 1), (", backward", 2))
    return {p + way: n * (times if p in trained else 1) for p, n in forward.items() for way, times in ways}


def seconds(config, recipe: Recipe, rates: dict, levers: Levers | None = None, rows: Sequence[int] = ()) -> dict:
    """GPU seconds by part of a step of one forward and backward pass; accumulation repeats all but "optimizer".

    Args:
        rates: the figures of the benchmark's `rates` (data/measurements/benchmark), of the GPU in question.
        rows: lengths of the rows of the pass, which attend each by itself. Default: `batch_size` of `max_length`.
    """
    levers, layers, tokens = levers or memory.ours(config), config.num_hidden_layers, recipe.tokens
    again = sum(memory.recomputed(recipe.gradient_checkpointing, i) for i in range(layers)) / layers
    work = flop(config, recipe.rank, tokens)
    products = work["base"] * (2 + again) + 2 * work["head"]
    # Kernels skip what the causal mask hides; the backward pass computes the scores anew: 5 products for 2.
    lengths = np.array(rows or [recipe.max_length] * recipe.batch_size)
    attention = work["attention"] * (lengths / tokens) ** 2 / 2 * (3.5 + again)
    # A short row leaves part of the GPU idle: TFLOP/s at each length, between the lengths measured.
    name = "attention_tflops_"
    known = sorted((int(n.removeprefix(name)), rate) for n, rate in rates.items() if n.startswith(name))
    tflops = np.interp(np.log(lengths), *zip(*((np.log(at), rate) for at, rate in known), strict=True))
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
    moved = layers * tokens * levers.element * (forward * (1 + again) + backward) * (1.6 if levers.upcast else 1)
    numbers = layers * sum(outputs * inputs for outputs, inputs in sizes.values())
    return {
        "matmul": products / (rates["matmul_tflops_2048_4096_11008"] * 1e12),
        "attention": float((attention / (tflops * 1e12)).sum()),
        "memory": moved / (rates["copy_gb_per_s"] * 1e9),
        "dequantize": numbers * (2 + again) / (rates["dequantize_gweights_per_s"] * 1e9),
        "optimizer": ADAM * len(memory.adapter(config, recipe.rank)),
    }
