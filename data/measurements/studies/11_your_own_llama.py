"""The record of chapter 11: an evening with a file of 3,000 rows, rehearsed on a GPU at a T4's rules.

    python data/measurements/benchmark random_model llama-2-7b outputs/random-llama-2-7b
    QLORA_PROFILE=llama-2-7b QLORA_BASE=outputs/random-llama-2-7b QLORA_CAPABILITY=7.5 \\
        python data/measurements/studies/11_your_own_llama.py evening      evening_7b.json

The notebook runs from the first cell to the last as `make run` runs it, with one epoch and a mirror folder. Weights and
rows are random: memory and time are real, answers and scores are not. Before training no answer ends early, so all have
256 tokens; after it they do end, so the time of "After" says nothing about longer answers.
"""

import csv
import json
import re
import shutil
import time
from pathlib import Path

import study
import torch
from benchmark.random_weights import rows

from utils import runtime
from utils.notebook import headless, measurements


def parts(executed: Path) -> dict[str, float]:
    """Seconds by part of the notebook, as its headings name them; without the time between cells."""
    found, heading = {}, "Setup"
    for cell in json.loads(executed.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown" and (named := re.search("^## (.+)", "".join(cell["source"]), re.MULTILINE)):
            heading = named[1]
        found[heading] = found.get(heading, 0) + (cell["metadata"].get("papermill", {}).get("duration") or 0)
    return found


def sizes(folder: Path) -> dict[str, float]:
    return {str(p.relative_to(folder)): p.stat().st_size / 1e6 for p in sorted(folder.rglob("*")) if p.is_file()}


chosen = study.options(["evening"])
folder = runtime.OUTPUTS / "runs" / time.strftime("evening_%H-%M-%S")
file = runtime.OUTPUTS / "evening.csv"
file.parent.mkdir(exist_ok=True)
lengths = measurements.read("speed_real_7b")["figures"]["lengths"] * (1 if chosen.quick else 30)
with file.open("w", encoding="utf-8", newline="") as opened:
    writer = csv.DictWriter(opened, ["instruction", "output"])
    writer.writeheader()
    writer.writerows(rows(lengths))
given = {"DATA": str(file), "EPOCHS": 1, "MIRROR": str(folder / "mirror")}
began = time.monotonic()
told = headless.run(headless.NOTEBOOK, given, folder)
seconds = time.monotonic() - began
card = dict(line.split(maxsplit=1) for line in told if len(line.split(maxsplit=1)) == 2)
made = runtime.ROOT / card["adapter"]
kept = {k: card[k] for k in ("rows", "recipe", "training", "loss")}
figures = {"rows": len(lengths), "seconds": seconds, "seconds by part": parts(folder / headless.NOTEBOOK.name)}
figures |= {"run card": kept, "adapter, MB": sizes(made)}
print("\n".join(told))
for name, s in figures["seconds by part"].items():
    print(f"{s:8.1f} s  {name}")
print(f"{seconds:8.1f} s  in all; GPU: {torch.cuda.is_available()}")
study.write(chosen, "evening_7b", figures)
shutil.rmtree(folder)
