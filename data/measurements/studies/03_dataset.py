"""The records of chapter 03.

    python data/measurements/studies/03_dataset.py validation_scale      a minute
    python data/measurements/studies/03_dataset.py dataset_trainings     eighteen trainings

Each writes the record of its name.
"""

import csv
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import study
from datasets import Dataset

from utils import evaluation, generation, presets
from utils.data import dataset
from utils.models import adapters, loading
from utils.training.trainer import train

# Run in a process of its own: the peak of a process counts all that it ever did.
PROBE = """
import re, resource, sys, time
from pathlib import Path
from utils.data import sources, validation
report = validation.Report("probe", Path(sys.argv[2]))
start = time.perf_counter()
kept = sum(1 for _ in validation.check(sources.read(Path(sys.argv[1])), report))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS; on Linux it counts the parent process, too
if sys.platform == "linux":
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(kept, report.rejected, seconds, peak)
"""
POCKET = presets.PROFILES["pocket"]


def validation_scale(quick: bool) -> dict:
    """Seconds and peak memory of checking files of a thousand to a million rows."""
    source = [*dataset.read(dataset.ALMANAC / "train.jsonl"), {"instruction": "?", "output": ""}]
    columns = ("instruction", "input", "output")

    def probe(suffix: str, size: int) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"probe{suffix}")
            with open(path, "w", encoding="utf-8", newline="") as file:
                cells = csv.writer(file)
                if suffix == ".csv":
                    cells.writerow(columns)
                for row in islice(cycle(source), size):
                    values = [row.get(column, "") for column in columns]
                    cells.writerow(values) if suffix == ".csv" else file.write(json.dumps(row) + "\n")
            command = [sys.executable, "-c", PROBE, str(path), folder]
            told = subprocess.run(command, cwd=study.ROOT, capture_output=True, text=True, check=True).stdout.split()
        assert int(told[0]) + int(told[1]) == size
        return {"rows": size, "seconds": float(told[2]), "peak_mb": float(told[3]) / 1e6}

    sizes = [1_000] if quick else [1_000, 10_000, 100_000, 1_000_000]
    return {suffix[1:]: [probe(suffix, size) for size in sizes] for suffix in (".jsonl", ".csv")}


def dataset_trainings(quick: bool) -> dict:
    """Exact match: loss on the answer or on everything; the longest rows or random ones; split by row or by person."""
    chapter = study.chapter("03_dataset", until="### One threshold for all")
    small, levels, test, choose = (chapter[name] for name in ("small", "levels", "test", "choose"))
    questions = [q for level in levels for q in [r for r in test if r["level"] == level][: 1 if quick else 200]]
    lessons = dataset.read("almanac/train.jsonl")
    different = chapter["clean"](lessons, threshold=0.9)[0]

    def exam(taught, seed, steps, asked=questions, everything=False):
        """`everything`: the loss counts the prompt, too."""
        recipe = replace(POCKET.recipe, seed=seed, steps=2 if quick else steps, epochs=1000)
        model = adapters.add(loading.load_base(POCKET.base), recipe)
        ready, _ = dataset.encode(small, taught, recipe.max_length)
        if everything:
            ready = Dataset.from_list([{**e, "labels": e["input_ids"]} for e in ready])
        train(model, small, ready, recipe, live=False)
        return evaluation.exact_match(asked, generation.answer(model, small, asked))

    found = {name: {} for name in ("completion", "everything", "longest", "random", "leaky", "honest")}
    for seed in range(1 if quick else 3):
        found["completion"][seed] = exam(lessons, seed, 100)
        found["everything"][seed] = exam(lessons, seed, 100, everything=True)
        for rule in ("longest", "random"):
            found[rule][seed] = exam(choose(different, 500, rule, seed), seed, 100)
        for name, split in (("leaky", "by_row"), ("honest", "by_person")):
            taught, held_out = chapter[split]
            found[name][seed] = exam(taught, seed, 200, held_out[: 2 if quick else None])
    return found


parts = {"validation_scale": validation_scale, "dataset_trainings": dataset_trainings}
chosen = study.options(list(parts))
study.write(chosen, chosen.part, parts[chosen.part](chosen.quick))
