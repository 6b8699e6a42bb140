"""Trained adapters on disk: outputs/adapters/<what made it>, whole or not there at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from utils import dataset, folders, loading
from utils.profile import Recipe
from utils.runtime import OUTPUTS, versions


def save(model, tokenizer, recipe: Recipe, rows: list[dict], report: dict, log: Sequence[dict] = ()) -> Path:
    """Save the adapter of `model`: safetensors and its config, the tokenizer, run.json, and the log as log.csv.

    run.json holds the base, its revision and its fingerprint, a hash of the training rows, the recipe, the steps
    trained, the versions, and `report`. The folder is named by a hash of what made the adapter, so that equal runs
    share one folder, and a run that was interrupted or continued has another.
    """
    run = _made_by(model, recipe, rows, getattr(model, "trained_steps", 0))
    final = _folder(run)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as unfinished:
        new, old = Path(unfinished) / "new", Path(unfinished) / "old"
        base = model.get_base_model().config
        run |= {"base": base._name_or_path, "base_revision": getattr(base, "_commit_hash", None)}
        model.peft_config["default"].revision = run["base_revision"]
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if log:
            import pandas

            pandas.DataFrame(log).set_index("step").to_csv(new / "log.csv")
        (new / "run.json").write_text(json.dumps(run | report, indent=2) + "\n", encoding="utf-8")
        try:
            if final.exists():
                os.replace(final, old)
            os.replace(new, final)
        except BaseException:
            if old.exists() and not final.exists():
                os.replace(old, final)
            raise
    return final


def trained(base: str, tokenizer, rows: list[dict], recipe: Recipe, mirror: str | Path | None = None):
    """The base in four bits with an adapter trained on `rows`: from disk if this very run was made, else trained now.

    A run that was cut off goes on from its last checkpoint, in this process or a later one. Two notebooks that ask at
    once wait for each other, and one of them trains.

    Args:
        mirror: a folder that outlives this machine, such as one on Google Drive. Checkpoints and the adapter are
            copied there, and looked for there.
    """
    import torch
    from filelock import FileLock
    from peft import PeftModel

    from utils import checkpoints, training

    model = loading.load_base(base)
    encoded, _ = dataset.encode(tokenizer, rows, recipe.max_length)
    made_by = _made_by(model, recipe, rows, training.arguments(recipe, len(encoded), "").max_steps)
    folder, unfinished = _folder(made_by), _unfinished(made_by)
    kept = mirror and Path(mirror) / "adapters" / folder.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if kept and not folder.exists() and kept.exists():
            folders.copy(kept, folder.parent)
        if folder.exists():
            return PeftModel.from_pretrained(model, folder).eval()
        model = loading.add_adapter(model, recipe)
        saved = checkpoints.Checkpoints(unfinished, mirror=mirror and Path(mirror) / "checkpoints" / unfinished.name)
        # On a GPU this may take an hour, which wants a picture; without one, notebooks' outputs are compared.
        live = torch.cuda.is_available()
        log = training.train(model, tokenizer, encoded, recipe, live=live, checkpoints=saved)
        made = save(model, tokenizer, recipe, rows, {"last": log[-1] if log else {}}, log)
        if made == folder:  # not one that was stopped
            if kept:
                try:
                    folders.copy(folder, kept.parent)
                except OSError as error:  # hours of training must not end in an error because Drive is full
                    print(f"note: the adapter could not be copied to {kept.parent} ({error.strerror or error})")
            saved.delete()
        return model


def _made_by(model, recipe: Recipe, rows: list[dict], steps: int) -> dict:
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return {
        "base_fingerprint": loading.fingerprint(base),
        "rows": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12],
        "recipe": asdict(recipe),
        "steps": steps,
        "versions": versions(),
    }


def _folder(made_by: dict) -> Path:
    return OUTPUTS / "adapters" / _hash(made_by)


def _unfinished(made_by: dict) -> Path:
    """Where the run's checkpoints are. Other versions go on with them: a new runtime may have other packages."""
    return OUTPUTS / "checkpoints" / _hash({k: v for k, v in made_by.items() if k != "versions"})


def _hash(made_by: dict) -> str:
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
