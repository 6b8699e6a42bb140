"""The records of chapter 12: one GPU and two GPUs of one host, a base of random weights, nothing downloaded.

    python data/measurements/studies/12_scaling_out.py all       two_gpus.json, part by part

or one of the parts alone: ddp, fsdp, resume, big13, big70, breaks, merge. Each run ("way") of a part is a process, or
two that `accelerate launch` starts with a file of data/accelerate. What a way has measured is written into the record
at once; a way that is there is not run again (delete it from the file to repeat it). ONLY="one;ddp" picks ways of a
part; several calls may run side by side. `--quick` goes through every line on a CPU, with gloo and the pocket's shape;
its figures mean nothing. No way may take longer than four minutes.

All ways of a shape train the same adapter on the same base: the layers are copies of one random layer, which is made
in seconds and can wait in the computer's memory until FSDP takes it to a GPU, layer by layer.
"""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import study
import torch
from datasets import Dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTTrainer

from utils import hardware, presets, runtime
from utils.models import adapters, loading
from utils.notebook import measurements
from utils.planning import random_model, rehearsal
from utils.presets import Recipe
from utils.training import trainer
from utils.training.checkpoints import Checkpoints

NAME, LIMIT = "two_gpus", 235  # seconds a way may take
FOLDER = runtime.OUTPUTS / "two_gpus"
# Four rows of 2,048 tokens a step, however many processes take them; the plain path of transformers and peft.
PLAIN = {"batch_size": 2, "max_length": 2048, "gradient_checkpointing": 1, "optimizer": "adamw_torch", "steps": 12}
PLAIN |= {"epochs": 100, "learning_rate": 2e-4, "warmup_steps": 2}
# The default recipe: packs, nothing recomputed, all levers.
FAST = {"batch_size": 1, "pack_length": 2048, "max_length": 1024, "optimizer": "paged_adamw_8bit", "steps": 8}
FAST |= {"epochs": 100, "learning_rate": 2e-4, "warmup_steps": 2}
DDP, FSDP2, FSDP1, PAGED = "two_t4", "two_24gb", "two_24gb_fsdp1", "paged_adamw_8bit"

WAYS = {  # part: {way: what differs from the plain recipe on one GPU}
    "ddp": {
        "one": {},
        "one, other order": {"batch_size": 1},  # the same rows in more passes: how far sums in another order go
        "ddp": {"config": DDP},
        "one, default": {"fast": True},
        "ddp, default": {"fast": True, "config": DDP},
        "one, default, T4 rules": {"fast": True, "t4": True},
        "ddp, default, T4 rules": {"fast": True, "config": DDP, "t4": True},
    },
    "fsdp": {
        "fsdp2": {"config": FSDP2},
        "fsdp1": {"config": FSDP1},
        "fsdp2, as it comes": {"config": FSDP2, "casts": True},  # with the casts that accelerate asks FSDP for
        "fsdp1, as it comes": {"config": FSDP1, "casts": True},
        "fsdp2, uint8": {"config": FSDP2, "storage": "uint8"},
        "fsdp1, uint8": {"config": FSDP1, "storage": "uint8"},
    },
    "resume": {
        "ddp, saved": {"config": DDP, "save": 4, "keep": "ddp"},
        "ddp, killed": {"config": DDP, "save": 4, "keep": "killed", "kill": 6},
        "ddp, goes on with two": {"config": DDP, "save": 4, "keep": "killed"},
        "ddp, goes on with one": {"save": 4, "keep": "killed, one"},
        "fsdp2, killed": {"config": FSDP2, "save": 4, "keep": "sharded", "kill": 6},
        "fsdp2, goes on with two": {"config": FSDP2, "save": 4, "keep": "sharded"},
        "fsdp1, killed": {"config": FSDP1, "save": 4, "keep": "sharded1", "kill": 6},
        "fsdp1, goes on with two": {"config": FSDP1, "save": 4, "keep": "sharded1"},
    },
    "big13": {
        "13b, one": {"shape": "llama-2-13b", "steps": 5},
        "13b, ddp": {"shape": "llama-2-13b", "steps": 5, "config": DDP},
        "13b, fsdp2": {"shape": "llama-2-13b", "steps": 5, "config": FSDP2},
        "13b, fsdp1": {"shape": "llama-2-13b", "steps": 5, "config": FSDP1},
    },
    "big70": {
        "70b, fsdp2": {"shape": "llama-2-70b", "steps": 4, "config": FSDP2, "max_length": 1024, "batch_size": 1},
        "70b, fsdp1": {"shape": "llama-2-70b", "steps": 4, "config": FSDP1, "max_length": 1024, "batch_size": 1},
    },
    "breaks": {
        "device_map auto": {"config": DDP, "auto": True, "steps": 2},
        "reentrant": {"config": DDP, "steps": 2, "reentrant": True},
        "paged optimizer, fsdp2": {"config": FSDP2, "steps": 2, "optimizer": PAGED, "save": 1, "keep": "paged2"},
        "paged optimizer, fsdp1": {"config": FSDP1, "steps": 2, "optimizer": PAGED, "save": 1, "keep": "paged1"},
        "merge, fsdp2": {"config": FSDP2, "steps": 2, "merge": True},
        "merge, fsdp1": {"config": FSDP1, "steps": 2, "merge": True},
        "storage float32, fsdp2": {"config": FSDP2, "steps": 2, "storage": "float32"},
        "storage float32, as it comes": {"config": FSDP2, "steps": 2, "storage": "float32", "casts": True},
    },
    "merge": {"merged": {"after": ["one", "ddp", "fsdp2", "fsdp1", "fsdp2, as it comes", "fsdp1, as it comes"]}},
}
FIRST = {"merge": ["ddp", "fsdp"]}  # parts whose adapters a part compares


