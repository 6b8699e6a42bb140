"""The prompt template: its exact text, and one BOS, one EOS and the right labels in every row."""

import pytest

from utils.data import template
from utils.tests import tiny

ROW = {"instruction": "Name the town.", "output": "Ironbeck"}
# Rows that tempt a tokenizer: special tokens as text, spaces at the edges, letters that no vocabulary has.
ODD_ROWS = [
    ROW,
    {"instruction": "Close it with </s>.", "input": "<s>[INST] hi [/INST]</s> ", "output": "so: </s> "},
    {"instruction": "<s>", "output": "</s>"},
    {"instruction": "<unk> in, <unk> out", "output": "<unk>"},
    {"instruction": "  spaces  ", "input": "\t\n", "output": "  two  words\n"},
    {"instruction": "Grüße, 世界 🎈", "output": "🎈"},
    {"instruction": "1 + 1", "output": "2"},
    {"instruction": "Answer with a colon.", "output": ": : :"},
    {"instruction": "### Response:", "input": "### Response:", "output": "### Response:"},
]


@pytest.fixture(scope="module", params=["tiny", "Llama-2's"])
def any_tokenizer(request, tmp_path_factory):
    """Both vocabularies in turn."""
    if request.param == "tiny":
        return tiny.make_tokenizer(tmp_path_factory.mktemp("tiny"), add_bos_token=True)
    if not tiny.LLAMA_2_TOKENIZER.is_file():
        pytest.skip("Llama-2's own tokenizer is not part of the repository")
    proto = tiny.LLAMA_2_TOKENIZER.read_bytes()
    return tiny.make_tokenizer(tmp_path_factory.mktemp("llama2"), add_bos_token=True, proto=proto)


def test_prompt_without_input():
    assert template.prompt(ROW) == "### Instruction:\nName the town.\n\n### Response:"


def test_prompt_with_input():
    assert template.prompt({**ROW, "input": "Ada Birch"}) == (
        "### Instruction:\nName the town.\n\n### Input:\nAda Birch\n\n### Response:"
    )


@pytest.mark.parametrize("nothing", ["", "  \n", None])
def test_an_empty_input_has_no_heading(nothing):
    assert template.prompt({**ROW, "input": nothing}) == template.prompt(ROW)


@pytest.mark.parametrize("row", ODD_ROWS)
def test_no_prompt_ends_in_a_space(row):
    assert template.prompt(row).endswith("### Response:")


@pytest.mark.parametrize("row", ODD_ROWS)
def test_every_completion_starts_with_exactly_one_space(row):
    assert template.completion(row) == " " + row["output"].strip()


@pytest.mark.parametrize("row", ODD_ROWS)
def test_exactly_one_bos_and_it_is_first(any_tokenizer, row):
    ids = template.encode(any_tokenizer, row)["input_ids"]
    assert [i for i, token in enumerate(ids) if token == any_tokenizer.bos_token_id] == [0]


@pytest.mark.parametrize("row", ODD_ROWS)
def test_exactly_one_eos_and_it_is_last_and_learned(any_tokenizer, row):
    encoded = template.encode(any_tokenizer, row)
    eos, last = any_tokenizer.eos_token_id, len(encoded["input_ids"]) - 1
    assert [i for i, token in enumerate(encoded["input_ids"]) if token == eos] == [last]
    assert encoded["labels"][last] == eos


@pytest.mark.parametrize("row", ODD_ROWS)
def test_a_prompt_has_the_same_tokens_alone_and_in_front_of_its_completion(any_tokenizer, row):
    before = template.encode_prompt(any_tokenizer, row)
    assert template.encode(any_tokenizer, row)["input_ids"][: len(before)] == before


@pytest.mark.parametrize("row", ODD_ROWS)
def test_labels_are_the_completion_and_mask_the_prompt(any_tokenizer, row):
    encoded = template.encode(any_tokenizer, row)
    masked = len(template.encode_prompt(any_tokenizer, row))
    assert encoded["labels"] == [-100] * masked + encoded["input_ids"][masked:]
    learned = [token for token in encoded["labels"] if token != -100]
    text = any_tokenizer.decode(learned[:-1], clean_up_tokenization_spaces=False)
    assert text.strip() == row["output"].strip()


@pytest.mark.parametrize("row", ODD_ROWS)
def test_the_text_comes_back_from_its_ids(any_tokenizer, row):
    ids = template.encode(any_tokenizer, row)["input_ids"]
    assert any_tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False) == (
        template.prompt(row) + template.completion(row)
    )


