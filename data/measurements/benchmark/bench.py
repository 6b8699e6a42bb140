"""What all parts of the benchmark stand on: models that are built and cleared away, and a record that grows."""

import math
import re
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import record
import torch
from transformers.models.llama import modeling_llama

from benchmark import measure
from benchmark.measure import Setting
from utils import hardware, runtime
from utils.models import adapters, loading
from utils.planning import random_model, rehearsal
from utils.presets import PROFILES, Recipe

NAMES = {"grid": "memory_grid_7b", "levers": "speed_levers_7b", "real": "speed_real_7b", "default": "speed_default_7b"}
REPLACED_BY_LIGER = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")  # in transformers itself


class Bench:
    """What all parts share: the shape, the recipe, the tokenizer, the clock, and the record that grows."""

    def __init__(self, options):
        self.options, self.gpu, self.started = options, torch.cuda.is_available(), time.monotonic()
        pocket = PROFILES["pocket"]
        self.config = random_model.config(pocket.base if options.quick else "llama-2-7b")
        recipe = pocket.recipe if options.quick else PROFILES["llama-2-7b"].recipe
        self.recipe: Recipe = replace(recipe, accumulation=1, pack_length=0)
        self.tokenizer = loading.load_tokenizer(pocket.base)  # only its padding token is used
        self.figures = {"rules": self.rules(), "missing": [], "left_over_gib": []}

    def rules(self) -> dict:
        if not self.gpu:
            return {"device": "cpu"}
        extra = {name: version(name) for name in ("liger-kernel", "triton", "accelerate")}
        attention = "memory-efficient, except in settings with any_attention"
        return {"dtype": "float16", "attention": attention, "cap_gib": hardware.T4_GIB} | extra

    @contextmanager
    def model(self, setting: Setting | None):
        """A fresh model. What earlier ones left on the GPU, which should be nothing, goes into the record."""
        hardware.free()
        self.figures["left_over_gib"].append(hardware.reset_peak())
        with patch.multiple(modeling_llama, **{n: getattr(modeling_llama, n) for n in REPLACED_BY_LIGER}):  # put back
            if setting:
                yield measure.build(self.config, self.recipe, setting)
            else:  # as everybody has it: the trainer does the rest
                yield adapters.add(random_model.build(self.config), self.recipe)

    def cap(self, on: bool) -> None:
        """Let torch use as much memory as on a T4, or all."""
        if self.gpu:
            total = torch.cuda.get_device_properties(0).total_memory / hardware.GIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, hardware.T4_GIB / total) if on else 1.0)

    def late(self, **what) -> bool:
        """Whether the time is up; `what` is then recorded as missing."""
        if time.monotonic() - self.started <= 60 * self.options.minutes:
            return False
        self.figures["missing"].append(what | {"why": "time"})
        return True

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)

    def save(self) -> None:
        part, quick = self.options.part, self.options.quick
        card = torch.cuda.get_device_name(0) if self.gpu else "cpu"
        name = NAMES.get(part, "rates_" + re.sub(r"\W+", "_", card).lower()) + ("_quick" if quick else "")
        self.figures["seconds_in_all"] = time.monotonic() - self.started
        command = f"python data/measurements/benchmark {part}" + (" --quick" if quick else "")
        record.write(name, finite(self.figures), command, self.options.out)

    def train(self, model, setting: Setting, batch: int, length: int, steps=None, **more) -> dict | None:
        """One configuration, under the limit and, if it does not fit, without it. None: failed."""
        if self.options.quick:
            length = max(32, length // 16)
        recipe = replace(self.recipe, batch_size=batch, max_length=length)
        steps = steps or ((1, 1, 2) if self.options.quick or batch * length > 8000 else (2, 2, 3))
        encoded = rehearsal.random_rows([length] * (batch * sum(steps)), self.config.vocab_size)
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

    def attempt(self, model, encoded, recipe, setting, steps, **more) -> dict | str:
        """What `measure.run` returns; "memory" if it does not fit, or what else went wrong."""
        try:
            found = measure.run(model, self.tokenizer, encoded, recipe, setting, steps, **more)
        except Exception as error:  # what cannot be measured here does not end the rest
            found = public(error)
            if "memory is full" in found or "out of memory" in found.lower():
                found = "memory"
            elif not self.gpu:
                raise
            else:
                traceback.print_exc(limit=-5)
        measure.clear(model)  # here, where no traceback keeps the tensors of the failed run
        return found


def public(error: Exception) -> str:
    """An error in a line, without the paths of this machine."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text.replace(str(runtime.ROOT), "~").replace(str(Path.home()), "~")[:300]


def finite(value):
    """`value` with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
