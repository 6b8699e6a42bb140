"""A program for test_resume: training runs with checkpoints that die where they are told to, or print how they ended.

    python -m utils.tests.training.killed_run BASE

It imports once, then reads a run a line from its input, as JSON: [FOLDER, MIRROR, WHERE]. Each run is a process of its
own, forked from the one that has only imported; answered is [return code, stdout, stderr].

WHERE: "step N" (after step N), "save N" (half-way through writing the Nth torch file), "rename N" and "renamed N"
(before and after the Nth renaming of a checkpoint), "interrupt N" (the stop button during step N), "never 0".
"""

# ruff: noqa: E402 - quiet() comes before the imports, as it does in a notebook
from utils import runtime
from utils.data import dataset
from utils.models import adapters, loading
from utils.training import checkpoints
from utils.training.trainer import train
from utils.tests import tiny

runtime.quiet()

import hashlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import bitsandbytes  # noqa: F401 - it and trl are imported by utils where they are needed: here for all runs
import torch
from transformers import TrainerCallback
from trl import SFTTrainer  # noqa: F401


calls = 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(original, number: int, before: bool = False, spoil: bool = False):
    """`original`, but its call of that number is the last thing that this process does."""

    def call(*arguments, **named):
        global calls
        calls += 1
        if calls < number:
            return original(*arguments, **named)
        if not before:
            original(*arguments, **named)
        if spoil:
            os.truncate(arguments[1], Path(arguments[1]).stat().st_size // 2)
        die()

    return call


class AtStep(TrainerCallback):
    def __init__(self, what: str, number: int):
        self.what, self.number, self.first_step = what, number, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.first_step = self.first_step or state.global_step
        if self.what == "step" and state.global_step == self.number:
            die()

    def on_substep_end(self, args, state, control, **kwargs):
        if self.what == "interrupt" and state.global_step == self.number - 1:
            signal.raise_signal(signal.SIGINT)


def run(base: str, folder: str, mirror: str, where: str) -> None:
    what, number = where.split()[0], int(where.split()[1])
    if what == "save":
        torch.save = counted(torch.save, number, spoil=True)
    if what in ("rename", "renamed"):
        checkpoints.Checkpoints._replace = staticmethod(counted(os.replace, number, before=what == "rename"))
    tokenizer = loading.load_tokenizer(base)
    encoded, _ = dataset.encode(tokenizer, tiny.ROWS, tiny.TWO_PASSES.max_length)
    model = adapters.add(loading.load_base(base), tiny.TWO_PASSES)
    saved = checkpoints.Checkpoints(folder, every=2, mirror=mirror or None)
    at_step = AtStep(what, number)
    log = train(
        model, tokenizer, encoded, tiny.TWO_PASSES, False, held_out=encoded, checkpoints=saved, callbacks=[at_step]
    )
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            digest.update(parameter.detach().numpy().tobytes())
    figures = [[entry.get(key) for key in ("step", "loss", "grad_norm", "learning_rate", "eval_loss")] for entry in log]
    result = {"adapter": digest.hexdigest(), "log": figures, "steps": model.trained_steps}
    print(json.dumps([result, at_step.first_step]))


def forked(base: str, folder: str, mirror: str, where: str) -> list:
    """Return code (negative: the signal), stdout and stderr of a run in a process of its own."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        if not (child := os.fork()):
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            try:
                run(base, folder, mirror, where)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told = [file.seek(0) or file.read() for file in (out, errors)]
    return [code, *told]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(forked(sys.argv[1], *json.loads(line))), flush=True)
