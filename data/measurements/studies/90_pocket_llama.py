"""The record of chapter 90, and the pocket model itself: the chapter's full run, for a GPU.

    python data/measurements/studies/90_pocket_llama.py full        pocket_llama.json

The model goes to outputs/pocket-llama. (`--quick` is the chapter's rehearsal: no model.)
"""

import study

chosen = study.options(["full"])
run = study.chapter("90_pocket_llama", until="## What can four million parameters learn?", FULL=not chosen.quick)
losses, tokens, steps = run["losses"], len(run["tokens"]), run["STEPS"]
every = range(0, steps, 50)
study.write(
    chosen,
    "pocket_llama",
    {
        "documents": len(run["documents"]),
        "distinct": len(set(run["documents"])) / len(run["documents"]),
        "tokens": tokens,
        "steps": steps,
        "passes": steps * run["BATCH"] * run["LENGTH"] / tokens,
        "seconds": run["seconds"],
        "parameters": run["total"],
        "curve": {"step": [i + 1 for i in every], "loss": [losses[i] for i in every]},
        "facts": run["facts"],
        "people": len(run["people"]),
        "exact": run["exact"],
        "contains": run["contains"],
    },
)