class Watch(TrainerCallback):
    """Seconds and peak of each step; bytes of the base, by kind, before the first one; ends a process on demand."""

    def __init__(self, way: dict):
        self.way, self.seconds, self.peaks, self.held, self.trainer = way, [], [], {}, None

    def on_step_begin(self, args, state, control, **kwargs):
        rehearsal.synchronize()
        if not self.held:
            wrong = [m for m in self.trainer.model_wrapped.modules() if hasattr(m, "quant_state") and elsewhere(m)]
            for module in wrong:  # block constants that did not come along to the GPU
                module.quant_state.to(args.device)
            self.held = {"bytes": held(self.trainer.model_wrapped), "allocated_gib": allocated()}
            self.held["constants_left_behind"] = len(wrong)
        hardware.reset_peak()
        self.began = time.perf_counter()
        if state.global_step == self.way.get("kill") and not hardware.is_main():
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs):
        rehearsal.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        self.peaks.append(hardware.peak())


def elsewhere(module) -> bool:
    return module.quant_state is not None and torch.cuda.is_available() and not module.quant_state.absmax.is_cuda


def allocated() -> float:
    return torch.cuda.memory_allocated() / hardware.GIB if torch.cuda.is_available() else 0.0


def kind(name: str, numbers) -> str:
    if "lora_" in name:
        return "adapter"
    return "4-bit weights" if "_proj" in name else "embeddings, head, norms"


