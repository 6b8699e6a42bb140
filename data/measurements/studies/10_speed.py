"""The record of chapter 10 that is made on a CPU: the parts of a training step of the pocket model.

    python data/measurements/studies/10_speed.py step_pocket_cpu        step_pocket_cpu.json

Those made on a GPU come from `python data/measurements/benchmark`.
"""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import study
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from utils import presets
from utils.data import dataset
from utils.models import adapters, loading
from utils.training.trainer import train

POCKET, STEPS = presets.PROFILES["pocket"], 8
TOKENIZER = loading.load_tokenizer(POCKET.base)
ROWS = dataset.encode(TOKENIZER, dataset.load(POCKET).train[: 32 * STEPS], 512)[0]
BATCHES = [[ROWS[i] for i in range(first, first + 32)] for first in range(0, len(ROWS), 32)]


def fresh(four_bit=True):
    return adapters.add(loading.load_base(POCKET.base, four_bit=four_bit), POCKET.recipe)


def tensors(rows):
    """Token ids, mask and labels of a batch, filled up to its longest row."""
    lists = {key: [torch.tensor(row[key]) for row in rows] for key in ("input_ids", "labels")}
    ids = pad_sequence(lists["input_ids"], batch_first=True, padding_value=0)
    labels = pad_sequence(lists["labels"], batch_first=True, padding_value=-100)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([[len(row["input_ids"])] for row in rows]), labels


def loss_of(model, ids, mask, labels):
    """Cross-entropy at the labelled positions alone, as `utils.training.trainer` computes it on a CPU."""
    base, wanted = model.get_base_model(), labels[:, 1:]
    hidden = base.model(ids, mask.long(), use_cache=False).last_hidden_state[:, :-1][wanted != -100]
    return torch.nn.functional.cross_entropy(base.lm_head(hidden).float(), wanted[wanted != -100])


def bare_loop(model):
    """Seconds of each part of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, parts = torch.optim.AdamW(trained, lr=1e-3), []
    model.train()
    for batch in BATCHES:
        marks = [time.perf_counter()]
        inputs = [tensor.to(model.device) for tensor in tensors(batch)]
        marks.append(time.perf_counter())
        loss = loss_of(model, *inputs)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        parts.append(np.diff([*marks, time.perf_counter()]))
    return pd.DataFrame(parts, columns=["data", "forward", "backward", "optimizer"])


class Clock(TrainerCallback):
    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())


def with_trainer():
    """Seconds of a step of the trainer, from end to end."""
    clock, short = Clock(), replace(POCKET.recipe, steps=len(BATCHES), epochs=1)
    train(fresh(), TOKENIZER, ROWS, short, live=False, callbacks=[clock])
    return np.median(np.diff(clock.ends))


chosen = study.options(["step_pocket_cpu"])
threads = torch.get_num_threads()
variants = {"4-bit base": bare_loop(fresh()), "32-bit base": bare_loop(fresh(four_bit=False))}
torch.set_num_threads(1)
variants["4-bit base, one thread"] = bare_loop(fresh())
torch.set_num_threads(threads)
figures = {name: times.median().to_dict() for name, times in variants.items()} | {"threads": threads}
figures["trainer and bare loop, in turn"] = [
    (with_trainer(), bare_loop(fresh()).sum(axis=1).median()) for _ in range(1 if chosen.quick else 5)
]
study.write(chosen, chosen.part, figures)
