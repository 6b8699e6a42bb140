"""Will it fit? Memory of a QLoRA run, from a configuration and a recipe alone.

The model is of the Llama architecture; its linear layers are in NF4 (but the output head) and each carries an adapter
in fp32. Sizes are those that torch's allocator sees, in bytes. Sources: the layout of bitsandbytes' QuantState and of
its 8-bit optimizers, and what each operation keeps for its backward pass; every term is compared with real tensors in
the tests of this module.
"""

from dataclasses import dataclass
from math import ceil

import torch

from utils import hardware
from utils.presets import Recipe

WORKSPACE = 64 * 2**20  # cuBLAS, as torch asks for on an H100; a T4 takes less
CONTEXT = int(0.3 * 2**30)  # CUDA itself, outside of torch's allocator


@dataclass(frozen=True)
class Levers:
    """What a run does that changes its memory or its time; chapter 10 goes through them one by one."""

    liger: bool = True  # fused norms and SwiGLU keep their inputs alone
    fused: bool = True  # base and adapters of the same input in one autograd node (levers.fuse_adapters)
    upcast: bool = False  # norms, embeddings, head in fp32, and with them the stream from layer to layer
    dropout: bool = False  # each adapter keeps an input of its own, with holes, and a byte a number for where they are
    double_quant: bool = True
    element: int = 2  # bytes of a number in the compute dtype


OURS = Levers()


def ours(config) -> Levers:
    """What `trainer.build` pulls for such a base: Liger's kernels are for Llama alone, and all of it is for Triton."""
    triton = hardware.has_triton() or not torch.cuda.is_available()  # without a GPU the plan is for another machine
    return Levers(liger=triton and config.model_type == "llama", fused=triton)


def shapes(config) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linear layers of one decoder layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    attention["o_proj"] = (hidden, queries)
    return attention | {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}


def weights(config, levers: Levers = OURS) -> dict[str, int]:
    """Bytes of the base: 4-bit weights, the constants of their blocks, and all that is not quantized."""
    numbers, constants = 0, 0
    for outputs, inputs in shapes(config).values():
        count = outputs * inputs
        blocks = ceil(count / 64)
        numbers += count // 2
        # 16 code values in fp32; absmax in fp32, or in 8 bits with an fp32 one for 256, 256 code values, an offset
        constants += 16 * 4 + (blocks + 4 * ceil(blocks / 256) + 256 * 4 + 4 if levers.double_quant else 4 * blocks)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    rest = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2) + (2 * layers + 1) * hidden
    return {
        "4-bit weights": layers * numbers,
        "block constants": layers * constants,
        "embeddings, head, norms": rest * (4 if levers.upcast else levers.element),
    }


def adapter(config, rank: int) -> list[int]:
    """Number of elements of each adapter matrix: A and B of every linear layer."""
    one = [rank * size for outputs, inputs in shapes(config).values() for size in (inputs, outputs)]
    return one * config.num_hidden_layers


def optimizer(sizes: list[int], name: str) -> dict[str, int]:
    """Bytes of Adam's two moments of tensors of `sizes`: on the GPU, and in pages that may leave it.

    8-bit: two bytes an element and two fp32 numbers a block of 256; tensors below 4,096 elements stay in fp32. Pages:
    only tensors of 100,000 elements or more (bitsandbytes, `get_state_buffer`).
    """
    kept, paged = 0, 0
    for size in sizes:
        small = "8bit" not in name or size < 4096
        moments = 8 * size if small else 2 * size
        kept += 0 if small else 8 * ceil(size / 256)
        if "paged" in name and size >= 100_000:
            paged += moments
        else:
            kept += moments
    return {"optimizer": kept, "optimizer, paged": paged}


