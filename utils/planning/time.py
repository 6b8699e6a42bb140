"""How long a step takes, by operations and bytes over measured rates."""

from collections.abc import Sequence

import numpy as np

from utils.planning import memory
from utils.planning.memory import Levers
from utils.presets import Recipe

SMALL = 6e-6  # fitted to memory_grid_7b: seconds of an adapter matrix in a pass, and of its 8-bit Adam: small kernels
LIBRARY = 1.74  # times as long as our kernel bitsandbytes takes to dequantize (record speed_default_7b)
PLAIN = 1.7  # fitted to a run of speed_levers_7b: what torch takes for norms, rotary, SwiGLU; copies of as many bytes


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

    `rates` are the figures of the benchmark's `rates` (data/measurements/benchmark), of the GPU in question; `rows` the
    lengths of the rows of the pass, which attend each by itself (default: `batch_size` of `max_length`).
    """
    levers, layers, tokens = levers or memory.ours(config), config.num_hidden_layers, recipe.tokens
    again = sum(memory.recomputed(recipe.gradient_checkpointing, i) for i in range(layers)) / layers
    work = flop(config, recipe.rank, tokens)
    # Kernels skip what the causal mask hides; the backward pass computes the scores anew: 5 products for 2.
    lengths = np.array(rows or [recipe.max_length] * recipe.batch_size)
    attention = work["attention"] * (lengths / tokens) ** 2 / 2 * (3.5 + again)
    # A short row leaves part of the GPU idle: TFLOP/s at each length, between the lengths measured.
    known = sorted((int(n.split("_")[-1]), rate) for n, rate in rates.items() if n.startswith("attention"))
    tflops = np.interp(np.log(lengths), *zip(*((np.log(at), rate) for at, rate in known), strict=True))
    hidden, inner, e, back = config.hidden_size, config.intermediate_size, levers.element, np.array([0, 1])
    outs, ins = (sum(side) for side in zip(*memory.shapes(config).values(), strict=True))
    fused, w, shared = levers.fused and not levers.dropout, 4 if levers.upcast else e, ins - 3 * hidden
    # Bytes that a token reads and writes in a layer beside the large products, forward and (`back`) backward: e a
    # number, w where it may be upcast. Narrow products wait for memory; fused, q, k, v share an input, and gate, up.
    adapters = e * ((1 + back) * shared + back * ins + 2 * outs)
    if not fused:  # each output is copied, scaled and summed; dropout reads and writes the input, with a mask
        adapters = e * ((1 + back) * ins + 4 * outs) + w * ((4 - 4 * back) * outs + 3 * back * (ins + 3 * hidden))
    casts = (w + e) * (shared + outs + hidden if fused else 2 * ins + (1 + back) * outs) * (w > e)
    rest = w * ((8 + 2 * back) * hidden + (3 + 2 * back) * inner)  # norms, rotary, SwiGLU
    if not levers.liger:  # with copies, and norms in fp32
        rest = PLAIN * (hidden * (w * (24 + 6 * back) + 40 + 104 * back + 24 * (w < 4)) + w * (5 + 4 * back) * inner)
    moved = adapters + casts + rest + levers.dropout * (2 * w + 1) * ins + 6 * hidden * w  # the last: sums of layers
    small, numbers = SMALL * len(memory.adapter(config, recipe.rank)), work["base"] / (2 * tokens)
    return {
        "matmul": (work["base"] * (2 + again) + 2 * work["head"]) / (rates["matmul_tflops_2048_4096_11008"] * 1e12),
        "attention": float((attention / (tflops * 1e12)).sum()),
        "memory": float(layers * tokens * (moved @ [1 + again, 1])) / (rates["copy_gb_per_s"] * 1e9),
        "small": small * (2 + again),
        "dequantize": numbers * (2 + again) * (1 if fused else LIBRARY) / (rates["dequantize_gweights_per_s"] * 1e9),
        "optimizer": small,
    }
