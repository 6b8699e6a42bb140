"""NF4 to 16 bits in one Triton kernel, equal to bitsandbytes' values bit for bit. Imported only where Triton runs.

bitsandbytes writes the constants of the blocks out first (two kernels), and then the weights (a third). Here a program
takes 1,024 bytes and does all of it: two codes a byte, the table of 16 values, and a block's constant, which double
quantization keeps as one byte, a table of 256 values, an fp32 constant for 256 of them, and an offset.
"""

import torch
import triton
import triton.language as tl

BYTES = 1024  # of a program: 32 blocks of 64 weights


@triton.jit
def _nf4_dequant(packed, table, absmax, table2, absmax2, offset, out, size, NESTED: tl.constexpr, BYTES: tl.constexpr):
    start = tl.program_id(0) * BYTES
    at = start + tl.arange(0, BYTES)
    inside = at < size
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    block = at // 32  # 64 codes
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        scale = tl.load(table2 + scale.to(tl.int32)) * tl.load(absmax2 + block // 256, mask=inside, other=0)
        scale += tl.load(offset)
    pair = tl.interleave(tl.load(table + (byte >> 4)) * scale, tl.load(table + (byte & 15)) * scale)
    into = 2 * start + tl.arange(0, 2 * BYTES)
    tl.store(out + into, pair.to(out.dtype.element_ty), mask=into < 2 * size)


def dequantize(weight: torch.Tensor, state) -> torch.Tensor:
    """The matrix (outputs x inputs) of a packed NF4 weight and its QuantState, as `dequantize_4bit` makes it."""
    out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    nested, size = state.state2 if state.nested else None, weight.numel()
    more = (nested.code, nested.absmax, state.offset) if nested else (state.code, state.absmax, state.absmax)
    grid = (triton.cdiv(size, BYTES),)
    # A fused multiply and add would round once where bitsandbytes rounds twice.
    _nf4_dequant[grid](weight, state.code, state.absmax, *more, out, size, bool(nested), BYTES, enable_fp_fusion=False)
    return out
