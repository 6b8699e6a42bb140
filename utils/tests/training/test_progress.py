"""The live picture of a run: a valid PNG with a constant text beside it in a notebook, lines elsewhere."""

import base64
import io
import sys
from types import SimpleNamespace

import pytest

from utils.training import progress


@pytest.fixture
def notebook(monkeypatch, tmp_path):
    """What a notebook's front end gets to see, message by message."""
    from IPython.core.displaypub import CapturingDisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    monkeypatch.delenv("QLORA_PROGRESS_LINES", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # a shell puts its own there
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    shell.display_pub = CapturingDisplayPublisher(parent=shell)
    yield shell.display_pub.outputs
    InteractiveShell.clear_instance()


def run(*logs: dict, steps: int = 20) -> None:
    """The callback through a run that logs these entries, every fifth step."""
    live, state = progress.LiveLoss(), start(steps=steps)
    live.on_train_begin(None, state, None)
    for log in logs:
        state.global_step += 5
        state.num_input_tokens_seen += 600
        state.log_history.append({**(log or {}), "step": state.global_step})
        live.on_log(None, state, None, logs=log)


def start(step: int = 0, steps: int = 20) -> SimpleNamespace:
    """What a callback sees of the trainer's state."""
    return SimpleNamespace(global_step=step, max_steps=steps, num_input_tokens_seen=0, log_history=[])


def pictures(messages: list[dict]) -> list[bytes]:
    return [base64.b64decode(message["data"]["image/png"], validate=True) for message in messages]


def test_one_picture_is_shown_and_then_updated_in_place(notebook):
    run({"loss": 2.0}, {"loss": 1.0})
    assert [message["update"] for message in notebook] == [False, True, True]
    assert len({message["transient"]["display_id"] for message in notebook}) == 1


def test_the_text_form_is_constant_so_that_stored_outputs_compare(notebook):
    run({"loss": 2.0}, {"loss": 1.0})
    assert {message["data"]["text/plain"] for message in notebook} == {"[training loss, live]"}


def test_every_picture_is_a_png_as_wide_as_a_notebook(notebook):
    import matplotlib.image

    run({"loss": 2.0}, {"loss": 1.0})
    shapes = {matplotlib.image.imread(io.BytesIO(png), format="png").shape[:2] for png in pictures(notebook)}
    assert shapes == {(380, 800)}


def test_the_picture_changes_with_each_loss(notebook):
    run({"loss": 2.0}, {"loss": 1.0})
    assert len(set(pictures(notebook))) == 3


@pytest.mark.parametrize("log", [{}, None, {"train_runtime": 1.0}])
def test_a_log_without_loss_shows_nothing_new(notebook, log):
    run(log)
    assert len(notebook) == 1


def test_a_second_run_starts_a_new_picture(notebook):
    live, state = progress.LiveLoss(), start(step=5)
    for _ in range(2):
        live.on_train_begin(None, state, None)
        live.on_log(None, state, None, logs={"loss": 1.0})
    assert [message["update"] for message in notebook] == [False, True] * 2


def test_a_run_leaves_no_figure_open(notebook):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    run({"loss": 2.0})
    assert pyplot.get_fignums() == before


def test_under_make_run_it_prints_lines_too(notebook, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_PROGRESS_LINES", "1")
    run({"loss": 2.0}, {"grad_norm": 1.0}, {"loss": 0.98765})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 5 of 20", "step 15 of 20"]
    assert [line.split()[-2:] for line in lines] == [["loss", "2.000"], ["loss", "0.988"]]
    assert len(notebook) == 3


def test_outside_a_notebook_it_prints_lines(monkeypatch, capsys):
    monkeypatch.delenv("QLORA_PROGRESS_LINES", raising=False)
    run({"loss": 2.0})
    assert capsys.readouterr().out.startswith("step 5 of 20, ")


def test_time_left_is_what_the_steps_so_far_took_each(monkeypatch, capsys):
    monkeypatch.setenv("QLORA_PROGRESS_LINES", "1")
    clock = iter([100.0, 130.0, 160.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run({"loss": 2.0}, {"loss": 1.0})
    assert [line.split(", ", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "0:30 passed, 1:30 left, 20 tokens/s, loss 2.000",
        "1:00 passed, 1:00 left, 20 tokens/s, loss 1.000",
    ]


def test_a_resumed_run_counts_time_and_tokens_from_where_it_goes_on(monkeypatch, capsys):
    monkeypatch.setenv("QLORA_PROGRESS_LINES", "1")
    clock = iter([100.0, 130.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    live, state = progress.LiveLoss(), start(step=10)
    state.num_input_tokens_seen = 1_000_000
    live.on_train_begin(None, state, None)
    state.global_step, state.num_input_tokens_seen = 15, 1_000_300
    live.on_log(None, state, None, logs={"loss": 2.0})
    assert capsys.readouterr().out == "step 15 of 20, 0:30 passed, 0:30 left, 10 tokens/s, loss 2.000\n"


def test_held_out_losses_are_shown_beside_the_others(notebook, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_PROGRESS_LINES", "1")
    run({"loss": 2.0}, {"eval_loss": 1.5})
    assert len(set(pictures(notebook))) == 3
    assert capsys.readouterr().out.splitlines()[1].endswith(", held-out loss 1.500")
