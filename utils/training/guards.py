"""What ends a training run early, and says why: a guard on the log, the stop button, and errors explained."""

import re
import signal
import threading
import traceback
from contextlib import contextmanager
from math import isfinite

import torch
from transformers import TrainerCallback

from utils.hardware import from_main
from utils.presets import Recipe
from utils.runtime import Stop


class Guard(TrainerCallback):
    """Ends a run that cannot learn, and says why."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if "loss" in logs and not isfinite(logs["loss"]):
            told = f"The loss is {logs['loss']} at step {state.global_step}"
            rate = f"learning_rate={args.learning_rate / 3:.1g}"
            raise Stop(f"{told}. Look for empty or very long rows; or lower the rate (notebook 11: CHANGE = {rate!r})")
        if logs.get("grad_norm") == 0:
            rate = f" the rate of {args.learning_rate:g} is far too high (notebook 11: lower it in CHANGE),"
            rate = " every pair is learned (take fewer steps)," * (logs.get("rewards/margins", 0) > 0) + rate  # DPO
            told = f"The gradient is exactly zero at step {state.global_step}:{rate * (state.global_step > 1)}"
            told += " the adapter is frozen or every label is masked"  # at step 1 the rate has changed nothing yet
            raise Stop(f"{told}. Load an adapter with is_trainable=True, and check that rows have an output")


class Finished(Exception):
    """All steps were done in an earlier part of the run: transformers would take one more."""


class Interrupt(TrainerCallback):
    """Within `with`, the first interrupt ends the run after the step under way; the second one ends it at once.

    An optimizer step cut in two would leave some matrices of the adapter a step ahead of others.
    """

    def __init__(self, save: bool):
        self.save, self.asked, self.before, self.begun = save, False, None, (0, 0)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only there does Python take signals
            self.before = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, kind, *_):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
        self.asked = self.asked or kind is KeyboardInterrupt
        return kind is KeyboardInterrupt

    def _ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = state.global_step, state.num_input_tokens_seen  # of an earlier part of this run
        if state.global_step >= args.max_steps:
            raise Finished

    def on_step_end(self, args, state, control, **kwargs):
        self.asked = from_main(self.asked)  # several processes end after the same step
        if self.asked:
            control.should_training_stop = True
            control.should_save = self.save


@contextmanager
def explained(recipe: Recipe):
    """Say what an error from within the training means, and what to do about it."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if re.search("(closed|reset) by peer|Timed out waiting|NCCL communicator was aborted", str(error)):
            told = "Another process of this run has ended, or does not answer; its own output says why"
            raise Stop(f"{told}. Run this again: with checkpoints it goes on from the last one") from None
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        # Jupyter keeps the last error and the tensors in its frames: the next try would find no room.
        traceback.clear_frames(error.__traceback__)
        told = "The memory is full. Change the recipe (notebook 11: in CHANGE), first what stands first"
        raise Stop(f"{told}: {'; '.join(to_lower(recipe))}") from None
    except FileNotFoundError as error:
        told = f"{error.filename or error} has vanished while training read it. Is a drive no longer mounted?"
        raise Stop(f"{told} Load the data again, from a local folder, and run this again") from None


def to_lower(recipe: Recipe) -> list[str]:
    """What to change in a recipe that does not fit into memory, the change that costs least first."""
    batch, passes, pack, longest = recipe.batch_size, recipe.accumulation, recipe.pack_length, recipe.max_length
    shorter = f"max_length={longest // 2}" + f", pack_length={longest // 2}" * bool(pack)
    changes = [
        (pack > longest, f"pack_length={max(longest, pack // 2)} (about the same result)"),
        (batch > 1 and not pack, f"batch_size={batch // 2}, accumulation={2 * passes} (the same result)"),
        (recipe.gradient_checkpointing != 1, "gradient_checkpointing=1 (the same result, some 40 % more time)"),
        ("8bit" not in recipe.optimizer, "optimizer=paged_adamw_8bit"),
        (True, f"{shorter} (longer rows are left out)"),
        (recipe.rank > 8, f"rank={recipe.rank // 2}"),
    ]
    return [text for applies, text in changes if applies]
