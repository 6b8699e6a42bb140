"""The step of this benchmark in Unsloth, at the same rules: a row for comparison.

Needs `pip install unsloth` in an environment of its own (it asks for older versions of some packages), a GPU, and the
folder that the part random_model writes. Writes data/measurements/speed_unsloth_7b.json: both of Unsloth's kinds of
checkpointing ("unsloth", which offloads, and False), with the attention of a T4 and with any. Unsloth's defaults stay
as they are; padding-free is among them.

With --real: rows as long as Alpaca's, in the ways of WAYS, in the memory of a T4, for data/measurements/
speed_unsloth_real_7b.json. Rows, passes and the count of useful tokens are those of the part real. On a T4 Unsloth
takes xformers for packs, whose kernel is torch's memory-efficient one in a single call; without xformers it calls
that once a row. Where xformers is installed (it need not load its own extension), packing is measured with it, too.
"""

import os
import random
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import record

from utils.notebook import measurements

RULES = {"dtype": "float16", "lora": "rank 16, no dropout, all linear layers", "optimizer": "paged_adamw_8bit"}
RULES |= {"attention": "t4: memory-efficient alone; any: what Unsloth and torch take", "memory_cap": "none"}
PACKAGES = ("unsloth", "unsloth_zoo", "trl", "torch", "triton", "bitsandbytes", "transformers", "peft", "accelerate")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = ((1, 2048), (1, 512), (2, 2048))
SHOWN = ("mode", "attention", "batch", "length", "gpu_ms", "resident_gib", "peak_allocated_gib")
STEPS = (3, 2, 3)  # to warm up, by the clock, in the profiler
WAYS = {  # checkpointing, rows (or packs) of a step, packing?, steps, xformers?
    "its notebooks' own: batch 2, its checkpointing, padding-free": ("unsloth", 2, False, (3, 3, 30), False),
    "checkpointing off, batch 2, padding-free": (False, 2, False, (3, 3, 30), False),
    "its checkpointing, packing": ("unsloth", 1, True, (2, 2, 10), False),
    "checkpointing off, packing": (False, 1, True, (2, 2, 10), False),
    "its checkpointing, packing, xformers": ("unsloth", 1, True, (2, 2, 10), True),
    "checkpointing off, packing, xformers": (False, 1, True, (2, 2, 10), True),
}
PACK = 2048


def load(folder: str, checkpointing, t4: bool, xformers: bool = False):
    """The 4-bit model with adapter, as Unsloth's notebooks make it, and its tokenizer."""
    import torch
    from unsloth import FastLanguageModel
    from unsloth.utils import attention_dispatch as dispatch

    if t4:  # memory-efficient attention alone; else whatever Unsloth and torch take
        dispatch.HAS_FLASH_ATTENTION = dispatch.HAS_XFORMERS = False
        dispatch._TORCH_VARLEN_ATTN = None
    if xformers:  # with the kernel that it has on a T4
        from xformers.ops import fmha

        kernel = (fmha.cutlass.FwOp, fmha.cutlass.BwOp)
        fmha.common._built_with_cuda = True  # the kernel is torch's own: whether its extension loads does not matter
        dispatch.xformers, dispatch.HAS_XFORMERS = fmha, True
        dispatch.XFORMERS_BLOCK_DIAG_CLS = fmha.attn_bias.BlockDiagonalCausalMask
        dispatch.xformers_attention = partial(fmha.memory_efficient_attention, op=kernel)
    torch.backends.cuda.enable_flash_sdp(not t4)
    torch.backends.cuda.enable_cudnn_sdp(not t4)
    settings = {"max_seq_length": 4096, "use_gradient_checkpointing": checkpointing}
    model, tokenizer = FastLanguageModel.from_pretrained(folder, dtype=torch.float16, load_in_4bit=True, **settings)
    lora = {"r": 16, "lora_alpha": 16, "lora_dropout": 0, "bias": "none", "target_modules": LINEAR}
    return FastLanguageModel.get_peft_model(model, **lora, **settings), tokenizer


