"""From a source to what is trained on: what a run says about rejected rows, how rows are split, what is too long."""

import json

import datasets
import pytest

from utils import presets, runtime
from utils.data import dataset, template

GOOD = {"instruction": "Name the town.", "input": "Ada", "output": "Ironbeck"}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(source) -> dataset.Data:
    return dataset.load(presets.Profile("mine", "base", str(source), presets.PROFILES["pocket"].recipe))


def numbered(n: int) -> list[dict]:
    return [{"instruction": f"question {i}", "input": "", "output": str(i)} for i in range(n)]


# Reading and checking.


def test_a_bad_row_is_named_and_the_others_are_kept_in_their_order(tmp_path):
    other = {**GOOD, "output": "Hazel", "level": "seen form"}
    report, rows = dataset.examine(write(tmp_path / "my.jsonl", [GOOD, {"instruction": "i"}, other]))
    assert rows == [GOOD, other]
    (finding,) = report.findings
    assert str(finding).startswith("my.jsonl, line 2: no 'output' (it has: instruction). Name the columns instruction,")


def test_one_foreign_line_in_a_utf_8_file_costs_that_line(tmp_path):
    lines = ['{"question": "Größe", "answer": "o"}'.encode(encoding) for encoding in ("utf-8", "latin-1")]
    (tmp_path / "my.jsonl").write_bytes(b"\n".join(lines))
    report, rows = dataset.examine(tmp_path / "my.jsonl")
    assert rows == [{"instruction": "Größe", "input": "", "output": "o"}]
    assert str(report.findings[0]).startswith("my.jsonl, line 2: 'question' holds bytes that are not UTF-8")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *((content, "my.jsonl has no rows. Write one JSON object a line: {") for content in ("", "\n\n", "\ufeff")),
        (
            '{"instruction": "i"}\n{"instruction": "i", "output": ""}',
            "my.jsonl: none of its 2 rows can be used. The first: my.jsonl, line 1: no 'output'",
        ),
    ],
)
def test_a_file_without_a_usable_row_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "my.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(runtime.Stop) as stop:
        dataset.read(tmp_path / "my.jsonl")
    assert str(stop.value).startswith(said) and "\n" not in str(stop.value)


def test_rejected_rows_are_told_and_do_not_stop_the_run(tmp_path, capsys):
    data = load(write(tmp_path / "my.jsonl", [*numbered(9), {"instruction": "i", "output": None}]))
    assert len(data.train) + len(data.held_out) == 9
    assert capsys.readouterr().out.startswith("my.jsonl: 9 of 10 rows kept, 1 rejected (null 1); see ")


def test_columns_may_be_named_by_the_environment(tmp_path, monkeypatch):
    (tmp_path / "my.csv").write_text("Frage;Antwort\na;b\nc;d\n")
    monkeypatch.setenv("QLORA_COLUMNS", "instruction=Frage, output=Antwort")
    data = load(tmp_path / "my.csv")
    assert {row["output"] for row in data.train + data.held_out} == {"b", "d"}
    monkeypatch.setenv("QLORA_COLUMNS", "Frage")
    with pytest.raises(runtime.Stop, match="QLORA_COLUMNS names no columns. Write it as in QLORA_COLUMNS=instruction="):
        load(tmp_path / "my.csv")
    monkeypatch.setenv("QLORA_COLUMNS", "instructions=Frage,output=Antwort")
    with pytest.raises(runtime.Stop, match="There is no column 'instructions' to be named: only system, history,"):
        load(tmp_path / "my.csv")


def test_the_cards_examples_are_read_as_they_say(tmp_path):
    """Every block of data/README.md is a file."""
    text = (runtime.ROOT / "data" / "README.md").read_text(encoding="utf-8")
    blocks = [part for part in text.split("\n\n") if part.startswith("    ")]
    assert len(blocks) == 5
    for block in blocks:
        lines = [line[4:] for line in block.splitlines()]
        path = tmp_path / ("my.jsonl" if lines[0].startswith("{") else "my.csv")
        path.write_text("\n".join(lines), encoding="utf-8")
        report, rows = dataset.examine(path)
        assert not report.findings and len(rows) >= 4, report.findings


# The Hub.


