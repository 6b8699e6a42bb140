"""The records of chapter 02, for a GPU; the chapter's own layers and loop train and measure.

    python data/measurements/studies/02_adapters.py rank_sweep --seed 0             rank_sweep_seed0.json, and so on
    python data/measurements/studies/02_adapters.py cuda                            adapters_cuda.json
    QLORA_CAPABILITY=7.5 python data/measurements/studies/02_adapters.py cuda       adapters_cuda_t4_rules.json

The first trains with every rank, with attention or the MLP alone, and all weights; the others are the chapter's
equalities in 16 bits.
"""

import os

import study
import torch

from utils import evaluation, generation
from utils.models import loading


def measured(model, kind: str, **settings) -> dict:
    """What was trained, its loss on held-out rows, and right and asked by level on the whole exam."""
    levels, tokenizer = run["LEVELS"], run["tokenizer"]
    asked = [row for row in run["data"].exam if row["level"] in levels][:: 100 if chosen.quick else 1]
    marks = evaluation.exact_match(asked, generation.answer(model, tokenizer, asked, 24, batch_size=400))
    scores = {"exam": {level: [m["exact"], m["asked"]] for level, m in marks.items()}}
    scores["held_out_loss"] = evaluation.loss(model, tokenizer, run["held_out"])
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"targets": kind, "parameters": numbers} | settings | scores


def effective_ranks() -> dict:
    """How many equal terms would spread the energy of each change as evenly: exp of the entropy, mean over matrices.

    After Roy and Vetterli 2007, who normalise the singular values; here it is their squares.
    """

    def of(matrix) -> float:
        share = torch.linalg.svdvals(matrix.float()) ** 2
        return torch.distributions.Categorical(probs=share / share.sum()).entropy().exp().item()

    def mean(kinds, matrices) -> float:
        ranks = [of(matrix) for name, matrix in matrices.items() if name.split(".")[-2] in kinds]
        return sum(ranks) / len(ranks)

    change, mlp = run["change"], run["MLP"]
    kinds = {"q and k": ("q_proj", "k_proj"), "v and o": ("v_proj", "o_proj"), "MLP": mlp}
    found = {name: mean(wanted, change) for name, wanted in kinds.items()}
    return found | {"weights": mean(run["ATTENTION"] + mlp, run["weights"]), "random numbers": of(run["noise"])}


chosen = study.options(["rank_sweep", "cuda"])
if chosen.part == "cuda":
    run = study.chapter("02_adapters", until="## The same on a GPU")
    merging = {"into_4_bit": run["rounded_error"], "dequantized": run["dense_error"]}
    figures = {"dtype": str(run["dtype"]), "differences": run["seen"], "merge_error": merging}
    study.write(chosen, "adapters_cuda" + "_t4_rules" * ("QLORA_CAPABILITY" in os.environ), figures)
else:
    settings = {"BATCH": 16} if chosen.quick else {"STEPS": 100, "BATCH": 32}
    run = study.chapter("02_adapters", until="## Checkpointing on a frozen base", SEED=chosen.seed, **settings)
    ranks, attention, mlp = run["RANKS"], run["ATTENTION"], run["MLP"]
    plan = [("all", attention + mlp, r, 16) for r in ranks] + [("all", attention + mlp, r, r) for r in (1, 4, 64)]
    plan += [("attention", attention, 16, 16), ("MLP", mlp, 16, 16)]
    steps = 2 if chosen.quick else run["recipe"].steps
    figures = {"seed": chosen.seed, "steps": steps, "dtype": str(run["dtype"])}
    figures |= {"energy_at_16": run["at_16"], "effective_rank": effective_ranks(), "terms": run["terms"]}
    figures |= {"loss_by_terms": run["losses"], "first_step": {"norm": run["norms"], "effect": run["effects"]}}
    longer = loading.load_base(run["world"].base, four_bit=False).float().requires_grad_(True)
    run["fit"](longer, steps, 5e-4, chosen.seed)
    figures["runs"] = [measured(longer, "full")]
    for kind, targets, r, alpha in plan[-2:] if chosen.quick else plan:
        figures["runs"].append(measured(run["train_rank"](r, alpha, targets, steps), kind, rank=r, alpha=alpha))
        study.write(chosen, f"rank_sweep_seed{chosen.seed}", figures)  # after each: a run cut off leaves something
