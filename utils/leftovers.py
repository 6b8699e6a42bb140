"""What a trainer leaves on a model and in the process, and its removal: the next run starts as the first one did."""

from utils import fast, memory


def clear(model, everything: bool = False) -> None:
    """Take back what a trainer leaves behind, so that the next run on this model, or the next model, starts like it.

    Args:
        everything: also what another setting of the same model would meet: patched forwards of the base, checkpointing,
            hooks, accelerate's choice of precision, and memory that is not used any more. For measurements.
    """
    from bitsandbytes.optim import GlobalOptimManager

    # accelerate does not prepare a model twice: the next trainer would compute without autocast.
    _restore_forward(model, "_is_accelerate_prepared")
    model.zero_grad(set_to_none=True)
    # For an 8-bit optimizer transformers enters the embedding in a list of the process, which would keep it alive.
    GlobalOptimManager.get_instance().initialize()
    if everything:
        _clear_base(model)
        memory.free()


def _clear_base(model) -> None:
    from accelerate.state import AcceleratorState

    base = model.get_base_model()
    for module in (model.base_model, base):  # forwards of trl, and of Liger's loss
        _restore_forward(module)
    base.gradient_checkpointing_disable()
    if getattr(base, "_require_grads_hook", None) is not None or getattr(base, "_require_grads_hooks", None):
        base.disable_input_require_grads()
    for layer in fast.decoder_layers(model):
        layer.gradient_checkpointing = False
    base.lm_head._forward_hooks.clear()  # from offloading
    base.lm_head._forward_pre_hooks.clear()
    AcceleratorState._reset_state(reset_partial_state=True)


def _restore_forward(module, *more: str) -> None:
    for name in ("forward", "_original_forward", *more):
        module.__dict__.pop(name, None)
