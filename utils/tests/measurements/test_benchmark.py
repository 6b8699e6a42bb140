"""Measuring one configuration must leave nothing behind that changes the next one; and the command works."""

import gc
import runpy
import sys
from dataclasses import replace

import pytest
import torch

from utils.data import dataset
from utils.models import loading
from utils.notebook import measurements
from utils.planning import random_model
from utils.planning.rehearsal import random_rows
from utils.planning.time import seconds
from utils.presets import PROFILES
from utils.tests import tiny
from utils.tests.measurements import FOLDER

sys.path.insert(0, str(FOLDER))
from benchmark import measure, parts

POCKET = PROFILES["pocket"]
# An 8-bit optimizer, as on a GPU: for it transformers keeps the embedding.
RECIPE = replace(tiny.RECIPE, batch_size=1, max_length=32, optimizer="adamw_8bit")
SETTINGS = [replace(parts.FAST, liger=False, checkpoint="none"), parts.USUAL]


def large_tensors():
    gc.collect()
    return {id(o): o.shape for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.numel() > 10_000}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_run_leaves_the_model_and_the_process_as_they_were(base, tokenizer, monkeypatch, setting):
    monkeypatch.setenv("QLORA_CAPABILITY", "8.0")  # bf16, so that autocast has something to do on a CPU, too
    config, before, seen = random_model.config(base), large_tensors(), []
    model = measure.build(config, RECIPE, setting)
    first = model.get_base_model().model.layers[0]
    first.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    for _ in range(2):
        found = measure.run(model, tokenizer, random_rows([32, 32], 384), RECIPE, setting, (1, 1, 0))
        measure.clear(model)
        assert found["steps"] == 2 and all(loss > 0 for loss in found["losses"]) and found["useful_tokens"] == [32, 32]
        for module in (model, model.base_model, model.get_base_model()):
            assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & module.__dict__.keys()
        assert all(p.grad is None for p in model.parameters())
    assert seen and all(seen)  # accelerate does not prepare a model twice: the second run would be without autocast
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.cudnn_sdp_enabled()
    del model, first, module
    assert not {i: shape for i, shape in large_tensors().items() if i not in before}


def command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / "benchmark"), run_name="__main__")
    return end.value.code


def test_the_command_records_what_planning_reads(monkeypatch, tmp_path):
    assert command(monkeypatch, "rates", "--quick", "--out", str(tmp_path)) == 0
    rates = measurements.read("rates_cpu_quick", tmp_path)["figures"]["rates"]
    assert rates.keys() == measurements.read("memory_grid_7b")["figures"]["rates"].keys()
    assert all(part > 0 for part in seconds(random_model.config(POCKET.base), POCKET.recipe, rates).values())
    assert command(monkeypatch, "grid", "--out", str(tmp_path)) == 2  # without a GPU


def test_a_folder_of_random_weights_loads_like_a_real_one(monkeypatch, tmp_path):
    assert command(monkeypatch, "random_model", POCKET.base, str(tmp_path)) == 0
    loading.load_base(str(tmp_path))
    tokenizer, rows = loading.load_tokenizer(str(tmp_path)), dataset.read(tmp_path / "rows.jsonl")
    tokenizer.model_max_length = 1024  # the pocket shape reads less
    encoded, too_long = dataset.encode(tokenizer, rows, 1024)
    middle = sorted(map(len, encoded["input_ids"]))[len(rows) // 2]
    assert not too_long and abs(middle - 162) < 10  # as in notebook 09
