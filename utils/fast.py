"""What makes a QLoRA step faster or smaller, one function each: they change a PEFT model in place, and can be combined.

None of them needs a new package but `liger`. The order: build the model, add the adapter, then these, then the trainer.
"""

import types

from transformers import TrainerCallback


def upcast(model) -> None:
    """What peft's `prepare_model_for_kbit_training` does to a model whose adapter is there already: everything that is
    frozen and not in four bits (norms, embeddings, output head) becomes fp32. The slow way, for comparison."""
    import torch

    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


class CheckpointEvery(TrainerCallback):
    """Recompute only every n-th decoder layer in the backward pass; the others keep what they computed.

    n = 2 recomputes half of the layers, n = 4 a quarter. For a trainer with `gradient_checkpointing=True`.
    """

    def __init__(self, n: int):
        self.n = n

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for i, layer in enumerate(decoder_layers(model)):
            layer.gradient_checkpointing = i % self.n == 0


def decoder_layers(model):
    """The list of decoder layers of a PEFT model or of a bare one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.layers


def fuse_adapters(model) -> int:
    """Let each adapted 4-bit layer compute base and adapter in one autograd node; returns how many layers.

    peft's forward makes six kernels out of y = x W^T + s (x A^T) B^T (base, copy, A, B, scaling, sum), and as many
    again in the backward pass. Here the small product is made first and the large one adds to it while it writes
    (`addmm`); s multiplies the narrow x A^T, and nothing where it is 1. Layers with dropout, a bias, or more than one
    adapter are left as they are; so is every call without gradients.
    """
    from peft.tuners.lora.bnb import Linear4bit

    changed = 0
    for module in model.modules():
        if isinstance(module, Linear4bit) and _is_plain(module):
            module.forward = types.MethodType(_fused_forward, module)
            changed += 1
    return changed


def _is_plain(module) -> bool:
    import torch

    name = module.active_adapters[0]
    dropout = isinstance(module.lora_dropout[name], torch.nn.Identity)
    return len(module.lora_A) == 1 and dropout and not module.lora_variant and module.get_base_layer().bias is None


def _fused_forward(self, x, *args, **kwargs):
    import torch

    if self.disable_adapters or self.merged or not torch.is_grad_enabled() or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    name, weight = self.active_adapters[0], self.get_base_layer().weight
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.get_base_layer().compute_dtype
    a, b = self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)
    return _function().apply(x.to(dtype), weight, weight.quant_state, a, b, self.scaling[name]).to(x.dtype)


_cached = []


def _function():
    """The autograd node. Made on first use, so that this module imports torch only where it is needed."""
    if _cached:
        return _cached[0]
    import bitsandbytes as bnb
    import torch

    class AdapterLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, state, a, b, scaling):
            flat = x.reshape(-1, x.shape[-1])
            with torch.autocast(x.device.type, enabled=False):
                down = flat @ a.t()  # tokens x rank
                if scaling != 1:
                    down *= scaling
                y = down @ b.t()
                y.addmm_(flat, restored(weight, state, x.dtype).t())  # the sum costs nothing within the large product
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
                grad_x.addmm_(g, restored(weight, ctx.state, g.dtype))
                grad_x = grad_x.view(*grad.shape[:-1], -1)
            return grad_x, None, None, up.t() @ flat, g.t() @ down, None

    def restored(weight, state, dtype):
        """The 4-bit weight as outputs x inputs in `dtype`; `weight` is stored as one column or one row."""
        return bnb.functional.dequantize_4bit(weight.view(-1, 1), state).to(dtype)

    _cached.append(AdapterLinear)
    return AdapterLinear


def liger(model) -> None:
    """Liger's fused RMSNorm, SwiGLU and rotary embedding on a (PEFT) model of the Llama architecture.

    They are patched in transformers itself, too, for every Llama that this process builds afterwards. The fused loss is
    apart (`liger_loss`), because trl replaces the model's forward when the trainer is built. Look for the kernels'
    names in a profile before you believe that they run.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, cross_entropy=False, model=base)


def liger_loss(model) -> None:
    """Liger's fused output head and cross-entropy on the base model; call it after the trainer has been built."""
    from liger_kernel.transformers.model.llama import lce_forward

    base = model.get_base_model()
    base.forward = types.MethodType(lce_forward, base)


def trainer_class(fused_loss: bool = False):
    """SFTTrainer; with `fused_loss` one that takes the loss which the model itself returns (after `liger_loss`).

    The number of labelled tokens goes in as `num_items_in_batch`: Liger then sums and divides once, in fp32. Its mean
    would divide before the 16-bit gradient is stored, and small gradients would be lost.
    """
    from trl import SFTTrainer

    if not fused_loss:
        return SFTTrainer

    class Trainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = {k: v for k, v in inputs.items() if k != "use_cache"}
            output = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
            return (output.loss, output) if return_outputs else output.loss

    return Trainer


def compile_layers(model) -> None:
    """Compile each decoder layer by itself: small graphs, made once and shared. Not for a T4 (capability 7.5)."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=False)
