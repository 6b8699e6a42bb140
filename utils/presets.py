"""The two worlds: which base, which data, which recipe. Nothing else differs between a laptop and a GPU."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from utils.runtime import ROOT, Stop


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained. Field names are those of peft's LoraConfig and trl's SFTConfig."""

    steps: int  # optimizer steps, at most
    epochs: int  # passes over the data, at most: a small file of one's own is not read a hundred times
    batch_size: int  # rows a forward pass
    accumulation: int  # forward passes an optimizer step
    learning_rate: float
    max_length: int  # tokens a row, prompt and completion together
    gradient_checkpointing: bool  # recompute activations: less memory, about a third more time
    optimizer: str  # a name of transformers' OptimizerNames
    rank: int = 16
    lora_alpha: int = 16
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    seed: int = 0


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
        recipe=Recipe(
            steps=180,
            epochs=10,
            batch_size=32,
            accumulation=1,
            learning_rate=4e-3,
            max_length=512,
            gradient_checkpointing=False,
            optimizer="adamw_torch",
        ),
    ),
    "llama-2-7b": Profile(
        "llama-2-7b",
        base="NousResearch/Llama-2-7b-hf",
        data="mlabonne/mini-platypus",
        recipe=Recipe(
            steps=120,
            epochs=3,
            batch_size=1,  # batch, accumulation and checkpointing are what planning chooses for a T4 (notebook 09)
            accumulation=16,
            learning_rate=2e-4,
            max_length=1024,
            gradient_checkpointing=False,
            optimizer="paged_adamw_8bit",
        ),
    ),
}


def pick(default: str = "", base: str = "", data: str = "") -> Profile:
    """The profile of this run: QLORA_PROFILE, else `default`, else llama-2-7b with CUDA and pocket without.

    `base` and `data` replace the profile's own; so does QLORA_BASE.

    Raises:
        Stop: an unknown profile.
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
