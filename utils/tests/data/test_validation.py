"""Rows in = rows kept + rows rejected, whatever they are; what is kept can be trained on; cleaning twice is idle."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from utils.data import dataset, duplicates, sources, template, validation

SETTINGS = {"max_examples": 60, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
# Words of many scripts, right to left too, emoji, what looks like control, spaces, and anything else.
SPICES = [
    "</s>",
    "<s>",
    "[INST]",
    "<unk>",
    "### Response:",
    "سلام",
    "ברוך הבא",
    "🎈👩‍🚀",
    "\u202e",
    "\u2028",
    "\0",
    " \n\t ",
    "é",
]
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(SPICES), max_size=5).map("".join))
VALUES = st.one_of(TEXTS, TEXTS, st.none(), st.integers(), st.booleans(), st.lists(TEXTS, max_size=2))
TURNS = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": VALUES})
ROWS = st.one_of(
    st.fixed_dictionaries({"instruction": TEXTS, "output": TEXTS}, optional={"input": VALUES}),
    st.fixed_dictionaries({"question": VALUES, "answer": VALUES}),
    st.fixed_dictionaries({"messages": st.lists(TURNS, max_size=4)}),
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3).map(
        lambda pairs: {
            "messages": [
                {"role": r, "content": t} for p in pairs for r, t in zip(("user", "assistant"), p, strict=True)
            ]
        }
    ),
    st.dictionaries(TEXTS, VALUES, max_size=3),
    VALUES,
)
LINES = st.lists(st.one_of(ROWS.map(lambda row: json.dumps(row)), st.text(max_size=30)), max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checked")


def checked(raws, folder: Path):
    report = validation.Report("my.jsonl", folder / "report")
    return list(validation.check(raws, report)), report


@given(lines=LINES)
@example(lines=["0\r0"])  # a carriage return alone ends no line
@example(lines=["\0"])  # a zero alone does not make the file UTF-16
@settings(**SETTINGS)
def test_rows_in_are_rows_kept_and_rows_rejected(lines, folder):
    path = folder / "my.jsonl"
    path.write_text("{}\n" + "\n".join(line.replace("\n", " ") for line in lines), encoding="utf-8", errors="replace")
    there = [line for line in path.read_bytes().decode("utf-8").split("\n") if line.strip()]
    kept, report = checked(sources.read(path), folder)
    assert len(there) == len(kept) + report.rejected == report.kept + report.kinds.total()
    rejected = [
        json.loads(line) for line in (report.folder / "rejected.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    ]
    assert len(rejected) == report.rejected
    with open(report.folder / "findings.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + report.rejected + report.notes.total()


@given(rows=st.lists(ROWS, max_size=10))
@settings(**SETTINGS)
def test_kept_rows_keep_their_order(rows, folder):
    tagged = [{**row, "id": i} for i, row in enumerate(row for row in rows if isinstance(row, dict))]
    kept, _ = checked((Raw(f"row {i}", row) for i, row in enumerate(tagged)), folder)
    assert [row["id"] for row in kept] == sorted(row["id"] for row in kept)


@given(rows=st.lists(ROWS, max_size=8))
@settings(**SETTINGS)
def test_what_was_kept_is_kept_again_as_it_is(rows, folder):
    kept, _ = checked((Raw(f"row {i}", row) for i, row in enumerate(rows)), folder)
    written = [json.loads(json.dumps(row)) for row in kept]
    again, report = checked((Raw(f"row {i}", row) for i, row in enumerate(written)), folder)
    assert (again, report.rejected) == (kept, 0)


@given(rows=st.lists(ROWS, max_size=8))
@settings(**SETTINGS)
def test_cleaning_a_clean_file_changes_nothing_and_keeps_the_order(rows, folder):
    kept, _ = checked((Raw(f"row {i}", row) for i, row in enumerate(rows)), folder)
    clean, why = duplicates.clean(kept)
    assert duplicates.clean(clean) == (clean, {})
    assert clean == [row for i, row in enumerate(kept) if i not in why]


@given(rows=st.lists(ROWS, min_size=1, max_size=5))
@settings(**SETTINGS)
def test_every_kept_row_ends_in_one_learned_eos_and_has_one_bos(rows, folder, tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for row in checked((Raw(f"row {i}", row) for i, row in enumerate(rows)), folder)[0]:
        encoded = template.encode(tokenizer, row)
        ids, labels = encoded["input_ids"], encoded["labels"]
        answers = 1 + len(row.get("history", []))
        assert (ids.count(bos), ids[0], labels[0]) == (1, bos, -100)
        assert ids.count(eos) == labels.count(eos) == answers
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
    assert written["row"] == raw
    assert written["reason"] == "my.jsonl, line 7: 'output' is null. It must be a text"
    assert (written["file"], written["where"], written["problem"]) == ("my.jsonl", "line 7", "null")


def test_a_clean_source_leaves_no_files_not_even_old_ones(tmp_path):
    checked([Raw("line 1", {})], tmp_path)
    assert len(list((tmp_path / "report").iterdir())) == 2
    _, report = checked([Raw("line 1", {"instruction": "i", "output": "o"})], tmp_path)
    assert list((tmp_path / "report").iterdir()) == []
    assert str(report) == "my.jsonl: 1 of 1 rows kept"


def test_memory_does_not_grow_with_the_rows(tmp_path):
    import tracemalloc

    def peak(rows: int) -> int:
        good, bad = {"instruction": "i" * 50, "output": "o"}, {"instruction": "i", "output": 1}
        raws = (Raw(f"line {i}", dict(bad if i % 10 == 0 else good)) for i in range(rows))
        tracemalloc.start()
        report = validation.Report("my.jsonl", tmp_path)
        for _ in validation.check(raws, report):
            pass
        return tracemalloc.get_traced_memory()[1]

    shown = 10 * validation.SHOWN  # from here on findings are counted and written, but no longer kept
    assert peak(3 * shown) < 1.1 * peak(shown)


def test_the_raw_almanac_and_its_key_are_made_again_byte_for_byte():
    import runpy

    folder = dataset.ALMANAC
    made = runpy.run_path(str(folder / "make_raw.py"))["make"]()
    assert made == ((folder / "raw.jsonl").read_bytes(), (folder / "raw_key.jsonl").read_bytes())
