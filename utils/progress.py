"""What a training run shows while it runs: one picture, updated in place."""

import base64
import io
import os
import time

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.notebook import NotebookProgressCallback

# What the trainer would print instead: times and bars that differ from run to run.
NOISY = (PrinterCallback, ProgressCallback, NotebookProgressCallback)


class LiveLoss(TrainerCallback):
    """Training loss against step, with the time left: a picture in a notebook, lines in a terminal.

    Under `make run` (QLORA_PROGRESS_LINES) both: the lines are for the terminal, the picture stays in the notebook.

    The picture's text form is constant, so that a notebook's stored outputs can be compared.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        from IPython import get_ipython
        from IPython.display import display

        self.points, self.start = [], time.monotonic()
        self.lines = "QLORA_PROGRESS_LINES" in os.environ or get_ipython() is None
        self.handle = display(self._picture(state), raw=True, display_id=True) if get_ipython() else None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        self.points.append((state.global_step, logs["loss"]))
        if self.lines:
            print(f"{self._status(state)}, loss {logs['loss']:.3f}", flush=True)
        if self.handle:
            self.handle.update(self._picture(state), raw=True)

    def _status(self, state) -> str:
        passed, done = time.monotonic() - self.start, state.global_step
        if not done:
            return f"step 0 of {state.max_steps}"
        left = passed / done * (state.max_steps - done)
        return f"step {done} of {state.max_steps}, {_clock(passed)} passed, {_clock(left)} left"

    def _picture(self, state) -> dict:
        from matplotlib.figure import Figure

        from utils import style

        figure = Figure(figsize=(style.WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
        if self.points:
            axes.plot(*zip(*self.points, strict=True), color=style.ADAPTER)
        axes.set(xlim=(0, state.max_steps), xlabel="step", ylabel="training loss", title=self._status(state))
        axes.set_ylim(bottom=0)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=100)
        return {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": "[training loss, live]"}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
