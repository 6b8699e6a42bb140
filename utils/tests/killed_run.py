"""A program for test_resume: a training run with checkpoints that dies where it is told to, or prints how it ended.

    python killed_run.py BASE FOLDER MIRROR [WHERE]

WHERE: "step N" (after step N), "save N" (half-way through writing the Nth torch file), "rename N" and "renamed N"
(before and after the Nth renaming of a checkpoint), "interrupt N" (the stop button during step N).
"""

# ruff: noqa: E402 - quiet() comes before the imports, as it does in a notebook
from utils import runtime

runtime.quiet()

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from utils import checkpoints, dataset, loading, training
from utils.tests import tiny

torch.set_num_threads(1)
base, folder, mirror = sys.argv[1:4]
what, number = (sys.argv[4] if len(sys.argv) > 4 else "never 0").split()
calls = 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(original, before: bool = False, spoil: bool = False):
    """`original`, but its call of that number is the last thing that this process does."""

    def call(*arguments, **named):
        global calls
        calls += 1
        if calls < int(number):
            return original(*arguments, **named)
        if not before:
            original(*arguments, **named)
        if spoil:
            os.truncate(arguments[1], Path(arguments[1]).stat().st_size // 2)
        die()

    return call


class AtStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if what == "step" and state.global_step == int(number):
            die()

    def on_substep_end(self, args, state, control, **kwargs):
        if what == "interrupt" and state.global_step == int(number) - 1:
            signal.raise_signal(signal.SIGINT)


if what == "save":
    torch.save = counted(torch.save, spoil=True)
if what in ("rename", "renamed"):
    checkpoints.Checkpoints._replace = staticmethod(counted(os.replace, before=what == "rename"))
tokenizer = loading.load_tokenizer(base)
encoded, _ = dataset.encode(tokenizer, tiny.ROWS, tiny.TWO_PASSES.max_length)
model = loading.add_adapter(loading.load_base(base), tiny.TWO_PASSES)
saved = checkpoints.Checkpoints(folder, every=2, mirror=mirror or None)
log = training.train(
    model, tokenizer, encoded, tiny.TWO_PASSES, False, held_out=encoded, checkpoints=saved, callbacks=[AtStep()]
)
digest = hashlib.sha256()
for _, parameter in sorted(model.named_parameters()):
    if parameter.requires_grad:
        digest.update(parameter.detach().numpy().tobytes())
figures = [[entry.get(key) for key in ("step", "loss", "grad_norm", "learning_rate", "eval_loss")] for entry in log]
print(json.dumps({"adapter": digest.hexdigest(), "log": figures, "steps": model.trained_steps}))
