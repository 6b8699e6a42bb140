"""The records of chapter 07: which base to merge into, llama.cpp's exam, and the way of a 7B.

    python data/measurements/studies/07_merge_and_export.py strength     export_strength_seed0.json; ten minutes, CPU
"""

import copy
from dataclasses import replace

import numpy as np
import study
import torch

from utils import evaluation, generation, presets
from utils.data import dataset, template
from utils.models import adapters, export, loading
from utils.training import trainer

PARTS = ("strength",)
chosen = study.options(PARTS)
pocket = presets.PROFILES["pocket"]
# (steps, learning rate): from a training that hardly changes the weights to the course's own, and a long one.
STRENGTHS = [(20, 2e-3), (180, 2e-4), (180, 5e-4), (180, 1e-3), (180, 2e-3), (180, 4e-3), (540, 4e-3)]


def with_weights(model, changed: dict):
    """A copy of a bare model with some matrices replaced."""
    other = copy.deepcopy(model)
    for name, weight in changed.items():
        other.get_submodule(name).weight.data = weight
    return other


def ways(bare, changes: dict) -> dict:
    """The three merges: name -> model. `changes`: module name -> what the adapter adds."""
    plain = {name: bare.get_submodule(name).weight.data for name in changes}
    trained = {name: export.nf4(weight) + changes[name] for name, weight in plain.items()}
    return {
        "as trained": with_weights(bare, trained),
        "into the original": with_weights(bare, {name: plain[name] + changes[name] for name in plain}),
        "back to four bits": with_weights(bare, {name: export.nf4(weight) for name, weight in trained.items()}),
    }


def logits(model, tokenizer, rows) -> list:
    """Logits of each row's prompt and expected answer, a tensor (tokens, vocabulary) a row."""
    ids = [template.encode(tokenizer, row)["input_ids"] for row in rows]
    with torch.no_grad():
        return [model(torch.tensor([row], device=model.device)).logits[0].float() for row in ids]


def kl(ours: list, theirs: list) -> float:
    """Mean Kullback-Leibler divergence a token, in nats, of `theirs` from `ours`."""
    a, b = (torch.cat(found).log_softmax(-1) for found in (ours, theirs))
    return (a.exp() * (a - b)).sum(-1).mean().item()


def strength(chosen) -> None:
    data, tokenizer = dataset.load(pocket), loading.load_tokenizer(pocket.base)
    questions = data.exam[::40] if chosen.quick else data.exam
    bare, results = loading.load_base(pocket.base, four_bit=False), []
    for steps, rate in STRENGTHS[:1] if chosen.quick else STRENGTHS:
        recipe = replace(pocket.recipe, steps=2 if chosen.quick else steps, learning_rate=rate, seed=chosen.seed)
        model = adapters.add(loading.load_base(pocket.base), recipe)
        trainer.train(model, tokenizer, dataset.encode(tokenizer, data.train, 512)[0], recipe, live=False)
        folder = adapters.save(model, tokenizer, recipe, data.train, {})
        changes = {name: change() for name, change in export.deltas(folder).items()}
        weights = {name: bare.get_submodule(name).weight.data for name in changes}
        ratio = {n: ((w - export.nf4(w)).norm() / changes[n].norm()).item() for n, w in weights.items()}
        found = {"steps": recipe.steps, "learning_rate": rate, "ratio": ratio, "ways": {}}
        found["median_ratio"] = float(np.median(list(ratio.values())))
        trained = logits(model, tokenizer, questions[::20])
        answers = {name: None for name in ("trained",)}
        for name, merged in ways(bare, changes).items():
            said = generation.answer(merged, tokenizer, questions)
            answers.setdefault("reference", said)  # as trained: equal to the trained model, four times as fast
            theirs = logits(merged, tokenizer, questions[::20])
            found["ways"][name] = {
                "exam": evaluation.exact_match(questions, said),
                "right": sum(a == row["output"] for a, row in zip(said, questions, strict=True)),
                "other_answers": sum(a != b for a, b in zip(said, answers["reference"], strict=True)),
                "kl_nats": kl(trained, theirs),
                "largest_logit_difference": max((a - b).abs().max().item() for a, b in zip(trained, theirs, strict=True)),
            }
        print(steps, rate, {n: (w["right"], w["other_answers"]) for n, w in found["ways"].items()}, flush=True)
        results.append(found)
    study.write(chosen, f"export_strength_seed{chosen.seed}", {"questions": len(questions), "trainings": results})


globals()[chosen.part](chosen)
