"""The records of chapter 04.

    python data/measurements/studies/04_training.py learning_rate --seed 0      training_learning_rate_seed0.json

The same for length, long, batch, optimizer, known, strangers, strangers_long and strangers_few: each changes one thing,
trains, and asks the exam; minutes to an hour on two CPU cores. The chapter's loop and the trainer on one instruction set:

    ATEN_CPU_CAPABILITY=avx2 python data/measurements/studies/04_training.py drift      training_drift_avx2.json

And for a GPU the recipe of the profile at a T4's rules, stopped and resumed (training_7b.json). The rules are fp16,
memory-efficient attention alone, and 14.12 GiB for torch:

    python data/measurements/benchmark random_model llama-2-7b outputs/random-llama-2-7b
    QLORA_PROFILE=llama-2-7b QLORA_BASE=outputs/random-llama-2-7b QLORA_CAPABILITY=7.5 \\
        DATA=outputs/random-llama-2-7b/rows.jsonl python data/measurements/studies/04_training.py 7b
"""

import json
import os
import random
import tempfile
import time
from dataclasses import asdict, replace

import study
import torch
from transformers import TrainerCallback

from utils import evaluation, generation, hardware, presets
from utils.data import dataset
from utils.models import adapters, loading
from utils.training.checkpoints import Checkpoints
from utils.training.trainer import train

