"""A panel in the notebook: a question, the answers of base and adapter side by side, sampling, history, a stop button.

Widgets of ipywidgets 7.7 (Colab) and 8 alone; no server. What the buttons do are methods, so that tests can click.
"""

import threading
import time
from collections.abc import Sequence
from html import escape

from utils import streaming
from utils.runtime import Stop
from utils.streaming import Sampling

REDRAW = 0.05  # seconds between two messages to the page: faster than eyes, slower than tokens
BOX = "border:1px solid #BDBDBD;border-radius:4px;padding:6px;min-height:3em;line-height:1.4;white-space:pre-wrap"


def answer_html(title: str, text: str, kind: str) -> str:
    """One answer as HTML; `kind` becomes its class, by which a test finds it on the page. Text stays text."""
    return f'<b>{escape(title)}</b><div class="playground-{kind}" style="{BOX}">{escape(text)}</div>'


def history_html(history: Sequence[dict]) -> str:
    """The exchanges so far as a table, the latest on top."""
    if not history:
        return ""
    cells = ("question", "base", "adapter", "how")
    rows = "".join(
        "<tr>" + "".join(f'<td style="padding:2px 10px 2px 0;vertical-align:top">{escape(e[c])}</td>' for c in cells)
        for e in reversed(history)
    )
    widths = {"asked": 25, "base": 40, "fine-tuned": 20, "how": 15}
    head = "".join(f'<th style="text-align:left;width:{share}%">{title}</th>' for title, share in widths.items())
    return f'<table class="playground-history" style="width:100%;line-height:1.4"><tr>{head}</tr>{rows}</table>'


def how(sampling: Sampling) -> str:
    """The settings in a few words: what is off is left out."""
    if not sampling.temperature:
        told = ["greedy"]
    else:
        told = [f"temperature {sampling.temperature:g}", f"seed {sampling.seed}"]
        told += [f"top-k {sampling.top_k}"] * bool(sampling.top_k) + [f"top-p {sampling.top_p:g}"] * (
            sampling.top_p < 1
        )
    return ", ".join(
        told + [f"repetition penalty {sampling.repetition_penalty:g}"] * (sampling.repetition_penalty != 1)
    )


class Playground:
    """`view` is what to display; `history` a list of dicts with question, input, base, adapter, how, stopped.

    Answers are made in a thread of their own, so that the kernel can hear the stop button. One at a time: a click while
    an answer runs starts no second one. The adapter is switched off and on within each step, so do not use the same
    model in another cell while an answer runs.
    """

    def __init__(self, model, tokenizer, question: str = ""):
        import ipywidgets as w

        self.model, self.tokenizer, self.history = model, tokenizer, []
        self.message, self._thread = "", None
        self._stopped, self._starting = threading.Event(), threading.Lock()
        wide, label = w.Layout(width="98%"), {"description_width": "110px"}
        self.question = w.Textarea(question, description="question", placeholder="Ask something", rows=2, layout=wide)
        self.input = w.Text("", description="input", placeholder="(often empty)", layout=wide)
        slide = {"style": label, "layout": w.Layout(width="340px"), "continuous_update": False}
        self.settings = {
            "temperature": w.FloatSlider(0.0, min=0, max=2, step=0.1, description="temperature", **slide),
            "top_k": w.IntSlider(0, min=0, max=100, description="top-k (0: off)", **slide),
            "top_p": w.FloatSlider(1.0, min=0.05, max=1, step=0.05, description="top-p (1: off)", **slide),
            "repetition_penalty": w.FloatSlider(1.0, min=1, max=2, step=0.05, description="rep. penalty", **slide),
            "max_new_tokens": w.IntSlider(64, min=1, max=256, description="at most (tokens)", **slide),
            "seed": w.IntSlider(0, min=0, max=99, description="seed", **slide),
        }
        self.ask_button = w.Button(description="Ask", button_style="primary")
        self.stop_button = w.Button(description="Stop", disabled=True)
        self.clear_button = w.Button(description="Clear history")
        self.status, self.past = w.HTML(), w.HTML()
        self.base, self.adapter = (w.HTML(layout=w.Layout(width="49%")) for _ in range(2))
        self._show("", "")
        self.ask_button.on_click(self.ask)
        self.stop_button.on_click(self.stop)
        self.clear_button.on_click(self.clear)
        sliders = list(self.settings.values())
        columns = w.HBox([w.VBox(sliders[:3]), w.VBox(sliders[3:])])
        buttons = w.HBox([self.ask_button, self.stop_button, self.clear_button, self.status])
        answers = w.HBox([self.base, self.adapter])
        self.view = w.VBox([self.question, self.input, columns, buttons, answers, self.past])

    def ask(self, _button=None) -> None:
        """Start answering, unless an answer is running. What goes wrong appears in the panel."""
        with self._starting:
            if self._thread and self._thread.is_alive():
                self._tell("Still answering. Press Stop first.")
                return
            self._stopped.clear()
            row = {"instruction": self.question.value, "input": self.input.value}
            sampling = Sampling(**{name: slider.value for name, slider in self.settings.items()})
            self.ask_button.disabled, self.stop_button.disabled = True, False
            self._tell("answering ...")
            self._thread = threading.Thread(target=self._run, args=(row, sampling), daemon=True)
            self._thread.start()

    def stop(self, _button=None) -> None:
        """End the running answer after its next token; what has been said is kept."""
        self._stopped.set()

    def clear(self, _button=None) -> None:
        """Forget the history."""
        self.history.clear()
        self.past.value = ""

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the running answer, in a cell or a test. Returns whether it has ended."""
        if self._thread:
            self._thread.join(seconds)
        return not (self._thread and self._thread.is_alive())

    def _run(self, row: dict, sampling: Sampling) -> None:
        said, drawn, began, steps = ("", ""), 0.0, time.monotonic(), 0
        try:
            self._show(*said)
            for said in streaming.side_by_side(self.model, self.tokenizer, row, sampling):
                steps += 1
                if self._stopped.is_set():
                    break
                if time.monotonic() - drawn > REDRAW:
                    self._show(*said)
                    drawn = time.monotonic()
            self._show(*said)
            stopped = self._stopped.is_set()
            told = how(sampling) + ", stopped" * stopped
            self.history.append({"question": row["instruction"], "input": row["input"], "base": said[0]})
            self.history[-1] |= {"adapter": said[1], "how": told, "stopped": stopped}
            self.past.value = history_html(self.history)
            passed = time.monotonic() - began
            self._tell(f"{'stopped by you' if stopped else 'done'}: {steps} tokens at most, in {passed:.1f} s")
        except Stop as stop:
            self._tell(str(stop), wrong=True)
        except Exception as error:  # in a thread it would vanish in the server's log
            self._tell(f"{type(error).__name__}: {error}", wrong=True)
        finally:
            self.ask_button.disabled, self.stop_button.disabled = False, True

    def _show(self, base: str, adapter: str) -> None:
        self.base.value = answer_html("base", base, "base")
        self.adapter.value = answer_html("fine-tuned", adapter, "adapter")

    def _tell(self, text: str, wrong: bool = False) -> None:
        self.message = text
        colour = "#B00020" if wrong else "#595959"
        self.status.value = f'<span class="playground-status" style="color:{colour}">{escape(text)}</span>'
