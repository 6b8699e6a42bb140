"""The rates of this card, from which `utils.planning.time` computes how long a step takes."""

import time

import torch
import torch.nn.functional as F
from bitsandbytes import functional

from benchmark import kernels, measure
from utils.training import levers


def measured(gpu: bool) -> dict:
    """16-bit matrix products, causal attention (forward and backward), bytes copied, weights dequantized; a second."""
    device, dtype, size = ("cuda", torch.float16, 8192) if gpu else ("cpu", torch.float32, 512)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    x = torch.randn(size // 4, size // 2, device=device, dtype=dtype)  # 2048 x 4096: one row of the training
    w = torch.randn(size * 43 // 32, size // 2, device=device, dtype=dtype)  # 11008 x 4096: Llama-2-7B's up_proj
    packed, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    out = torch.empty_like(a)
    n, m = size, w.shape[0]
    measure.choose_attention(False)

    def attention(length: int) -> float:
        shape = (1, 32, length, 128) if gpu else (1, 4, length // 16, 128)
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

        def attend():
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), q)

        return 7 * q.shape[2] ** 2 * q.shape[1] * 128 / seconds(attend) / 1e12  # 4 + 10, half of it masked

    return {
        **{f"attention_tflops_{length}": attention(length) for length in (512, 2048, 16384)},
        "matmul_tflops_square": 2 * n**3 / seconds(lambda: torch.mm(a, b, out=out)) / 1e12,
        "matmul_tflops_2048_4096_11008": 2 * x.shape[0] * x.shape[1] * m / seconds(lambda: x @ w.t()) / 1e12,
        "copy_gb_per_s": 2 * out.nbytes / seconds(lambda: out.copy_(a)) / 1e9,
        "dequantize_gweights_per_s": w.numel() / seconds(lambda: levers.dequantize(packed, state)) / 1e9,
    }


def seconds(work, repeats: int = 20) -> float:
    """Seconds of `work`, the best of three times `repeats` calls; on a GPU those in which it is busy."""
    work()
    found = []
    for _ in range(3):
        times, started = [], time.perf_counter()
        with kernels.profiled(times):
            for _ in range(repeats if torch.cuda.is_available() else 1):
                work()
        found.append(times[0].busy / 1e3 / repeats if times else time.perf_counter() - started)
    return min(found)
