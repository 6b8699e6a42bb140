"""Trained adapters on disk: outputs/adapters/<what made it>, whole or not there at all."""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from utils import dataset, loading
from utils.profile import Recipe
from utils.runtime import OUTPUTS, versions


def save(model, tokenizer, recipe: Recipe, rows: list[dict], report: dict) -> Path:
    """Save the adapter of `model`: safetensors and its config, the tokenizer, and run.json.

    run.json holds the base and its fingerprint, a hash of the training rows, the recipe, the steps trained, the
    versions, and `report`. The folder is named by a hash of all but the last, so that equal runs share one folder,
    and a run that was interrupted or continued has another.
    """
    run = _made_by(model, recipe, rows, getattr(model, "trained_steps", 0))
    final = _folder(run)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as unfinished:
        new, old = Path(unfinished) / "new", Path(unfinished) / "old"
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        run["base"] = model.get_base_model().config._name_or_path
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


def trained(base: str, tokenizer, rows: list[dict], recipe: Recipe):
    """The base in four bits with an adapter trained on `rows`: from disk if this very run was made, else trained now.

    Two notebooks that ask at once wait for each other, and one of them trains.
    """
    from filelock import FileLock
    from peft import PeftModel

    from utils import training

    model = loading.load_base(base)
    encoded, _ = dataset.encode(tokenizer, rows, recipe.max_length)
    folder = _folder(_made_by(model, recipe, rows, training.arguments(recipe, len(encoded), "").max_steps))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.exists():
            return PeftModel.from_pretrained(model, folder).eval()
        model = loading.add_adapter(model, recipe)
        training.train(model, tokenizer, encoded, recipe, live=False)
        save(model, tokenizer, recipe, rows, {})
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
    name = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    return OUTPUTS / "adapters" / name
