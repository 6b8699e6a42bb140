"""Measuring one configuration must leave nothing behind that changes the next one."""

import gc
import warnings
from dataclasses import replace

import pytest
import torch

from utils.models import loading
from utils.notebook import measurements
from utils.planning import random_model
from utils.planning.time import seconds

POCKET = PROFILES["pocket"]
# An 8-bit optimizer, as on a GPU: for it transformers keeps the embedding.
RECIPE = replace(POCKET.recipe, accumulation=1, batch_size=1, max_length=32, optimizer="adamw_8bit")
SETTINGS = [replace(workloads.FAST, liger=False, checkpoint="none"), workloads.USUAL]


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setenv("QLORA_CAPABILITY", "8.0")  # bf16, so that autocast has something to do on a CPU, too
    config, tokenizer = random_model.config(POCKET.base), loading.load_tokenizer(POCKET.base)

    def run(setting, model=None):
        model = model or measure.build(config, RECIPE, setting)
        found = measure.run(model, tokenizer, measure.rows(2, 32, config.vocab_size), RECIPE, setting, (1, 1, 0))
        leftovers.clear(model, everything=True)
        return model, found

    return run


def large_tensors():
    gc.collect()
    with warnings.catch_warnings():  # of old names in torch that gc meets
        warnings.simplefilter("ignore")
        return {id(o): tuple(o.shape) for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.numel() > 10_000}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_no_tensor_outlives_its_configuration(measured, setting):
    before = large_tensors()
    measured(setting)
    assert not {i: shape for i, shape in large_tensors().items() if i not in before}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_every_run_on_a_model_computes_under_autocast(measured, setting):
    model, found = measured(setting)
    assert found["steps"] == 2 and all(loss > 0 for loss in found["losses"])
    seen, layer = [], model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    measured(setting, model)
    measured(setting, model)
    assert seen and all(seen)


def test_a_run_restores_what_it_patched(measured):
    model, _ = measured(SETTINGS[0])
    for module in (model, model.base_model, model.get_base_model()):
        assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & module.__dict__.keys()
    assert all(p.grad is None for p in model.parameters())


def test_a_run_leaves_attention_as_it_was(measured):
    measured(SETTINGS[0])
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.cudnn_sdp_enabled()


def test_the_command_records_what_the_planner_reads(tmp_path):
    assert benchmark.main(["rates", "--quick", "--out", str(tmp_path)]) == 0
    found = measurements.read("rates_cpu_quick", tmp_path)["figures"]["rates"]
    assert found.keys() == measurements.read("memory_grid_7b")["figures"]["rates"].keys()
    config, recipe = random_model.config(POCKET.base), POCKET.recipe
    assert all(seconds > 0 for seconds in seconds(config, recipe, found).values())
