"""The speed of generate() on a random model of the base's shape, in 4 and in 16 bits."""

import time

import torch

from benchmark import kernels, measure
from benchmark.bench import Bench
from utils import hardware
from utils.models import adapters
from utils.planning import random_model
from utils.planning.rehearsal import synchronize


def generation(bench: Bench) -> None:
    """Tokens a second of generate(): 4-bit with adapter (fp32, and in 16 bits), and merged in 16 bits."""
    measure.choose_attention(False)
    bench.cap(False)  # a merged 7B in 16 bits does not fit a T4 with anything beside it
    new, prompt = (4, 8) if bench.options.quick else (32, 128)
    for kind in ("4-bit, fp32 adapter", "4-bit, 16-bit adapter", "merged, 16-bit"):
        model = None  # before the next one is made
        hardware.free()
        model = random_model.build(bench.config, four_bit=not kind.startswith("merged"))
        if "adapter" in kind:
            model = adapters.add(model, bench.recipe).eval()
        if kind.endswith("16-bit adapter"):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.float16 if bench.gpu else torch.float32)
        for batch in (1, 2) if bench.options.quick else (1, 4, 8, 16, 32):
            if bench.late(generation=kind, batch=batch):
                continue
            ids = torch.randint(3, bench.config.vocab_size, (batch, prompt), device=model.device)
            found = {"kind": kind, "batch": batch, "prompt_tokens": prompt} | generated(model, ids, new)
            bench.figures["generation"].append(found)
            bench.say(f"{kind} x {batch}: {found['tokens_per_wall_s']:.0f} tokens/s by the clock")
            bench.save()


def generated(model, ids, new: int) -> dict:
    """Seconds of generate() for a batch of prompts: by the clock, and GPU-busy for the prompt and for a token."""

    def call(count: int):
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        synchronize()

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
