"""Measure QLoRA training of a 7B shape: memory, GPU time and what each lever buys. Nothing is downloaded.

    python -m utils.benchmark grid      peak memory and time over lengths, batches and kinds of checkpointing
    python -m utils.benchmark levers    each lever alone and together; gradients against fp32; the card's two rates
    python -m utils.benchmark real      rows as long as Alpaca's, padded and packed; generation in 4 and in 16 bits

Each writes data/measurements/<name>.json (memory_grid_7b, speed_levers_7b, speed_real_7b) after every configuration, so
that what a time limit leaves undone is missing and the rest is there. The model has Llama-2-7B's shape and random
weights. On CUDA the rules of a T4 hold: fp16, no FlashAttention, no cuDNN attention, and torch may use 14.12 GiB (a
T4's 14.5 less context and paged optimizer); what does not fit is measured again without that limit, and marked.

GPU time is the time in which the GPU is busy, from torch's profiler: the median of several steps. Wall time stands
beside it; a fast GPU with a slow host waits for launches, and its wall time says nothing about a T4.

--quick runs one or two configurations of the pocket shape, on a CPU too, to see that everything works.
"""

import argparse
import math
import os
import sys
import time
import traceback
from dataclasses import replace

from utils import kernels, measure, records, stand_in
from utils.measure import GIB, Setting
from utils.profile import PROFILES, Recipe

T4_GIB = 14.12
FAST, USUAL = Setting(), Setting(upcast=True, liger=False, fused=False)
# Lengths in tokens of Llama-2's tokenizer of the 999 rows of data/alpaca_en_demo.json (hiyouga/LLaMA-Factory, commit
# ff6d4d1), in this course's template: percentiles 0.5, 1.5, ... 99.5.
ALPACA = [31, 36, 39, 40, 41, 44, 45, 46, 47, 49, 50, 51, 53, 53, 54, 55, 57, 58, 59, 60, 61, 63, 65, 67, 68, 70, 71]
ALPACA += [73, 76, 78, 81, 83, 87, 90, 94, 98, 100, 106, 109, 112, 117, 121, 125, 130, 135, 140, 144, 147, 153, 158]
ALPACA += [165, 169, 173, 176, 181, 186, 190, 194, 204, 209, 215, 220, 226, 233, 240, 246, 253, 260, 268, 283, 289]
ALPACA += [294, 302, 311, 315, 322, 326, 335, 346, 352, 362, 367, 374, 382, 389, 401, 409, 415, 421, 433, 441, 452]
ALPACA += [458, 473, 479, 503, 515, 550, 580, 655]

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
    (USUAL, MORE, True),
    (replace(FAST, checkpoint="none"), MORE, True),
    (FAST, MORE + [(1, 4096)], False),
    (replace(FAST, checkpoint=2), [*ONE, (1, 4096)], False),
    (replace(FAST, fused=False, checkpoint="none"), MORE, True),
    (replace(FAST, fused=False), ONE, False),
    (replace(FAST, fused=False, liger=False), ONE, True),
    (replace(USUAL, liger=True), ONE, True),
    (replace(USUAL, fused=True), ONE, False),
    (replace(USUAL, checkpoint="none"), ONE, False),
    (replace(FAST, fused=False, compiled=True, checkpoint="none"), ONE, False),
    (replace(FAST, compiled=True, checkpoint="none"), ONE, False),
    (replace(FAST, double_quant=False, checkpoint="none"), ONE, False),
    (replace(FAST, liger=False, checkpoint="none"), ONE, False),
    (replace(FAST, checkpoint="offload"), ONE, False),
    (replace(FAST, liger_first=True, fused=False, checkpoint="none"), ONE, False),
    (replace(FAST, any_attention=True, checkpoint="none"), ONE, False),
    (replace(FAST, any_attention=True), ONE, False),
    (replace(FAST, any_attention=True, fused=False, checkpoint="none"), ONE, False),
    (replace(USUAL, any_attention=True), ONE, False),
]


