"""One training configuration measured: peak memory, GPU-busy time, wall time, through the trainer that trains."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from statistics import median_high

import numpy as np
import torch

from benchmark import kernels
from utils import hardware
from utils.models import adapters
from utils.models.loading import bare
from utils.planning import random_model, rehearsal
from utils.presets import Recipe
from utils.training import levers, trainer


@dataclass(frozen=True)
class Setting:
    """Which of the levers are pulled: those of utils.training.levers, and what the benchmark compares them with."""

    dropout: float = 0.0  # share of an adapter's inputs that is set to zero
    upcast: bool = False  # frozen 16-bit weights to fp32, as prepare_model_for_kbit_training does
    liger: bool = True  # fused norms, SwiGLU, rotary embedding
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
        on = [n for n, pulled in asdict(self).items() if pulled and n not in ("checkpoint", "double_quant")]
        on += [] if self.double_quant else ["single_quant"]
        return "+".join([*on, f"checkpoint_{self.checkpoint}"])


def build(config, recipe: Recipe, setting: Setting):
    """A random model of `config`'s shape with an adapter and the setting's levers."""
    base = random_model.build(config, double_quant=setting.double_quant)
    if setting.liger and setting.liger_first:
        levers.liger(base)
    model = adapters.add(base, recipe)
    for module in model.modules():
        if setting.dropout and hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(setting.dropout)
    if setting.upcast:
        upcast(model)
    if setting.liger and not setting.liger_first:
        levers.liger(model)
    if setting.fused:
        levers.fuse_adapters(model)
    if setting.by_row:
        levers.attend_by_row(model)
    if setting.compiled:
        for layer in bare(model).model.layers:  # by themselves: small graphs, made once and shared; not for a T4
            layer.compile(dynamic=False)
    return model


def upcast(model) -> None:
    """What peft's `prepare_model_for_kbit_training` does to a model whose adapter is there already: everything that is
    frozen and not in four bits (norms, embeddings, output head) becomes fp32. The slow way, for comparison."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


class Watch(rehearsal.Watch):
    """Takes the times of steps: first some to warm up, then some by the clock, then some in the profiler.

    Args:
        gradients: a dict that is filled with the first finite gradients, by parameter; then the run ends.
    """

    def __init__(self, warm: int, timed: int, profiled: int, gradients: dict | None = None):
        super().__init__(warm, timed)
        self.timed, self.until, self.steps = timed, self.steps, self.steps + profiled
        self.profile, self.times, self.skipped, self.gradients = ExitStack(), [], 0, gradients

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control)
        if state.global_step >= self.until:
            self.profile.enter_context(kernels.profiled(self.times))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None or self.gradients:
            return
        found = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
        if all(torch.isfinite(g).all() for g in found.values()):  # else the scaler skips this step, and lowers itself
            self.gradients.update(found)
            control.should_training_stop = True

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        super().on_step_end(args, state, control)
        self.profile.close()
        self.skipped += bool(getattr(optimizer, "step_was_skipped", False))

    @property
    def middle(self):
        """The `kernels.Times` of the profiled step with the median time; None without a GPU."""
        return sorted(self.times, key=lambda t: t.busy)[len(self.times) // 2] if self.times else None

    def seen(self) -> dict:
        """What was seen, for a record."""
        middle, by_clock = self.middle, self.seconds[: self.timed]
        return {
            "gpu_ms": middle and middle.busy,
            "gpu_ms_steps": [t.busy for t in self.times],
            "gpu_ms_by_kind": middle and dict(middle.by_kind),
            "kernels": middle and middle.top(),
            "launches": middle and middle.launches,
            "wall_ms": 1e3 * median_high(by_clock) if by_clock else None,
            "peak_allocated_gib": max(self.peaks),
            "steps_skipped_by_scaler": self.skipped,
        }


def run(
    model, tokenizer, encoded, recipe: Recipe, setting: Setting | None, steps=(2, 2, 3), gradients=None, **arguments
):
    """Train on `encoded` and return what was seen, as a dict for a record; see the keys at the end.

    Args:
        setting: None trains as everybody does who calls `trainer.train` with this recipe.
        steps: how many to warm up, to time by the clock, to profile.
        gradients: see `Watch`.
        arguments: more for `trainer.build`.

    Raises:
        Stop: it does not fit; `clear` afterwards, outside of the except block.
    """
    watch = Watch(*steps, gradients)
    recipe, resident = replace(recipe, steps=watch.steps, epochs=10**6), hardware.reset_peak()
    if setting:
        again = {"none": 0, "all": 1, "offload": 1}.get(setting.checkpoint, setting.checkpoint)
        recipe = replace(recipe, gradient_checkpointing=again)
        arguments |= {
            "activation_offloading": setting.checkpoint == "offload",
            "packing": setting.packed,
            "fast": False,
        }
    made = trainer.build(model, tokenizer, encoded, recipe, callbacks=[watch], **arguments)
    choose_attention(bool(setting and setting.any_attention))
    try:
        log = trainer.run(made, live=False)
    finally:
        watch.profile.close()
        choose_attention(True)
    middle = watch.middle
    return watch.seen() | {
        "setting": setting.name if setting else "default",
        "levers": setting and asdict(setting),
        "batch": recipe.batch_size,
        "length": recipe.max_length,
        "resident_gib": resident,
        "losses": [entry["loss"] for entry in log],
        "useful_tokens": np.diff([0, *(entry["num_input_tokens_seen"] for entry in log)]).tolist(),
        "steps": made.state.global_step,
        "largest_b": max((p.abs().max().item() for n, p in model.named_parameters() if "lora_B" in n), default=None),
        "liger_kernels_seen": middle and all(any(n in k.lower() for k in middle.by_name) for n in kernels.LIGER),
    }


def clear(model) -> None:
    """Take back, beyond what `trainer.clear` does, what another setting of the same model, or the next one, would meet.

    Patched forwards of the base, checkpointing, hooks, accelerate's choice of precision, and memory that is not used
    any more.
    """
    from accelerate.state import AcceleratorState

    trainer.clear(model)
    base = bare(model)
    for module in (model.base_model, base):  # forwards of trl, and of Liger's loss
        for name in ("forward", "_original_forward"):
            module.__dict__.pop(name, None)
    base.gradient_checkpointing_disable()
    if getattr(base, "_require_grads_hook", None) is not None or getattr(base, "_require_grads_hooks", None):
        base.disable_input_require_grads()
    for layer in base.model.layers:
        layer.gradient_checkpointing = False
    base.lm_head._forward_hooks.clear()  # from offloading
    base.lm_head._forward_pre_hooks.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    hardware.free()


def choose_attention(fastest: bool) -> None:
    """Memory-efficient attention alone, as on a T4, or whatever torch takes on this GPU. A CPU keeps what it has."""
    fastest = fastest or not torch.cuda.is_available()
    torch.backends.cuda.enable_flash_sdp(fastest)
    torch.backends.cuda.enable_cudnn_sdp(fastest)
