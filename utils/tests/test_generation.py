"""Answers in order and ended where they should; tokens as generate() makes them, and the adapter never left off."""

from itertools import pairwise

import pytest
import torch

from utils import generation
from utils.data import template
from utils.generation import Sampling
from utils.models import adapters, loading
from utils.tests import tiny

ROW = tiny.ROWS[0]


@pytest.fixture(scope="module")
def model(base):
    """The tiny base with an adapter that does something."""
    return tiny.stir(adapters.add(loading.load_base(base), tiny.RECIPE), std=0.2)


def test_answers_come_in_order_however_they_are_batched_and_padded(model, tokenizer, base):
    one_by_one = [generation.answer(model, tokenizer, [row])[0] for row in tiny.ROWS]
    assert len(set(one_by_one)) == len({template.prompt(row) for row in tiny.ROWS})
    to_the_right = loading.load_tokenizer(base)
    to_the_right.padding_side = "right"
    assert generation.answer(model, to_the_right, tiny.ROWS[::-1], batch_size=5) == one_by_one[::-1]
    assert generation.answer(model, tokenizer, []) == []


def parrot(tokenizer, *chain: str):
    """A Llama that after each piece of `chain` says the next one, whatever came before."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64}
    one = {"num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **one, eos_token_id=None)).eval()  # the tokenizer knows the end
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()  # layers change nothing: the last token alone decides
        embedding = torch.nn.functional.normalize(torch.randn(len(tokenizer), 64), dim=1)
        model.get_input_embeddings().weight.copy_(embedding)
        ids = tokenizer.convert_tokens_to_ids(list(chain))
        assert tokenizer.unk_token_id not in ids
        for one, following in pairwise(ids):
            model.lm_head.weight[following] += embedding[one]
    return model


@pytest.mark.parametrize(
    ("chain", "answer"),
    [
        ((":", "▁Ada", "▁Birch", "</s>", "▁Hazelcombe"), "Ada Birch"),
        ((":", "▁Ada", "▁", "</s>"), "Ada"),  # space around an answer is not part of it
        ((":", "▁Ada", "▁Birch", "▁Ada"), "Ada Birch Ada Birch Ada"),  # it never ends, so it is cut
    ],
)
def test_an_answer_ends_where_the_model_says_so_or_is_cut(tokenizer, chain, answer):
    assert generation.answer(parrot(tokenizer, *chain), tokenizer, tiny.ROWS[:3], max_new_tokens=5) == [answer] * 3


def test_an_answer_ends_at_the_tokenizers_end_and_at_the_bases(tokenizer):
    model = parrot(tokenizer, ":", "▁Ada", "▁Birch", "</s>", "▁Hazelcombe")
    for ends, answer in (
        (None, "Ada Birch"),
        ([5, 6], "Ada Birch"),
        (tokenizer.convert_tokens_to_ids("▁Birch"), "Ada"),
    ):
        model.generation_config.eos_token_id = ends
        *_, streamed = generation.stream(model, tokenizer, ROW)
        assert generation.answer(model, tokenizer, [ROW]) == [streamed] == [answer], ends


def test_a_prompt_that_leaves_no_room_is_not_asked_and_a_line_says_so(model, tokenizer, capsys):
    long = {"instruction": "Ada " * 3000}
    expected = generation.answer(model, tokenizer, [ROW])[0]
    assert generation.answer(model, tokenizer, [long, ROW]) == ["", expected]
    assert capsys.readouterr().out == "1 of 2 questions are too long for this model, and are not asked\n"


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_as_it_was(model, tokenizer, training):
    model.train(training)
    generation.answer(model, tokenizer, tiny.ROWS[:1], max_new_tokens=1)
    assert all(module.training is training for module in model.modules())
    model.eval()


@pytest.mark.parametrize(
    "chosen",
    [{"repetition_penalty": 1.3}, {"temperature": 1.3, "top_k": 5}, {"temperature": 0.8, "top_k": 0, "top_p": 0.5}],
)
def test_without_adapter_the_tokens_are_those_of_the_bases_generate(model, tokenizer, chosen):
    """Notebook 06 compares with the adapter."""
    ids = template.encode_prompt(tokenizer, ROW)
    chosen = {**chosen, "max_new_tokens": 24}
    torch.manual_seed(0)
    with model.disable_adapter():
        given = {"do_sample": "temperature" in chosen, "pad_token_id": 0, **chosen}
        expected = model.generate(input_ids=torch.tensor([ids]), **given)[0, len(ids) :].tolist()
    assert list(generation.tokens(model, ids, Sampling(**chosen), adapter=False)) == [t for t in expected if t != 2]


def test_the_end_of_sequence_token_ends_the_answer_and_is_not_part_of_it(model, tokenizer, monkeypatch):
    ids = template.encode_prompt(tokenizer, ROW)
    free = list(generation.tokens(model, ids, Sampling(max_new_tokens=8)))
    for ends in (free[4], [1, free[4]]):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        assert list(generation.tokens(model, ids, Sampling(max_new_tokens=8))) == free[: free.index(free[4])]


def test_an_answer_ends_with_the_context(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert len(list(generation.tokens(model, [1] + [5] * 249, Sampling(max_new_tokens=100)))) == 6


def test_a_stream_grows_by_whole_letters(model, tokenizer, monkeypatch):
    ids = tokenizer("Ada ü", add_special_tokens=False).input_ids  # ü is bytes: not in the vocabulary
    monkeypatch.setattr(generation, "tokens", lambda *_: iter(ids))
    texts = list(generation.stream(model, tokenizer, ROW))
    assert len(texts) == len(ids) and texts[-3:] == ["Ada", "Ada", "Ada ü"]


def test_between_two_tokens_the_adapter_is_on(model, tokenizer):
    ids = torch.tensor([template.encode_prompt(tokenizer, ROW)])
    with torch.no_grad():
        before = model(ids).logits
        for _ in generation.stream(model, tokenizer, ROW, Sampling(max_new_tokens=2), adapter=False):
            assert torch.equal(model(ids).logits, before)
