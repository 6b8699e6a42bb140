"""One row: each schema, each conversation, each thing that can be wrong, with its words."""

import pytest

from utils.data import rows

WANTED = {"instruction": "i", "input": "", "output": "o"}
GOOD = {"instruction": "i", "output": "o"}


def said(raw, columns=None) -> str:
    with pytest.raises(rows.Problem) as problem:
        rows.normal(raw, columns)
    return str(problem.value)


def talk(*turns, names=("role", "content")):
    return [dict(zip(names, turn, strict=True)) for turn in turns]


U, A, U2, A2 = ("user", "u"), ("assistant", "a"), ("user", "u2"), ("assistant", "a2")


@pytest.mark.parametrize(
    "raw",
    [
        GOOD,
        {"Instruction": "i", " OUTPUT ": "o", "input": None},
        {"prompt": "i", "completion": "o"},
        {"question": "i", "answer": "o", "input": " "},
        {"messages": talk(("user", "i"), ("assistant", "o"))},
        {"conversations": talk(("human", "i"), ("gpt", "o"), names=("from", "value"))},
        {"conversations": '[{"from": "human", "value": "i"}, {"from": "GPT", "value": "o"}]'},
        {"prompt": talk(("user", "i")), "completion": talk(("assistant", "o"))},
        {"messages": talk(("developer", ""), ("user", [{"type": "text", "text": "i"}]), ("model", [{"text": "o"}]))},
        {"messages": talk(("system", None), ("user", "i"), ("assistant", "o"))},
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
    assert rows.normal({"prompt": "i", "response": "o"}, {"output": "response"}) == (WANTED, [])


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
        ([U, ("tool", "x"), A], 'messages[1] has the role "tool". Give each message a role: system, user or assis'),
        ([("system", ""), U, A, A2], "messages[3] is the assistant's, where the user should speak"),
        ([U, ("assistant", [{"type": "image_url"}])], "'messages[1]' is [{"),
        ([U, ("assistant", [{"type": "image", "text": "x"}])], "'messages[1]' is [{"),
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
        ([GOOD], "a list, not an object"),
        ("text", "a str, not an object"),
        (None, "a NoneType, not an object"),
        (3, "a int, not an object"),
        ({}, "no 'instruction' (it has: nothing)"),
        ({"text": "all"}, "no 'instruction' (it has: text)"),
        ({"prompt": "i", "output": "o"}, "no 'instruction' (it has: prompt, output)"),
        ({"instruction": "i", "completion": "o"}, "no 'output' (it has: instruction, completion)"),
        ({"instruction": "i"}, "no 'output' (it has: instruction)"),
        ({"prompt": "i"}, "no 'completion' (it has: prompt)"),
        (GOOD | {"output": None}, "'output' is null. It must be a text"),
        (GOOD | {"output": 42}, "'output' is 42. It must be a text"),
        (GOOD | {"output": float("nan")}, "'output' is NaN. It must be a text"),
        (GOOD | {"output": ""}, "'output' is \"\". It must be a text that is not empty"),
        (GOOD | {"output": " \n"}, "'output' is \" \\n\". It must be a text that is not empty"),
        (GOOD | {"output": b"o"}, "'output' is \"b'o'\". It must be a text"),  # Parquet may hold bytes
        (GOOD | {"instruction": ""}, "'instruction' is \"\". It must be a text that is not empty"),
        (GOOD | {"instruction": ["i"]}, "'instruction' is [\"i\"]. It must be a text"),
        (GOOD | {"input": 5}, "'input' is 5. It must be a text, or be left out"),
        (GOOD | {"input": 0}, "'input' is 0. It must be a text, or be left out"),
        (GOOD | {"input": False}, "'input' is false. It must be a text, or be left out"),
        (GOOD | {"input": []}, "'input' is []. It must be a text, or be left out"),
        (GOOD | {"system": 3}, "'system' is 3. It must be a text, or be left out"),
        (GOOD | {"output": "o\ud83d"}, "'output' holds half a character"),
        (GOOD | {"instruction": "\ude00"}, "'instruction' holds half a character"),
        (GOOD | {"input": "\ud83d"}, "'input' holds half a character"),
        (GOOD | {"note": "\udcf6"}, "'note' holds bytes that are not UTF-8"),
        (GOOD | {"history": [["a", "b"]]}, '\'history\' is [["a", "b"]]'),
        (GOOD | {"history": [{"instruction": "a"}]}, "'history[0].output' is null"),
        ({"messages": "hello"}, "'messages' is \"hello\""),
        ({"messages": ["a", "b"]}, "messages[0] has the role null"),
    ],
)
def test_what_is_wrong_is_said(raw, reason):
    assert said(raw).startswith(reason)


@pytest.mark.parametrize("raw", [GOOD | {"output": [1] * 10_000}, {str(i): "x" * i for i in range(10_000)}])
def test_a_message_fits_on_a_screen(raw):
    assert len(said(raw)) < 500


# What a row says beside its texts: obeyed, or refused, or told as not used.


