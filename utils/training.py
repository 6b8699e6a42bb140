"""One QLoRA run through trl's SFTTrainer, with the guards that a T4 and a CPU need."""

import hashlib
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import asdict
from math import ceil

from transformers import TrainerCallback

from utils import guards, leftovers, loading, progress
from utils.checkpoints import Checkpoints
from utils.profile import Recipe, capability, compute_dtype
from utils.runtime import Stop, versions
from utils.trainer import trainer_class


def arguments(recipe: Recipe, rows: int, folder: str, save_steps: int = 0, evaluate: bool = False):
    """trl's SFTConfig for a recipe on `rows` rows, valid from transformers 5.15 on.

    Args:
        save_steps: optimizer steps between two checkpoints; 0 for none.
        evaluate: compute the loss on held-out rows ten times.
    """
    import torch
    from trl import SFTConfig

    dtype = compute_dtype(capability())
    an_epoch = ceil(rows / (recipe.batch_size * recipe.accumulation))
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
        dataset_kwargs={"skip_prepare_dataset": True},  # rows are encoded by utils.dataset, labels and all
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


def train(
    model,
    tokenizer,
    encoded,
    recipe: Recipe,
    live: bool = True,
    held_out=None,
    checkpoints: Checkpoints | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict]:
    """Train the adapter of `model` in place on encoded rows; a live picture shows the loss unless `live` is False.

    The stop button ends the training after the step under way and keeps what has been learned; pressed again, at once.
    `model.trained_steps` counts the steps that the adapter has had, over all calls.

    Args:
        held_out: encoded rows whose loss is computed ten times on the way.
        checkpoints: where the run is saved every so many steps; what is there of this run already is not done again.
        callbacks: more of transformers' callbacks.

    Returns:
        the log: a list of dicts with step, loss, grad_norm, learning_rate, num_input_tokens_seen, and eval_loss where
        it was computed.

    Raises:
        Stop: nothing to train, no rows, rows that cannot be read any more, a loss that is not finite, a gradient of
            zero, memory or disk full, checkpoints of another run; the message says what to do.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not before:
        raise Stop("No parameter of this model can be trained: add an adapter, or load it with is_trainable=True")
    if not len(encoded):
        raise Stop("There are no rows to train on. Look at what was rejected or too long, in outputs/data")
    latest, interrupt = None, guards.Interrupt(save=checkpoints is not None)
    with guards.explained(recipe), tempfile.TemporaryDirectory() as folder:
        if checkpoints:
            checkpoints.claim(_run(model, encoded, recipe))
            latest = checkpoints.latest()
        save_steps = checkpoints.every if checkpoints else 0
        trainer = trainer_class()(
            model=model,
            args=arguments(recipe, len(encoded), folder, save_steps, evaluate=held_out is not None),
            train_dataset=encoded,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[guards.Guard(), interrupt, *callbacks, *([progress.LiveLoss()] if live else [])],
        )
        trainer.checkpoints = checkpoints
        for callback in progress.NOISY:
            trainer.remove_callback(callback)
        # The trainer has rounded the adapter to bf16, which a T4 cannot train and which resumes inexactly.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = before[name].float()
        try:
            with interrupt:
                trainer.train(resume_from_checkpoint=str(latest) if latest else None)
        finally:
            leftovers.clear(model)
    done = trainer.state.global_step
    if interrupt.asked and done < trainer.args.max_steps:
        goes_on = " Run this again and it goes on from there." if checkpoints else ""
        print(f"Stopped by you after {done} steps. The adapter keeps what it has learned.{goes_on}")
    if checkpoints:
        checkpoints.finish()
    # A checkpoint holds the whole adapter, so the steps of an earlier part of this run are not counted twice.
    model.trained_steps = done if latest else getattr(model, "trained_steps", 0) + done
    model.eval()
    return log_of(trainer.state.log_history)


def log_of(history: list[dict]) -> list[dict]:
    """The trainer's `log_history` as one dict a logged step; held-out losses stand beside the training loss."""
    evaluated = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    entries = [entry for entry in history if "loss" in entry]
    return [e | {"eval_loss": evaluated[e["step"]]} if e["step"] in evaluated else e for e in entries]


def _run(model, encoded, recipe: Recipe) -> dict:
    """What decides the result of a run, for `Checkpoints.claim`."""
    tokens = hashlib.sha256()
    for row in encoded:
        tokens.update(array("q", row["input_ids"] + row["labels"]).tobytes())
    return {
        "base": {"name": model.config._name_or_path, "fingerprint": loading.fingerprint(model)},
        "data": {"rows": len(encoded), "tokens": tokens.hexdigest()[:12]},
        "recipe": asdict(recipe),
        "versions": versions(),
    }