def saved(config, rank: int, tokens: int, levers: Levers | None = None) -> int:
    """Bytes that one decoder layer keeps for its backward pass, its own input among them.

    `tokens` are those of one forward pass: batch times length, padding included.
    """
    levers = levers or ours(config)
    element, sizes = levers.element, shapes(config)
    hidden, inner = config.hidden_size, config.intermediate_size
    (queries, _), (keys, _) = sizes["q_proj"], sizes["k_proj"]
    wide = 4 if levers.upcast else element
    norms = 2 * (hidden * (wide if levers.liger else 4) + 4)  # input (unfused: in fp32), one root
    inputs = hidden * element * (5 if wide != element and not levers.fused else 2)  # of q, k, v and of gate, up
    inputs += inner * element  # of down; that of o is the output of attention
    if levers.dropout:
        inputs = (element + 1) * sum(size for _, size in sizes.values())
    attention = (2 * queries + 2 * keys) * element + 4 * config.num_attention_heads  # q, k, v, output; sums of softmax
    mlp = inner * wide * (2 if levers.liger else 3)  # gate, up, (silu of gate)
    narrow = len(sizes) * rank * element  # x A^T of every adapter
    outs, ins = (sum(side) for side in zip(*sizes.values(), strict=True))
    # A and B in 16 bits; in 32, A in one piece, where adapters are fused (those with dropout are not)
    casts = element * rank * (ins + outs if element < 4 else ins * (levers.fused and not levers.dropout))
    return tokens * (norms + inputs + attention + mlp + narrow) + casts


def recomputed(recompute: int, layer: int) -> bool:
    """Whether the backward pass computes this layer again: of n, every n-th; of 0, none."""
    return recompute > 0 and layer % recompute == 0


def at_peak(config, recipe: Recipe, levers: Levers | None = None, offload: bool = False) -> dict[str, int]:
    """Bytes by kind at the moment of the peak of a step; their sum is torch's peak, without what lies in pages.

    The backward pass is walked from the last layer to the first: what layers kept becomes less, gradients become more,
    and the layer at work holds what it computed again, one weight in `element` bytes, and two gradients. With `offload`
    every layer is recomputed, and what it needs for that, its input, goes to the host meanwhile.
    """
    levers = levers or ours(config)
    recompute, element = 1 if offload else recipe.gradient_checkpointing, levers.element
    layers, tokens = config.num_hidden_layers, recipe.tokens
    wide = 4 if levers.upcast else element
    sizes = adapter(config, recipe.rank)
    moments = optimizer(sizes, recipe.optimizer)
    whole = saved(config, recipe.rank, tokens, levers)
    entrance = tokens * config.hidden_size * wide  # a layer's input
    outputs, inputs = shapes(config)["down_proj"]
    at_work = outputs * inputs * element + 4 * ceil(outputs * inputs / 64)  # one weight, and its absmax in fp32
    at_work += tokens * (outputs * wide + inputs * element)  # gradients of its output and of its input
    if wide != element:
        at_work += tokens * (outputs * element + inputs * wide)  # and each in the other dtype
    again = [recomputed(recompute, i) for i in range(layers)]
    stays = 0 if offload else entrance
    kept = [stays if a else whole for a in again]
    steps = []  # (activations kept, those of the layer at work, gradients, what else it needs)
    for i in range(layers):
        gradients = 4 * sum(sizes) * (layers - 1 - i) // layers
        steps.append((sum(kept[: i + 1]), whole - stays if again[i] else 0, gradients, at_work))
    before = 2 * entrance  # the output head: the stream and its gradient; Liger and, on a GPU, trl score in chunks
    before += tokens * config.vocab_size * 12 if element == 4 and not levers.liger else 0  # logits, softmax, gradient
    steps.append((sum(kept), before, 0, 0))
    steps.append((0, 0, 4 * sum(sizes), 0))  # the optimizer's step
    activations, redone, gradients, working = max(steps, key=sum)
    return {
        **weights(config, levers),
        "adapter": 4 * sum(sizes),
        "optimizer": moments["optimizer"],
        "gradients": gradients,
        "kept activations": activations,
        "recomputed layer": redone,
        "at work": working + WORKSPACE,
    }
