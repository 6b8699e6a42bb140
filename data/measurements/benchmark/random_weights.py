"""A model of random weights on disk, in 16 bits, for what wants to load one: Unsloth, and chapter 00 on a GPU."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.data import dataset, template
from utils.models import loading
from utils.notebook import measurements
from utils.planning import random_model
from utils.presets import PROFILES


def rows(lengths: Sequence[int]) -> list[dict]:
    """Rows of random words of the almanac, each nearly as many tokens long as `lengths` says."""
    tokenizer, draw, found = loading.load_tokenizer(PROFILES["pocket"].base), random.Random(0), []
    words = sorted({word for row in dataset.load(PROFILES["pocket"]).train for word in row["instruction"].split()})
    for length in lengths:
        texts = {"instruction": "", "output": draw.choice(words)}
        while (missing := length - len(template.encode(tokenizer, texts)["input_ids"])) > 0:
            part = "instruction" if len(texts["instruction"]) < 50 or draw.random() < 0.4 else "output"
            texts[part] = " ".join([texts[part], *draw.choices(words, k=1 + missing // 6)]).strip()
        found.append(texts)
    return found


def write(target: str, folder: str) -> None:
    """A model of `target`'s shape (as `random_model.config` names it), a tokenizer, rows.jsonl as long as Alpaca's."""
    model = random_model.build(random_model.config(target), four_bit=False, dtype=torch.float16)
    model.save_pretrained(folder)
    tokenizer = loading.load_tokenizer(PROFILES["pocket"].base)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    lines = [json.dumps(row) for row in rows(measurements.read("speed_real_7b")["figures"]["lengths"] * 3)]
    Path(folder, "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
