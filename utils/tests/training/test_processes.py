"""Two processes on a CPU (gloo) train together: the same as one with their rows, one checkpoint, one voice.

    RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 python -m ... BASE FOLDER

is one of them, as torchrun would start it. The stop button is pressed in the main process alone, during the third step;
then the same call goes on from the checkpoint. The main process writes FOLDER/result.json: the log and the adapter.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from utils import hardware
from utils.data import dataset
from utils.models import adapters, loading
from utils.runtime import ROOT
from utils.tests import tiny
from utils.training.checkpoints import Checkpoints
from utils.training.trainer import train

# Four rows a step, whether one process takes all or two take half; twice through twelve rows are six steps.
RECIPE = replace(tiny.RECIPE, steps=100, epochs=2)


class Press(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if hardware.is_main() and state.global_step == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """What two processes made and printed: (folder, result, [stdout of each])."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command, pipe = [sys.executable, "-m", "utils.tests.training.test_processes", base, str(folder)], subprocess.PIPE
    environments = [{**os.environ, **world, "RANK": i, "LOCAL_RANK": i} for i in "01"]
    started = [subprocess.Popen(command, cwd=ROOT, env=e, stdout=pipe, stderr=pipe, text=True) for e in environments]
    try:
        told = [process.communicate(timeout=300) for process in reversed(started)][::-1]
    finally:
        for process in started:  # where one fails the other would wait for it
            process.kill()
    assert [process.returncode for process in started] == [0, 0], told
    return folder, json.loads((folder / "result.json").read_text()), [out for out, _ in told]


def test_they_compute_what_one_process_does(two, adapted, tokenizer, encoded):
    _, result, _ = two
    log = train(adapted, tokenizer, encoded, RECIPE, live=False)
    assert len(log) == len(result["log"]) == 6  # steps are counted with the number of processes
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("learning_rate", 0), ("num_input_tokens_seen", 0)):
        assert [e[name] for e in result["log"]] == pytest.approx([e[name] for e in log], rel=tolerance), name
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:  # rounding grows from step to step: 1e-3 of what a matrix holds
            distance = (torch.tensor(result["adapter"][name]) - parameter).norm()
            assert distance <= 1e-3 * parameter.norm(), name


def test_they_stop_together_and_go_on_from_one_whole_checkpoint(two):
    folder, result, _ = two
    assert result["steps"] == [3, 6]
    assert {path.name for path in (folder / "run").iterdir()} == {"checkpoint-4", "checkpoint-6", "run.json"}
    listed = json.loads((folder / "run" / "checkpoint-6" / "whole.json").read_text())
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= listed.keys()
    assert json.loads((folder / "run" / "run.json").read_text())["split"]["processes"] == 2


def test_only_the_main_process_prints(two):
    main, other = two[2]
    lines = [line.split(",")[0] for line in main.splitlines()]
    stopped = (
        "Stopped by you after 3 steps. The adapter keeps what it has learned. Run this again and it goes on from there."
    )
    assert lines == [*(f"step {n} of 6" for n in (1, 2, 3)), stopped, *(f"step {n} of 6" for n in (4, 5, 6))]
    assert other == ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    base, folder = sys.argv[1], Path(sys.argv[2])
    recipe = replace(RECIPE, batch_size=RECIPE.batch_size // hardware.processes())
    tokenizer = loading.load_tokenizer(base)
    encoded, _ = dataset.encode(tokenizer, tiny.ROWS, recipe.max_length)
    saved = Checkpoints(folder / "run", every=2)
    if not hardware.is_main():
        os.replace = None  # which gives a checkpoint its name: nobody else must call it
    steps = []
    for callbacks in ([Press()], []):
        model = adapters.add(loading.load_base(base), recipe)
        log = train(model, tokenizer, encoded, recipe, checkpoints=saved, callbacks=callbacks)
        steps.append(log[-1]["step"])
    if hardware.is_main():
        adapter = {n: p.tolist() for n, p in model.named_parameters() if p.requires_grad}
        (folder / "result.json").write_text(json.dumps({"steps": steps, "log": log, "adapter": adapter}))
    hardware.wait_for_all()
    torch.distributed.destroy_process_group()