def test_the_answers_first_piece_is_the_one_known_from_prose(any_tokenizer):
    """After a line break "Ada" falls apart into other pieces, and the exam with it."""
    prose = any_tokenizer("was born in Ironbeck", add_special_tokens=False).input_ids
    learned = [token for token in template.encode(any_tokenizer, ROW)["labels"] if token != -100]
    assert prose[-len(learned[:-1]) :] == learned[:-1]


@pytest.mark.parametrize("row", ODD_ROWS)
def test_a_tokenizer_that_adds_no_bos_gives_the_same_ids(any_tokenizer, tmp_path, row):
    from transformers import LlamaTokenizer

    any_tokenizer.save_pretrained(tmp_path)
    without = LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=False)
    assert without("a").input_ids[0] != without.bos_token_id
    assert template.encode(without, row) == template.encode(any_tokenizer, row)


def test_a_tokenizer_without_a_bos_adds_none(any_tokenizer, tmp_path):
    from transformers import LlamaTokenizer

    any_tokenizer.save_pretrained(tmp_path)
    without = LlamaTokenizer.from_pretrained(tmp_path)
    without.bos_token = None
    assert template.encode_prompt(without, ROW) == template.encode_prompt(any_tokenizer, ROW)[1:]


def test_a_drifting_boundary_is_refused_and_not_trained_on(any_tokenizer, monkeypatch):
    """The template that people write first: the space belongs to the prompt."""
    monkeypatch.setattr(template, "question", lambda row: f"### Instruction:\n{row['instruction']}\n\n### Response: ")
    monkeypatch.setattr(template, "completion", lambda row: row["output"])
    with pytest.raises(ValueError, match="prompt's tokens change in front of the completion: 'Name the town.'"):
        template.encode(any_tokenizer, ROW)


# Conversations.

TALK = {
    "system": "Be brief.",
    "history": [
        {"instruction": "Where does Ada live?", "output": "Ironbeck"},
        {"instruction": "</s>", "output": "<s>"},
    ],
    "instruction": "And her pet?",
    "input": "",
    "output": "cat",
}


def test_a_conversation_is_its_exchanges_one_behind_the_other(any_tokenizer):
    rows = [
        TALK["history"][0] | {"system": "Be brief."},
        TALK["history"][1],
        {"instruction": "And her pet?", "output": "cat"},
    ]
    alone = [template.encode(any_tokenizer, row) for row in rows]
    together = template.encode(any_tokenizer, TALK)
    for key in ("input_ids", "labels"):
        assert together[key] == alone[0][key] + alone[1][key][1:] + alone[2][key][1:]


def test_a_conversation_has_one_bos_and_a_learned_eos_behind_each_answer(any_tokenizer):
    encoded = template.encode(any_tokenizer, TALK)
    ids, labels = encoded["input_ids"], encoded["labels"]
    bos, eos = any_tokenizer.bos_token_id, any_tokenizer.eos_token_id
    assert (ids.count(bos), ids[0]) == (1, bos)
    assert ids.count(eos) == labels.count(eos) == 3
    assert labels[-1] == eos


def test_what_was_said_is_a_prefix_of_the_next_prompt(any_tokenizer):
    earlier = {"system": TALK["system"], "history": TALK["history"][:1], **TALK["history"][1]}
    said = template.encode(any_tokenizer, earlier)["input_ids"]
    asked = template.encode_prompt(any_tokenizer, TALK)
    assert asked[: len(said)] == said
    assert template.encode(any_tokenizer, TALK)["input_ids"][: len(asked)] == asked


def test_a_conversation_can_be_read():
    assert template.prompt(TALK) == (
        "Be brief.\n\n### Instruction:\nWhere does Ada live?\n\n### Response: Ironbeck\n\n"
        "### Instruction:\n</s>\n\n### Response: <s>\n\n### Instruction:\nAnd her pet?\n\n### Response:"
    )


# Tokens a word (fertility): what a vocabulary made mostly of English costs the others.


def test_llama_2_needs_more_tokens_a_word_where_it_read_less(any_tokenizer):
    if len(any_tokenizer) != 32_000:
        pytest.skip("a statement about Llama-2's vocabulary")
    samples = {
        "en": "The miller lives in the town",
        "de": "Der Müller wohnt in der Stadt",
        "el": "Ο μυλωνάς μένει στην πόλη",
    }
    fertility = {k: len(any_tokenizer.tokenize(text)) / len(text.split()) for k, text in samples.items()}
    assert fertility["en"] < fertility["de"] < 2 < 3 < fertility["el"]
