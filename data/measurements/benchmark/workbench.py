"""What all parts of the benchmark stand on: models that are built and cleared away, and a record that grows."""

import math
import re
import time
import traceback
from dataclasses import replace

from utils import leftovers, memory, records, stand_in
from utils.benchmark import measure
from utils.benchmark.measure import Setting
from utils.profile import PROFILES, Recipe

T4_GIB = 14.12


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
        memory.free()
        self.figures["left_over_gib"].append(memory.allocated())
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
            total = torch.cuda.get_device_properties(0).total_memory / memory.GIB
            torch.cuda.set_per_process_memory_fraction(min(1.0, T4_GIB / total) if on else 1.0)

    @property
    def late(self) -> bool:
        return time.monotonic() - self.started > 60 * self.options.minutes

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)

    def save(self) -> None:
        import torch

        part = self.options.part
        names = {"grid": "memory_grid_7b", "levers": "speed_levers_7b", "real": "speed_real_7b"}
        card = torch.cuda.get_device_name(0) if self.gpu else "cpu"
        name = names.get(part, "rates_" + re.sub(r"\W+", "_", card).lower()) + ("_quick" if self.options.quick else "")
        command = f"python -m utils.benchmark {part}" + (" --quick" if self.options.quick else "")
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
        leftovers.clear(model, everything=True)  # here, where no traceback keeps the tensors of the failed run
        return found


class llama_restored:
    """Liger replaces a function and two classes of transformers; this puts them back."""

    def __enter__(self):
        from transformers.models.llama import modeling_llama

        self.module = modeling_llama
        self.kept = {n: getattr(modeling_llama, n) for n in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")}

    def __exit__(self, *error):
        for name, value in self.kept.items():
            setattr(self.module, name, value)


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
