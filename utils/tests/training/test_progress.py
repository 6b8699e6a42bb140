"""The live picture of a run: a valid PNG with a constant text beside it in a notebook, lines elsewhere."""

import base64
import io
import sys
from types import SimpleNamespace

import matplotlib.image
import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from matplotlib import pyplot
from traitlets.config import Config

from utils.training import progress


@pytest.fixture
def notebook(monkeypatch, tmp_path):
    """What a notebook's front end gets to see, message by message."""
    monkeypatch.delenv("QLORA_PROGRESS_LINES", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # a shell puts its own there
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    shell.display_pub = CapturingDisplayPublisher(parent=shell)
    yield shell.display_pub.outputs
    InteractiveShell.clear_instance()


@pytest.fixture
def clock(monkeypatch):
    """Half a minute between two looks at the clock."""
    ticks = iter(range(100, 1000, 30))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(ticks)))


def run(*logs: dict | None, first: int = 0) -> None:
    """The callback through a run of 20 steps, from step `first` on, that logs these entries, every fifth step."""
    live = progress.LiveLoss()
    state = SimpleNamespace(global_step=first, max_steps=20, num_input_tokens_seen=1000 * first, log_history=[])
    live.on_train_begin(None, state, None)
    for log in logs:
        state.global_step += 5
        state.num_input_tokens_seen += 600
        state.log_history.append({**(log or {}), "step": state.global_step})
        live.on_log(None, state, None, logs=log)


def test_one_picture_is_shown_and_then_updated_in_place(notebook):
    open_before = pyplot.get_fignums()
    run({"loss": 2.0}, {"loss": 1.0})
    assert [message["update"] for message in notebook] == [False, True, True]
    assert len({message["transient"]["display_id"] for message in notebook}) == 1
    # A constant text, so that stored outputs compare; the picture changes, and is as wide as a notebook.
    assert {message["data"]["text/plain"] for message in notebook} == {"[training loss, live]"}
    pictures = {base64.b64decode(message["data"]["image/png"], validate=True) for message in notebook}
    assert len(pictures) == 3
    assert {matplotlib.image.imread(io.BytesIO(png), format="png").shape[:2] for png in pictures} == {(380, 800)}
    assert pyplot.get_fignums() == open_before
    run({}, None, {"loss": 1.0}, {"train_runtime": 1.0})  # a second run has its own; a log without loss shows nothing
    assert [message["update"] for message in notebook][3:] == [False, True]


def test_under_make_run_it_prints_lines_too(notebook, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_PROGRESS_LINES", "1")
    run({"loss": 2.0}, {"grad_norm": 1.0}, {"loss": 0.98765}, {"eval_loss": 1.5})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 5 of 20", "step 15 of 20", "step 20 of 20"]
    assert [line.split(", ")[-1] for line in lines] == ["loss 2.000", "loss 0.988", "held-out loss 1.500"]
    assert len({message["data"]["image/png"] for message in notebook}) == 4


def test_outside_a_notebook_it_prints_lines_and_the_time_that_is_left(clock, monkeypatch, capsys):
    monkeypatch.delenv("QLORA_PROGRESS_LINES", raising=False)
    run({"loss": 2.0}, {"loss": 1.0})
    run({"loss": 2.0}, first=10)  # resumed: time and tokens count from where it goes on
    assert capsys.readouterr().out.splitlines() == [
        "step 5 of 20, 0:00:30 passed, 0:01:30 left, 20 tokens/s, loss 2.000",
        "step 10 of 20, 0:01:00 passed, 0:01:00 left, 20 tokens/s, loss 1.000",
        "step 15 of 20, 0:00:30 passed, 0:00:30 left, 20 tokens/s, loss 2.000",
    ]
