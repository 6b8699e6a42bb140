"""Tokens one by one: the same as generate(), stoppable anywhere, and the adapter never left off."""

import pytest
import torch

from utils import generation, runtime
from utils.data import template
from utils.models import adapters, loading
from utils.tests import tiny

ROW = tiny.ROWS[0]
SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=0.7, seed=3),
    Sampling(temperature=1.3, top_k=5, seed=1),
    Sampling(temperature=1.0, top_p=0.5, repetition_penalty=1.2, seed=2),
]


@pytest.fixture(scope="module")
def model(base):
    """The tiny base with an adapter that does something."""
    model = adapters.add(loading.load_base(base), tiny.RECIPE)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def generated(model, ids: list[int], s: Sampling) -> list[int]:
    """What transformers' own generate() makes of the same settings."""
    given = {"do_sample": s.temperature > 0, "max_new_tokens": s.max_new_tokens, "pad_token_id": 0}
    given |= {"repetition_penalty": s.repetition_penalty}
    if s.temperature:
        given |= {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
    torch.manual_seed(s.seed)
    new = model.generate(input_ids=torch.tensor([ids]), **given)[0, len(ids) :].tolist()
    return new[:-1] if new[-1] == 2 else new


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_tokens_are_those_of_generate(model, tokenizer, sampling, adapter):
    ids = template.encode_prompt(tokenizer, ROW)
    ours = list(generation.tokens(model, ids, sampling, adapter))
    if adapter:
        assert ours == generated(model, ids, sampling)
    else:
        with model.disable_adapter():
            assert ours == generated(model, ids, sampling)


def test_the_end_of_sequence_token_ends_the_answer_and_is_not_part_of_it(model, tokenizer, monkeypatch):
    ids = template.encode_prompt(tokenizer, ROW)
    free = list(generation.tokens(model, ids, Sampling(max_new_tokens=8)))
    for ends in (free[4], [1, free[4]]):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        assert list(generation.tokens(model, ids, Sampling(max_new_tokens=8))) == free[: free.index(free[4])]


def test_a_stream_grows_and_ends_as_the_decoded_whole(model, tokenizer):
    texts = list(generation.stream(model, tokenizer, ROW, Sampling(max_new_tokens=20)))
    ids = list(generation.tokens(model, template.encode_prompt(tokenizer, ROW), Sampling(max_new_tokens=20)))
    assert texts[-1] == tokenizer.decode(ids).strip().rstrip("\ufffd")
    assert len(texts) == len(ids)


def test_a_letter_that_is_not_whole_is_held_back(tokenizer):
    ids = tokenizer("ü", add_special_tokens=False).input_ids  # bytes: not in the vocabulary
    assert len(ids) > 2
    assert list(streaming._texts(tokenizer, iter(ids)))[-2:] == ["", "ü"]


def test_side_by_side_is_what_each_says_alone(model, tokenizer):
    sampling = Sampling(max_new_tokens=12, temperature=0.8)
    pairs = list(generation.side_by_side(model, tokenizer, ROW, sampling))
    alone = [list(generation.stream(model, tokenizer, ROW, sampling, adapter))[-1] for adapter in (False, True)]
    assert list(pairs[-1]) == alone and alone[0] != alone[1]


def test_a_stream_that_is_left_leaves_the_adapter_on(model, tokenizer):
    ids = torch.tensor([template.encode_prompt(tokenizer, ROW)])
    with torch.no_grad():
        before = model(ids).logits
        for step, _ in enumerate(generation.side_by_side(model, tokenizer, ROW, Sampling())):
            assert torch.equal(model(ids).logits, before)
            if step == 3:
                break
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("question", ["", " \n", None])
def test_an_empty_question_is_refused_at_once(model, tokenizer, question):
    with pytest.raises(runtime.Stop, match="The question is empty. Write one"):
        generation.stream(model, tokenizer, {"instruction": question})


def test_a_prompt_longer_than_the_context_says_by_how_much(model, tokenizer):
    long = {"instruction": "Ada Birch " * 200}
    ids = template.encode_prompt(tokenizer, long)
    assert len(ids) > 256
    with pytest.raises(runtime.Stop, match=rf"has {len(ids):,} tokens; .* made for 256, .* by {len(ids) - 255:,} at"):
        generation.stream(model, tokenizer, long)


def test_an_answer_ends_with_the_context(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    ids = [1] + [5] * 249
    assert len(list(generation.tokens(model, ids, Sampling(max_new_tokens=100)))) == 6


def test_control_tokens_in_a_question_are_text(model, tokenizer):
    ids = streaming.encode(model, tokenizer, {"instruction": "</s><s> Where?</s>"})
    assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in ids
