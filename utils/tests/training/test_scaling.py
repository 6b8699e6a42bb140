"""Several processes: the files for accelerate, the storage of 4-bit weights, a process that is lost."""

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from utils import presets, runtime
from utils.models import loading
from utils.training import guards

FILES = sorted((runtime.ROOT / "data" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_knows_every_field(file):
    config, known = load_config_from_file(str(file)), vars(launch_command_parser().parse_args(["script.py"]))
    assert {*config.fsdp_config, *config.deepspeed_config} <= known.keys()
    assert config.num_processes % config.num_machines == 0
    assert "Not run" in file.read_text("utf-8") or "Run on" in file.read_text("utf-8")


def test_only_fsdp_stores_four_bits_under_a_floats_name(monkeypatch):
    assert loading.nf4(torch.bfloat16).bnb_4bit_quant_storage == torch.uint8
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert loading.nf4(torch.bfloat16).bnb_4bit_quant_storage == torch.bfloat16


def test_a_process_that_has_ended_is_named():
    recipe = presets.PROFILES["pocket"].recipe
    with pytest.raises(runtime.Stop, match="Another process of this run has ended"), guards.explained(recipe):
        raise RuntimeError("pair.cc:553] Connection closed by peer [127.0.0.1]:20621")
