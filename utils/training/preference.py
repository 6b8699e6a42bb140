"""DPO: an adapter learns which of two answers to prefer. `build` makes trl's trainer, for `trainer.run`."""

import tempfile
from dataclasses import fields
from hashlib import sha256

from datasets import Dataset
from peft import get_peft_model_state_dict
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from utils import hardware
from utils.data import dataset, template
from utils.models import loading
from utils.presets import Recipe
from utils.runtime import Stop
from utils.training import guards, levers
from utils.training.trainer import Whole, arguments

SIDES = ("chosen", "rejected")


class Trainer(Whole, DPOTrainer):
    def _prepare_dataset(self, dataset, *args):
        return dataset  # encoded already, by our template

    def _load_from_checkpoint(self, folder, model=None):
        super()._load_from_checkpoint(folder, model)  # older versions leave "default" out where "ref" is beside it
        self.model.load_adapter(folder, "default", is_trainable=True)


def read(source: str) -> list[dict]:
    """Rows of a file with prompt, chosen, rejected; each answer must pass what `dataset.examine` checks."""
    found = [dataset.examine(source, {"instruction": "prompt", "output": side}) for side in SIDES]
    print(*dict.fromkeys(str(report).split("\n")[0] for report, _ in found), sep="\n")
    first, second = ({row.origin[1]: row for row in rows} for _, rows in found)
    return [
        first[at] | {"chosen": first[at]["output"], "rejected": second[at]["output"]} for at in first if at in second
    ]


def encode(tokenizer, rows: list[dict], max_length: int) -> Dataset:
    """Token ids of prompts and of both answers, EOS behind each; a pair with one too long is left out, with a line."""
    pairs = []
    for row in rows:
        row = {"instruction": row.get("prompt"), **row}
        prompt = template.encode_prompt(tokenizer, row)
        ids = {f"{s}_ids": template.encode(tokenizer, row | {"output": row[s]})["input_ids"] for s in SIDES}
        if max(map(len, ids.values())) <= min(max_length, tokenizer.model_max_length):
            pairs.append({"prompt_ids": prompt} | {name: whole[len(prompt) :] for name, whole in ids.items()})
    if len(pairs) < len(rows):
        print(f"{len(rows) - len(pairs)} of {len(rows)} pairs have an answer beyond {max_length} tokens: left out")
    return Dataset.from_list(pairs)


def build(model, tokenizer, pairs: Dataset, recipe: Recipe, checkpoints=None, callbacks=(), fast=None, **settings):
    """A `Trainer` whose policy is the adapter of `model`, in fp32, and whose reference is a frozen copy of it.

    `settings` are fields of DPOConfig (beta, loss_type ...); the rest is as in `trainer.build`. A batch holds
    `recipe.batch_size` pairs, so twice as many rows.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not before or not len(pairs):
        raise Stop("There are no pairs" if before else 'The adapter is frozen: model.set_adapter("default") first')
    loading.check(model, tokenizer)
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    if hardware.has_triton() if fast is None else fast:
        levers.pull(model)
    with guards.explained(recipe), tempfile.TemporaryDirectory() as folder:
        ours = arguments(recipe, len(pairs), folder, checkpoints.every if checkpoints else 0)
        names = {f.name for f in fields(TrainingArguments) if f.init} - {"accelerator_config", "parallelism_config"}
        args = DPOConfig(**{name: getattr(ours, name) for name in names}, max_length=None, **settings)
        args.ddp_find_unused_parameters, args._n_gpu = False, min(args.n_gpu, 1)
        made = Trainer(model, args=args, train_dataset=pairs, processing_class=tokenizer, callbacks=list(callbacks))
    for name, parameter in model.named_parameters():  # trl has rounded the adapter to bf16
        if name in before:
            parameter.data = before[name].float()
    reference = sha256(b"".join(t.cpu().numpy().tobytes() for t in get_peft_model_state_dict(model).values()))
    made.recipe, made.settings, made.checkpoints = recipe, settings | {"from": reference.hexdigest()[:12]}, checkpoints
    return made
