"""Several processes: the files for accelerate, the storage of 4-bit weights, a process that is lost."""

import os
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.fsdp import FullyShardedDataParallel

from utils import presets, runtime
from utils.models import adapters, loading
from utils.tests import tiny
from utils.training import cache, guards, preference, trainer


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


# accelerate has FSDP for GPUs alone: it takes the two CPU processes for some.
CUT = """
import sys
from dataclasses import replace

import torch
from accelerate.state import DistributedType, PartialState
from trl import SFTTrainer

from utils.models import loading
from utils.tests import tiny
from utils.training import cache, trainer

plain = PartialState.__init__


def as_gpu(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.device = DistributedType.MULTI_GPU, torch.device("cpu")


PartialState.__init__ = as_gpu
trainer.Trainer._loss = SFTTrainer.compute_loss  # not ours for CPUs, which goes around the wrapped model
recipe = replace(tiny.RECIPE, batch_size=tiny.RECIPE.batch_size // 2)
model = cache.trained_adapter(sys.argv[1], loading.load_tokenizer(sys.argv[1]), tiny.ROWS, recipe)
assert any(hasattr(p, "full_tensor") for p in model.parameters()), "nothing was cut"
"""


def test_an_adapter_that_fsdp_has_cut_is_saved_whole(base, tokenizer, tmp_path, monkeypatch):
    script, file = tmp_path / "cut.py", runtime.ROOT / "data" / "accelerate" / "two_24gb.yaml"
    script.write_text(CUT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port=0"]
    started = [*command, "--mixed_precision=no", script, base]
    places = {"PYTHONPATH": str(runtime.ROOT), "QLORA_OUTPUTS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(started, env={**os.environ, **places}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [saved] = (tmp_path / "adapters").glob("*/run.json")
    cut = tiny.weights(adapters.load(saved.parent)[0])
    monkeypatch.setattr(adapters, "OUTPUTS", tmp_path / "alone")
    alone = tiny.weights(cache.trained_adapter(base, tokenizer, tiny.ROWS, tiny.RECIPE))
    assert cut.keys() == alone.keys()
    for name, tensor in cut.items():
        assert (tensor - alone[name]).norm() <= 1e-2 * alone[name].norm(), name


def test_fsdps_first_version_is_refused_before_it_loads(base, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(runtime.Stop, match=r"two_24gb\.yaml"):
        loading.load_base(base)


@pytest.mark.skipif(version("peft") < "0.21", reason="peft 0.20 matched the names of weights")
def test_peft_finds_no_adapter_under_fsdps_first_version():
    """peft 0.21 looks for the adapter by the names of modules, which FSDP's first version changes, and finds none."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
        model = peft.get_peft_model(torch.nn.Sequential(layer), peft.LoraConfig(target_modules=["0.0"]))
        alone = peft.get_peft_model_state_dict(model)
        cut = lambda module, recurse, **_: recurse or module is layer or isinstance(module, torch.nn.Linear)  # noqa: E731
        model = FullyShardedDataParallel(model, auto_wrap_policy=cut, device_id=torch.device("cpu"))
        assert len(alone) == 2 and not peft.get_peft_model_state_dict(model), "mended in peft: take the Stop away"
    finally:
        torch.distributed.destroy_process_group()
