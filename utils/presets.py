"""The two worlds: which base, which data, which recipe. Nothing else differs between a laptop and a GPU."""

import os
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

from utils.runtime import ROOT, Stop


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained. Field names are those of peft's LoraConfig and trl's SFTConfig."""

    epochs: int  # passes over the data
    batch_size: int  # rows a forward pass
    accumulation: int  # forward passes an optimizer step: it takes batch_size x accumulation rows
    learning_rate: float
    max_length: int  # tokens a row, prompt and completion together
    optimizer: str = "adamw_torch"  # a name of transformers' OptimizerNames
    steps: int = 0  # optimizer steps, at most; 0: as many as the epochs take
    pack_length: int = 0  # tokens of a pack, which a forward pass then takes in place of a batch; 0: no packs
    gradient_checkpointing: int = 0  # recompute activations: of no layer, of every one (1), of every n-th (n)
    rank: int = 16
    lora_alpha: int = 16
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass, at most, padding included."""
        return self.pack_length or self.batch_size * self.max_length

    def read_whole(self, rows: int, epochs: int = 0) -> "Recipe":
        """This recipe without a limit of steps, for a file of one's own: every row is read as often as any other.

        `epochs` says how often. If it does not: as the recipe does, or, where that would take more than its limit of
        steps, as often as comes near to the limit, and at least once.
        """
        near = round(self.steps * self.batch_size * self.accumulation / max(rows, 1)) or 1
        return replace(self, epochs=epochs or (min(self.epochs, near) if self.steps else self.epochs), steps=0)

    def changed(self, text: str) -> "Recipe":
        """This recipe with other values: "learning_rate=7e-5, rank=8". Stop if there is no such field or value."""
        known, found = {field.name: field for field in fields(self)}, {}
        for change in filter(None, map(str.strip, text.split(","))):
            name, _, value = (part.strip() for part in change.partition("="))
            try:
                found[name] = known[name].type(value)
                least = 1e-9 if known[name].default is MISSING or name == "rank" else 0
                if known[name].type is not str and not found[name] >= least:
                    raise ValueError
            except (KeyError, ValueError):
                every = ", ".join(f"{name}={value}" for name, value in asdict(self).items())
                raise Stop(f"CHANGE: {change!r} names no field of a recipe, or no value for it: {every}") from None
        return replace(self, **found)


@dataclass(frozen=True)
class Profile:
    """One world. `base` is a folder or a Hub name; `data` a JSONL file, or the name of a Hub data set."""

    name: str
    base: str
    data: str
    recipe: Recipe


PROFILES = {
    "pocket": Profile(
        "pocket",
        base=str(ROOT / "data" / "pocket-llama"),
        data=str(ROOT / "data" / "almanac" / "train.jsonl"),
        recipe=Recipe(epochs=10, batch_size=32, accumulation=1, learning_rate=4e-3, max_length=512, steps=180),
    ),
    "llama-2-7b": Profile(
        "llama-2-7b",
        base="NousResearch/Llama-2-7b-hf",
        data="mlabonne/mini-platypus",
        recipe=Recipe(
            epochs=3,
            batch_size=1,
            accumulation=16,
            learning_rate=2e-4,
            max_length=1024,
            optimizer="paged_adamw_8bit",
            pack_length=2048,  # a T4 has room for it with nothing recomputed; utils.planning.fit chooses for your card
        ),
    ),
}


def pick(default: str = "", base: str = "", data: str = "") -> Profile:
    """The profile of this run: QLORA_PROFILE, else `default`, else llama-2-7b with CUDA and pocket without.

    `base` and `data` replace the profile's own; so does QLORA_BASE. Stop if there is no such profile.
    """
    name = os.environ.get("QLORA_PROFILE") or default
    if not name:
        import torch

        name = "llama-2-7b" if torch.cuda.is_available() else "pocket"
    if name not in PROFILES:
        raise Stop(f"There is no profile {name!r}. Choose one of: {', '.join(PROFILES)}")
    profile = PROFILES[name]
    base = base or os.environ.get("QLORA_BASE", "") or profile.base
    if not Path(base).is_dir() and (ROOT / base).is_dir():  # typed from the course's folder, read in notebooks/
        base = str(ROOT / base)
    return replace(profile, base=base, data=data or profile.data)
