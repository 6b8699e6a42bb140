"""The exam: answers in order, the same in a batch as alone, marked by level; loss over every token once."""

from itertools import pairwise

import pytest
import torch

from utils import evaluation, generation
from utils.data import template
from utils.models import loading
from utils.tests import tiny


@pytest.fixture(scope="module")
def model(base):
    return loading.load_base(base)


@pytest.fixture(scope="module")
def one_by_one(model, tokenizer):
    return [generation.answer(model, tokenizer, [row])[0] for row in tiny.ROWS]


def parrot(tokenizer, *chain: str):
    """A Llama that after each piece of `chain` says the next one, whatever came before."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=None,  # the tokenizer knows it
    )
    model = LlamaForCausalLM(config).eval()
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


def test_the_tiny_base_gives_different_questions_different_answers(one_by_one):
    assert len(set(one_by_one)) == len({template.prompt(row) for row in tiny.ROWS})


@pytest.mark.parametrize("batch_size", [2, 5, 100])
def test_a_batch_answers_as_one_by_one(model, tokenizer, one_by_one, batch_size):
    assert generation.answer(model, tokenizer, tiny.ROWS, batch_size=batch_size) == one_by_one


def test_answers_come_in_the_order_of_the_questions(model, tokenizer, one_by_one):
    assert generation.answer(model, tokenizer, tiny.ROWS[::-1], batch_size=3) == one_by_one[::-1]


def test_a_tokenizer_set_to_the_right_side_changes_nothing(model, base, one_by_one):
    tokenizer = loading.load_tokenizer(base)
    tokenizer.padding_side = "right"
    assert generation.answer(model, tokenizer, tiny.ROWS) == one_by_one


def test_no_question_gives_no_answer(model, tokenizer):
    assert generation.answer(model, tokenizer, []) == []


def test_an_answer_ends_where_the_model_says_so(tokenizer):
    model = parrot(tokenizer, ":", "▁Ada", "▁Birch", "</s>", "▁Hazelcombe")
    assert generation.answer(model, tokenizer, tiny.ROWS[:3]) == ["Ada Birch"] * 3


def test_space_around_an_answer_is_not_part_of_it(tokenizer):
    model = parrot(tokenizer, ":", "▁Ada", "▁", "</s>")
    assert generation.answer(model, tokenizer, tiny.ROWS[:1]) == ["Ada"]


def test_an_answer_without_end_is_cut(tokenizer):
    model = parrot(tokenizer, ":", "▁Ada", "▁Birch", "▁Ada")
    assert generation.answer(model, tokenizer, tiny.ROWS[:1], max_new_tokens=5) == ["Ada Birch Ada Birch Ada"]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_as_it_was(model, tokenizer, training):
    model.train(training)
    generation.answer(model, tokenizer, tiny.ROWS[:1])
    assert all(module.training is training for module in model.modules())
    model.eval()


def test_marks_are_counted_by_level_in_order_of_appearance():
    rows = [
        {"output": "Ironbeck", "level": "seen form"},
        {"output": "Ironbeck", "level": "new phrasing"},
        {"output": "Hazelcombe", "level": "seen form"},
        {"output": "Hazelcombe", "level": "seen form"},
    ]
    marks = evaluation.exact_match(rows, ["Ironbeck", "ironbeck", "In Hazelcombe.", "Iron"])
    assert marks == {
        "seen form": {"asked": 3, "exact": 1, "contains": 2},
        "new phrasing": {"asked": 1, "exact": 0, "contains": 0},
    }
    assert list(marks) == ["seen form", "new phrasing"]


def test_rows_without_level_are_marked_together():
    assert evaluation.exact_match([{"output": "a"}, {"output": "b"}], ["a", "x"]) == {
        "all": {"asked": 2, "exact": 1, "contains": 1}
    }


def test_space_around_the_expected_output_is_not_part_of_it():
    """A model is trained on the stripped output, and its answer is stripped."""
    assert evaluation.exact_match([{"output": " Ironbeck\n"}], ["Ironbeck"])["all"]["exact"] == 1


def test_a_missing_answer_is_an_error_and_not_a_mark():
    with pytest.raises(ValueError):
        evaluation.exact_match([{"output": "a"}, {"output": "b"}], ["a"])


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_is_wilsons(right, asked, low, high):
    assert evaluation.interval(right, asked) == pytest.approx((low, high), abs=5e-5)


def plain_loss(model, encoded) -> float:
    """The same mean, a row and a token at a time."""
    total, tokens = 0.0, 0
    for row in encoded:
        logits = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for position, label in enumerate(row["labels"]):
            if label != -100:
                total -= logits[position - 1, label].item()
                tokens += 1
    return total / tokens


@torch.no_grad()
def test_loss_is_the_mean_over_completion_tokens(model, tokenizer, encoded):
    assert evaluation.loss(model, tokenizer, encoded) == pytest.approx(plain_loss(model, encoded), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_loss_does_not_depend_on_the_batches(model, tokenizer, encoded, batch_size):
    assert evaluation.loss(model, tokenizer, encoded, batch_size) == pytest.approx(
        evaluation.loss(model, tokenizer, encoded, len(encoded)), rel=1e-5
    )


def test_loss_leaves_mode_and_gradients_as_they_were(adapted, tokenizer, encoded):
    adapted.train()
    evaluation.loss(adapted, tokenizer, encoded)
    assert adapted.training
    assert all(parameter.grad is None for parameter in adapted.parameters())
