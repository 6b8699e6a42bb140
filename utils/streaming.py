"""Answers that come token by token, from the base and from the base with its adapter, and can be stopped anywhere."""

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from utils import template
from utils.runtime import Stop


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Names are those of transformers' GenerationConfig; the defaults are greedy."""

    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    repetition_penalty: float = 1.0  # 1: off
    max_new_tokens: int = 64
    seed: int = 0


def encode(model, tokenizer, row: dict) -> list[int]:
    """Token ids of the prompt of `row`.

    Raises:
        Stop: an empty question, or a prompt that leaves no room for an answer.
    """
    if not (row.get("instruction") or "").strip():
        raise Stop("The question is empty. Write one")
    ids, limit = template.encode_prompt(tokenizer, row), model.config.max_position_embeddings
    if len(ids) >= limit:
        told = f"The prompt has {len(ids):,} tokens; this model was made for {limit:,}, answer included"
        raise Stop(f"{told}. Shorten it by {len(ids) - limit + 1:,} at least")
    return ids


def tokens(model, ids: list[int], sampling: Sampling, adapter: bool = True) -> Iterator[int]:
    """The tokens that continue `ids`, one by one, without the end-of-sequence token that ends them.

    They end at the model's context, too. Whoever takes no further token stops the computation.

    Args:
        model: a PeftModel if `adapter` is False.
        adapter: False switches the adapter off, for each step alone: between two tokens the model is as it was.
    """
    import torch
    from transformers import DynamicCache

    choose = _chooser(model, sampling)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    seen = new = torch.tensor([ids], device=model.device)
    kept = {cache_argument(model): DynamicCache(config=model.config)}
    for _ in range(min(sampling.max_new_tokens, model.config.max_position_embeddings - len(ids))):
        with torch.no_grad(), nullcontext() if adapter else model.disable_adapter():
            out = model(input_ids=new, use_cache=True, logits_to_keep=1, **kept)
        new = choose(seen, out.logits[:, -1].float())
        if new.item() in ends:
            return
        seen = torch.cat([seen, new], dim=1)
        yield new.item()


def cache_argument(model) -> str:
    """What `model` calls its KV cache: `past_key_values`, and `cache` from transformers 5.24 on."""
    forward = (model.get_base_model() if hasattr(model, "get_base_model") else model).forward
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def _chooser(model, sampling: Sampling):
    """Function of all tokens so far (1, n) and the next token's logits (1, vocabulary): the next token (1, 1)."""
    import torch
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps = LogitsProcessorList()  # in the order of generate()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if not sampling.temperature:
        return lambda seen, logits: steps(seen, logits).argmax(dim=-1, keepdim=True)
    steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    dice = torch.Generator(model.device).manual_seed(sampling.seed)
    return lambda seen, logits: torch.multinomial(steps(seen, logits).softmax(-1), 1, generator=dice)


def stream(model, tokenizer, row: dict, sampling: Sampling | None = None, adapter: bool = True) -> Iterator[str]:
    """The answer so far, after each of its tokens, without surrounding space.

    The tokens are decoded together each time: alone they have neither their spaces nor, where several make one letter,
    a meaning. A letter that is not whole yet is held back.

    Raises:
        Stop: see `encode`; at once, not with the first token.
    """
    return _texts(tokenizer, tokens(model, encode(model, tokenizer, row), sampling or Sampling(), adapter))


def _texts(tokenizer, made: Iterator[int]) -> Iterator[str]:
    ids = []
    for token in made:
        ids.append(token)
        yield tokenizer.decode(ids, skip_special_tokens=True).strip().rstrip("\ufffd")


def side_by_side(model, tokenizer, row: dict, sampling: Sampling | None = None) -> Iterator[tuple[str, str]]:
    """The base's answer so far and the adapter's, a token of each in turn, from one model in memory."""
    both = [stream(model, tokenizer, row, sampling, adapter) for adapter in (False, True)]
    texts, running = ["", ""], [True, True]
    while True:
        for i in (0, 1):
            if running[i]:
                text = next(both[i], None)
                running[i] = text is not None
                texts[i] = texts[i] if text is None else text
        if not any(running):
            return
        yield texts[0], texts[1]
