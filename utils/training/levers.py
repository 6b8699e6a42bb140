"""What makes a QLoRA step faster or smaller, one function each, for a model with its adapter and before its trainer."""

from functools import partial

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
    """All that makes a step on a GPU faster and leaves its result as it is; Liger's kernels are for Llama alone."""
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


TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linear layers that read the same input


def fuse_adapters(model) -> int:
    """Let adapted 4-bit layers compute base and adapter in one autograd node; returns how many layers.

    peft's forward makes six kernels out of y = x W^T + s (x A^T) B^T (base, copy, A, B, scaling, sum), and as many
    again in the backward pass. Here the small product is made first and the large one adds to it while it writes
    (`addmm`); s multiplies the narrow x A^T, and nothing where it is 1. Layers that read the same x share a node: one
    product for all their A, and one sum for the gradient of x. Layers with dropout, a bias, or more than one adapter
    are left as they are; so is every call without gradients.
    """
    names = {name for group in TOGETHER for name in group}
    count = 0
    for parent in model.modules():
        found = {name: m for name, m in parent.named_children() if isinstance(m, Linear4bit) and _is_plain(m)}
        groups = [[found[name] for name in group if name in found] for group in TOGETHER]
        for group in [g for g in groups if g] + [[m] for name, m in found.items() if name not in names]:
            shared = _Shared(group)
            for i, module in enumerate(group):
                module.forward = partial(shared.forward, i)
            count += len(group)
    return count


def _is_plain(module) -> bool:
    dropout = isinstance(module.lora_dropout[module.active_adapters[0]], torch.nn.Identity)
    return len(module.lora_A) == 1 and dropout and not module.lora_variant and module.get_base_layer().bias is None


class _Shared:
    """Layers that read the same input: the first call computes all of them, the others take what is theirs."""

    def __init__(self, modules):
        self.modules, self.input, self.outputs = modules, None, {}

    def forward(self, i, x, *args, **kwargs):
        module = self.modules[i]
        if module.disable_adapters or module.merged or not torch.is_grad_enabled() or args or kwargs:
            return type(module).forward(module, x, *args, **kwargs)
        if self.input is not x or i not in self.outputs:
            self.input, self.outputs = x, dict(enumerate(self._all(x)))
        y = self.outputs.pop(i)
        if not self.outputs:
            self.input = None
        return y

    def _all(self, x):
        name, kind, base = self.modules[0].active_adapters[0], x.device.type, self.modules[0].get_base_layer()
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.compute_dtype
        weights = [module.get_base_layer().weight for module in self.modules]
        scaling = self.modules[0].scaling[name]
        matrices = [getattr(m, side)[name].weight for side in ("lora_A", "lora_B") for m in self.modules]
        return (y.to(x.dtype) for y in _AdapterLinears.apply(x.to(dtype), scaling, weights, *matrices))


class _AdapterLinears(torch.autograd.Function):
    """x W^T + s (x A^T) B^T of several layers; `matrices` are all A, then all B, in fp32 as they are trained."""

    @staticmethod
    def forward(ctx, x, scaling, weights, *matrices):
        flat, count = x.reshape(-1, x.shape[-1]), len(weights)
        a = torch.cat(matrices[:count]).to(x.dtype)  # all ranks x inputs
        bs = [b.to(x.dtype) for b in matrices[count:]]
        with torch.autocast(x.device.type, enabled=False):
            down = flat @ a.t()  # tokens x all ranks
            if scaling != 1:
                down *= scaling
            ys = [narrow @ b.t() for narrow, b in zip(down.chunk(count, 1), bs, strict=True)]
            for y, weight in zip(ys, weights, strict=True):  # the sum costs nothing in the large product
                y.addmm_(flat, dequantize(weight, weight.quant_state).to(x.dtype).t())
        ctx.save_for_backward(flat, down, a, *bs, *weights)
        ctx.scaling, ctx.count = scaling, count
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)

    @staticmethod
    def backward(ctx, *grads):
        flat, down, a, *rest = ctx.saved_tensors
        bs, weights = rest[: ctx.count], rest[ctx.count :]
        gs = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        up = torch.cat([g @ b for g, b in zip(gs, bs, strict=True)], 1)  # tokens x all ranks
        if ctx.scaling != 1:
            up *= ctx.scaling
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = up @ a
            for g, weight in zip(gs, weights, strict=True):
                grad_x.addmm_(g, dequantize(weight, weight.quant_state).to(g.dtype))
            grad_x = grad_x.view(*grads[0].shape[:-1], -1)
        grad_b = [g.t() @ narrow for g, narrow in zip(gs, down.chunk(ctx.count, 1), strict=True)]
        return grad_x, None, None, *(up.t() @ flat).chunk(ctx.count), *grad_b


def dequantize(weight, state):
    """A packed 4-bit weight as a matrix, outputs x inputs: by nf4.py where Triton runs, else by bitsandbytes."""
    if weight.is_cuda and hardware.has_triton() and state.quant_type == "nf4" and state.blocksize == 64:
        from utils.training import nf4

        return nf4.dequantize(weight, state)
    return dequantize_4bit(weight.view(-1, 1), state)  # it is stored as one column or one row


def liger(model) -> None:
    """Liger's fused RMSNorm, SwiGLU and rotary embedding on a (PEFT) model of the Llama architecture.

    They are patched in transformers itself, too, for every Llama that this process builds afterwards. Liger's loss is
    left out: trl has one of its own that scores in chunks, and it is as fast.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, cross_entropy=False, model=bare(model))


def attend_by_row(model) -> None:
    """Let the rows of a pack attend each by itself, so that nothing is computed between them.

    torch takes a pack as one square of tokens x tokens and computes what the mask then hides. Here each row is a causal
    square of its own: on a GPU in one call of the memory-efficient kernel, which takes the rows' ends, elsewhere in one
    call a row. For packs that carry the rows' ends (`cu_seq_lens_q`, from trl 1.16 on): one without them is a Stop at
    its step. Batches of padded rows go as before.
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
