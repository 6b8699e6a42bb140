"""DPO: an adapter learns which of two answers to prefer. `build` makes trl's trainer, for `trainer.run`."""

import tempfile
from dataclasses import fields
from hashlib import sha256

from datasets import Dataset
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from utils import hardware
from utils.data import dataset, template
from utils.models import loading
from utils.presets import Recipe
from utils.runtime import Stop
from utils.training import guards, levers
from utils.training.trainer import Whole, arguments

SIDES, ANEW = ("chosen", "rejected"), {"accelerator_config", "parallelism_config"}  # made from scratch


class Trainer(Whole, DPOTrainer):
    def _prepare_dataset(self, dataset, *args):
        return dataset  # encoded already, by our template

    def _load_from_checkpoint(self, folder, model=None):
        super()._load_from_checkpoint(folder, model)  # older versions leave "default" out where "ref" is beside it
        self.model.load_adapter(folder, "default", is_trainable=True)


def read(source: str) -> list[dict]:
    """Rows of a file with prompt, chosen, rejected; each answer must pass what `dataset.examine` checks."""
    found = [dataset.examine(source, {"instruction": "prompt", "output": side}) for side in SIDES]
    print(*(f"{side}: {str(report).splitlines()[0]}" for side, (report, _) in zip(SIDES, found, strict=True)), sep="\n")
    one, two = ({row.origin[1]: row for row in rows} for _, rows in found)
    return [row | {"chosen": row["output"], "rejected": two[at]["output"]} for at, row in one.items() if at in two]


def encode(tokenizer, rows: list[dict], max_length: int) -> Dataset:
    """Token ids of prompts and of both answers, EOS behind each; a pair with one too long is left out, with a line."""
    pairs, limit = [], min(max_length, tokenizer.model_max_length)
    for row in ({"instruction": row.get("prompt"), **row} for row in rows):
        start = len(template.encode_prompt(tokenizer, row))
        ids = {s: template.encode(tokenizer, row | {"output": row[s]})["input_ids"] for s in SIDES}
        if max(map(len, ids.values())) <= limit:
            pairs.append({"prompt_ids": ids["chosen"][:start]} | {f"{s}_ids": ids[s][start:] for s in SIDES})
    if len(pairs) < len(rows):
        print(f"{len(rows) - len(pairs)} of {len(rows)} pairs have an answer beyond {limit} tokens: left out")
    return Dataset.from_list(pairs)


def build(model, tokenizer, pairs: Dataset, recipe: Recipe, checkpoints=None, callbacks=(), fast=None, **settings):
    """A `Trainer` whose policy is the adapter of `model`, in fp32, and whose reference ("ref") is a frozen copy of it.

    `settings` are fields of DPOConfig (beta, loss_type ...); the rest is as in `trainer.build`. A batch of pairs has
    twice as many rows. `gradient_checkpointing` above 1 recomputes every layer, as 1 does: for the reference trl
    switches it off, and then on again for all.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not before or not len(pairs):
        frozen = 'No parameter of this model can be trained: it is frozen. First: model.set_adapter("default")'
        raise Stop("There are no rows to train on: no pair is left" if before else frozen)
    loading.check(model, tokenizer)
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    if hardware.has_triton() if fast is None else fast:
        levers.pull(model)
    with guards.explained(recipe), tempfile.TemporaryDirectory() as folder:
        ours = arguments(recipe, len(pairs), folder, checkpoints.every if checkpoints else 0)
        args = {f.name: getattr(ours, f.name) for f in fields(TrainingArguments) if f.init and f.name not in ANEW}
        args = DPOConfig(**args, max_length=None, **settings)
        args.ddp_find_unused_parameters, args._n_gpu = False, min(args.n_gpu, 1)
        made = Trainer(model, args=args, train_dataset=pairs, processing_class=tokenizer, callbacks=list(callbacks))
    for name, values in before.items():  # trl has rounded the adapter to bf16, and peft 0.20 froze it beside its copy
        model.get_parameter(name).requires_grad_(True).data = values.float()
    begun = sha256(b"".join(values.float().cpu().numpy().tobytes() for values in before.values())).hexdigest()[:12]
    made.recipe, made.settings, made.checkpoints = recipe, settings | {"from": begun}, checkpoints
    return made