def held(model) -> dict[str, list[int]]:
    """[bytes on this card, bytes of the whole] by kind, tensor by tensor; the constants of the blocks, too."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    found: dict[str, list[int]] = {}

    def count(which: str, here: float, whole: float) -> None:
        both = found.setdefault(which, [0, 0])
        both[0], both[1] = both[0] + int(here), both[1] + int(whole)

    flat = [m for m in model.modules() if isinstance(m, FullyShardedDataParallel) and m._flat_param is not None]
    for unit in flat:  # FSDP1 has one flat tensor a unit, of which each card has its part
        tensor = unit._flat_param
        whole = sum(tensor._numels)
        for info, numbers in zip(tensor._param_infos, tensor._numels, strict=False):
            name = f"{info.module_name}.{info.param_name}"
            name = "lora_" if tensor.requires_grad else name
            size = numbers * tensor.element_size()
            count(kind(name, tensor), size * tensor.numel() / whole, size)
    for name, parameter in model.named_parameters():
        if not flat:
            here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            count(kind(name, parameter), here.nbytes, parameter.numel() * parameter.element_size())
    for module in model.modules():
        if (state := getattr(module, "quant_state", None)) is not None:
            tensors = [state.absmax, state.code] + ([state.state2.absmax, state.state2.code] if state.nested else [])
            size = sum(t.nbytes for t in tensors)
            count("block constants", size, size)
    return found


def base(shape: str, where, quick: bool):
    """A random 4-bit model of a shape, its layers copies of one, in the memory of `where`."""
    config = random_model.config(presets.PROFILES["pocket"].base if quick else shape)
    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    model = random_model.build(config)
    for part in (*model.model.children(), model.lm_head):
        part.to(where)
    for i in range(1, layers):
        model.model.layers.append(copy.deepcopy(model.model.layers[0]))
        model.model.layers[i].self_attn.layer_idx = i
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):  # a copy's weight has constants of its own
            module.quant_state, module.weight.module = module.weight.quant_state, module
    model.config.num_hidden_layers = layers
    loading.keep_trainable(model)
    return model


def rows(recipe: Recipe, fast: bool, quick: bool) -> Dataset:
    """Random tokens: full rows, or, for packs, rows of the lengths of an instruction data set."""
    lengths = [recipe.max_length] * 64
    if fast:
        lengths = [min(n, recipe.max_length) for n in measurements.read("speed_real_7b")["figures"]["lengths"] * 4]
    return rehearsal.random_rows(lengths, 2000 if quick else 32000)


def work(way: dict, quick: bool, result: Path) -> None:
    """One way, in each of its processes; the main one writes what was seen."""
    if torch.cuda.is_available():
        torch.cuda.set_device(hardware.device())
    torch.set_num_threads(1 if quick else 8)
    if quick and hardware.sharded():  # accelerate has FSDP for GPUs alone: let it take these CPUs for some
        from accelerate.state import DistributedType, PartialState

        made_here = PartialState.__init__

        def as_gpu(self, *args, **kwargs):
            made_here(self, *args, **kwargs)
            if self.distributed_type == DistributedType.MULTI_CPU:
                self.distributed_type, self.device = DistributedType.MULTI_GPU, torch.device("cpu")

        PartialState.__init__ = as_gpu
        trainer.Trainer._loss = SFTTrainer.compute_loss  # ours for CPUs goes around the wrapped model's forward
    if "casts" in way:
        del trainer.Whole.create_accelerator_and_postprocess
    if "storage" in way:
        plain, dtype = loading.nf4, getattr(torch, way["storage"])

        def nf4(*args, **kwargs):
            settings = plain(*args, **kwargs)
            settings.bnb_4bit_quant_storage = dtype
            return settings

        loading.nf4 = nf4
    fast, processes = way.get("fast", False), hardware.processes()
    of_recipe = Recipe.__dataclass_fields__.keys()
    fields = (FAST if fast else PLAIN) | {k: v for k, v in way.items() if k in of_recipe}
    a_step = 16 if fast else 4
    recipe = Recipe(**fields, accumulation=a_step // (fields["batch_size"] * processes))
    if quick:
        recipe = replace(recipe, steps=min(recipe.steps, 8), max_length=32, pack_length=32 * fast)
        recipe = replace(recipe, accumulation=1) if fast else recipe
    began = time.monotonic()
    hardware.reset_peak()
    tokenizer = loading.load_tokenizer(presets.PROFILES["pocket"].base)
    if way.get("auto"):
        model = AutoModelForCausalLM.from_pretrained(
            presets.PROFILES["pocket"].base,
            device_map="auto",
            quantization_config=loading.nf4(torch.bfloat16),
        )
        recipe = replace(recipe, max_length=32)
    else:
        cut = hardware.sharded() and way.get("storage") != "uint8"  # FSDP moves what it cuts, and nothing else
        model = base(way.get("shape", "llama-2-7b"), "cpu" if cut else hardware.device(), quick)
    model = adapters.add(model, recipe)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    made = {"seconds": time.monotonic() - began, "peak_gib": hardware.peak(), "process_gib": hardware.process_peak()}
    saved = Checkpoints(FOLDER / way["keep"], every=way["save"]) if "keep" in way else None
    watch, settings = Watch(way), {"logging_steps": 1}
    if way.get("reentrant"):
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    encoded = rows(recipe, fast, quick or way.get("auto", False))
    built = trainer.build(
        model,
        tokenizer,
        encoded,
        recipe,
        checkpoints=saved,
        callbacks=[watch],
        fast=None if fast else False,
        **settings,
    )
    watch.trainer = built
    began = time.monotonic()
    log = trainer.run(built, live=False)
    seconds = time.monotonic() - began
    if way.get("merge"):
        merged = built.accelerator.unwrap_model(built.model).merge_and_unload()
        shapes = {tuple(p.shape) for n, p in merged.named_parameters() if "gate_proj" in n}
        whole = (model.config.intermediate_size, model.config.hidden_size)
        made["merged"] = f"gate_proj has the shapes {sorted(shapes)}, a whole one {whole}"
    everywhere = [None] * processes
    mine = watch.held | {"peak_gib": max(watch.peaks), "peaks_gib": watch.peaks}
    if processes > 1:
        torch.distributed.all_gather_object(everywhere, mine)
    else:
        everywhere = [mine]
    steady = sorted(watch.seconds[3:] or watch.seconds)
    read = [e["num_input_tokens_seen"] for e in log]
    tokens = (read[-1] - read[0]) / max(1, len(read) - 1) if read else 0
    step_s = steady[len(steady) // 2]
    figures = {
        "processes": processes,
        "cards": everywhere,
        "losses": [e["loss"] for e in log],
        "grad_norms": [e.get("grad_norm") for e in log],
        "steps": [e["step"] for e in log],
        "seconds": seconds,
        "step_s": step_s,
        "steps_s": watch.seconds,
        "tokens_a_step": tokens,
        "tokens_per_s": tokens / step_s,
        "making": made,
        "adapter_parameters": parameters,
        "dtype": str(hardware.compute_dtype(hardware.capability())),
        "batch_size": recipe.batch_size,
        "accumulation": built.args.gradient_accumulation_steps,
    }
    if hardware.is_main():
        result.write_text(json.dumps(figures))  # first: what follows may fail
    if not way.get("merge"):
        adapter = trained(built.model_wrapped)
        if hardware.is_main():
            save_file(adapter, result.with_suffix(".safetensors"))
    hardware.wait_for_all()
    if processes > 1:
        torch.distributed.destroy_process_group()


def trained(model) -> dict[str, torch.Tensor]:
    """The whole adapter, by peft's names, gathered from all cards; every process must call it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    found, units = {}, {n: m for n, m in model.named_modules() if isinstance(m, FullyShardedDataParallel)}
    for name, unit in units.items():
        if unit._flat_param is not None and unit._flat_param.requires_grad:
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
                found |= {f"{name}.{n}": p.detach().float().cpu().clone() for n, p in unit.module.named_parameters()}
    for name, parameter in model.named_parameters():
        if "lora_" in name and not units:
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name] = whole.detach().float().cpu().contiguous()
    return {clean(name): tensor for name, tensor in found.items()}


