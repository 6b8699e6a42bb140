"""Trained adapters that are made once: outputs/adapters/<what made it> is loaded, or trained now."""

from contextlib import nullcontext
from pathlib import Path

import torch
from filelock import FileLock
from peft import PeftModel

from utils import hardware
from utils.data import dataset
from utils.models import adapters, loading
from utils.presets import Recipe
from utils.training import checkpoints, trainer


def trained_adapter(base: str, tokenizer, rows: list[dict], recipe: Recipe, mirror: str | Path | None = None):
    """The base in four bits with an adapter trained on `rows`: from disk if this very run was made, else trained now.

    A run that was cut off goes on from its last checkpoint, in this process or a later one. Two notebooks that ask at
    once wait for each other, and one of them trains. `mirror` is a folder that outlives this machine, such as one on
    Google Drive: checkpoints and the adapter are copied there, and looked for there. Under FSDP the model that is
    returned is cut: load the adapter in another process.
    """
    model = loading.load_base(base)
    encoded, _ = dataset.encode(tokenizer, rows, recipe.max_length)
    made_by = adapters.made_by(model, recipe, rows, trainer.steps(encoded, recipe))
    folder = adapters.folder_of(made_by)
    # Other versions go on with the checkpoints: a new runtime may have other packages.
    unfinished = adapters.folder_of({k: v for k, v in made_by.items() if k != "versions"}, "checkpoints")
    kept = mirror and Path(mirror) / "adapters" / folder.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    # No lock around a training of several processes: one would wait for it outside, for the others within.
    with FileLock(folder.with_suffix(".lock")) if hardware.processes() == 1 else nullcontext():
        if hardware.is_main() and kept and not folder.exists() and kept.exists():
            checkpoints.copy(kept, folder.parent)
        if hardware.from_main(folder.exists()):
            return PeftModel.from_pretrained(model, folder).eval()
        model = adapters.add(model, recipe)
        saved = checkpoints.Checkpoints(unfinished, mirror=mirror and Path(mirror) / "checkpoints" / unfinished.name)
        # On a GPU this may take an hour, which wants a picture; without one, notebooks' outputs are compared.
        log = trainer.train(model, tokenizer, encoded, recipe, live=torch.cuda.is_available(), checkpoints=saved)
        made = adapters.save(model, tokenizer, recipe, rows, {"last": log[-1] if log else {}}, log)
        if hardware.is_main() and made == folder:  # not one that was stopped
            if kept:
                try:
                    checkpoints.copy(folder, kept.parent)
                except OSError as error:  # hours of training must not end in an error because Drive is full
                    print(f"note: the adapter could not be copied to {kept.parent} ({error.strerror or error})")
            saved.delete()
        hardware.wait_for_all()
        return model
