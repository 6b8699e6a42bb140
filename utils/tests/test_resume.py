"""kill -9 at any moment, a fresh process, and the same adapter to the last bit."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest

from utils.runtime import ROOT
from utils.tests import tiny


def start(base: str, folder, where: str = "", mirror: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.tests.killed_run", base, str(folder), str(mirror), *([where] * bool(where))]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def ended(run: subprocess.CompletedProcess) -> dict:
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory) -> dict:
    """How the run ends when nothing happens to it; and again, in the same folder."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    found = ended(start(base, folder))
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


@pytest.fixture(scope="module")
def resumed(base, tmp_path_factory) -> dict:
    """For each place: how the first process ended, what it left, and how a fresh process ended."""

    def die_and_go_on(where: str):
        folder = tmp_path_factory.mktemp("killed") / "run"
        killed = start(base, folder, where)
        left = sorted(path.name for path in folder.glob("checkpoint-*"))
        return killed, left, start(base, folder), list(folder.glob(".unfinished-*"))

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(KILLED, pool.map(die_and_go_on, KILLED), strict=True))


@pytest.mark.parametrize("where", KILLED)
def test_kill_and_resume(resumed, unbroken, where):
    killed, left, after, litter = resumed[where]
    step, half_written = KILLED[where]
    assert killed.returncode == -9, killed.stderr
    assert left == [f"checkpoint-{n}" for n in (2, 4) if n <= step]
    assert ended(after) == unbroken
    assert ("skipped a checkpoint that was being written" in after.stdout) == half_written
    assert not litter


def test_the_stop_button_saves_and_the_run_goes_on(base, unbroken, tmp_path):
    stopped = start(base, tmp_path / "run", "interrupt 3")
    assert "Stopped by you after 3 steps" in stopped.stdout
    assert ended(stopped)["steps"] == 3
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    assert ended(start(base, tmp_path / "run")) == unbroken


def test_a_new_machine_goes_on_from_the_mirror(base, unbroken, tmp_path):
    assert start(base, tmp_path / "run", "step 5", mirror=tmp_path / "drive").returncode == -9
    on_another = start(base, tmp_path / "another machine", mirror=tmp_path / "drive")
    assert "fetching checkpoint-" in on_another.stdout
    assert ended(on_another) == unbroken


def test_the_cell_for_a_new_runtime_needs_only_the_settings(base, tmp_path):
    """Chapter 04's cell for the morning after, in a process where no other cell but the first two has run."""
    notebook = nbformat.read(ROOT / "notebooks" / "04_training.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.ROWS))
    program = [
        *cells[:2],
        f"DATA = {str(tmp_path / 'rows.jsonl')!r}",
        f"from utils import adapter; adapter.OUTPUTS = Path({str(tmp_path)!r})",
        next(source for source in cells if "adapter.trained(" in source),
    ]
    (tmp_path / "morning.py").write_text("\n".join(program))
    command, place = [sys.executable, str(tmp_path / "morning.py")], ROOT / "notebooks"
    run = subprocess.run(command, cwd=place, env={**os.environ, "QLORA_BASE": base}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.glob("adapters/*/adapter_model.safetensors"))