def clean(name: str) -> str:
    """A parameter's name without what the wrappers put into it."""
    for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", ".default"):
        name = name.replace(part, "")
    return name.removeprefix("module.")


def merge(way: dict, quick: bool, result: Path) -> None:
    """Adapters of the ways: how far apart, what their logits are on one base, and after merging into it."""
    found, reference = {}, load_file(FOLDER / "one.safetensors")
    model = base("llama-2-7b", hardware.device(), quick)
    peft = adapters.add(model, Recipe(**PLAIN, accumulation=2)).eval()
    ids = torch.arange(3, 67, device=hardware.device())[None]

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits.float()

    for name in [n for n in (*way["after"], "one, other order") if (FOLDER / f"{n}.safetensors").is_file()]:
        adapter = load_file(FOLDER / f"{name}.safetensors")
        far = sorted(float((adapter[k] - v).norm() / v.norm().clamp(min=1e-12)) for k, v in reference.items())
        outcome = set_peft_model_state_dict(peft, adapter)
        found[name] = {"median": far[len(far) // 2], "largest": far[-1], "unknown_names": len(outcome.unexpected_keys)}
        found[name]["logits"] = logits(peft)
        held_by_peft = get_peft_model_state_dict(peft)
        found[name]["loaded"] = all(torch.equal(held_by_peft[k].float().cpu(), v) for k, v in adapter.items())
    if found:
        with_adapter, plain = found["one"]["logits"], None
        with peft.disable_adapter():
            plain = logits(peft)
        for name in found:
            found[name]["logits_from_one"] = float((found[name].pop("logits") - with_adapter).abs().max())
        found["logits_moved_by_the_adapter"] = float((with_adapter - plain).abs().max())
        last = next(reversed([n for n in found if isinstance(found[n], dict)]))
        before = logits(peft)
        whole = adapters.add(base("llama-2-7b", hardware.device(), quick).dequantize(), Recipe(**PLAIN, accumulation=2))
        set_peft_model_state_dict(whole, load_file(FOLDER / f"{last}.safetensors"))
        merged = whole.eval().merge_and_unload()
        found["merged"] = {"of": last, "largest_logit_difference": float((logits(merged) - before).abs().max())}
    result.write_text(json.dumps(found))


def launched(part: str, name: str, way: dict) -> dict:
    """Run a way in processes of its own and return what it measured, or how it failed."""
    result = FOLDER / f"{name}.json"
    result.unlink(missing_ok=True)
    script = [str(Path(__file__).resolve()), part, *(["--quick"] if chosen.quick else [])]
    if config := way.get("config"):
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += [
            "--config_file",
            str(study.ROOT / "data" / "accelerate" / f"{config}.yaml"),
            "--main_process_port=0",
        ]
        command += ["--mixed_precision=no"] if chosen.quick else []
        command += ["--mixed_precision=bf16"] if not chosen.quick and not way.get("t4") else []
    else:
        command = [sys.executable]
    rules = {"QLORA_CAPABILITY": "7.5"} if way.get("t4") and not chosen.quick else {}
    environment = {**os.environ, **rules, "WAY": json.dumps(way), "RESULT": str(result), "OMP_NUM_THREADS": "1"}
    if not config:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    began, output = time.monotonic(), FOLDER / f"{name}.txt"
    with open(output, "w") as file:  # no pipe: a process that outlives its launcher would keep it open
        process = subprocess.Popen(command + script, env=environment, stdout=file, stderr=file)
    try:
        ended = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its processes, which are out of its group, within 30 s
        process.wait(45)
        ended = f"ended after {LIMIT} s"
    # What is not finite, such as the norm of a gradient that overflows in fp16, is None in a record.
    figures = json.loads(result.read_text(), parse_constant=lambda _: None) if result.is_file() else {}
    return figures | {"exit": ended, "whole_seconds": time.monotonic() - began, "said": said(output.read_text())}


def said(told: str) -> list[str]:
    """The lines of an output that say what went wrong; without paths."""
    wanted = ("Stop:", "Error", "error:", "exitcode", "Signal", "Excluding")
    lines = [line.strip() for line in told.splitlines() if any(text in line for text in wanted)]
    for path, short in ((sys.executable, "python"), (str(runtime.ROOT), "."), (str(Path.home()), "~")):
        lines = [line.replace(path, short)[:300] for line in lines]
    return [line for i, line in enumerate(dict.fromkeys(lines)) if "/site-packages/" not in line and i < 30][:12]


def known(name: str) -> dict:
    """What was measured before: the folder may be new and the record there, or the other way round."""
    places = [place for place in (FOLDER, chosen.out) if (place / f"{name}.json").is_file()]
    return {k: v for place in places for k, v in measurements.read(name, place)["figures"].items()}


def main() -> None:
    """All ways of the parts that were asked for; the record after each."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    name = f"{NAME}_quick" if chosen.quick else NAME
    parts = list(WAYS) if chosen.part == "all" else [*FIRST.get(chosen.part, []), chosen.part]
    chosen.part = "all"  # whose record it is, whichever part adds to it
    for part in parts:
        for way_name, way in WAYS[part].items():
            if way_name in known(name) or way_name not in os.environ.get("ONLY", way_name).split(";"):
                continue
            if "keep" in way and "goes on" not in way_name:  # what an earlier try has left
                shutil.rmtree(FOLDER / way["keep"], ignore_errors=True)
            outcome = launched(part, way_name, way) | {"part": part, "config": way.get("config", "")}
            if way_name == "ddp, killed" and (FOLDER / "killed").is_dir():  # for one process, before two go on
                shutil.rmtree(FOLDER / "killed, one", ignore_errors=True)
                shutil.copytree(FOLDER / "killed", FOLDER / "killed, one")
            step = f"{outcome['step_s']:.3f} s a step" if "step_s" in outcome else f"{outcome['said'][-1:]}"
            print(f"{way_name:28} exit {outcome['exit']}, {outcome['whole_seconds']:.0f} s; {step}", flush=True)
            study.write(chosen, name, known(name) | {way_name: outcome})
            shutil.copy(chosen.out / f"{name}.json", FOLDER)


chosen = study.options(["all", *WAYS])
if "WAY" in os.environ:
    try:
        given, place = json.loads(os.environ["WAY"]), Path(os.environ["RESULT"])
        (merge if chosen.part == "merge" else work)(given, chosen.quick, place)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.exit(1)
else:
    torch.cuda.is_available()  # the record's hardware names the cards
    main()
