"""One training configuration measured: peak memory, GPU-busy time, wall time, through the trainer that trains."""

import tempfile
from dataclasses import asdict, dataclass, replace

from utils import fast, loading, memory, packs, stand_in, training
from utils.benchmark import kernels
from utils.benchmark.watch import Watch
from utils.profile import Recipe


@dataclass(frozen=True)
class Setting:
    """Which of the levers of utils.fast are pulled."""

    dropout: float = 0.0  # share of an adapter's inputs that is set to zero
    upcast: bool = False  # frozen 16-bit weights to fp32, as prepare_model_for_kbit_training does
    liger: bool = True  # fused norms, SwiGLU, rotary embedding and loss
    liger_first: bool = False  # before the adapter instead of after it: does the order matter?
    fused: bool = True  # base and adapter of a layer in one autograd node
    checkpoint: str | int = "all"  # "none", "all", "offload", or n: recompute every n-th layer
    compiled: bool = False  # each decoder layer by torch.compile
    double_quant: bool = True
    packed: bool = False  # rows are packs with `seq_lengths`
    by_row: bool = False  # the rows of a pack attend one by one
    any_attention: bool = False  # FlashAttention and cuDNN's, too, which a T4 has not

    @property
    def name(self) -> str:
        names = ("dropout", "upcast", "liger", "liger_first", "fused", "compiled", "packed", "by_row", "any_attention")
        on = [n for n in names if getattr(self, n)]
        on += [] if self.double_quant else ["single_quant"]
        return "+".join([*on, f"checkpoint_{self.checkpoint}"])


def build(config, recipe: Recipe, setting: Setting):
    """A random model of `config`'s shape with an adapter and the setting's levers."""
    import torch

    base = stand_in.make(config, double_quant=setting.double_quant)
    if setting.liger and setting.liger_first:
        fast.liger(base)
    model = loading.add_adapter(base, recipe)
    for module in model.modules():
        if setting.dropout and hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(setting.dropout)
    if setting.upcast:
        fast.upcast(model)
    if setting.liger and not setting.liger_first:
        fast.liger(model)
    if setting.fused:
        fast.fuse_adapters(model)
    if setting.by_row:
        packs.attend_by_row(model)
    if setting.compiled:
        fast.compile_layers(model)
    return model


def rows(count: int, length: int, vocabulary: int, seed: int = 0):
    """Rows of random token ids, all of them labels."""
    import numpy as np
    from datasets import Dataset

    ids = np.random.default_rng(seed).integers(3, vocabulary, (count, length)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def run(model, tokenizer, encoded, recipe: Recipe, setting: Setting, steps=(2, 2, 3), mixed=True, gradients=None):
    """Train on `encoded` and return what was seen, as a dict for a record; see the keys at the end.

    Args:
        steps: how many to warm up, to time by the clock, to profile.
        mixed: False computes in fp32 (for the reference of the gradients).
        gradients: a dict that is filled with the first finite gradients, by parameter; then the run ends.

    Raises:
        torch.OutOfMemoryError: it does not fit; `leftovers.clear` afterwards, outside of the except block.
    """

    watch = Watch(*steps)
    watch.gradients = gradients
    recipe = replace(recipe, steps=watch.steps, epochs=10**6, gradient_checkpointing=setting.checkpoint != "none")
    resident = memory.allocated()
    with tempfile.TemporaryDirectory() as folder:
        args = training.arguments(recipe, len(encoded), folder)
        args.activation_offloading = setting.checkpoint == "offload"
        args.packing = setting.packed
        if not mixed:
            args.fp16 = args.bf16 = False
            args.mixed_precision = "no"
        trainer = _trainer(setting.liger, watch)(
            model=model, args=args, train_dataset=encoded, processing_class=tokenizer, callbacks=[watch]
        )
        for callback in list(trainer.callback_handler.callbacks):
            if "Printer" in type(callback).__name__ or "Progress" in type(callback).__name__:
                trainer.remove_callback(callback)
        if isinstance(setting.checkpoint, int):
            trainer.add_callback(fast.CheckpointEvery(setting.checkpoint))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # trl has made them bf16
        if setting.liger:
            fast.liger_loss(model)
        choose_attention(setting.any_attention)
        try:
            trainer.train()
        finally:
            watch.close()
            choose_attention(True)
    median = lambda values: sorted(values)[len(values) // 2] if values else None  # noqa: E731
    middle = sorted(watch.times, key=lambda t: t.busy)[len(watch.times) // 2] if watch.times else None
    return {
        "setting": setting.name,
        "levers": asdict(setting),
        "batch": recipe.batch_size,
        "length": recipe.max_length,
        "gpu_ms": middle and middle.busy,
        "gpu_ms_steps": [t.busy for t in watch.times],
        "gpu_ms_by_kind": middle and dict(middle.by_kind),
        "kernels": middle and middle.top(),
        "launches": middle and middle.launches,
        "wall_ms": median(watch.seconds) and 1e3 * median(watch.seconds),
        "resident_gib": resident,
        "peak_allocated_gib": max(m[-1] for m in watch.memory),
        "peak_reserved_gib": memory.peak()[1],
        "memory_gib_steps": watch.memory,
        "losses": [loss.item() for loss in watch.losses],
        "useful_tokens": watch.useful,
        "steps": trainer.state.global_step,
        "largest_b": max(p.abs().max().item() for n, p in model.named_parameters() if "lora_B" in n),
        "steps_skipped_by_scaler": watch.skipped,
        "liger_kernels_seen": middle and all(any(n in k.lower() for k in middle.by_name) for n in kernels.LIGER),
    }


def choose_attention(fastest: bool) -> None:
    """Memory-efficient attention alone, as on a T4, or whatever torch takes on this GPU. A CPU keeps what it has."""
    import torch

    fastest = fastest or not torch.cuda.is_available()
    torch.backends.cuda.enable_flash_sdp(fastest)
    torch.backends.cuda.enable_cudnn_sdp(fastest)


def _trainer(fused_loss: bool, watch: Watch):
    class Trainer(fast.trainer_class(fused_loss)):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            watch.memory[-1] += [memory.allocated(), memory.peak()[0]]
            return loss

        def training_step(self, model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")
            watch.useful[-1] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            loss = super().training_step(model, inputs, *args, **kwargs)
            watch.losses.append(loss.detach().float())
            return loss

    return Trainer
