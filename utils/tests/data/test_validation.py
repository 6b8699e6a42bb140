"""Rows in = rows kept + rows rejected, whatever they are; what is kept can be trained on; cleaning twice is idle."""

import csv
import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from utils.data import sources, template, validation
from utils.data.sources import Raw

SETTINGS = {"max_examples": 60, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
# Words of many scripts, right to left too, emoji, what looks like control, spaces, and anything else.
SPICES = ["</s>", "<s>", "[INST]", "<unk>", "### Response:", "سلام", "ברוך הבא", "🎈👩‍🚀", "é"]
SPICES += ["\u202e", "\u2028", "\0", " \n\t "]
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(SPICES), max_size=5).map("".join))
VALUES = st.one_of(TEXTS, TEXTS, st.none(), st.integers(), st.booleans(), st.lists(TEXTS, max_size=2))
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": VALUES}), max_size=2)
NESTED = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2))
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", None]), "content": st.one_of(VALUES, PARTS)},
    optional={"weight": st.sampled_from([0, 1, None, 0.5]), "tool_calls": NESTED, "name": NESTED},
)


def talk(pairs) -> dict:
    said = [turn for question, answer, more in pairs for turn in (("user", question, {}), ("assistant", answer, more))]
    return {"messages": [{"role": role, "content": text, **more} for role, text, more in said]}


