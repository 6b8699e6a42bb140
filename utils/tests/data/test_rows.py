"""One row: each schema, each conversation, each thing that can be wrong, with its words."""

import pytest


WANTED = {"instruction": "i", "input": "", "output": "o"}


def said(raw, columns=None) -> str:
    with pytest.raises(Rejected) as rejected:
        rows.normal(raw, columns)
    return str(rejected.value)


def talk(*turns, names=("role", "content")):
    return [dict(zip(names, turn, strict=True)) for turn in turns]


U, A, U2, A2 = ("user", "u"), ("assistant", "a"), ("user", "u2"), ("assistant", "a2")


@pytest.mark.parametrize(
    "raw",
    [
        {"instruction": "i", "output": "o"},
        {"Instruction": "i", " OUTPUT ": "o", "input": None},
        {"prompt": "i", "completion": "o"},
        {"question": "i", "answer": "o", "input": " "},
        {"messages": talk(("user", "i"), ("assistant", "o"))},
        {"conversations": talk(("human", "i"), ("gpt", "o"), names=("from", "value"))},
        {"conversations": '[{"from": "human", "value": "i"}, {"from": "GPT", "value": "o"}]'},
        {"prompt": talk(("user", "i")), "completion": talk(("assistant", "o"))},
    ],
)
def test_schemas_by_their_columns(raw):
    assert rows.normal(raw) == (WANTED, [])


def test_columns_by_name():
    raw = {"Frage": "i", "Antwort": "o", "Kontext": "c", "nr": 1}
    named = {"instruction": "Frage", "output": "antwort", "input": "Kontext"}
    assert rows.normal(raw, named)[0] == {"instruction": "i", "input": "c", "output": "o", "nr": 1}
    assert rows.normal({"dialog": talk(U, A)}, {"messages": "dialog"})[0]["output"] == "a"
    assert said({"Frage": "i"}, named).startswith("no 'antwort' (it has: Frage)")


def test_a_conversation_keeps_all_its_turns():
    row, _ = rows.normal({"messages": talk(("system", "s"), U, A, U2, A2), "id": 7})
    history = [{"instruction": "u", "output": "a"}]
    assert row == {"system": "s", "history": history, "instruction": "u2", "input": "", "output": "a2", "id": 7}
    assert rows.normal(row) == (row, [])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "'messages' is []"),
        ([U], "'messages' ends without an answer"),
        ([U, A, U2], "'messages' ends without an answer"),
        ([A, U, A2], "messages[0] is the assistant's, where the user should speak"),
        ([U, U2, A], "messages[1] is the user's, where the assistant should speak"),
        ([("system", "s"), U, A, A2], "messages[3] is the assistant's, where the user should speak"),
        ([U, A, ("system", "s"), A2], "messages[2] is the system's, where the user should speak"),
        ([("system", "s")], "'messages' ends without an answer"),
        ([U, ("tool", "x"), A], 'messages[1] has the role "tool"'),
        ([U, (None, "x")], "messages[1] has the role null"),
        ([U, ("assistant", "")], "'messages[1]' is \"\""),
        ([U, ("assistant", None)], "'messages[1]' is null"),
        ([U, ("assistant", ["x"])], "'messages[1]' is [\"x\"]"),
    ],
)
def test_a_conversation_that_nobody_could_have_had(turns, reason):
    assert said({"messages": talk(*turns)}).startswith(reason)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ({"messages": "hello"}, "'messages' is \"hello\""),
        ({"messages": ["a", "b"]}, "messages[0] has the role null"),
        ({"instruction": "i", "output": "o", "history": [["a", "b"]]}, '\'history\' is [["a", "b"]]'),
        ({"instruction": "i", "output": "o", "history": [{"instruction": "a"}]}, "'history[0].output' is null"),
        ({"instruction": "i", "output": "o", "system": 3}, "'system' is 3"),
        ({"instruction": "i"}, "no 'output' (it has: instruction)"),
        ({"prompt": "i"}, "no 'completion' (it has: prompt)"),
        ({"text": "all"}, "no 'instruction' (it has: text)"),
        ({"instruction": "i", "output": "o", "note": "\udcf6"}, "'note' holds bytes that are not UTF-8"),
    ],
)
def test_what_is_wrong_is_said(raw, reason):
    assert said(raw).startswith(reason)


def test_a_prompt_without_answer_has_a_kind_of_its_own():
    with pytest.raises(Rejected) as rejected:
        rows.normal({"prompt": "i", "id": 3})
    assert (rejected.value.problem.kind, rejected.value.problem.field) == ("prompt only", "completion")


# Notes: the row can be used.


@pytest.mark.parametrize(
    "text",
    [
        "### Instruction:\ni\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response.\n\n### Instruction:\ni\n\n### Response:",
        "### Instruction:\n### Instruction:\ni\n### Response:\n### Response:",
    ],
)
def test_a_carried_template_is_taken_off_and_said(text):
    row, notes = rows.normal({"instruction": text, "output": "o"})
    assert row == WANTED
    assert {note.kind for note in notes} == {"template"}


def test_a_carried_input_becomes_the_input():
    text = "### Instruction:\ni\n\n### Input:\nc\n\n### Response:"
    assert rows.normal({"instruction": text, "output": "o"})[0] == {**WANTED, "input": "c"}


@pytest.mark.parametrize("text", ["o</s>", "</s> o", "[INST] o", "<|im_end|>", "<<SYS>>"])
def test_control_text_is_kept_and_noted(text):
    row, notes = rows.normal({"instruction": "i", "output": text})
    assert row["output"] == text
    assert [note.kind for note in notes] == ["control text"]


@pytest.mark.parametrize("text", ["nan", "None", "NULL", " n/a "])
def test_a_word_for_nothing_is_kept_and_noted(text):
    row, notes = rows.normal({"instruction": "i", "output": text})
    assert (row["output"], [note.kind for note in notes]) == (text, ["stand-in"])
