"""The records of chapter 00: one whole run of it.

    python data/measurements/studies/00_start_here.py exam --seed 0         exam_seed0.json, and so on
    QLORA_BASE=outputs/random-llama-2-7b QLORA_CAPABILITY=7.5 QLORA_PROFILE=llama-2-7b \\
        DATA=outputs/random-llama-2-7b/rows.jsonl python data/measurements/studies/00_start_here.py random_7b

The second is for a GPU and a model of random weights (`python data/measurements/benchmark random_model`); it writes
random_7b_t4_rules.json: speed and memory are real there, text is not.
"""

import os
from dataclasses import asdict, replace

import study

from utils import hardware, presets
from utils.runtime import ROOT

chosen = study.options(["exam", "random_7b"])
data = str(ROOT / os.environ["DATA"]) if os.environ.get("DATA") else None
if chosen.quick:
    pocket = presets.PROFILES["pocket"]
    presets.PROFILES["pocket"] = replace(pocket, recipe=replace(pocket.recipe, steps=5))
    data = data or str(ROOT / "data" / "almanac" / "validation.jsonl")
run = study.chapter("00_start_here", SEED=chosen.seed, DATA=data)

figures = {name: run[name] for name in ("seconds", "log", "before", "after", "loss_before", "loss_after", "trainable")}
figures |= {"profile": run["world"].name, "recipe": asdict(run["recipe"]), "parameters": run["parameters"]}
figures |= {"dtype": str(hardware.compute_dtype(hardware.capability())), "rows": len(run["encoded"])}
figures |= {"peak_gib": run["peak"] or None, "invented_of_100": run["made_up"]}
study.write(chosen, f"exam_seed{chosen.seed}" if chosen.part == "exam" else "random_7b_t4_rules", figures)
