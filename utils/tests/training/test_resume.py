"""kill -9 at any moment, a fresh process, and the same adapter to the last bit.

    python -m utils.tests.training.test_resume BASE

imports once, then reads a run a line from its input, as JSON: [FOLDER, MIRROR, WHERE]. Each run is a process of its
own, forked from the one that has only imported; answered is [return code, stdout, stderr].

WHERE the run dies: "save N" (after the Nth torch file), "renamed N" (after the Nth renaming of a checkpoint); or
"interrupt N" (the stop button during step N), "never 0".
"""

# ruff: noqa: E402 - quiet() comes before the imports, as it does in a notebook
from utils import runtime

runtime.quiet()

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from transformers import TrainerCallback

from utils.data import dataset
from utils.models import adapters, loading
from utils.runtime import ROOT
from utils.tests import tiny
from utils.training import checkpoints
from utils.training.trainer import train

# The packs, the optimizer and the recomputing of the 7B profile's kind.
RECIPE = replace(tiny.TWO_PASSES, pack_length=128, gradient_checkpointing=1, optimizer="paged_adamw_8bit")


def last(original, number: int, counts=lambda *_: True):
    """`original`, but its call of that number (of those that count) is the last thing that this process does."""
    calls = []

    def call(one, other):
        original(one, other)
        calls.extend([other] * counts(one, other))
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return call


class Press(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            signal.raise_signal(signal.SIGINT)


def run(base: str, folder: str, mirror: str, where: str) -> None:
    what, number = where.split()[0], int(where.split()[1])
    if what == "save":
        torch.save = last(torch.save, number)
    if what == "renamed":
        os.replace = last(os.replace, number, lambda _, to: Path(to).name.startswith("checkpoint-"))
    tokenizer = loading.load_tokenizer(base)
    encoded, _ = dataset.encode(tokenizer, tiny.ROWS, RECIPE.max_length)
    model = adapters.add(loading.load_base(base), RECIPE)
    saved = checkpoints.Checkpoints(folder, every=2, mirror=mirror or None)
    callbacks = [Press(number)] if what == "interrupt" else []
    log = train(model, tokenizer, encoded, RECIPE, held_out=encoded, checkpoints=saved, callbacks=callbacks)
    adapter = [parameter.tolist() for _, parameter in sorted(model.named_parameters()) if parameter.requires_grad]
    kept = [[entry.get(key) for key in ("step", "loss", "grad_norm", "learning_rate", "eval_loss")] for entry in log]
    digest = hashlib.sha256(json.dumps(adapter).encode()).hexdigest()
    seen = {entry["step"]: entry["num_input_tokens_seen"] for entry in log}
    told = {"adapter": digest, "log": kept, "steps": model.trained_steps}
    print(json.dumps(told | {"session": model.session, "seen": seen}))


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


@pytest.fixture(scope="module")
def start(base):
    """A function that makes a run, each in a process of its own: forked, for imports take longer than these runs."""
    command, pipe = [sys.executable, "-m", "utils.tests.training.test_resume", base], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)

    def start(folder, where: str = "never 0", mirror="") -> subprocess.CompletedProcess:
        print(json.dumps([str(folder), str(mirror), where]), file=process.stdin, flush=True)
        return subprocess.CompletedProcess([], *json.loads(process.stdout.readline()))

    yield start
    process.communicate(timeout=60)  # the end of its input ends it


def ended(run: subprocess.CompletedProcess, first_step: int) -> dict:
    """How it ended; it must have begun with this step, for a run that starts again from nothing ends alike."""
    assert (run.returncode, run.stderr) == (0, "")  # a healthy run writes nothing there
    assert next(line for line in run.stdout.splitlines() if line.startswith("step ")).startswith(f"step {first_step} ")
    found = json.loads(run.stdout.splitlines()[-1])
    steps, seen = found["steps"], found.pop("seen")
    assert found.pop("session") == [steps - first_step + 1, seen[str(steps)] - seen.get(str(first_step - 1), 0)]
    return found


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory) -> dict:
    """How the run ends when nothing happens to it."""
    found = ended(start(tmp_path_factory.mktemp("unbroken") / "run"), 1)
    assert [entry[0] for entry in found["log"]] == [1, 2, 3, 4, 5, 6]
    assert found["log"][-1][-1] is not None  # a held-out loss
    return found


def left(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".unfinished-"))


def test_killed_half_way_through_a_checkpoint_it_goes_on_here_and_from_the_mirror(start, unbroken, tmp_path):
    folder, mirror = tmp_path / "run", tmp_path / "drive"
    killed = start(folder, "save 5", mirror)  # three torch files a checkpoint: optimizer, schedule, random numbers
    assert killed.returncode == -9, killed.stderr
    assert left(folder) == left(mirror) == ["checkpoint-2", "run.json"]
    on_another_machine = start(tmp_path / "another", mirror=mirror)
    assert "fetching checkpoint-2" in on_another_machine.stdout
    assert ended(on_another_machine, 3) == unbroken
    here = start(folder)
    assert "skipped a checkpoint that was being written" in here.stdout
    assert ended(here, 3) == unbroken
    assert not list(folder.glob(".unfinished-*"))


def test_stopped_by_the_button_then_killed_behind_a_checkpoint_it_goes_on_each_time(start, unbroken, tmp_path):
    stopped = start(tmp_path, "interrupt 3")
    assert "Stopped by you after 3 steps" in stopped.stdout
    assert ended(stopped, 1)["steps"] == 3
    assert left(tmp_path) == ["checkpoint-2", "checkpoint-3", "run.json"]
    assert start(tmp_path, "renamed 1").returncode == -9
    assert left(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "run.json"]
    again = start(tmp_path)
    assert "skipped" not in again.stdout
    assert ended(again, 5) == unbroken


def test_the_cell_for_a_new_runtime_needs_only_the_settings(base, tmp_path, monkeypatch):
    """Chapter 04's cell for the morning after, where no other cell but the settings has run."""
    notebook = nbformat.read(ROOT / "notebooks" / "04_training.ipynb", as_version=4)
    settings = next(cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell = next(cell.source for cell in notebook.cells if "= trained_adapter(" in cell.source)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.ROWS))
    monkeypatch.setenv("QLORA_BASE", base)
    monkeypatch.setattr(adapters, "OUTPUTS", tmp_path)
    exec(f"{settings}\nDATA = {str(tmp_path / 'rows.jsonl')!r}\n{cell}", {})
    assert list(tmp_path.glob("adapters/*/adapter_model.safetensors"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(forked(sys.argv[1], *json.loads(line))), flush=True)
