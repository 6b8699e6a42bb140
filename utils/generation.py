"""Answers of a model: many at once, or one that comes token by token and can be stopped anywhere."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile

import torch
import transformers as t

from utils.data import template
from utils.models.loading import bare
from utils.runtime import Stop


@contextmanager
def evaluating(model) -> Iterator[None]:
    """No gradients and no dropout within; afterwards the model is in the mode in which it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def answer(model, tokenizer, rows: list[dict], max_new_tokens: int = 16, batch_size: int = 100) -> list[str]:
    """Greedy answers to the prompts of `rows`, in their order, without surrounding space.

    Prompts are padded on the left (on the right the model would continue the padding) and sorted by length, so that
    little is padded. A prompt that leaves no room for an answer gets "", and a line says so.
    """
    ends = sorted(_ends(model) | {tokenizer.eos_token_id})
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    greedy = t.GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, **special)
    prompts = [template.encode_prompt(tokenizer, row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    order = [i for i in order if len(prompts[i]) < model.config.max_position_embeddings]
    if len(order) < len(rows):
        print(f"{len(rows) - len(order)} of {len(rows)} questions are too long for this model, and are not asked")
    answers = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer.pad({"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt")
        with evaluating(model):
            ids = model.generate(**inputs.to(model.device), generation_config=greedy)
        said = [takewhile(lambda i: i not in ends, new) for new in ids[:, inputs.input_ids.shape[1] :].tolist()]
        texts = tokenizer.batch_decode([list(new) for new in said], skip_special_tokens=True)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text.strip()
    return answers


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Names are those of transformers' GenerationConfig; the defaults are greedy."""

    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    repetition_penalty: float = 1.0  # 1: off
    max_new_tokens: int = 64
    seed: int = 0


def stream(model, tokenizer, row: dict, sampling: Sampling | None = None, adapter: bool = True) -> Iterator[str]:
    """The answer so far, after each of its tokens, without surrounding space.

    The tokens are decoded together each time: alone they have neither their spaces nor, where several make one letter,
    a meaning. A letter that is not whole yet is held back. Stop, at once and not with the first token, if the question
    is empty or leaves no room for an answer.
    """
    if not (row.get("instruction") or "").strip():
        raise Stop("The question is empty. Write one")
    ids, limit = template.encode_prompt(tokenizer, row), model.config.max_position_embeddings
    if len(ids) >= limit:
        told = f"The prompt has {len(ids):,} tokens; this model was made for {limit:,}, answer included"
        raise Stop(f"{told}. Shorten it by {len(ids) - limit + 1:,} at least")

    def texts():
        so_far = []
        for token in tokens(model, ids, sampling or Sampling(), adapter):
            if token == tokenizer.eos_token_id:  # which was trained; the base may have another
                return
            so_far.append(token)
            yield tokenizer.decode(so_far, skip_special_tokens=True).rstrip("\ufffd").strip()

    return texts()


def _ends(model) -> set[int]:
    ends = model.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def tokens(model, ids: list[int], sampling: Sampling, adapter: bool = True) -> Iterator[int]:
    """The tokens that continue `ids`, one by one, without the end-of-sequence token that ends them.

    They end at the model's context, too. If no further token is taken, no further one is computed. With `adapter` False
    that of a PeftModel is off, for each step alone: between two tokens the model is as it was.
    """
    choose = _chooser(model, sampling)
    ends = _ends(model)
    seen = new = torch.tensor([ids], device=model.device)
    kept = {cache_argument(model): t.DynamicCache(config=model.config)}
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
    return "cache" if "cache" in inspect.signature(bare(model).forward).parameters else "past_key_values"


def _chooser(model, sampling: Sampling):
    """Function of all tokens so far (1, n) and the next token's logits (1, vocabulary): the next token (1, 1)."""
    steps = t.LogitsProcessorList([t.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))])
    if not sampling.temperature:
        return lambda seen, logits: steps(seen, logits).argmax(dim=-1, keepdim=True)
    steps.append(t.TemperatureLogitsWarper(float(sampling.temperature)))  # in the order of generate()
    if sampling.top_k:
        steps.append(t.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(t.TopPLogitsWarper(sampling.top_p))
    dice = torch.Generator(model.device).manual_seed(sampling.seed)
    return lambda seen, logits: torch.multinomial(steps(seen, logits).softmax(-1), 1, generator=dice)
