"""The record of chapter 05: what a training makes the base forget, and how much of its own prose brings back.

    QLORA_PROFILE=pocket python data/measurements/studies/05_evaluation.py forgetting        forgetting.json

Five amounts of prose, three seeds each, measured with the chapter's own cells; half an hour on two CPU cores.
"""

from dataclasses import replace

import study
from datasets import Dataset

from utils import evaluation, presets
from utils.data import dataset
from utils.models import adapters
from utils.training import trainer

chosen = study.options(["forgetting"])
amounts, seeds = (0, 30, 100, 300, 1000), range(3)
if chosen.quick:
    pocket = presets.PROFILES["pocket"]
    rows = str(dataset.ALMANAC / "validation.jsonl")  # no exam: the held-out rows are the questions
    presets.pick = lambda: replace(pocket, data=rows, recipe=replace(pocket.recipe, steps=3))
    amounts, seeds = (0, 5), range(1)
run = study.chapter("05_evaluation", until="### Wilson or bootstrap?")
run["questions"] = run["data"].exam or run["questions"]  # all of them; the chapter asks every other one


def trial(texts: int, seed: int) -> dict:
    """Train with so many texts of the base's own in the mixture, and examine."""
    recipe = replace(run["recipe"], seed=seed)
    model = adapters.add(run["load"](), recipe)
    with model.disable_adapter():
        own = run["rehearsal"](model, texts, seed)
    trainer.train(model, run["tokenizer"], Dataset.from_list(run["rows"] + own), recipe, live=False)
    found = run["examine"](model)
    return {
        "texts": texts,
        "seed": seed,
        "prose_perplexity": run["perplexity"](found["prose"]),
        "facts": run["knows"](model).mean(),
        "exam": evaluation.exact_match(run["questions"], found["answers"]),
    }


stations = run["VARIANTS"] | {"with prose": {"adapter": run["second"]}}
results = {name: run["examine"](run["load"](**how)) for name, how in stations.items()}
models = {
    name: {"exact": int(found["exact"].sum()), "prose_perplexity": run["perplexity"](found["prose"])}
    for name, found in results.items()
}
figures = {"dtype": str(run["load"]().dtype), "questions": len(run["questions"]), "models": models}
figures["trials"] = [trial(texts, seed) for texts in amounts for seed in seeds]
study.write(chosen, "forgetting", figures)
