"""Several processes: the files for accelerate, the storage of 4-bit weights, a process that is lost."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from utils import presets, runtime
from utils.models import loading
from utils.training import guards, preference, trainer


@pytest.mark.parametrize("file", sorted((runtime.ROOT / "data" / "accelerate").glob("*.yaml")), ids=lambda f: f.stem)
def test_accelerate_knows_every_field(file):
    config, known = load_config_from_file(str(file)), vars(launch_command_parser().parse_args(["script.py"]))
    assert {*config.fsdp_config, *config.deepspeed_config} <= known.keys()
    assert config.num_processes % config.num_machines == 0
    assert "Not run" in file.read_text("utf-8") or "not on" in file.read_text("utf-8")


def test_only_fsdp_stores_four_bits_under_a_floats_name(monkeypatch):
    assert loading.nf4(torch.bfloat16).bnb_4bit_quant_storage == torch.uint8
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert loading.nf4(torch.bfloat16).bnb_4bit_quant_storage == torch.bfloat16


def test_a_process_that_has_ended_is_named():
    with pytest.raises(runtime.Stop, match="Another process"), guards.explained(presets.PROFILES["pocket"].recipe):
        raise RuntimeError("pair.cc:553] Connection closed by peer [127.0.0.1]:20621")


def test_fsdp_casts_nothing_whoever_asks(monkeypatch):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    state = SimpleNamespace(fsdp_plugin=plugin)
    made = lambda self: setattr(self, "accelerator", SimpleNamespace(state=state))  # noqa: E731
    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", made)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for kind in (trainer.Trainer, preference.Trainer):
        kind.create_accelerator_and_postprocess(object.__new__(kind))
        plugin.set_mixed_precision(torch.bfloat16, override=True)  # as transformers does for a 4-bit base
        assert plugin.mixed_precision_policy is None
