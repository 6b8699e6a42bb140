"""kill -9 at any moment, a fresh process, and the same adapter to the last bit."""

import json
import os
import subprocess
import sys

import nbformat
import pytest


from utils.tests import tiny


class Runs:
    """A process that has imported everything and forks itself for each run: imports take longer than these runs."""

    def __init__(self, base: str):
        command = [sys.executable, "-m", "utils.tests.training.killed_run", base]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)

    def start(self, folder, where: str = "never 0", mirror="") -> subprocess.CompletedProcess:
        print(json.dumps([str(folder), str(mirror), where]), file=self.process.stdin, flush=True)
        return subprocess.CompletedProcess([], *json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate(timeout=60)  # the end of its input ends it


@pytest.fixture(scope="module")
def start(base):
    """A function that makes a run in a process of its own."""
    runs = Runs(base)
    yield runs.start
    runs.close()


def ended(run: subprocess.CompletedProcess, first_step: int) -> dict:
    """How it ended; it must have begun with this step, for a run that starts again from nothing ends alike."""
    assert run.returncode == 0, run.stderr
    result, began = json.loads(run.stdout.splitlines()[-1])
    assert began == first_step
    return result


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory) -> dict:
    """How the run ends when nothing happens to it, in a process that shares no import with the others."""
    runs = Runs(base)
    found = ended(runs.start(tmp_path_factory.mktemp("unbroken") / "run"), 1)
    runs.close()
    assert [entry[0] for entry in found["log"]] == [1, 2, 3, 4, 5, 6]
    assert found["log"][-1][-1] is not None  # a held-out loss
    return found


# Where it is killed (three torch files a checkpoint: optimizer, schedule, random numbers), the last whole checkpoint,
# and whether a half-written one is found.
KILLED = {
    "step 1": (0, False),
    "step 5": (4, False),
    "save 5": (2, True),
    "rename 2": (2, True),
    "renamed 2": (4, False),
}


@pytest.mark.parametrize("where", KILLED)
def test_kill_and_resume(start, unbroken, tmp_path, where):
    folder, (step, half_written) = tmp_path / "run", KILLED[where]
    killed = start(folder, where)
    assert killed.returncode == -9, killed.stderr
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4) if n <= step]
    after = start(folder)
    assert ended(after, step + 1) == unbroken
    assert ("skipped a checkpoint that was being written" in after.stdout) == half_written
    assert not list(folder.glob(".unfinished-*"))


def test_the_stop_button_saves_and_the_run_goes_on(start, unbroken, tmp_path):
    stopped = start(tmp_path / "run", "interrupt 3")
    assert "Stopped by you after 3 steps" in stopped.stdout
    assert ended(stopped, 1)["steps"] == 3
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    assert ended(start(tmp_path / "run"), 4) == unbroken


def test_a_new_machine_goes_on_from_the_mirror(start, unbroken, tmp_path):
    assert start(tmp_path / "run", "step 5", mirror=tmp_path / "drive").returncode == -9
    on_another = start(tmp_path / "another machine", mirror=tmp_path / "drive")
    assert "fetching checkpoint-" in on_another.stdout
    assert ended(on_another, 5) == unbroken


def test_the_cell_for_a_new_runtime_needs_only_the_settings(base, tmp_path):
    """Chapter 04's cell for the morning after, in a process where no other cell but the first two has run."""
    notebook = nbformat.read(ROOT / "notebooks" / "04_training.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.ROWS))
    program = [
        *cells[:2],
        f"DATA = {str(tmp_path / 'rows.jsonl')!r}",
        f"from utils import adapter; adapter.OUTPUTS = Path({str(tmp_path)!r})",
        next(source for source in cells if "trained_adapter(" in source),
    ]
    (tmp_path / "morning.py").write_text("\n".join(program))
    command, place = [sys.executable, str(tmp_path / "morning.py")], ROOT / "notebooks"
    run = subprocess.run(command, cwd=place, env={**os.environ, "QLORA_BASE": base}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.glob("adapters/*/adapter_model.safetensors"))
