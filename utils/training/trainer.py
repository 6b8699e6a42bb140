"""One training run: `build` makes trl's trainer from model, rows and recipe; `run` trains, with guards and checkpoints.

`train` is both. Several processes may call the same (torchrun, accelerate, notebook_launcher): each trains on its share
of the rows, and the main one alone writes and prints.
"""

import hashlib
import json
import tempfile
from contextlib import suppress
from dataclasses import asdict
from math import ceil

import torch
import transformers
from bitsandbytes.optim import GlobalOptimManager
from trl import SFTConfig, SFTTrainer, pack_dataset

from utils import hardware
from utils.models import loading
from utils.presets import Recipe
from utils.runtime import Stop, versions
from utils.training import guards, levers, progress
from utils.training.checkpoints import Checkpoints


class Whole:
    """What `run` needs of a trl trainer, put before it in a class's bases: a checkpoint that is whole or not there."""

    recipe: Recipe
    settings: dict  # in which the run differs from what its recipe says
    checkpoints: Checkpoints | None = None
    penalty = None  # of a list of the trained weights; it joins the loss

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if hardware.sharded():  # autocast computes as on one card; FSDP's own casts alter numbers (chapter 12, part 5)
            plugin = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy, plugin.set_mixed_precision = None, lambda *args, **settings: None

    def _save_checkpoint(self, model, trial):
        folder = self.args.output_dir
        with self.checkpoints.saving(self.state.global_step) as unfinished:
            self.args.output_dir = str(unfinished)
            try:  # not trl's method, which adds a model card: nobody publishes a checkpoint
                transformers.Trainer._save_checkpoint(self, model, trial)
            finally:
                self.args.output_dir = folder


class Trainer(Whole, SFTTrainer):
    """SFTTrainer, which on a CPU computes the same loss from the labelled positions alone.

    trl 1.16 does so only where Triton runs. Elsewhere it scores every position of the batch, prompt and padding
    included, and then masks them: a quarter of the time of a run on two cores.
    """

    # Twice in each pass transformers would walk through the thousands of modules of a model with its adapter: to count
    # its parameters, and to put them into training mode. Where a slow host feeds a fast GPU that is a tenth of a pass.
    def floating_point_ops(self, inputs):
        return 0

    def training_step(self, model, *args, **kwargs):
        if not loading.bare(self.model).training:  # a PeftModel that was just made says yes, around a base that is not
            model.train()
        model.__dict__["train"] = lambda *_: model
        try:
            return super().training_step(model, *args, **kwargs)
        finally:
            del model.__dict__["train"]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self._loss(model, inputs, return_outputs, num_items_in_batch)
        if self.penalty and loading.bare(model).training:
            trained = [p for p in model.parameters() if p.requires_grad]
            loss = loss + self.penalty(trained) / self.current_gradient_accumulation_steps
        return loss

    def _loss(self, model, inputs, return_outputs, num_items_in_batch):
        base = loading.bare(model)
        # Other architectures may do more than this between their layers and the loss (Gemma 2 squeezes logits).
        # Autocast, and the sum of several processes' gradients, are in the forward of the wrapped model.
        plain = isinstance(base, transformers.LlamaForCausalLM) and not (self.args.fp16 or self.args.bf16)
        if return_outputs or not plain or model.device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        scored = labels != -100
        hidden = base.model(**{k: v for k, v in inputs.items() if k != "labels"} | {"use_cache": False})[0]
        logits = base.lm_head(hidden[:, :-1][scored]).float()
        summed = torch.nn.functional.cross_entropy(logits, labels[scored], reduction="sum")
        items = scored.sum() if num_items_in_batch is None else num_items_in_batch
        return summed / torch.as_tensor(items).clamp(min=1)  # no label at all: zero, which the guard explains


def packed(encoded, recipe: Recipe):
    """Encoded rows put together into packs of `recipe.pack_length` tokens (best fit, longest first), if it has packs.

    Stop if a row is longer than a pack, in which it would be cut.
    """
    if not recipe.pack_length or not len(encoded) or "seq_lengths" in encoded.column_names:
        return encoded
    if (longest := max(map(len, encoded["input_ids"]))) > recipe.pack_length:
        told = f"A row has {longest} tokens and a pack {recipe.pack_length}"
        raise Stop(f"{told}. Make pack_length at least as large as max_length")
    return pack_dataset(encoded, recipe.pack_length, "bfd")


