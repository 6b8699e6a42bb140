"""Gradients of a setting against those in fp32 on the same 4-bit weights."""

from dataclasses import replace

import bitsandbytes as bnb
import torch
from datasets import Dataset

from benchmark.bench import Bench
from benchmark.measure import Setting


def gradients(bench: Bench, model, setting: Setting | None, rows: Dataset | None = None, **arguments):
    """({parameter: gradient}, loss), unscaled; the first that the scaler finds finite.

    Of one row of 1,024 tokens; or of all `rows` in one step: in packs without a setting, else one row at a time.
    """
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            std = 0.02 if "lora_B" in name else 0.01
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0, std, generator=draw))
    keep, recipe = {}, bench.recipe
    try:
        bench.recipe = replace(recipe, learning_rate=0.0, max_grad_norm=1e9, optimizer="sgd")
        if rows:
            bench.cap(bool(setting is None))
            taken = replace(bench.recipe, accumulation=len(rows), pack_length=0 if setting else 2048)
            found = bench.attempt(model, rows, taken, setting, (0, 12, 0), gradients=keep, **arguments)
        else:
            found = bench.train(model, setting, 1, 1024, (0, 12, 0), gradients=keep, **arguments)
    finally:
        bench.recipe = recipe
    return (keep, found["losses"][0]) if isinstance(found, dict) and keep else None


def fp32_gradients(bench: Bench, rows: Dataset | None = None):
    """The same in fp32 throughout, on the same 4-bit weights."""
    setting = Setting(upcast=True, liger=False, fused=False)
    with bench.model(setting) as model:
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.compute_dtype = torch.float32
        found = gradients(bench, model, setting, rows, fp16=False, bf16=False, mixed_precision="no")
    bench.say("fp32 gradients " + ("made" if found else "missing"))
    return found


def compared(setting: Setting | None, found: dict, loss: float, reference: dict, reference_loss: float) -> dict:
    """Relative error of each gradient tensor: |found - reference| / |reference|."""
    errors = {n: ((found[n] - r).norm() / r.norm()).item() for n, r in reference.items()}
    total = sum((found[n] - r).square().sum() for n, r in reference.items()).sqrt()
    worst = max(errors, key=errors.get)
    ordered = sorted(errors.values())
    return {
        "setting": setting.name if setting else "default",
        "median": ordered[len(ordered) // 2],
        "worst": errors[worst],
        "worst_name": worst.removeprefix("base_model.model.model."),
        "above_5_percent": sum(e > 0.05 for e in ordered),
        "of_the_whole": (total / sum(r.square().sum() for r in reference.values()).sqrt()).item(),
        "errors_sorted": [round(e, 5) for e in ordered],
        "loss": loss,
        "loss_fp32": reference_loss,
        "loss_relative_difference": abs(loss - reference_loss) / reference_loss,
    }