class Bench:
    """What all parts share: the shape, the recipe, the tokenizer, the clock, and the record that grows."""

    def __init__(self, options):
        import torch

        from utils import loading

        self.options, self.gpu, self.started = options, torch.cuda.is_available(), time.monotonic()
        if options.quick:
            self.config, recipe = stand_in.config(PROFILES["pocket"].base), PROFILES["pocket"].recipe
        else:
            self.config, recipe = stand_in.config("llama-2-7b"), PROFILES["llama-2-7b"].recipe
        self.recipe: Recipe = replace(recipe, accumulation=1)
        self.tokenizer = loading.load_tokenizer(PROFILES["pocket"].base)  # only its padding token is used
        self.figures = {"rules": self.rules(), "missing": [], "left_over_gib": []}

    def build(self, recipe: Recipe, setting: Setting):
        """A fresh model. What earlier ones left on the GPU, which should be nothing, goes into the record."""
        measure.free()
        self.figures["left_over_gib"].append(measure.allocated())
        return measure.build(self.config, recipe, setting)

    def rules(self) -> dict:
        if not self.gpu:
            return {"device": "cpu"}
        from importlib.metadata import version

        extra = {name: version(name) for name in ("liger-kernel", "triton", "accelerate")}
        attention = "memory-efficient, except in settings with any_attention"
        return {"dtype": "float16", "attention": attention, "cap_gib": T4_GIB} | extra

    def cap(self, on: bool) -> None:
        import torch

        if self.gpu:
            total = torch.cuda.get_device_properties(0).total_memory / GIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, T4_GIB / total) if on else 1.0)

    @property
    def late(self) -> bool:
        return time.monotonic() - self.started > 60 * self.options.minutes

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)

    def save(self) -> None:
        names = {"grid": "memory_grid_7b", "levers": "speed_levers_7b", "real": "speed_real_7b"}
        name = names[self.options.part] + ("_quick" if self.options.quick else "")
        command = f"python -m utils.benchmark {self.options.part}" + (" --quick" if self.options.quick else "")
        self.figures["seconds_in_all"] = time.monotonic() - self.started
        records.write(name, finite(self.figures), command, self.options.out)

    def shape(self, batch: int, length: int) -> tuple[int, int]:
        return (batch, max(32, length // 16)) if self.options.quick else (batch, length)

    def train(self, model, setting: Setting, batch: int, length: int, steps=None, **more) -> dict | None:
        """One configuration, under the limit and, if it does not fit, without it. None: failed."""
        batch, length = self.shape(batch, length)
        recipe = replace(self.recipe, batch_size=batch, max_length=length)
        steps = steps or ((1, 1, 2) if self.options.quick or batch * length > 8000 else (2, 2, 3))
        encoded = measure.rows(batch * sum(steps), length, self.config.vocab_size)
        for capped in (True, False):
            self.cap(capped)
            found = self.attempt(model, encoded, recipe, setting, steps, **more)
            if isinstance(found, dict):
                self.say(
                    f"{setting.name:40} {batch} x {length:5}  GPU {found['gpu_ms'] or 0:7.1f} ms"
                    f"  wall {found['wall_ms'] or 0:7.1f} ms  peak {found['peak_allocated_gib'] or 0:6.2f} GiB"
                    f"{'' if capped else '  does not fit a T4'}"
                )
                return found | {"fits_t4": capped and self.gpu}
            if found != "memory":
                break
        self.figures["missing"].append({"setting": setting.name, "batch": batch, "length": length, "why": found})
        self.say(f"{setting.name:40} {batch} x {length:5}  not measured: {found}")
        return None

    def attempt(self, model, encoded, recipe, setting, steps, **more):
        import torch

        found = None
        try:
            found = measure.run(model, self.tokenizer, encoded, recipe, setting, steps, **more)
        except torch.OutOfMemoryError:
            found = "memory"
        except Exception as error:
            found = "memory" if "out of memory" in str(error).lower() else f"{type(error).__name__}: {public(error)}"
            traceback.print_exc(limit=-5)
            if self.options.quick and not self.gpu:
                raise
        measure.settle(model)  # here, where no traceback keeps the tensors of the failed run
        return found


def grid(bench: Bench) -> None:
    """Peaks and times of the fast recipe, one model for all."""
    setting = replace(FAST, liger=bench.gpu)
    bench.figures["rates"] = rates(bench)
    bench.say(f"rates {bench.figures['rates']}")
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
    bench.figures |= {"configurations": [], "gradients": [], "rates": rates(bench)}
    bench.say(f"rates {bench.figures['rates']}")
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
        measure.free()
        bench.save()


def lever(bench: Bench, setting: Setting, shapes: list, reference) -> None:
    with rotary_restored():
        model = bench.build(bench.recipe, setting)
        for batch, length in shapes:
            steps = (2, 4, 4) if (batch, length) == (1, 2048) and not bench.options.quick else None
            if found := bench.train(model, setting, batch, length, steps):
                bench.figures["configurations"].append(found)
        if reference and (found := gradients(bench, model, setting)):
            bench.figures["gradients"].append(compared(setting, *found, *reference))
            bench.say(f"{setting.name:40} gradients {bench.figures['gradients'][-1]['median']:.2%} median")


def rates(bench: Bench) -> dict:
    """The planner's rates: 16-bit matrix products, causal attention (forward and backward), bytes, dequantize."""
    import torch
    import torch.nn.functional as F
    from bitsandbytes import functional

    device = "cuda" if bench.gpu else "cpu"
    dtype = torch.float16 if bench.gpu else torch.float32
    size = 8192 if bench.gpu else 512
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    x = torch.randn(size // 4, size // 2, device=device, dtype=dtype)  # 2048 x 4096: one row of the training
    w = torch.randn(size * 43 // 32, size // 2, device=device, dtype=dtype)  # 11008 x 4096: Llama-2-7B's up_proj
    packed, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    out = torch.empty_like(a)
    n, m = size, w.shape[0]
    measure.choose_attention(False)

    def attention(length: int) -> float:
        shape = (1, 32, length, 128) if bench.gpu else (1, 4, length // 16, 128)
        q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

        def attend():
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), q)

        return 7 * q.shape[2] ** 2 * q.shape[1] * 128 / seconds(attend) / 1e12  # 4 + 10, half of it masked

    return {
        **{f"attention_tflops_{length}": attention(length) for length in (512, 2048, 16384)},
        "matmul_tflops_square": 2 * n**3 / seconds(lambda: torch.mm(a, b, out=out)) / 1e12,
        "matmul_tflops_2048_4096_11008": 2 * x.shape[0] * x.shape[1] * m / seconds(lambda: x @ w.t()) / 1e12,
        "copy_gb_per_s": 2 * out.nbytes / seconds(lambda: out.copy_(a)) / 1e9,
        "dequantize_gweights_per_s": w.numel() / seconds(lambda: functional.dequantize_4bit(packed, state)) / 1e9,
    }


def seconds(work, repeats: int = 20) -> float:
    """Seconds of `work`, the best of three times `repeats` calls; on a GPU those in which it is busy."""
    import torch

    work()
    found = []
    for _ in range(3):
        times, started = [], time.perf_counter()
        with kernels.profiled(times):
            for _ in range(repeats if torch.cuda.is_available() else 1):
                work()
        found.append(times[0].busy / 1e3 / repeats if times else time.perf_counter() - started)
    return min(found)


def gradients(bench: Bench, model, setting: Setting, mixed: bool = True):
    """({parameter: gradient}, loss) of one row of 1,024 tokens, unscaled; the first that the scaler finds finite."""
    import torch

    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # values that bf16 holds exactly: trl rounds adapters to it
            std = 0.02 if "lora_B" in name else 0.01
            value = torch.empty(parameter.shape).normal_(0, std, generator=draw).bfloat16()
            parameter.data.copy_(value)
    keep, recipe = {}, bench.recipe
    try:
        bench.recipe = replace(recipe, learning_rate=0.0, max_grad_norm=1e9, optimizer="sgd")
        found = bench.train(model, setting, 1, 1024, (0, 12, 0), mixed=mixed, gradients=keep)
    finally:
        bench.recipe = recipe
    return (keep, found["losses"][0]) if found and keep else None


def fp32_gradients(bench: Bench):
    """The same in fp32 throughout, on the same 4-bit weights."""
    import bitsandbytes as bnb

    setting = Setting(upcast=True, liger=False, fused=False)
    with rotary_restored():
        model = bench.build(bench.recipe, setting)
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                import torch

                module.compute_dtype = torch.float32
        found = gradients(bench, model, setting, mixed=False)
        del model
    measure.free()
    bench.say("fp32 gradients " + ("made" if found else "missing"))
    return found


def compared(setting: Setting, found: dict, loss: float, reference: dict, reference_loss: float) -> dict:
    """Relative error of each gradient tensor: |found - reference| / |reference|."""
    errors = {n: ((found[n] - r).norm() / r.norm()).item() for n, r in reference.items()}
    total = sum((found[n] - r).square().sum() for n, r in reference.items()).sqrt()
    worst = max(errors, key=errors.get)
    ordered = sorted(errors.values())
    return {
        "setting": setting.name,
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


def public(error: Exception) -> str:
    """An error's text without the paths of this machine."""
    from pathlib import Path

    from utils import runtime

    text = " ".join(str(error).split())
    for private in (str(runtime.ROOT), str(Path.home())):
        text = text.replace(private, "~")
    return text[:300]


def finite(value):
    """`value` with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class rotary_restored:
    """Liger replaces a function of transformers; this puts it back."""

    def __enter__(self):
        from transformers.models.llama import modeling_llama

        self.module = modeling_llama
        self.kept = {n: getattr(modeling_llama, n) for n in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")}

    def __exit__(self, *error):
        for name, value in self.kept.items():
            setattr(self.module, name, value)


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
    fast_packed = replace(FAST, packed=True, checkpoint="none", liger=bench.gpu)
    ways = [  # (name, setting, rows, batch)
        ("usual, padded batches of 4", USUAL, together, 4),
        ("usual, packs", replace(USUAL, packed=True), packs, 1),
        ("fast, padded batches of 4", replace(FAST, liger=bench.gpu), together, 4),
        ("fast, packs, no checkpointing", fast_packed, packs, 1),
        ("fast, packs, checkpoint all", replace(fast_packed, checkpoint="all"), packs, 1),
    ]
    bench.figures |= {"lengths": ALPACA, "pack": pack, "packs": len(packs), "training": [], "generation": []}
    for name, setting, encoded, batch in ways:
        recipe = replace(bench.recipe, batch_size=batch, max_length=pack)
        steps = (1, 1, 2) if bench.options.quick else (2, 2, 20 if batch > 1 else 10)
        with rotary_restored():
            model = bench.build(recipe, setting)
            bench.cap(True)
            found = bench.attempt(model, encoded, recipe, setting, steps)
            del model
        measure.free()
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


def generation(bench: Bench) -> None:
    """Tokens a second of generate(): 4-bit with adapter (fp32, and in 16 bits), and merged in 16 bits."""
    import torch

    from utils import loading

    measure.choose_attention(False)
    bench.cap(False)  # a merged 7B in 16 bits does not fit a T4 with anything beside it
    new, prompt = (4, 8) if bench.options.quick else (32, 128)
    for kind in ("4-bit, fp32 adapter", "4-bit, 16-bit adapter", "merged, 16-bit"):
        model = stand_in.make(bench.config, four_bit=not kind.startswith("merged"))
        if "adapter" in kind:
            model = loading.add_adapter(model, bench.recipe).eval()
        if kind.endswith("16-bit adapter"):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.float16 if bench.gpu else torch.float32)
        for batch in (1, 2) if bench.options.quick else (1, 4, 8, 16, 32):
            if bench.late:
                bench.figures["missing"].append({"generation": kind, "batch": batch, "why": "time"})
                continue
            ids = torch.randint(3, bench.config.vocab_size, (batch, prompt), device=model.device)
            found = {"kind": kind, "batch": batch, "prompt_tokens": prompt} | generated(model, ids, new)
            bench.figures["generation"].append(found)
            bench.say(f"{kind} x {batch}: {found['tokens_per_wall_s']:.0f} tokens/s by the clock")
            bench.save()
        del model
        measure.free()


def generated(model, ids, new: int) -> dict:
    """Seconds of generate() for a batch of prompts: by the clock, and GPU-busy for the prompt and for a token."""
    import torch

    def call(count: int):
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    times, batch = [], len(ids)
    with torch.no_grad():
        call(2)
        started = time.perf_counter()
        call(new)
        wall = time.perf_counter() - started
        for count in (1, 9):
            with kernels.profiled(times):
                call(count)
    found = {"new_tokens": new, "wall_s": wall, "tokens_per_wall_s": batch * new / wall}
    if times:
        a_token = (times[1].busy - times[0].busy) / 8 / 1e3
        by_kind = {k: (v - times[0].by_kind[k]) / 8 for k, v in times[1].by_kind.items()}
        found |= {"prompt_gpu_s": times[0].busy / 1e3, "tokens_per_gpu_s": batch / a_token}
        found |= {"gpu_ms_a_token_by_kind": by_kind, "launches_a_token": (times[1].launches - times[0].launches) / 8}
    return found


def main(arguments: list[str] | None = None) -> int:
    from pathlib import Path

    from utils import runtime

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("grid", "levers", "real"))
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
    {"grid": grid, "levers": levers, "real": real}[options.part](bench)
    bench.save()
    if (left := max(bench.figures["left_over_gib"], default=0.0)) > 0.01:
        print(f"Earlier configurations left {left:.2f} GiB on the GPU: the peaks of this record are too high")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
