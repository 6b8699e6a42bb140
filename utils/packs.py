"""Packs: several rows in one, as trl's `packing` makes them; here, what their attention computes."""


def attend_by_row(model) -> None:
    """Let the rows of a pack attend each by itself, so that nothing is computed between them.

    Memory-efficient attention takes a pack as one square of tokens x tokens and computes what the mask then hides. Here
    each row is a causal square of its own, one call of torch's attention for each. For trainers with `packing=True` or
    `padding_free=True`: trl's batches then carry the rows' ends (`cu_seq_lens_q`). Any other batch goes as before.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("by_row", _attention_by_row)
    AttentionMaskInterface.register("by_row", sdpa_mask)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("by_row")
    base.model.register_forward_pre_hook(_row_lengths, with_kwargs=True)


def _row_lengths(module, args, kwargs):
    """Read the rows' lengths back from the GPU once, not in every layer."""
    if (ends := kwargs.get("cu_seq_lens_q")) is not None:
        return args, kwargs | {"row_lengths": ends.diff().tolist()}


def _attention_by_row(module, query, key, value, attention_mask, *args, row_lengths=None, **kwargs):
    """transformers' attention function; query, key, value are 1 x heads x tokens x head size where there are rows."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as attend

    if row_lengths is None:
        return attend(module, query, key, value, attention_mask, *args, **kwargs)
    rows = zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([attend(module, *row, None, *args, **kwargs)[0] for row in rows], dim=1), None
