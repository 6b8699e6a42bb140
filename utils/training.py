"""One QLoRA run through trl's SFTTrainer, with the guards that a T4 and a CPU need."""

import tempfile
from math import ceil, isfinite

from transformers import TrainerCallback

from utils import progress
from utils.profile import Recipe, capability, compute_dtype
from utils.runtime import Stop


def arguments(recipe: Recipe, rows: int, folder: str):
    """trl's SFTConfig for a recipe on `rows` rows, valid from transformers 5.15 on."""
    import torch
    from trl import SFTConfig

    dtype = compute_dtype(capability())
    an_epoch = ceil(rows / (recipe.batch_size * recipe.accumulation))
    steps = min(recipe.steps, recipe.epochs * an_epoch)
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
        logging_steps=max(1, steps // 40),
        logging_nan_inf_filter=False,  # a non-finite loss must be seen, not averaged away
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=recipe.seed,
    )


def train(model, tokenizer, encoded, recipe: Recipe, live: bool = True) -> list[dict]:
    """Train the adapter of `model` in place on encoded rows; a live picture shows the loss unless `live` is False.

    An interrupt (the stop button) ends the training early and keeps what has been learned. `model.trained_steps`
    counts the steps that the adapter has had, over all calls.

    Returns:
        the log: a list of dicts with step, loss, grad_norm, learning_rate.

    Raises:
        Stop: nothing to train, a loss that is not finite, or a gradient of zero; the message says what to do.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if not before:
        raise Stop("No parameter of this model can be trained: add an adapter, or load it with is_trainable=True")
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer_class()(
            model=model,
            args=arguments(recipe, len(encoded), folder),
            train_dataset=encoded,
            processing_class=tokenizer,
            callbacks=[Guard(), progress.LiveLoss()] if live else [Guard()],
        )
        for callback in progress.NOISY:
            trainer.remove_callback(callback)
        # The trainer has rounded the adapter to bf16, which a T4 cannot train and which resumes inexactly.
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = before[name].float()
        try:
            trainer.train()
        except KeyboardInterrupt:
            print(f"Stopped by you after {trainer.state.global_step} steps. The adapter keeps what it has learned.")
    model.trained_steps = getattr(model, "trained_steps", 0) + trainer.state.global_step
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def peak_gib() -> float | None:
    """Most GPU memory that torch had allocated at once in this process, in GiB; None without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def _trainer_class():
    """SFTTrainer, which on a CPU computes the same loss from the labelled positions alone.

    trl 1.16 does so only where Triton runs. Elsewhere it scores every position of the batch, prompt and padding
    included, and then masks them: a quarter of the time of a run on two cores.
    """
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            # Other architectures may do more than this between their layers and the loss (Gemma 2 squeezes logits).
            if return_outputs or not isinstance(base, LlamaForCausalLM) or model.device.type != "cpu":
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            labels = inputs["labels"][:, 1:]
            scored = labels != -100
            hidden = base.model(inputs["input_ids"], inputs["attention_mask"], use_cache=False).last_hidden_state
            logits = base.lm_head(hidden[:, :-1][scored]).float()
            summed = torch.nn.functional.cross_entropy(logits, labels[scored], reduction="sum")
            items = scored.sum() if num_items_in_batch is None else num_items_in_batch
            return summed / torch.as_tensor(items).clamp(min=1)  # no label at all: zero, which the guard explains

    return Trainer


class Guard(TrainerCallback):
    """Ends a run that cannot learn, and says why."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if "loss" in logs and not isfinite(logs["loss"]):
            raise Stop(
                f"The loss is {logs['loss']} at step {state.global_step}. Lower learning_rate (try a third), "
                "and look for empty or very long rows"
            )
        if logs.get("grad_norm") == 0:
            raise Stop(
                f"The gradient is exactly zero at step {state.global_step}: the adapter is frozen or every label is "
                "masked. Load an adapter with is_trainable=True, and check that rows have an output"
            )
