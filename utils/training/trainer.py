"""One training run: `build` makes trl's trainer from model, rows and recipe; `run` trains, with guards and checkpoints.

`train` is both. Several processes may call the same (torchrun, accelerate, notebook_launcher): each trains on its share
of the rows, and the main one alone writes and prints.
"""

import hashlib
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from math import ceil

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from utils import hardware
from utils.models import loading
from utils.presets import Recipe
from utils.runtime import Stop, versions
from utils.training import guards, progress
from utils.training.checkpoints import Checkpoints


class Trainer(SFTTrainer):
    """SFTTrainer with checkpoints that are whole, and on a CPU the same loss from the labelled positions alone.

    trl 1.16 does the latter only where Triton runs. Elsewhere it scores every position of the batch, prompt and padding
    included, and then masks them: a quarter of the time of a run on two cores.
    """

    recipe: Recipe
    identity: dict  # what decides the result of the run, for `Checkpoints.claim`
    checkpoints: Checkpoints | None = None
    fused_loss = False  # the model itself returns the loss (levers.liger_loss)

    def _save_checkpoint(self, model, trial):
        folder = self.args.output_dir
        with self.checkpoints.saving(self.state.global_step) as unfinished:
            self.args.output_dir = str(unfinished)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = folder

    def create_model_card(self, *arguments, **named):
        pass  # it would be written beside each checkpoint, and nobody publishes those

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.fused_loss:
            # With the number of labels Liger sums and divides once, in fp32. Its mean would divide before the 16-bit
            # gradient is stored, and small gradients would be lost.
            inputs = {k: v for k, v in inputs.items() if k != "use_cache"}
            output = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
            return (output.loss, output) if return_outputs else output.loss
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        # Other architectures may do more than this between their layers and the loss (Gemma 2 squeezes logits), and
        # several processes share gradients in the wrapped model's own forward.
        if return_outputs or not isinstance(base, LlamaForCausalLM) or model.device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        scored = labels != -100
        hidden = base.model(inputs["input_ids"], inputs["attention_mask"], use_cache=False).last_hidden_state
        logits = base.lm_head(hidden[:, :-1][scored]).float()
        summed = torch.nn.functional.cross_entropy(logits, labels[scored], reduction="sum")
        items = scored.sum() if num_items_in_batch is None else num_items_in_batch
        return summed / torch.as_tensor(items).clamp(min=1)  # no label at all: zero, which the guard explains


