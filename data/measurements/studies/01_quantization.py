"""The record of chapter 01: Llama-2-7B's matrices in four bits on a GPU, and the chapter's equalities there.

    python data/measurements/studies/01_quantization.py quantization        quantization_7b.json

The matrices are random ones in Llama-2-7B's 224 shapes: for seconds and bytes the values do not matter.
"""

import time

import study
import torch
from bitsandbytes import functional as library


def timed(function, *arguments, **named):
    """(result, seconds)"""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None  # a GPU works on while Python goes on
    wait()
    started = time.monotonic()
    result = function(*arguments, **named)
    wait()
    return result, time.monotonic() - started


def quantize_all(shapes, nested: bool) -> dict:
    """Random fp16 matrices of these shapes, each made, quantized, restored once and dropped: what it takes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    kept, there, back = [], 0.0, 0.0
    for shape in shapes:
        w = torch.randn(shape, dtype=torch.float16, device=device) * 0.02
        result, seconds = timed(library.quantize_4bit, w, quant_type="nf4", compress_statistics=nested)
        kept.append(result)
        there, back = there + seconds, back + timed(library.dequantize_4bit, *result)[1]
    weights, stored = sum(shape.numel() for shape in shapes), sum(run["stored_bytes"](*result) for result in kept)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    sizes = {"weights": weights, "bytes_before": 2 * weights, "bytes_after": stored, "peak_gib": peak}
    return sizes | {"quantize_seconds": there, "dequantize_seconds": back}


def equalities(shape) -> dict:
    """Our bytes against the library's, on the pocket model and on one matrix; the layer's output and gradient."""
    compare, matrices = run["compare"], list(run["originals"].values())
    large = torch.randn(shape, dtype=torch.float16, device=device) * 0.02
    found = {"pocket": run["together"]([compare(w) for w in matrices]), "seven_fp16": compare(large)}
    pairs = [[library.quantize_4bit(v, quant_type="nf4")[0].cpu() for v in (w, w.cpu())] for w in matrices]
    found["pocket_bytes_unlike_cpu"] = sum(int((a != b).sum()) for a, b in pairs)
    found["zero_block_byte"] = library.quantize_4bit(torch.zeros(64, device=device), quant_type="nf4")[0][0].item()
    for what, (a, b) in {"outputs": run["outputs"], "input_gradients": run["gradients"]}.items():
        found[f"linear4bit_{what}_relative"] = ((a - b).abs().max() / b.abs().max()).item()
    return found


chosen = study.options(["quantization"])
run = study.chapter("01_quantization", until="## The loss, text by text")
device = run["device"]
shapes = [layer.weight.shape for layer in run["seven_linears"][: 1 if chosen.quick else None]]
_ = quantize_all(shapes[:7], True)  # the first calls load the kernels
figures = {"nf4": quantize_all(shapes, False), "nf4_double": quantize_all(shapes, True)}
figures[f"{device}_equalities"] = equalities(shapes[0] if chosen.quick else torch.Size([11008, 4096]))
study.write(chosen, "quantization_7b", figures)
