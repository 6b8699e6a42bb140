"""The prompt template: its exact text, and one BOS, one EOS and the right labels in every row."""

import pytest
from transformers import LlamaTokenizer

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
HISTORY = [{"instruction": "Where does Ada live?", "output": "Ironbeck"}, {"instruction": "</s>", "output": "<s>"}]
TALK = {"system": "Be brief.", "history": HISTORY, "instruction": "And her pet?", "input": "", "output": "cat"}


@pytest.fixture(scope="module", params=["tiny", "Llama-2's"])
def any_tokenizer(request, tmp_path_factory):
    """Both vocabularies in turn."""
    if request.param == "tiny":
        return tiny.make_tokenizer(tmp_path_factory.mktemp("tiny"), add_bos_token=True)
    if not tiny.LLAMA_2_TOKENIZER.is_file():
        pytest.skip("Llama-2's own tokenizer is not part of the repository")
    proto = tiny.LLAMA_2_TOKENIZER.read_bytes()
    return tiny.make_tokenizer(tmp_path_factory.mktemp("llama2"), add_bos_token=True, proto=proto)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (ROW, "### Instruction:\nName the town.\n\n### Response:"),
        (ROW | {"input": "Ada"}, "### Instruction:\nName the town.\n\n### Input:\nAda\n\n### Response:"),
        *((ROW | {"input": nothing}, "### Instruction:\nName the town.\n\n### Response:") for nothing in (" \n", None)),
        (
            TALK,
            "Be brief.\n\n### Instruction:\nWhere does Ada live?\n\n### Response: Ironbeck\n\n"
            "### Instruction:\n</s>\n\n### Response: <s>\n\n### Instruction:\nAnd her pet?\n\n### Response:",
        ),
    ],
)
def test_the_prompts_text(row, text):
    assert template.prompt(row) == text


@pytest.mark.parametrize("row", ODD_ROWS)
def test_the_ids_and_labels_of_a_row(any_tokenizer, row):
    encoded = template.encode(any_tokenizer, row)
    ids, labels = encoded["input_ids"], encoded["labels"]
    bos, eos = any_tokenizer.bos_token_id, any_tokenizer.eos_token_id
    special = [(i, token) for i, token in enumerate(ids) if token in (bos, eos)]
    assert special == [(0, bos), (len(ids) - 1, eos)]
    prompt = template.encode_prompt(any_tokenizer, row)
    assert ids[: len(prompt)] == prompt
    assert labels == [-100] * len(prompt) + ids[len(prompt) :]

    def text(ids):
        return any_tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    assert template.prompt(row).endswith("### Response:")  # and not with a space
    assert text(ids[1:-1]) == f"{template.prompt(row)} {row['output'].rstrip()}"
    assert text(labels[len(prompt) : -1]).strip() == row["output"].strip()


def test_the_answers_first_piece_is_the_one_known_from_prose(any_tokenizer):
    """After a line break "Ada" falls apart into other pieces, and the exam with it."""
    prose = any_tokenizer("was born in Ironbeck", add_special_tokens=False).input_ids
    learned = [token for token in template.encode(any_tokenizer, ROW)["labels"] if token != -100]
    assert prose[-len(learned[:-1]) :] == learned[:-1]


def test_the_tokenizers_own_setting_of_a_bos_does_not_matter(any_tokenizer, tmp_path):
    any_tokenizer.save_pretrained(tmp_path)
    without = LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=False)
    assert without("a").input_ids[0] != without.bos_token_id
    for row in (*ODD_ROWS, TALK):
        assert template.encode(without, row) == template.encode(any_tokenizer, row)
    without.bos_token = None  # such as Qwen's
    assert template.encode_prompt(without, ROW) == template.encode_prompt(any_tokenizer, ROW)[1:]


def test_a_drifting_boundary_is_refused_and_not_trained_on(any_tokenizer, monkeypatch):
    """The template that people write first: the space belongs to the prompt."""
    monkeypatch.setattr(template, "question", lambda row: f"### Instruction:\n{row['instruction']}\n\n### Response: ")
    monkeypatch.setattr(template, "completion", lambda row: row["output"])
    with pytest.raises(ValueError, match="prompt's tokens change in front of the completion: 'Name the town.'"):
        template.encode(any_tokenizer, ROW)


def test_a_conversation_is_its_exchanges_one_behind_the_other(any_tokenizer):
    first, second = TALK["history"]
    rows = [first | {"system": "Be brief."}, second, {"instruction": "And her pet?", "output": "cat"}]
    alone = [template.encode(any_tokenizer, row) for row in rows]
    together = template.encode(any_tokenizer, TALK)
    for key in ("input_ids", "labels"):  # one BOS in front of all; each EOS is there, and learned
        assert together[key] == alone[0][key] + alone[1][key][1:] + alone[2][key][1:]


@pytest.mark.parametrize(
    ("output", "completion"),
    [("    return x\n", "     return x"), ("\n\nx", " \n\nx"), ("\tx", " \tx"), (" Paris", " Paris"), ("x  \n", " x")],
)
def test_an_indentation_is_part_of_the_answer_and_one_space_the_templates(any_tokenizer, output, completion):
    row = ROW | {"output": output}
    assert template.completion(row) == completion
    learned = [token for token in template.encode(any_tokenizer, row)["labels"] if token != -100]
    before = any_tokenizer("Response:", add_special_tokens=False).input_ids
    assert any_tokenizer.decode(before + learned[:-1], clean_up_tokenization_spaces=False) == "Response:" + completion


def test_an_answer_of_weight_0_is_read_and_not_learned(any_tokenizer):
    first, second = TALK["history"]
    given = template.encode(any_tokenizer, TALK)
    found = template.encode(any_tokenizer, TALK | {"history": [first | {"weight": 0}, second]})
    learned = len(template.encode(any_tokenizer, first | {"system": TALK["system"]})["input_ids"])
    assert found["input_ids"] == given["input_ids"]
    assert found["labels"] == [-100] * learned + given["labels"][learned:] != given["labels"]


def test_what_was_said_is_a_prefix_of_the_next_prompt(any_tokenizer):
    earlier = {"system": TALK["system"], "history": TALK["history"][:1], **TALK["history"][1]}
    said = template.encode(any_tokenizer, earlier)["input_ids"]
    asked = template.encode_prompt(any_tokenizer, TALK)
    assert asked[: len(said)] == said
    assert template.encode(any_tokenizer, TALK)["input_ids"][: len(asked)] == asked