POCKET = presets.PROFILES["pocket"]
SWEEPS = {
    "learning_rate": {f"{v:g}": {"learning_rate": v} for v in (0.0004, 0.001, 0.004, 0.016)},
    "length": {str(v): {"steps": v} for v in (45, 90, 360)},
    "long": {"540": {"steps": 540}},
    "batch": {str(v): {"batch_size": v, "steps": 180 * 32 // v} for v in (8, 128)},
    "optimizer": {"adamw_8bit": {"optimizer": "adamw_8bit"}},
    "known": {"180 steps": {}},
    "strangers": {"180 steps": {}},
    "strangers_long": {"540 steps": {"steps": 540}},
    "strangers_few": {"400 steps": {"steps": 400}},  # 640 rows, twenty times over
}


def from_chapter(beginning: str, name: str, **names):
    """What one cell of the chapter defines, given the names that it needs."""
    cells = json.loads((study.ROOT / "notebooks" / "04_training.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    exec(next(source for source in sources if f"{beginning} {name}(" in source), names)
    return names[name]


def sweep(axis: str) -> dict:
    """Right answers and questions by level, and the held-out loss, for each value of what is changed."""
    data, tokenizer = dataset.load(POCKET), loading.load_tokenizer(POCKET.base)
    renamed = from_chapter("def", "renamed", data=data, dataset=dataset, json=json, random=random)
    rows = [renamed(row) for row in data.train] if axis.startswith("strangers") else data.train
    rows = rows[:640] if axis == "strangers_few" else rows
    some = slice(None, None, 50 if chosen.quick else 1)
    known = [row for row in data.exam if row["level"] == "seen form"]
    asked = [row for row in data.exam if row["level"] in ("seen form", "new phrasing")][some]

    def exact(model, asked: list[dict]) -> dict:
        marks = evaluation.exact_match(asked, generation.answer(model, tokenizer, asked))
        return {level: [m["exact"], m["asked"]] for level, m in marks.items()}

    def habits(model) -> dict:
        """How many of its own rows the model knows by heart, and how often it invents something about nobody."""
        own = exact(model, [row for row in rows if row["level"] == "seen form"][:: 10 if len(rows) > 640 else 1][some])[
            "seen form"
        ]
        kinds, nobody = {row["attribute"] for row in known[:300]}, [renamed(row) for row in known[:300][some]]
        values = {kind: {row["output"] for row in rows if row["attribute"] == kind} for kind in kinds}
        answers = generation.answer(model, tokenizer, nobody)
        invented = sum(said in values[row["attribute"]] for said, row in zip(answers, nobody, strict=True))
        return {"learned": own, "invented": [invented, len(nobody)]}

    found = {}
    for value, changes in SWEEPS[axis].items():
        recipe = replace(POCKET.recipe, seed=chosen.seed, **changes | ({"steps": 2} if chosen.quick else {}))
        model = adapters.add(loading.load_base(POCKET.base), recipe)
        taught, held_out = (dataset.encode(tokenizer, part, 512)[0] for part in (rows, data.held_out[some]))
        train(model, tokenizer, taught, recipe, live=False)
        found[value] = {"exam": exact(model, asked), "held_out_loss": evaluation.loss(model, tokenizer, held_out)}
        found[value] |= habits(model) if axis.startswith(("known", "strangers")) else {}
    return {"values": found}


def drift() -> dict:
    """Losses of the chapter's loop and of the trainer over the whole recipe; right answers to 300 questions."""
    run = study.chapter("04_training", until="Sixty steps", SEED=chosen.seed)
    recipe = replace(run["recipe"], steps=12) if chosen.quick else run["recipe"]
    questions = [row for row in run["data"].exam if row["level"] == "seen form"][: 5 if chosen.quick else 300]
    loop, library = run["fresh"](), run["fresh"]()
    by_hand = run["train_by_hand"](loop, run["encoded"], recipe)
    log = train(library, run["tokenizer"], run["encoded"], recipe, live=False)
    losses = {"by hand": [e["loss"] for e in by_hand], "trainer": [(e["step"], e["loss"]) for e in log]}
    answers = {
        name: generation.answer(model, run["tokenizer"], questions)
        for name, model in (("by hand", loop), ("trainer", library))
    }
    right = {name: evaluation.exact_match(questions, said)["seen form"]["exact"] for name, said in answers.items()}
    return {"losses": losses, "right": right}


class StopAfter(TrainerCallback):
    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def gpu() -> dict:
    """The whole run of the profile; the same stopped after 6 steps, and resumed until the 12th."""
    rules = {"device": "cpu"}
    if torch.cuda.is_available():
        os.environ.setdefault("QLORA_CAPABILITY", "7.5")
        rules = {"attention": "memory-efficient", "cap_gib": hardware.T4_GIB}  # the base is loaded by these
    world = presets.pick(data=os.environ.get("DATA", ""))
    recipe = replace(world.recipe, steps=14, batch_size=2) if chosen.quick else world.recipe
    tokenizer, skips = (
        loading.load_tokenizer(world.base),
        from_chapter("class", "Skips", TrainerCallback=TrainerCallback)(),
    )
    encoded, _ = dataset.encode(tokenizer, dataset.load(world).train, recipe.max_length)

    def run(*callbacks, checkpoints=None) -> list[dict]:
        hardware.free()
        model = adapters.add(loading.load_base(world.base), recipe)
        return train(model, tokenizer, encoded, recipe, checkpoints=checkpoints, callbacks=callbacks)

    began = time.monotonic()
    log = run(skips)
    figures = {"log": log, "seconds": time.monotonic() - began, "peak_gib": hardware.peak()}
    with tempfile.TemporaryDirectory() as folder:
        parts = [run(StopAfter(last), checkpoints=Checkpoints(folder, every=3)) for last in (6, 12)]
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(log, parts[1], strict=False)]
    lengths = sorted(len(row["input_ids"]) for row in encoded)
    return figures | {
        "skipped_steps": skips.count,
        "stopped_after": parts[0][-1]["step"],
        "resumed_loss_gaps": gaps,
        "steps": log[-1]["step"],
        "recipe": asdict(recipe),
        "dtype": str(hardware.compute_dtype(hardware.capability())),
        "rules": rules,
        "tokens_a_row": {"shortest": lengths[0], "median": lengths[len(lengths) // 2], "longest": lengths[-1]},
    }


chosen = study.options([*SWEEPS, "drift", "7b"])
if chosen.part == "7b":
    study.write(chosen, "training_7b", gpu())
elif chosen.part == "drift":
    study.write(chosen, f"training_drift_{torch.backends.cpu.get_cpu_capability().lower()}", drift())
else:
    study.write(chosen, f"training_{chosen.part}_seed{chosen.seed}", sweep(chosen.part))