def step(model, tokenizer, checkpointing, batch: int, length: int, lengths=None, packing=False, steps=STEPS) -> dict:
    """One configuration, with the keys of `measure.Watch.seen`; `lengths` of the rows, if they are not all `length`."""
    import trl
    from accelerate.state import AcceleratorState

    from benchmark.measure import Watch
    from utils import hardware
    from utils.planning.rehearsal import random_rows

    watch = Watch(*steps)
    args = trl.SFTConfig(
        output_dir=str(Path("outputs", "unsloth")),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,  # Unsloth changes the default to 2
        max_steps=watch.steps,
        max_length=length,
        packing=packing,
        learning_rate=2e-4,
        fp16=True,
        bf16=False,
        optim="paged_adamw_8bit",
        gradient_checkpointing=bool(checkpointing),
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    rows = random_rows(lengths or [length] * (batch * watch.steps), model.config.vocab_size).remove_columns("labels")
    trainer = trl.SFTTrainer(model, args, processing_class=tokenizer, train_dataset=rows, callbacks=[watch])
    tokens, train_on = [], trainer.training_step

    def counted(model, inputs, *more, **named):
        tokens.append((inputs["input_ids"] != tokenizer.pad_token_id).sum())  # read later: nothing waits for it
        return train_on(model, inputs, *more, **named)

    trainer.training_step = counted
    first_b = next(p for n, p in model.named_parameters() if "lora_B" in n)
    b_before, resident = first_b.detach().cpu(), hardware.reset_peak()
    try:
        trainer.train()
    finally:
        watch.profile.close()
    found = watch.seen() | {"mode": str(checkpointing), "batch": batch, "length": length, "resident_gib": resident}
    found |= {"padding_free": bool(trainer.args.padding_free), "packing": bool(trainer.args.packing)}
    found |= {"rows": len(trainer.train_dataset), "useful_tokens": [int(count) for count in tokens]}
    found |= {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}
    found |= {"step_applied": bool((first_b.detach().cpu() != b_before).any())}
    model.zero_grad(set_to_none=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    hardware.free()
    return found


def measured(folder: str, checkpointing, t4: bool) -> tuple[list[dict], dict]:
    """All shapes on one model, and the versions of the packages. For a process of its own: see `main`."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    import unsloth  # noqa: F401  first, because it patches the others

    model, tokenizer = load(folder, checkpointing, t4)
    rules = {"attention": "t4" if t4 else "any"}
    found = [step(model, tokenizer, checkpointing, *shape) | rules for shape in SHAPES]
    return found, {p: version(p) for p in PACKAGES}


def measured_way(folder: str, checkpointing, batch: int, packing: bool, steps, xformers: bool) -> tuple[dict, dict]:
    """One of WAYS on rows of real lengths, and the versions of the packages. For a process of its own: see `real`."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    import unsloth  # noqa: F401, I001  first, because it patches the others
    import torch
    from benchmark.bench import finite
    from utils import hardware

    lengths = [min(n, PACK) for n in measurements.read("speed_real_7b")["figures"]["lengths"]] * 2
    random.Random(0).shuffle(lengths)
    model, tokenizer = load(folder, checkpointing, True, xformers)
    hardware.free()
    total = torch.cuda.get_device_properties(0).total_memory / hardware.GIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, hardware.T4_GIB / total))
    found = step(model, tokenizer, checkpointing, batch, PACK, lengths, packing, steps)
    useful, gpu = sum(found["useful_tokens"][-steps[2] :]), sum(found["gpu_ms_steps"]) / 1e3
    found |= {"useful_tokens_profiled": useful, "useful_tokens_per_gpu_s": useful / gpu, "cap_gib": hardware.T4_GIB}
    packages = (*PACKAGES, *(["xformers"] if xformers else []))
    return finite({k: v for k, v in found.items() if k != "kernels"}), {p: version(p) for p in packages}


def real(options) -> None:
    """Useful tokens a second of the ways of WAYS; `options` are those of the command."""
    started, [folder] = time.monotonic(), options.more
    attention = "memory-efficient alone: a call for each row, with xformers one for all"
    rules = RULES | {"attention": attention, "memory_cap": "a T4's"}
    figures = {"rules": rules, "pack": PACK, "training": [], "missing": []}
    for name, way in WAYS.items():
        if way[-1] and not find_spec("xformers"):
            continue
        try:  # a process of its own, whose end ends no other way
            if time.monotonic() - started > 60 * options.minutes:
                raise TimeoutError("no time left")
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                found, figures["packages"] = process.submit(measured_way, folder, *way).result()
        except Exception as error:
            from benchmark.bench import public

            traceback.print_exc()
            figures["missing"].append({"way": name, "why": public(error)})
        else:
            figures["training"].append(found | {"way": name})
            said = f"{found['useful_tokens_per_gpu_s']:.0f} useful tokens a GPU second"
            said = f"{said}, wall {found['wall_ms']:.0f} ms, {found['peak_allocated_gib']:.1f} GiB"
            print(f"{time.monotonic() - started:6.1f} s  {name}: {said}", flush=True)
        figures["seconds_in_all"] = time.monotonic() - started
        command = f"python data/measurements/benchmark unsloth {folder} --real"
        record.write("speed_unsloth_real_7b", figures, command, options.out)


def main(options) -> None:
    """All four ways; `options` are those of the command."""
    started, [folder] = time.monotonic(), options.more
    figures = {"rules": RULES, "configurations": [], "missing": []}
    # A process for each model: adapters and optimizers of an earlier one stay on the GPU.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as process:
        for t4, checkpointing in ((True, "unsloth"), (True, False), (False, False), (False, "unsloth")):
            if time.monotonic() - started > 60 * options.minutes:
                figures["missing"].append({"mode": str(checkpointing), "attention": "t4" if t4 else "any"})
                continue
            found, figures["packages"] = process.submit(measured, folder, checkpointing, t4).result()
            figures["configurations"] += found
            for one in found:
                print({name: one[name] for name in SHOWN}, flush=True)
            command = f"python data/measurements/benchmark unsloth {folder}"
            record.write("speed_unsloth_7b", figures, command, options.out)