def arguments(recipe: Recipe, rows: int, folder: str, save_steps: int = 0, evaluate: bool = False) -> SFTConfig:
    """trl's SFTConfig for a recipe on `rows` rows, valid from transformers 5.15 on.

    Args:
        save_steps: optimizer steps between two checkpoints; 0 for none.
        evaluate: compute the loss on held-out rows ten times.
    """
    dtype = hardware.compute_dtype(hardware.capability())
    an_epoch = ceil(rows / (recipe.batch_size * recipe.accumulation * hardware.processes()))
    steps = min(recipe.steps, recipe.epochs * an_epoch)
    logging_steps = max(1, steps // 40)
    return SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(recipe.warmup_steps, steps // 5),
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optimizer,
        gradient_checkpointing=recipe.gradient_checkpointing,
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
        per_device_eval_batch_size=recipe.batch_size,
        prediction_loss_only=True,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=recipe.seed,
    )


def build(
    model,
    tokenizer,
    encoded,
    recipe: Recipe,
    held_out=None,
    checkpoints: Checkpoints | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings,
) -> Trainer:
    """The trainer of a run on encoded rows; the adapter of `model` is what it trains, in fp32.

    Args:
        held_out: encoded rows whose loss is computed ten times on the way.
        checkpoints: where the run is saved every so many steps; what is there of this run already is not done again.
        callbacks: more of transformers' callbacks.
        settings: fields of SFTConfig that are to differ from `arguments`.

    Raises:
        Stop: nothing to train, or no rows.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not before:
        raise Stop("No parameter of this model can be trained: add an adapter, or load it with is_trainable=True")
    if not len(encoded):
        raise Stop("There are no rows to train on. Look at what was rejected or too long, in outputs/data")
    scratch = tempfile.TemporaryDirectory()  # the trainer wants a folder; checkpoints have places of their own
    args = arguments(recipe, len(encoded), scratch.name, checkpoints.every if checkpoints else 0, held_out is not None)
    if hardware.processes() > 1:
        settings["ddp_find_unused_parameters"] = False  # every adapter is used; transformers does not know a PeftModel
    for name, value in settings.items():
        setattr(args, name, value)
    trainer = Trainer(model, args, train_dataset=encoded, eval_dataset=held_out, processing_class=tokenizer)
    trainer.recipe, trainer.checkpoints, trainer.scratch = recipe, checkpoints, scratch
    trainer.identity = _identity(model, encoded, recipe)
    for callback in progress.NOISY:
        trainer.remove_callback(callback)
    for callback in callbacks:
        trainer.add_callback(callback)
    # The trainer has rounded the adapter to bf16, which a T4 cannot train and which resumes inexactly.
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = before[name].float()
    return trainer


def run(trainer: Trainer, live: bool = True) -> list[dict]:
    """Train what `trainer` was built for, in place; a live picture shows the loss unless `live` is False.

    The stop button ends the training after the step under way and keeps what has been learned; pressed again, at once.
    `model.trained_steps` counts the steps that the adapter has had, over all calls.

    Returns:
        the log: a list of dicts with step, loss, grad_norm, learning_rate, num_input_tokens_seen, and eval_loss where
        it was computed.

    Raises:
        Stop: rows that cannot be read any more, a loss that is not finite, a gradient of zero, memory or disk full,
            checkpoints of another run; the message says what to do.
    """
    model, checkpoints = trainer.model, trainer.checkpoints
    latest, interrupt = None, guards.Interrupt(save=checkpoints is not None)
    for callback in (guards.Guard(), interrupt, *([progress.LiveLoss()] if live and hardware.is_main() else [])):
        trainer.add_callback(callback)
    with guards.explained(trainer.recipe):
        if checkpoints:
            checkpoints.claim(trainer.identity)
            latest = checkpoints.latest()
        try:
            with interrupt:
                trainer.train(resume_from_checkpoint=str(latest) if latest else None)
        finally:
            clear(model)
    done = trainer.state.global_step
    if interrupt.asked and done < trainer.args.max_steps and hardware.is_main():
        goes_on = " Run this again and it goes on from there." if checkpoints else ""
        print(f"Stopped by you after {done} steps. The adapter keeps what it has learned.{goes_on}")
    # A checkpoint holds the whole adapter, so the steps of an earlier part of this run are not counted twice.
    model.trained_steps = done if latest else getattr(model, "trained_steps", 0) + done
    model.eval()
    return log_of(trainer.state.log_history)


def train(model, tokenizer, encoded, recipe: Recipe, live: bool = True, **more) -> list[dict]:
    """`build` and `run`: train the adapter of `model` in place and return the log. `more` goes to `build`."""
    return run(build(model, tokenizer, encoded, recipe, **more), live)


def log_of(history: list[dict]) -> list[dict]:
    """The trainer's `log_history` as one dict a logged step; held-out losses stand beside the training loss."""
    evaluated = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    entries = [entry for entry in history if "loss" in entry]
    return [e | {"eval_loss": evaluated[e["step"]]} if e["step"] in evaluated else e for e in entries]


def clear(model) -> None:
    """Take back what a trainer leaves on a model and in the process, so that the next run starts as the first did."""
    from bitsandbytes.optim import GlobalOptimManager

    # accelerate does not prepare a model twice: the next trainer would compute without autocast.
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        model.__dict__.pop(name, None)
    model.zero_grad(set_to_none=True)
    # For an 8-bit optimizer transformers enters the embedding in a list of the process, which would keep it alive.
    GlobalOptimManager.get_instance().initialize()


def _identity(model, encoded, recipe: Recipe) -> dict:
    tokens = hashlib.sha256()
    for row in encoded:
        tokens.update(array("q", row["input_ids"] + row["labels"]).tobytes())
    return {
        "base": {"name": model.config._name_or_path, "fingerprint": loading.fingerprint(model)},
        "data": {"rows": len(encoded), "tokens": tokens.hexdigest()[:12]},
        "recipe": asdict(recipe),
        "versions": versions(),
    }
