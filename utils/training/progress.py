"""What a training run shows while it runs: one picture, updated in place."""

import base64
import io
import os
import time
from datetime import timedelta

from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.notebook import NotebookProgressCallback

from utils import hardware
from utils.notebook import figures

# What the trainer would print instead: times and bars that differ from run to run.
NOISY = (PrinterCallback, ProgressCallback, NotebookProgressCallback)


class LiveLoss(TrainerCallback):
    """Loss and gradient norm against step, with the time left: a picture in a notebook, lines in a terminal.

    Under `make run` (QLORA_PROGRESS_LINES) both: the lines are for the terminal, the picture stays in the notebook.
    The picture's text form is constant, so that a notebook's stored outputs can be compared.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first_step = time.monotonic(), state.global_step
        self.first_tokens = state.num_input_tokens_seen
        self.lines = "QLORA_PROGRESS_LINES" in os.environ or get_ipython() is None
        self.handle = display(self._picture(state), raw=True, display_id=True) if get_ipython() else None

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        for key, name in (("loss", "loss"), ("eval_loss", "held-out loss")):
            if self.lines and key in logs:
                print(f"{self._status(state)}, {name} {logs[key]:.3f}", flush=True)
        if self.handle and ("loss" in logs or "eval_loss" in logs):
            self.handle.update(self._picture(state), raw=True)

    def _status(self, state) -> str:
        passed, done = time.monotonic() - self.start, state.global_step - self.first_step
        if not done:
            return f"step {state.global_step} of {state.max_steps}"
        clock = [timedelta(seconds=round(s)) for s in (passed, passed / done * (state.max_steps - state.global_step))]
        rate = (state.num_input_tokens_seen - self.first_tokens) / passed
        status = f"step {state.global_step} of {state.max_steps}, {clock[0]} passed, {clock[1]} left"
        status += f", {rate:,.0f} tokens/s" if rate else ""
        return f"{status}, peak {hardware.peak():.1f} GiB" if hardware.peak() else status

    def _picture(self, state) -> dict:
        figure = Figure(figsize=(figures.WIDTH, 3.8), layout="constrained")
        losses, norms = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        for axes, key, color, label, marker in (
            (losses, "loss", figures.ADAPTER, "training", None),
            (losses, "eval_loss", figures.OTHER, "held out", "o"),
            (norms, "grad_norm", figures.REFERENCE, None, None),
        ):
            points = [(entry["step"], entry[key]) for entry in state.log_history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker)
        if any("eval_loss" in entry for entry in state.log_history):
            losses.legend()
        title = self._status(state)
        losses.set(xlim=(0, state.max_steps), ylim=(0, None), ylabel="loss (nats a token)", title=title)
        norms.set(ylim=(0, None), xlabel="step", ylabel="grad norm")
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=100)
        return {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": "[training loss, live]"}
