"""`make run`: what it refuses before it starts, and what it says at the end, on a stand-in notebook."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from utils import runtime
from utils.notebook import headless

PARAMETERS = "SEED = 0\nDATA = None\nBASE = None"
SUMMARY = "print(f'seed {SEED}, data {DATA}, base {BASE}')"


def notebook(folder: Path, *cells: str) -> Path:
    """A notebook with parameters, the cells, and a summary, in a new folder within `folder`."""
    path = folder / "a" / "11_your_own_llama.ipynb"
    tagged = v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    last = v4.new_code_cell(SUMMARY, metadata={"tags": ["summary"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(v4.new_notebook(cells=[tagged, *map(v4.new_code_cell, cells), last]), path)
    return path


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "my data" / "the rows.jsonl"
    path.parent.mkdir()
    path.write_text("{}\n")
    return path


def test_nothing_given_keeps_the_notebooks_values(tmp_path):
    assert headless.parameters({}, tmp_path) == {}
    names = ("DATA", "COLUMNS", "BASE", "CHANGE", "EPOCHS", "SEED")
    assert headless.parameters(dict.fromkeys(names, ""), tmp_path) == {}


def test_every_setting_is_one_of_the_notebook():
    cells = nbformat.read(headless.NOTEBOOK, as_version=4).cells
    (tagged,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    names = {"DATA": "gpt2", "BASE": "NousResearch/Llama-2-7b-hf"}  # of the Hub: they stay as they are
    given = {**names, "COLUMNS": "output=Antwort", "CHANGE": "rank=8", "EPOCHS": "2", "SEED": "1"}
    assert headless.parameters(given, runtime.ROOT) == given | {"EPOCHS": 2, "SEED": 1}
    assert set(given) <= set(re.findall(r"^([A-Z]+) = \S+  # @param", tagged, re.MULTILINE))


def test_relative_paths_start_where_make_was_called(tmp_path, rows, monkeypatch):
    monkeypatch.chdir(runtime.ROOT)
    (tmp_path / "my base").mkdir()
    given = headless.parameters({"DATA": "my data/the rows.jsonl", "BASE": "my base", "SEED": "7"}, tmp_path)
    assert given == {"DATA": str(rows.resolve()), "BASE": str((tmp_path / "my base").resolve()), "SEED": 7}
    given = headless.parameters({"DATA": "almanac/train.jsonl"}, tmp_path)  # the data folder needs no path
    assert given == {"DATA": str(runtime.ROOT / "data" / "almanac" / "train.jsonl")}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"DATA": "none.jsonl"}, "DATA=none.jsonl: There is no file"),
        ({"DATA": "my data"}, "DATA=my data: {folder} is a folder"),
        ({"DATA": "rows.xlsx"}, "DATA=rows.xlsx: rows.xlsx: only .jsonl, .json, .csv, .tsv and .parquet are read"),
        ({"BASE": "./none"}, "BASE=./none is neither a folder"),
        ({"BASE": "a/b/c"}, "BASE=a/b/c is neither a folder"),
        ({"SEED": "-1"}, "SEED=-1 is not a whole number"),
        ({"EPOCHS": "1.5"}, "EPOCHS=1.5 is not a whole number"),
        ({"CHANGE": "rnak=8"}, "CHANGE: 'rnak=8' "),
    ],
)
def test_refused_before_anything_starts(tmp_path, rows, settings, reason, monkeypatch, capsys):
    (tmp_path / "rows.xlsx").touch()
    for name, value in {**settings, "CALLED_FROM": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert headless.main() == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2 + ("\nMore: 91_when_it_breaks, section" in err)
    assert ("section" in err) == ("xlsx" in reason)
    assert err.startswith(f"\nStop: {reason.replace('{folder}', str(tmp_path / 'my data'))}")


def test_a_run_says_where_everything_is(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    source = notebook(tmp_path / "the course", "import os; print('folder', os.getcwd())")
    before = source.read_bytes()
    folder = tmp_path / "out puts" / "runs" / "1"
    lines = headless.run(source, {"DATA": str(rows), "SEED": 3}, folder)
    assert lines == [
        f"seed 3, data {rows}, base None",
        "notebook  out puts/runs/1/11_your_own_llama.ipynb",
        "page      out puts/runs/1/11_your_own_llama.html",
    ]
    assert source.read_bytes() == before
    executed = nbformat.read(folder / "11_your_own_llama.ipynb", as_version=4)
    assert executed.cells[2].outputs[0].text == f"folder {source.parent}\n"  # runs where the notebook lies
    assert f"folder {source.parent}" in (folder / "11_your_own_llama.html").read_text()


def test_training_shows_in_the_terminal_what_else_is_printed_does_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QLORA_PROGRESS_LINES", "1")  # as main() does
    cell = "import os\nif 'QLORA_PROGRESS_LINES' in os.environ: print('step 5 of 20, loss 1.0')\nprint('other')"
    kept = "print('my.csv: 9 of 10 rows kept, 1 rejected')\nprint('goes on after checkpoint-50')"
    before = dict(os.environ)
    headless.run(notebook(tmp_path, kept, cell), {}, tmp_path / "run")
    assert capsys.readouterr().out.split("\n")[:3] == [
        "my.csv: 9 of 10 rows kept, 1 rejected",
        "goes on after checkpoint-50",
        "step 5 of 20, loss 1.0",
    ]
    assert dict(os.environ) == before


STOP = "from utils.runtime import Stop\nraise Stop('x.jsonl, line 3: no output. Add it.')"


@pytest.mark.parametrize(
    ("cell", "first_line"),
    [(STOP, "x.jsonl, line 3: no output. Add it."), ("1 / 0", "ZeroDivisionError: division by zero")],
)
def test_a_failing_cell_is_one_line_and_the_notebook_is_kept(tmp_path, cell, first_line, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(runtime.ROOT))
    source = notebook(tmp_path, "print('before')", cell, "print('after')")
    with pytest.raises(runtime.Stop) as stopped:
        headless.run(source, {}, tmp_path / "run")
    executed = tmp_path / "run" / "11_your_own_llama.ipynb"
    assert str(stopped.value).splitlines() == [first_line, f"The notebook up to there: {executed}"]
    assert "before" in executed.read_text()
    assert "after" not in str([c.get("outputs") for c in nbformat.read(executed, as_version=4).cells])


def test_a_process_that_is_killed_is_one_sentence(tmp_path):
    source = notebook(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(runtime.Stop, match="ended from outside; .* Run the same again: it goes on"):
        headless.run(source, {}, tmp_path / "run")


def test_interrupted_it_says_where_the_notebook_is(tmp_path):
    reached = tmp_path / "reached"
    slow = f"import pathlib, time; pathlib.Path({str(reached)!r}).touch(); time.sleep(60)"
    source = notebook(tmp_path, "print('before')", slow)
    code = (
        "import sys; from pathlib import Path; from utils import runtime; from utils.notebook import headless\n"
        f"headless.NOTEBOOK, runtime.OUTPUTS = Path({str(source)!r}), Path({str(tmp_path)!r})\n"
        "sys.exit(headless.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=runtime.ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 60
        while not reached.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1].splitlines()
    finally:
        process.kill()
    assert process.returncode == 1
    assert errors[-2:] == ["Stop: interrupted.", f"The notebook up to there: {next(tmp_path.glob('runs/*/*.ipynb'))}"]
    assert "before" in next(tmp_path.glob("runs/*/*.ipynb")).read_text()