ROWS = st.one_of(
    st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS}, optional={"input": VALUES}),
    st.fixed_dictionaries({"question": VALUES, "answer": VALUES}),
    st.fixed_dictionaries({"messages": st.lists(TURNS, max_size=4)}),
    st.lists(st.tuples(TEXTS, TEXTS, st.sampled_from([{}, {"weight": 0}])), min_size=1, max_size=3).map(talk),
    st.fixed_dictionaries({"messages": st.lists(TURNS, max_size=4)}, optional={"system": NESTED, "input": NESTED}),
    st.fixed_dictionaries({"conversations": NESTED, "history": NESTED, "label": VALUES, "tools": NESTED}),
    st.dictionaries(TEXTS, VALUES, max_size=3),
    VALUES,
)
LINES = st.lists(st.one_of(ROWS.map(json.dumps), st.text(max_size=30)), max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checked")


def checked(raws, folder: Path):
    report = validation.Report("my.jsonl", folder / "report")
    return list(validation.check(raws, report)), report


def numbered(rows):
    return (Raw(f"row {i}", row) for i, row in enumerate(rows))


@given(lines=LINES)
@example(lines=["0\r0"])  # a carriage return alone ends no line
@example(lines=["\0"])  # a zero alone does not make the file UTF-16
@settings(**SETTINGS)
def test_rows_in_are_rows_kept_and_rows_rejected(lines, folder):
    path = folder / "my.jsonl"
    text = "\n".join(["{}", *(line.replace("\n", " ") for line in lines)])
    path.write_text(text, encoding="utf-8", errors="replace", newline="")
    there = [line for line in path.read_bytes().decode("utf-8").split("\n") if line.strip()]
    kept, report = checked(sources.read(path), folder)
    assert len(there) == len(kept) + report.rejected == report.kept + report.kinds.total()
    rejected = (report.folder / "rejected.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert len([json.loads(line) for line in rejected]) == report.rejected
    with open(report.folder / "findings.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + report.rejected + report.notes.total()


@given(rows=st.lists(ROWS, max_size=8))
@settings(**SETTINGS)
def test_kept_rows_keep_their_order_and_can_be_trained_on(rows, folder, tokenizer):
    tagged = [{**row, "id": i} for i, row in enumerate(row for row in rows if isinstance(row, dict))]
    kept, _ = checked(numbered(tagged), folder)
    assert [row["id"] for row in kept] == sorted(row["id"] for row in kept)
    again, report = checked(numbered(json.loads(json.dumps(kept))), folder)
    assert (again, report.rejected) == (kept, 0)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for row in kept:
        encoded = template.encode(tokenizer, row)
        ids, labels = encoded["input_ids"], encoded["labels"]
        assert (ids.count(bos), ids[0], labels[0]) == (1, bos, -100)
        earlier = row.get("history", [])
        assert ids.count(eos) == 1 + len(earlier) == labels.count(eos) + sum("weight" in e for e in earlier)
        assert labels[-1] == eos and labels[-2] != eos
        asked = template.encode_prompt(tokenizer, row)
        assert ids[: len(asked)] == asked and labels[len(asked)] != -100


def test_a_very_long_line_and_deep_nesting(folder):
    path = folder / "long.jsonl"
    deep: object = "x"
    for _ in range(200):
        deep = [deep]
    rows = [{"instruction": "i " * 500_000, "output": "o"}, {"instruction": "i", "output": deep}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, report = checked(sources.read(path), folder)
    assert (len(kept), report.rejected) == (1, 1)


def test_a_rejected_row_is_written_whole_with_its_reason(tmp_path):
    raw = {"instruction": "Größe 🎈", "output": None, "more": [1, {"a": "b"}]}
    _, report = checked([Raw("line 7", raw)], tmp_path)
    written = json.loads((report.folder / "rejected.jsonl").read_text(encoding="utf-8"))
    assert written.pop("row") == raw
    reason = "my.jsonl, line 7: 'output' is null. It must be a text"
    assert written == {"file": "my.jsonl", "where": "line 7", "problem": "null", "reason": reason}
    assert str(report).startswith("my.jsonl: 0 of 1 rows kept, 1 rejected (null 1); see ")


def test_a_clean_source_leaves_no_files_not_even_old_ones(tmp_path):
    checked([Raw("line 1", {})], tmp_path)
    assert len(list((tmp_path / "report").iterdir())) == 2
    _, report = checked([Raw("line 1", {"instruction": "i", "output": "o"})], tmp_path)
    assert list((tmp_path / "report").iterdir()) == []
    assert str(report) == "my.jsonl: 1 of 1 rows kept\nused: instruction, output\nnot used: nothing"


def test_the_report_names_every_column_and_field_and_whether_it_is_used(tmp_path):
    turns = [{"role": "user", "content": "i"}, {"role": "assistant", "content": "o", "weight": 1, "name": "Ada"}]
    raws = [
        {"instruction": "i", "output": "o", "group": 1, "nr": b"1"},
        {"messages": turns, "input": "c", "system": "s"},
    ]
    _, report = checked(numbered(raws), tmp_path)
    used = "used: instruction, output, group, messages, system, messages[].role, messages[].content, messages[].weight"
    assert str(report).split("\n")[1:] == [used, "not used: nr, input, messages[].name"]
    _, report = checked(numbered([{"question": "q", "answer": "a", **{f"c{i}": i for i in range(5000)}}]), tmp_path)
    assert len(str(report)) < 500 and str(report).endswith("c19, 4980 more")


@pytest.mark.parametrize(
    "value", [datetime(2026, 1, 1), Decimal("0.1"), b"\xff", np.float32(0.5), float("nan"), {1: {2}}]
)
def test_a_column_may_hold_anything(value, tmp_path):
    (row,), report = checked([Raw("row 1", {"instruction": "i", "output": "o", "more": value})], tmp_path)
    assert row["more"] is value and not report.rejected
    checked([Raw("row 1", {"instruction": "i", "more": value})], tmp_path)
    assert "more" in json.loads((tmp_path / "report" / "rejected.jsonl").read_text())["row"]


def test_findings_beyond_those_that_are_kept_are_counted_and_written(tmp_path):
    _, report = checked(numbered([{}] * (validation.SHOWN + 5)), tmp_path)
    assert (len(report.findings), report.rejected) == (validation.SHOWN, validation.SHOWN + 5)
    for name, header in (("rejected.jsonl", 0), ("findings.csv", 1)):
        assert (report.folder / name).read_bytes().count(b"\n") == header + report.rejected
