"""The record of chapter 10 that is made on a CPU: the parts of a training step of the pocket model.

    python data/measurements/studies/10_speed.py step_pocket_cpu        step_pocket_cpu.json

Those made on a GPU come from `python data/measurements/benchmark`.
"""

import study

chosen = study.options(["step_pocket_cpu"])
run = study.chapter("10_speed", until="These times depend on your computer")
figures = {name: times.median().to_dict() for name, times in run["variants"].items()} | {"threads": run["threads"]}
figures["trainer and bare loop, in turn"] = [
    (run["with_trainer"](), run["bare_loop"](run["fresh"](), run["batches"]).sum(axis=1).median())
    for _ in range(1 if chosen.quick else 5)
]
study.write(chosen, chosen.part, figures)
