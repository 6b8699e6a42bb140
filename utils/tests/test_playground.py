"""The panel without a page: its buttons are clicked, and what it shows is read from its widgets."""

import threading
import time

import pytest

from utils import loading, playground, streaming
from utils.playground import Playground
from utils.streaming import Sampling
from utils.tests import tiny

QUESTION = tiny.ROWS[0]["instruction"]


@pytest.fixture(scope="module")
def model(base):
    return loading.add_adapter(loading.load_base(base), tiny.RECIPE)


@pytest.fixture
def panel(model, tokenizer):
    panel = Playground(model, tokenizer, QUESTION)
    panel.settings["max_new_tokens"].value = 8
    yield panel
    panel.stop()
    assert panel.wait(30)


@pytest.fixture
def endless(monkeypatch):
    """Answers that go on until they are stopped; returns the list of answers that were begun."""
    begun = []

    def slowly(model, tokenizer, row, sampling):
        begun.append(row["instruction"])
        for n in range(10_000):
            time.sleep(0.01)
            yield "base " * n, "tuned " * n

    monkeypatch.setattr(streaming, "side_by_side", slowly)
    return begun


def settled(panel) -> str:
    assert panel.wait(30)
    assert not panel.ask_button.disabled and panel.stop_button.disabled
    return panel.status.value


def test_a_click_answers_and_remembers(panel, model, tokenizer):
    panel.ask_button.click()
    assert "done: 8 tokens" in settled(panel)
    *_, (base, tuned) = streaming.side_by_side(model, tokenizer, {"instruction": QUESTION}, Sampling(max_new_tokens=8))
    (entry,) = panel.history
    assert (entry["question"], entry["base"], entry["adapter"], entry["stopped"]) == (QUESTION, base, tuned, False)
    assert playground.answer_html("base", base, "base") == panel.base.value
    assert playground.answer_html("fine-tuned", tuned, "adapter") == panel.adapter.value


def test_the_settings_reach_the_sampling(panel, monkeypatch):
    seen = []
    monkeypatch.setattr(streaming, "side_by_side", lambda m, t, row, sampling: seen.append((row, sampling)) or iter(()))
    values = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2, "max_new_tokens": 3, "seed": 4}
    for name, value in values.items():
        panel.settings[name].value = value
    panel.input.value = "Ada Birch"
    panel.ask_button.click()
    settled(panel)
    assert seen == [({"instruction": QUESTION, "input": "Ada Birch"}, Sampling(**values))]
    assert panel.history[0]["how"] == "temperature 0.7, seed 4, top-k 5, top-p 0.9, repetition penalty 1.2"


def test_stop_ends_it_and_keeps_what_was_said(panel, endless):
    panel.ask_button.click()
    time.sleep(0.2)
    assert panel.ask_button.disabled and not panel.stop_button.disabled
    panel.stop_button.click()
    assert "stopped by you" in settled(panel)
    assert panel.history[0]["stopped"] and panel.history[0]["adapter"].startswith("tuned")
    assert panel.history[0]["how"] == "greedy, stopped"


def test_a_second_click_starts_no_second_answer(panel, endless):
    before = threading.active_count()
    for _ in range(5):
        panel.ask_button.click()
    assert threading.active_count() == before + 1
    assert "Still answering" in panel.status.value
    panel.stop_button.click()
    settled(panel)
    assert endless == [QUESTION]
    panel.ask_button.click()  # and afterwards one can ask again
    time.sleep(0.1)
    panel.stop_button.click()
    settled(panel)
    assert len(endless) == len(panel.history) == 2


def test_an_empty_question_is_said_in_the_panel(panel):
    panel.question.value = "  "
    panel.ask_button.click()
    assert "The question is empty" in settled(panel)
    assert panel.history == []


def test_an_error_appears_in_the_panel(panel, monkeypatch):
    def fails(*arguments):
        yield "some", "thing"
        raise RuntimeError("CUDA out of <memory>")

    monkeypatch.setattr(streaming, "side_by_side", fails)
    panel.ask_button.click()
    assert "RuntimeError: CUDA out of &lt;memory&gt;" in settled(panel)


def test_what_people_and_models_write_is_text(panel, monkeypatch):
    monkeypatch.setattr(streaming, "side_by_side", lambda *a: iter([("<b>base</b>", "<script>x</script>")]))
    panel.question.value = "<img src=x onerror=alert(1)>"
    panel.ask_button.click()
    settled(panel)
    shown = panel.base.value + panel.adapter.value + panel.past.value
    assert "<script>" not in shown and "<img" not in shown and "<b>base</b>&" not in shown
    assert "&lt;script&gt;" in panel.adapter.value and "&lt;img" in panel.past.value


def test_the_history_has_the_latest_on_top_and_can_be_cleared(panel):
    for question in ("First?", "Second?"):
        panel.question.value = question
        panel.ask_button.click()
        settled(panel)
    assert panel.past.value.index("Second?") < panel.past.value.index("First?")
    panel.clear_button.click()
    assert panel.history == [] and panel.past.value == ""


def test_it_uses_no_widget_that_7_7_lacks(panel):
    """Colab has ipywidgets 7.7.1: these are in both (and nothing is displayed into an Output, which threads upset)."""
    from ipywidgets import Widget

    used = {type(w).__name__ for w in Widget.widgets.values()} if hasattr(Widget, "widgets") else set()
    boxes = [panel.view]
    while boxes:
        box = boxes.pop()
        used.add(type(box).__name__)
        boxes += getattr(box, "children", ())
    assert used - {"Layout", "ButtonStyle", "SliderStyle", "DescriptionStyle", "TextStyle", "HTMLStyle"} <= {
        "VBox", "HBox", "Textarea", "Text", "FloatSlider", "IntSlider", "Button", "HTML"
    }  # fmt: skip
