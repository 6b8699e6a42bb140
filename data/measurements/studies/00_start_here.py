"""The records of chapter 00: one whole run of it.

    python data/measurements/studies/00_start_here.py exam --seed 0         exam_seed0.json, and so on

random_7b_t4_rules.json was made by an earlier version of the chapter, which took a base and data of one's own:
notebook 11 does that now.
"""

from dataclasses import asdict, replace

import study

from utils import hardware, presets

chosen = study.options(["exam"])
if chosen.quick:
    pocket = presets.PROFILES["pocket"]
    presets.PROFILES["pocket"] = replace(pocket, recipe=replace(pocket.recipe, steps=5))
run = study.chapter("00_start_here", bounds=not chosen.quick, SEED=chosen.seed)

figures = {"log": run["log"], "loss_before": run["loss_before"], "loss_after": run["loss_after"]}
figures |= {"before": run["before"], "after": run["after"]}
figures |= {"profile": run["world"].name, "recipe": asdict(run["recipe"])}
figures |= {"parameters": run["parameters"], "trainable": run["trainable"]}
figures |= {"dtype": str(hardware.compute_dtype(hardware.capability())), "rows": len(run["encoded"])}
figures |= {"peak_gib": hardware.peak() or None, "invented_of_100": run["made_up"]}
study.write(chosen, f"exam_seed{chosen.seed}", figures)
