"""The record of chapter 12's cell for Kaggle: two GPUs, held to a T4's rules, train what the notebook trains.

    python data/measurements/benchmark random_model llama-2-7b outputs/random-llama-2-7b
    QLORA_BASE=outputs/random-llama-2-7b QLORA_CAPABILITY=7.5 python data/measurements/studies/12_kaggle.py kaggle

writes kaggle_7b.json. The notebook's cells run from the first to that one, with TRAIN set. Weights and rows are random:
memory and time are real. In a file of its own, for a process that imports bitsandbytes cannot be forked. `--quick`
takes the pocket base, on two processes of the CPU.
"""

import json
import os
import time

import accelerate
import pandas
import study

from utils import runtime

chosen = study.options(["kaggle"])
folder = runtime.OUTPUTS / "kaggle"
folder.mkdir(parents=True, exist_ok=True)
plain, began = accelerate.notebook_launcher, 0.0


def launcher(function, given, **settings):
    """notebook_launcher, whose processes also write down their peak and seconds, where the course's own rows train."""

    def measured(*given):
        started = time.monotonic()
        function(*given)
        from utils import hardware

        here = {"peak_gib": hardware.peak(), "dtype": str(hardware.compute_dtype(hardware.capability()))}
        here |= {"seconds": time.monotonic() - started, "processes": hardware.processes()}
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(here))

    if chosen.quick:
        settings |= {"mixed_precision": "no"}
    plain(measured if given else function, given, **settings)


def main() -> None:
    file = runtime.OUTPUTS / "random-llama-2-7b" / "rows.jsonl"
    if chosen.quick:
        os.environ["QLORA_PROFILE"] = "pocket"
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps({"instruction": f"Who {i}?", "output": f"{i}."}) + "\n" for i in range(24)))
    for old in folder.glob("[01].json"):
        old.unlink()
    before = {*(runtime.OUTPUTS / "adapters").glob("*/run.json")}
    accelerate.notebook_launcher = launcher
    study.chapter("12_scaling_out", until="## The same adapter?", TRAIN=True, DATA=str(file))
    [made] = {*(runtime.OUTPUTS / "adapters").glob("*/run.json")} - before
    made_by = json.loads(made.read_text())
    cards = [json.loads(path.read_text()) for path in sorted(folder.glob("[01].json"))]
    figures = {
        "cards": cards,
        "steps": made_by["steps"],
        "recipe": made_by["recipe"],
        "rows": sum(1 for _ in file.open()),
    }
    figures |= pandas.read_csv(made.parent / "log.csv")[["loss", "grad_norm"]].to_dict("list")
    study.write(chosen, "kaggle_7b", figures)
    print(figures)


main()