@pytest.mark.parametrize("name", ["owner/rows", "rows"])
def test_a_hub_name_is_asked_of_the_hub(monkeypatch, name):
    carried = "### Instruction:\nWhat is {}?\n\n### Response:\n"  # as mlabonne/mini-platypus has it
    held = {"owner/rows": numbered(10), "rows": [{"instruction": carried.format(1), "output": "1"}] * 2}
    parts = {(name, "train"): datasets.Dataset.from_list(rows) for name, rows in held.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: parts[name, split])
    data = load(name)
    assert len(data.train) == len(held[name]) - 1
    assert template.prompt(data.train[0]).count("### Instruction:") == 1


def test_a_hub_row_without_the_columns_names_the_row(monkeypatch):
    table = datasets.Dataset.from_list([{"prompt": "p", "output": "o"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    with pytest.raises(runtime.Stop, match="^owner/rows: none of its 1 rows can be used. The first: owner/rows, row 1"):
        load("owner/rows")


def test_a_hub_name_without_network_is_one_line_that_says_the_mend():
    with pytest.raises(runtime.Stop, match=r"^Data set owner/rows cannot be had from the Hub \(.+\). Go online, or"):
        load("owner/rows")


# Splitting.


@pytest.mark.parametrize(("n", "held_out"), [(2, 1), (4, 1), (10, 1), (15, 2), (100, 10), (1001, 100)])
def test_own_data_are_split_90_to_10_and_nothing_is_lost(tmp_path, n, held_out):
    source = write(tmp_path / "my.jsonl", numbered(n))
    data = load(source)
    assert (len(data.train), len(data.held_out), data.exam) == (n - held_out, held_out, [])
    assert sorted(data.train + data.held_out, key=lambda row: int(row["output"])) == numbered(n)
    assert load(source) == data
    if n > 1000:  # they come from all over the file
        places = [int(row["output"]) for row in data.held_out]
        assert min(places) < n / 4 and max(places) > 3 * n / 4


def test_the_almanac_comes_split_with_its_exam():
    data = dataset.load(presets.pick("pocket"))
    assert len(data.exam) >= 500
    people = [{row["person"] for row in part} for part in (data.train, data.held_out, data.exam)]
    assert not people[0] & people[2]


def test_the_almanacs_training_file_stands_for_its_three_files(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "ALMANAC", tmp_path)
    for name, n in (("validation", 2), ("test", 3), ("train", 5)):
        source = write(tmp_path / f"{name}.jsonl", numbered(n))
    assert load(source) == dataset.Data(numbered(5), numbered(2), numbered(3))


@pytest.mark.parametrize(
    ("sizes", "held_out", "told"),
    [
        ([180, *[1] * 20], 20, ""),
        ([95, 5], 5, ""),
        ([5, 95], 5, ""),
        ([50, 25, 25], 25, "Groups of rows: 3. Held out: 25 of 100 rows"),
        ([50, 50], 50, "Groups of rows: 2. Held out: 50 of 100 rows"),
        ([100], 10, "All rows ask the same, or are of one group: single rows are held out"),
        ([3, 1], 1, ""),
        ([1], 0, "Groups of rows: 1. Held out: 0 of 1 rows"),
    ],
)
@pytest.mark.parametrize("row", [lambda i: GOOD | {"instruction": f"{i}"}, lambda i: GOOD | {"group": f"{i}"}])
def test_the_larger_groups_are_trained_on(sizes, held_out, told, row, capsys):
    rows = [row(i) for i, n in enumerate(sizes) for _ in range(n)]
    train, out = dataset.split(rows)
    assert (len(train), len(out)) == (len(rows) - held_out, held_out)
    assert capsys.readouterr().out.startswith(told)


@pytest.mark.parametrize("one", [["x"], {"x": [1]}, 7, "7", b"x", (1, 2)])
def test_a_group_may_be_anything_and_nothing(one):
    nothing = (None, "", float("nan"))
    rows = [row | {"group": one if i < 5 else nothing[i % 3]} for i, row in enumerate(numbered(40))]
    _, held_out = dataset.split(rows)
    assert len(held_out) >= 4 and sum(row["group"] is one for row in held_out) in (0, 5)


@pytest.mark.parametrize("by", ["group", "person", lambda row: row["group"] // 2])
def test_a_group_is_on_one_side(by):
    rows = [{**row, "group": i % 7, "person": "one" if i < 50 else i} for i, row in enumerate(numbered(100))]
    train, held_out = dataset.split(rows, by)
    key = by if callable(by) else (lambda row: row[by])
    assert not {key(row) for row in train} & {key(row) for row in held_out}
    assert sorted(train + held_out, key=rows.index) == rows and train and held_out


def test_without_a_group_rows_with_the_same_question_stay_together():
    rows = [{"instruction": f"question {i % 10}", "input": "", "output": str(i)} for i in range(40)]
    train, held_out = dataset.split(rows)
    assert len(held_out) == 4 and not {r["instruction"] for r in train} & {r["instruction"] for r in held_out}


# Encoding: a row that is too long, by its answer or by its prompt, is left out whole and given back.


@pytest.mark.parametrize("long", [{**GOOD, "output": "x" * 30}, {**GOOD, "instruction": "i " * 300, "output": "o"}])
def test_rows_are_encoded_by_the_template_and_those_too_long_given_back(tokenizer, long):
    rows = [GOOD, long, {**GOOD, "output": "xxx"}]
    each = [template.encode(tokenizer, row) for row in rows]
    longest = len(each[1]["input_ids"])
    for max_length, kept in ((longest, each), (longest - 1, [each[0], each[2]])):
        encoded, too_long = dataset.encode(tokenizer, rows, max_length)
        assert [dict(row) for row in encoded] == kept
        assert too_long == [row for row, e in zip(rows, each, strict=True) if e not in kept]
    with pytest.raises(runtime.Stop, match=f"All 3 rows are longer than 5 tokens. Shorten .* max_length {longest} k"):
        dataset.encode(tokenizer, rows, 5)


def test_too_long_rows_are_rejected_with_their_lengths_and_what_would_keep_them(tokenizer, tmp_path, capsys):
    rows = [row | {"output": "x" * i} for i, row in enumerate(numbered(41)[1:], 1)]
    report, rows = dataset.examine(write(tmp_path / "my.jsonl", rows))
    lengths = [len(template.encode(tokenizer, row)["input_ids"]) for row in rows]
    for _ in range(2):  # asked again, nothing is written twice
        encoded, too_long = dataset.encode(tokenizer, rows, lengths[29])
    written = [json.loads(line) for line in (report.folder / "rejected.jsonl").read_text().splitlines()]
    assert [line["row"] for line in written] == too_long and len(too_long) + len(encoded) == 40
    assert written[-1]["where"] == "line 40"
    enough = f"max_length {sorted(lengths)[37]} keeps 95 % of rows, {max(lengths)} keeps all"
    told = f"{lengths[-1]} tokens are too many. {enough}"
    assert written[-1]["reason"] == f"my.jsonl, line 40: {told}"
    assert (report.kept, report.rejected) == (len(encoded), len(too_long))
    assert f"rejected (too long {len(too_long)})" in str(report) and told[-30:] in str(report)
    assert str(report) in capsys.readouterr().out


@pytest.mark.parametrize("lower", [True, False])
def test_no_max_length_is_advised_that_the_base_cannot_read(tokenizer, tmp_path, monkeypatch, lower):
    report, rows = dataset.examine(write(tmp_path / "my.jsonl", [*numbered(39), GOOD | {"output": "x " * 90}]))
    short, *_, reads, _ = sorted(len(template.encode(tokenizer, row)["input_ids"]) for row in rows)
    monkeypatch.setattr(tokenizer, "model_max_length", reads)
    assert len(dataset.encode(tokenizer, rows, short if lower else 2 * reads)[1]) >= 1
    told = f"; max_length {reads} keeps 95 % of rows" if lower else f"; The base reads {reads} at most"
    assert str(report).splitlines()[0].endswith(told)


def test_held_out_rows_that_are_all_too_long_end_no_run_and_training_rows_do(tokenizer, tmp_path):
    _, rows = dataset.examine(write(tmp_path / "my.jsonl", [*numbered(9), GOOD | {"output": "x" * 90}]))
    longest = len(template.encode(tokenizer, rows[8])["input_ids"])
    encoded, too_long = dataset.encode(tokenizer, rows[9:], longest)
    assert (len(encoded), encoded.column_names, too_long) == (0, ["input_ids", "labels"], rows[9:])
    with pytest.raises(runtime.Stop, match="All 9 rows are longer than 5 tokens"):
        dataset.encode(tokenizer, rows[:9], 5)
