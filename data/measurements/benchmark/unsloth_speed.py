"""The step of `utils.benchmark` in Unsloth, at the same rules: a row for comparison.

    python -m utils.stand_in llama-2-7b outputs/random-llama-2-7b    (once: random weights, 13.5 GB)
    python -m utils.benchmark.unsloth_speed outputs/random-llama-2-7b

Needs `pip install unsloth` in an environment of its own (it asks for older versions of some packages) and a GPU. Writes
data/measurements/speed_unsloth_7b.json: both of Unsloth's kinds of checkpointing ("unsloth", which offloads, and
False), with the attention of a T4 and with any. Unsloth's defaults stay as they are; padding-free is among them.
"""

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

RULES = {"dtype": "float16", "lora": "rank 16, no dropout, all linear layers", "optimizer": "paged_adamw_8bit"}
RULES |= {"attention": "t4: memory-efficient alone; any: what Unsloth and torch take", "memory_cap": "none"}
PACKAGES = ("unsloth", "unsloth_zoo", "trl", "torch", "triton", "bitsandbytes", "transformers", "peft", "accelerate")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = ((1, 2048), (1, 512), (2, 2048))
SHOWN = ("mode", "attention", "batch", "length", "gpu_ms", "resident_gib", "peak_allocated_gib")
STEPS = (3, 2, 3)  # to warm up, by the clock, in the profiler


def load(folder: str, checkpointing):
    """The 4-bit model with adapter, as Unsloth's notebooks make it, and its tokenizer."""
    import torch
    from unsloth import FastLanguageModel

    settings = {"max_seq_length": 4096, "use_gradient_checkpointing": checkpointing}
    model, tokenizer = FastLanguageModel.from_pretrained(folder, dtype=torch.float16, load_in_4bit=True, **settings)
    lora = {"r": 16, "lora_alpha": 16, "lora_dropout": 0, "bias": "none", "target_modules": LINEAR}
    return FastLanguageModel.get_peft_model(model, **lora, **settings), tokenizer


def choose_attention(t4: bool) -> None:
    """Memory-efficient attention alone, as on a T4, or whatever Unsloth and torch take."""
    import torch
    from unsloth.utils import attention_dispatch as dispatch

    if t4:
        dispatch.HAS_FLASH_ATTENTION = dispatch.HAS_XFORMERS = False
        dispatch._TORCH_VARLEN_ATTN = None
    torch.backends.cuda.enable_flash_sdp(not t4)
    torch.backends.cuda.enable_cudnn_sdp(not t4)


def measure(model, tokenizer, checkpointing, batch: int, length: int, t4: bool) -> dict:
    """One configuration, with the keys of `utils.benchmark.measure.run`."""
    import numpy as np
    import trl
    from accelerate.state import AcceleratorState
    from datasets import Dataset

    from utils import memory
    from utils.benchmark.watch import Watch

    choose_attention(t4)
    watch = Watch(*STEPS)
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, (batch * watch.steps, length)).tolist()
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
    rows = Dataset.from_list([{"input_ids": row} for row in ids])
    trainer = trl.SFTTrainer(model, args, processing_class=tokenizer, train_dataset=rows, callbacks=[watch])
    first_b = next(p for n, p in model.named_parameters() if "lora_B" in n)
    b_before = first_b.detach().cpu()
    resident = memory.allocated()
    try:
        trainer.train()
    finally:
        watch.close()
    middle = sorted(watch.times, key=lambda t: t.busy)[len(watch.times) // 2]
    found = {"mode": str(checkpointing), "attention": "t4" if t4 else "any", "batch": batch, "length": length}
    found |= {"gpu_ms": middle.busy, "gpu_ms_steps": [t.busy for t in watch.times], "launches": middle.launches}
    found |= {"gpu_ms_by_kind": dict(middle.by_kind), "kernels": middle.top()}
    found |= {"wall_ms": 1e3 * sorted(watch.seconds)[len(watch.seconds) // 2]}
    found |= {"peak_allocated_gib": max(m[-1] for m in watch.memory), "resident_gib": resident}
    found |= {"padding_free": bool(trainer.args.padding_free)}
    found |= {"steps_skipped_by_scaler": watch.skipped}
    found |= {"step_applied": bool((first_b.detach().cpu() != b_before).any())}
    model.zero_grad(set_to_none=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    memory.free()
    return found


def measured(folder: str, checkpointing, t4: bool) -> tuple[list[dict], dict]:
    """All shapes on one model, and the versions of the packages. For a process of its own: see `main`."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    import unsloth  # noqa: F401  first, because it patches the others

    model, tokenizer = load(folder, checkpointing)
    found = [measure(model, tokenizer, checkpointing, *shape, t4) for shape in SHAPES]
    return found, {p: version(p) for p in PACKAGES}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model of Llama-2-7B's shape in 16 bits")
    parser.add_argument("--minutes", type=float, default=4, help="load no model after this time")
    parser.add_argument("--out", type=Path, default=None, help="folder of the record (default data/measurements)")
    options = parser.parse_args(arguments)
    import torch  # noqa: F401  so that the record names the GPU, which only the other processes use

    from utils import records

    started = time.monotonic()
    figures = {"rules": RULES, "configurations": [], "missing": []}
    # A process for each model: adapters and optimizers of an earlier one stay on the GPU.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as process:
        for t4, checkpointing in ((True, "unsloth"), (True, False), (False, False), (False, "unsloth")):
            if time.monotonic() - started > 60 * options.minutes:
                figures["missing"].append({"mode": str(checkpointing), "attention": "t4" if t4 else "any"})
                continue
            found, figures["packages"] = process.submit(measured, options.model, checkpointing, t4).result()
            figures["configurations"] += found
            for one in found:
                print({name: one[name] for name in SHOWN}, flush=True)
            records.write("speed_unsloth_7b", figures, "python -m utils.benchmark.unsloth_speed MODEL", options.out)


if __name__ == "__main__":
    main()
