"""The step of this benchmark in Unsloth, at the same rules: a row for comparison.

Needs `pip install unsloth` in an environment of its own (it asks for older versions of some packages), a GPU, and the
folder that the part random_model writes. Writes data/measurements/speed_unsloth_7b.json: both of Unsloth's kinds of
checkpointing ("unsloth", which offloads, and False), with the attention of a T4 and with any. Unsloth's defaults stay
as they are; padding-free is among them.
"""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import record

RULES = {"dtype": "float16", "lora": "rank 16, no dropout, all linear layers", "optimizer": "paged_adamw_8bit"}
RULES |= {"attention": "t4: memory-efficient alone; any: what Unsloth and torch take", "memory_cap": "none"}
PACKAGES = ("unsloth", "unsloth_zoo", "trl", "torch", "triton", "bitsandbytes", "transformers", "peft", "accelerate")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = ((1, 2048), (1, 512), (2, 2048))
SHOWN = ("mode", "attention", "batch", "length", "gpu_ms", "resident_gib", "peak_allocated_gib")
STEPS = (3, 2, 3)  # to warm up, by the clock, in the profiler


def load(folder: str, checkpointing, t4: bool):
    """The 4-bit model with adapter, as Unsloth's notebooks make it, and its tokenizer."""
    import torch
    from unsloth import FastLanguageModel
    from unsloth.utils import attention_dispatch as dispatch

    if t4:  # memory-efficient attention alone; else whatever Unsloth and torch take
        dispatch.HAS_FLASH_ATTENTION = dispatch.HAS_XFORMERS = False
        dispatch._TORCH_VARLEN_ATTN = None
    torch.backends.cuda.enable_flash_sdp(not t4)
    torch.backends.cuda.enable_cudnn_sdp(not t4)
    settings = {"max_seq_length": 4096, "use_gradient_checkpointing": checkpointing}
    model, tokenizer = FastLanguageModel.from_pretrained(folder, dtype=torch.float16, load_in_4bit=True, **settings)
    lora = {"r": 16, "lora_alpha": 16, "lora_dropout": 0, "bias": "none", "target_modules": LINEAR}
    return FastLanguageModel.get_peft_model(model, **lora, **settings), tokenizer


def step(model, tokenizer, checkpointing, batch: int, length: int) -> dict:
    """One configuration, with the keys of `measure.Watch.seen`."""
    import trl
    from accelerate.state import AcceleratorState

    from benchmark.measure import Watch
    from utils import hardware
    from utils.planning.rehearsal import random_rows

    watch = Watch(*STEPS)
    args = trl.SFTConfig(
        output_dir=str(Path("outputs", "unsloth")),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,  # Unsloth changes the default to 2
        max_steps=watch.steps,
        max_length=length,
        learning_rate=2e-4,
        fp16=True,
        bf16=False,
        optim="paged_adamw_8bit",
        gradient_checkpointing=bool(checkpointing),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = random_rows([length] * (batch * watch.steps), model.config.vocab_size).remove_columns("labels")
    trainer = trl.SFTTrainer(model, args, processing_class=tokenizer, train_dataset=rows, callbacks=[watch])
    first_b = next(p for n, p in model.named_parameters() if "lora_B" in n)
    b_before, resident = first_b.detach().cpu(), hardware.reset_peak()
    try:
        trainer.train()
    finally:
        watch.profile.close()
    found = watch.seen() | {"mode": str(checkpointing), "batch": batch, "length": length, "resident_gib": resident}
    found |= {"padding_free": bool(trainer.args.padding_free)}
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
