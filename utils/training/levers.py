"""What makes a QLoRA step faster or smaller, one function each, for a model with its adapter and before its trainer."""

import types
from functools import cache

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.bnb import Linear4bit
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils import hardware
from utils.models.loading import bare
from utils.runtime import Stop

ONE_CALL = hasattr(torch.ops.aten, "_efficient_attention_forward")  # torch's own, of packs: a private operator
NO_ENDS = "This pack does not say where its rows end. Pack with trl's pack_dataset, 1.16 or newer: pip install -U trl"


def pull(model) -> None:
    """All that makes a step on a GPU faster and leaves its result as it is: what `trainer.build` does to a model.

    Kernels of Liger are for the Llama architecture; on another the rest is done.
    """
    fuse_adapters(model)
    if isinstance(bare(model), LlamaForCausalLM):
        liger(model)


class CheckpointEvery(TrainerCallback):
    """Recompute only every n-th decoder layer in the backward pass; the others keep what they computed.

    n = 2 recomputes half of the layers, n = 4 a quarter. For a trainer with `gradient_checkpointing=True`.
    """

    def __init__(self, n: int):
        self.n = n

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for i, layer in enumerate(bare(model).model.layers):
            layer.gradient_checkpointing = i % self.n == 0


def fuse_adapters(model) -> int:
    """Let each adapted 4-bit layer compute base and adapter in one autograd node; returns how many layers.

    peft's forward makes six kernels out of y = x W^T + s (x A^T) B^T (base, copy, A, B, scaling, sum), and as many
    again in the backward pass. Here the small product is made first and the large one adds to it while it writes
    (`addmm`); s multiplies the narrow x A^T, and nothing where it is 1. Layers with dropout, a bias, or more than one
    adapter are left as they are; so is every call without gradients.
    """
    found = [module for module in model.modules() if isinstance(module, Linear4bit) and _is_plain(module)]
    for module in found:
        module.forward = types.MethodType(_fused_forward, module)
    return len(found)


def dequantize(weight, state):
    """A packed 4-bit weight as a matrix, outputs x inputs: by nf4.py where Triton runs, else by bitsandbytes."""
    if weight.is_cuda and hardware.has_triton() and state.quant_type == "nf4" and state.blocksize == 64:
        return _nf4().dequantize(weight, state)
    return dequantize_4bit(weight.view(-1, 1), state)  # it is stored as one column or one row


@cache
def _nf4():
    from utils.training import nf4

    return nf4


def _is_plain(module) -> bool:
    dropout = isinstance(module.lora_dropout[module.active_adapters[0]], torch.nn.Identity)
    return len(module.lora_A) == 1 and dropout and not module.lora_variant and module.get_base_layer().bias is None


def _fused_forward(self, x, *args, **kwargs):
    if self.disable_adapters or self.merged or not torch.is_grad_enabled() or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    name, weight = self.active_adapters[0], self.get_base_layer().weight
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.get_base_layer().compute_dtype
    a, b = self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)
    return _AdapterLinear.apply(x.to(dtype), weight, weight.quant_state, a, b, self.scaling[name]).to(x.dtype)


class _AdapterLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, state, a, b, scaling):
        flat = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            down = flat @ a.t()  # tokens x rank
            if scaling != 1:
                down *= scaling
            y = down @ b.t()
            y.addmm_(flat, dequantize(weight, state).to(x.dtype).t())  # the sum costs nothing in the large product
        ctx.save_for_backward(flat, down, a, b, weight)
        ctx.state, ctx.scaling = state, scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        flat, down, a, b, weight = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        up = g @ b  # tokens x rank
        if ctx.scaling != 1:
            up *= ctx.scaling
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = up @ a
            grad_x.addmm_(g, dequantize(weight, ctx.state).to(g.dtype))
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        return grad_x, None, None, up.t() @ flat, g.t() @ down, None


def liger(model) -> None:
    """Liger's fused RMSNorm, SwiGLU and rotary embedding on a (PEFT) model of the Llama architecture.

    They are patched in transformers itself, too, for every Llama that this process builds afterwards. The fused loss is
    apart (`liger_loss`), because trl replaces the model's forward when the trainer is built.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, cross_entropy=False, model=bare(model))


def liger_loss(trainer) -> None:
    """Liger's fused output head and cross-entropy on the model of a trainer that `trainer.build` made."""
    from liger_kernel.transformers.model.llama import lce_forward

    base = bare(trainer.model)
    base.forward = types.MethodType(lce_forward, base)
    trainer.fused_loss = True


def attend_by_row(model) -> None:
    """Let the rows of a pack attend each by itself, so that nothing is computed between them.

    torch takes a pack as one square of tokens x tokens and computes what the mask then hides. Here each row is a causal
    square of its own: on a GPU in one call of the memory-efficient kernel, which takes the rows' ends, elsewhere in one
    call a row. For trainers with packing or padding_free, whose batches carry the
    rows' ends (`cu_seq_lens_q`, from trl 1.16 on). A batch of padded rows goes as before.

    Raises:
        Stop: at the first step, a pack without its rows' ends.
    """
    base = bare(model)
    if base.config._attn_implementation == "by_row":
        return
    AttentionInterface.register("by_row", _attention_by_row)
    AttentionMaskInterface.register("by_row", sdpa_mask)
    base.set_attn_implementation("by_row")
    base.model.register_forward_pre_hook(_row_lengths, with_kwargs=True)


def _row_lengths(module, args, kwargs):
    """Read the rows' lengths once, not in every layer; on a GPU they are not read back at all."""
    if (ends := kwargs.get("cu_seq_lens_q")) is not None:
        return args, kwargs if ends.is_cuda and ONE_CALL else kwargs | {"row_lengths": ends.diff().tolist()}
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is not None and (mask is None or mask.all()) and ((positions == 0).sum(-1) > 1).any():
        raise Stop(NO_ENDS)


def _attention_by_row(module, query, key, value, attention_mask, *args, row_lengths=None, **kwargs):
    """transformers' attention function; query, key, value are 1 x heads x tokens x head size where there are rows."""
    ends = kwargs.get("cu_seq_lens_q")
    if ends is not None and query.is_cuda and ONE_CALL:
        shared = query.shape[1] // key.shape[1]  # query heads to one key head
        keys, values = (states.repeat_interleave(shared, 1) if shared > 1 else states for states in (key, value))
        states, longest = [states.transpose(1, 2) for states in (query, keys, values)], kwargs["max_length_q"]
        causal, keep_sums = 1, True
        rows = (None, ends, ends, longest, longest, 0.0, causal, keep_sums)
        return torch.ops.aten._efficient_attention_forward(*states, *rows, scale=kwargs.get("scaling"))[0], None
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    rows = zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, None, *args, **kwargs)[0] for row in rows], dim=1), None