def arguments(recipe: Recipe, rows: int, folder: str, save_steps: int = 0, evaluate: bool = False, packs: int = 0):
    """trl's SFTConfig for a recipe on `rows` rows, valid from transformers 5.15 on.

    It saves every `save_steps` (0: never); it evaluates ten times. If the rows are in `packs`, a step takes as many as
    come nearest to its rows.
    """
    dtype = hardware.compute_dtype(hardware.capability())
    batch, passes = recipe.batch_size, recipe.accumulation
    if packs:
        batch, passes = 1, max(1, round(batch * passes * packs / rows))
    steps = recipe.epochs * ceil((packs or rows) / (batch * passes * hardware.processes()))
    steps = min(steps, recipe.steps or steps)
    logging_steps = max(1, steps // 40)
    return SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=passes,
        packing=bool(packs),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(recipe.warmup_steps, steps // 5),
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optimizer,
        gradient_checkpointing=bool(recipe.gradient_checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        max_length=recipe.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},  # rows are encoded by utils.data, labels and all
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,  # a non-finite loss must be seen, not averaged away
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if evaluate else "no",
        eval_steps=4 * logging_steps,
        per_device_eval_batch_size=batch,
        prediction_loss_only=True,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=recipe.seed,
    )


def steps(encoded, recipe: Recipe) -> int:
    """Optimizer steps of a run on encoded rows."""
    packs = len(packed(encoded, recipe)) if recipe.pack_length else 0
    return arguments(recipe, len(encoded), "", packs=packs).max_steps


def build(
    model, tokenizer, encoded, recipe: Recipe, held_out=None, checkpoints=None, callbacks=(), fast=None, **settings
):
    """A `Trainer` for a run on encoded rows; the adapter of `model` is what it trains, in fp32.

    Args:
        held_out: encoded rows whose loss is computed ten times on the way.
        checkpoints: `Checkpoints`, where the run is saved; what is there of this run already is not done again.
        callbacks: more of transformers' callbacks.
        fast: pull the levers for a GPU (`levers.pull`). Default: if Triton runs here.
        settings: fields of SFTConfig that are to differ; `penalty`, of a list of the trained weights, joins the loss.

    Raises:
        Stop: nothing to train, no rows, what `loading.check` refuses, or packs that do not say where their rows end.
    """
    penalty = settings.pop("penalty", None)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not before:
        raise Stop("No parameter of this model can be trained: add an adapter, or load it with is_trainable=True")
    if not len(encoded):
        raise Stop("There are no rows to train on. Look at what was rejected or too long, in outputs/data")
    loading.check(model, tokenizer)
    rows, packs = len(encoded), packed(encoded, recipe)
    if hardware.has_triton() and not hardware.sharded() if fast is None else fast:
        levers.pull(model)
    if recipe.pack_length:
        levers.attend_by_row(model)
    # The trainer makes its folder at once, and never uses it: checkpoints have places of their own.
    with guards.explained(recipe), tempfile.TemporaryDirectory() as folder:
        saving = {"save_steps": checkpoints.every if checkpoints else 0, "evaluate": held_out is not None}
        args = arguments(recipe, rows, folder, **saving, packs=len(packs) if recipe.pack_length else 0)
        args.ddp_find_unused_parameters = False  # every adapter is used; transformers does not know a PeftModel
        args._n_gpu = min(args.n_gpu, 1)  # a process has one GPU, however many there are: trl refuses DataParallel
        if args.device.type == "cpu":  # one of several processes has cpu:1, from which torch 2.11 cannot go on
            args.__dict__["_setup_devices"] = torch.device("cpu")
        for name, value in settings.items():
            if not hasattr(args, name):
                raise TypeError(f"SFTConfig has no {name}")
            setattr(args, name, value)
        data = {"train_dataset": packs, "eval_dataset": held_out if held_out is None else packed(held_out, recipe)}
        trainer = Trainer(model, args, **data, processing_class=tokenizer, callbacks=list(callbacks))
    trainer.recipe, trainer.settings, trainer.checkpoints, trainer.penalty = recipe, settings, checkpoints, penalty
    if recipe.gradient_checkpointing > 1:
        trainer.add_callback(levers.CheckpointEvery(recipe.gradient_checkpointing))
    # The trainer has rounded the adapter to bf16, which a T4 cannot train and which resumes inexactly.
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = before[name].float()
    if args.packing or args.padding_free:
        given = {*packs[0], *trainer.data_collator([packs[0]])}
        if "cu_seq_lens_q" not in given or (args.packing and "seq_lengths" not in given):
            raise Stop(levers.NO_ENDS)
    return trainer


def run(trainer: Whole, live: bool = True) -> list[dict]:
    """Train what `trainer` was built for, in place; a live picture shows the loss unless `live` is False.

    The stop button ends the training after the step under way and keeps what has been learned; pressed again, at once.
    `model.trained_steps` counts the steps that the adapter has had, over all calls; `model.session` is (steps, tokens)
    of this one, without the earlier part of a run that it goes on with. Returns the log: dicts with step, loss,
    grad_norm, learning_rate, num_input_tokens_seen; and eval_loss, where computed. Stop says what to do: rows are gone,
    a loss is not finite, a gradient zero, memory or disk full, or checkpoints are another run's.
    """
    model, checkpoints = trainer.model, trainer.checkpoints
    latest, interrupt = None, guards.Interrupt(save=checkpoints is not None)
    for callback in progress.NOISY:
        trainer.remove_callback(callback)
    for callback in (guards.Guard(), interrupt, *([progress.LiveLoss()] if live and hardware.is_main() else [])):
        trainer.add_callback(callback)
    with guards.explained(trainer.recipe), interrupt:
        if checkpoints:
            checkpoints.claim(identity(trainer))
            latest = checkpoints.latest()
        try:
            with suppress(guards.Finished):
                trainer.train(resume_from_checkpoint=str(latest) if latest else None)
        finally:
            clear(model)
    done = trainer.state.global_step
    if interrupt.asked and done < trainer.args.max_steps and hardware.is_main():
        goes_on = " Run this again and it goes on from there." if checkpoints else ""
        print(f"Stopped by you after {done} steps. The adapter keeps what it has learned.{goes_on}")
    # A checkpoint holds the whole adapter, so the steps of an earlier part of this run are not counted twice.
    model.trained_steps = done if latest else getattr(model, "trained_steps", 0) + done
    model.session = done - interrupt.begun[0], trainer.state.num_input_tokens_seen - interrupt.begun[1]
    model.eval()
    history = trainer.state.log_history
    evaluated = {entry["step"]: {"eval_loss": entry["eval_loss"]} for entry in history if "eval_loss" in entry}
    return [entry | evaluated.get(entry["step"], {}) for entry in history if "loss" in entry]


def train(model, tokenizer, encoded, recipe: Recipe, live: bool = True, **more) -> list[dict]:
    """`build` and `run`: train the adapter of `model` in place and return the log. `more` goes to `build`."""
    return run(build(model, tokenizer, encoded, recipe, **more), live)


def identity(trainer: Whole) -> dict:
    """What decides the result of a run, for `Checkpoints.claim`."""
    model, tokens, recipe = trainer.model, hashlib.sha256(), asdict(trainer.recipe)
    split = {name: recipe.pop(name) for name in ("batch_size", "accumulation")} | {"processes": hardware.processes()}
    a_step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * hardware.processes()
    for row in trainer.train_dataset:
        tokens.update(json.dumps(row, sort_keys=True).encode())
    # A penalty is known by what it says of some numbers: functions have no other name that lasts.
    penalty = {"penalty": float(trainer.penalty([torch.linspace(-1, 1, 21)]))} if trainer.penalty else {}
    return {
        "base": {"name": model.config._name_or_path, "fingerprint": loading.fingerprint(model)},
        "data": {"rows": len(trainer.train_dataset), "tokens": tokens.hexdigest()[:12]},
        "recipe": recipe | trainer.settings | penalty | {"a_step": a_step},  # rows, or packs
        "split": split,
        "versions": versions(),
    }


def clear(model) -> None:
    """Take back what a trainer leaves on a model and in the process, so that the next run starts as the first did."""
    # accelerate does not prepare a model twice: the next trainer would compute without autocast.
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)
    loading.bare(model).__dict__.pop("forward", None)  # trl's, with the output head and the loss in one
    model.zero_grad(set_to_none=True)
    # For an 8-bit optimizer transformers enters the embedding in a list of the process, which would keep it alive.
    GlobalOptimManager.get_instance().initialize()