def turn(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


LEARNED, READ = {"instruction": "i", "output": "o"}, {"instruction": "u", "output": "a", "weight": 0}


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ({"question": "i", "context": "c", "answer": "o"}, WANTED | {"input": "c"}),
        (GOOD | {"input": "c", "context": "d"}, WANTED | {"input": "c", "context": "d"}),
        (GOOD | {"input": float("nan"), "tools": [], "images": None, "label": True}, {"label": True}),
        ({"messages": talk(U, A), "system": "s"}, {"system": "s", "instruction": "u", "input": "", "output": "a"}),
        ({"messages": talk(U, A), "input": "c", "history": "h"}, {"instruction": "u", "input": "", "output": "a"}),
        ({"messages": [*talk(U), turn("a", weight=0), *talk(("user", "i")), turn("o", weight=1)]}, {"history": [READ]}),
        ({"messages": [*talk(("user", "i")), turn("o"), *talk(U), turn("a", weight=0.0)]}, WANTED),
        ({"messages": [*talk(U), turn("a", train=False), *talk(("user", "i")), turn("o")]}, {"history": [READ]}),
        ({"messages": [*talk(U), turn("a", loss=False), *talk(("user", "i")), turn("o")]}, {"history": [READ]}),
        ({"instruction": "i", "context": "c", "response": "o"}, WANTED | {"input": "c"}),
        (GOOD | {"history": [READ, LEARNED | {"input": "c"}]}, {"history": [READ, LEARNED | {"input": "c"}]}),
    ],
)
def test_what_changes_the_meaning_is_obeyed(raw, wanted):
    row, notes = rows.normal(raw)
    assert (row.items() >= wanted.items(), notes) == (True, [])
    assert "history" in wanted or "history" not in row
    assert row["input"] == wanted.get("input", "")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (GOOD | {"tools": [{"name": "f"}]}, "'tools' (tool calling) has no place in the template. Say it as text"),
        (GOOD | {"images": ["x.png"]}, "'images' (beyond text) has no place"),
        *(
            ({"messages": [*talk(U), turn("a", **more)]}, f"'messages[1].{name}' ({kind}) has no place")
            for name, kind, more in (
                ("tool_calls", "tool calling", {"tool_calls": [{"id": 1}]}),
                ("function_call", "tool calling", {"function_call": {"name": "f"}}),
                ("reasoning_content", "beyond text", {"reasoning_content": "because"}),
            )
        ),
        ({"messages": [*talk(U), turn("a", weight=0.5)]}, "the weight of messages[1] is 0.5. Only 0 and 1"),
        ({"messages": [*talk(U), turn("a", weight=0)]}, "'messages' has no answer to learn: every weight is 0"),
        ({"messages": talk(("system", "s"), U, A), "system": "t"}, "'system' and the system's message are two texts"),
        ({"question": "i", "context": {"a": "b"}, "answer": "o"}, "'context' is {"),
        ({"prompt": talk(U), "completion": talk(A), "input": "c"}, "'input' stands beside a conversation. Put it into"),
    ],
)
def test_what_the_template_cannot_say_is_refused(raw, reason):
    assert said(raw).startswith(reason)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"prompt": "i", "chosen": "a", "rejected": "b"}, "This is preference data: chapter 13"),
        ({"prompt": "i", "completion": "o", "label": False}, "to avoid (KTO). This is preference data: chapter 13"),
        ({"question": "i", "answer": "o", "label": "False"}, "to avoid (KTO). This is preference data: chapter 13"),
        ({"text": "### Human: i### Assistant: o"}, "This is ready-made text, template and all: give"),
        ({"conversations": talk(("human", "u"), ("function_call", "{}"), names=("from", "value"))}, "tool calling"),
    ],
)
def test_data_made_for_something_else_are_called_what_they_are(raw, told):
    assert told in said(raw)


def test_a_prompt_without_answer_has_a_kind_of_its_own():
    with pytest.raises(rows.Problem) as problem:
        rows.normal({"prompt": "i", "id": 3})
    assert (problem.value.kind, problem.value.field) == ("prompt only", "completion")


# Notes: the row can be used.


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("### Instruction:\ni\n\n### Response:\n", WANTED),
        ("Below is an instruction that describes a task.\n\n### Instruction:\ni\n\n### Response:", WANTED),
        ("### Instruction:\n### Instruction:\ni\n### Response:\n### Response:", WANTED),
        ("### Instruction:\ni\n\n### Input:\nc\n\n### Response:", WANTED | {"input": "c"}),
    ],
)
def test_a_carried_template_is_taken_off_and_said(text, wanted):
    row, notes = rows.normal(GOOD | {"instruction": text})
    assert row == wanted
    assert {note.kind for note in notes} == {"template"}


CONTROL = ["o</s>", "</s> o", "[INST] o", "<|im_end|>", "<<SYS>>", "### Human: hi", "USER: hi"]
CONTROL += ["<start_of_turn>user", "<|eot_id|>", "<bos>"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Write '### Response:' first.", "control text"),  # no template: the text goes on
        *((text, "control text") for text in CONTROL),
        *((text, "stand-in") for text in ("nan", "None", "NULL", " n/a ")),
    ],
)
def test_what_looks_wrong_is_kept_and_noted_wherever_it_stands(text, kind):
    row, notes = rows.normal(GOOD | {"output": text})
    assert (row["output"], [note.kind for note in notes]) == (text, [kind])
    _, notes = rows.normal(GOOD | {"history": [GOOD | {"output": text}]})
    assert [(note.kind, note.field) for note in notes] == [(kind, "history[0].output")]
    _, notes = rows.normal(GOOD | {"system": text})
    assert [(note.kind, note.field) for note in notes] == ([(kind, "system")] if kind == "control text" else [])


def test_a_carried_input_does_not_replace_the_rows_own():
    text = "### Instruction:\ni\n\n### Input:\nc\n\n### Response:"
    row, notes = rows.normal(GOOD | {"instruction": text, "input": "mine"})
    assert (row["instruction"], row["input"], [n.kind for n in notes]) == (text, "mine", ["control text"])
