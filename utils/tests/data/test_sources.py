"""Any file to raw rows: each format, each separator, each encoding; and the words for those that cannot be read."""

import json

import pytest

from utils import runtime
from utils.data import dataset, sources

ROWS = [
    {"instruction": "Translate: Größe, 世界 🎈", "input": "a, b; c\td", "output": 'He said "no".\nTwice.'},
    {"instruction": "Name the town.", "input": "", "output": "Ironbeck"},
]


def as_csv(rows, separator=",", end="\n") -> str:
    def cell(text):
        return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',;\t"\n') else text

    lines = [list(rows[0]), *(row.values() for row in rows)]
    return "".join(separator.join(map(cell, line)) + end for line in lines)


def read(path):
    return [raw.value for raw in sources.read(sources.find(path))]


def stopped(path) -> str:
    with pytest.raises(runtime.Stop) as stop:
        list(sources.read(sources.find(path)))
    assert "\n" not in str(stop.value)
    return str(stop.value)


# Formats.


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["my.csv", "my.CSV", "my.tsv"])
def test_csv_with_any_separator(tmp_path, separator, name):
    (tmp_path / name).write_text(as_csv(ROWS, separator), encoding="utf-8", newline="")
    assert read(tmp_path / name) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_encodings_with_their_mark(tmp_path, encoding, end, kind):
    text = {
        "csv": as_csv(ROWS, ";", end),
        "jsonl": end.join(json.dumps(row, ensure_ascii=False) for row in ROWS),
        "json": json.dumps(ROWS, ensure_ascii=False, indent=2).replace("\n", end),
    }[kind]
    (tmp_path / f"my.{kind}").write_bytes(text.encode(encoding))
    assert read(tmp_path / f"my.{kind}") == ROWS


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["my.json", "my.jsonl"])
def test_a_json_array_also_inside_an_object(tmp_path, indent, wrapped, name):
    if wrapped and name == "my.jsonl":
        pytest.skip("a line that is an object is a row there")
    (tmp_path / name).write_text(json.dumps({"data": ROWS} if wrapped else ROWS, indent=indent))
    assert read(tmp_path / name) == ROWS


def test_a_json_file_of_lines_and_one_with_a_single_row(tmp_path):
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=1))
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    assert read(tmp_path / "lines.json") == ROWS
    assert read(tmp_path / "one.json") == ROWS[:1]
    assert read(tmp_path / "talk.json") == [talk]


def test_parquet_and_folders_of_datasets(tmp_path):
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "my.parquet")
    table.save_to_disk(tmp_path / "folder")
    DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("my.parquet", "folder", "splits"):
        assert read(tmp_path / name) == ROWS, name
    DatasetDict({"test": table}).save_to_disk(tmp_path / "no_train")
    assert "no_train has the splits test and no 'train'" in stopped(tmp_path / "no_train")


# Where a row stands.


def test_the_place_is_the_line_where_the_row_begins(tmp_path):
    (tmp_path / "my.csv").write_text("\n" + as_csv(ROWS + ROWS), newline="")
    assert [raw.where for raw in sources.read(tmp_path / "my.csv")] == ["line 3", "line 5", "line 6", "line 8"]


# What a CSV file does to people (cells stay texts: no NA, no 7 for 007).


def test_cells_stay_as_they_are_written(tmp_path):
    (tmp_path / "my.csv").write_text("question,answer,\na,NA,\nb,None,\nc,007,\nd,1e5,x\n")
    rows = read(tmp_path / "my.csv")
    assert [row["answer"] for row in rows] == ["NA", "None", "007", "1e5"]
    assert rows[0].keys() == {"question", "answer"} and rows[3][""] == "x"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("Name two colours,red, blue", ("columns", "3 cells for 2 columns")),
        ("alone", ("columns", "1 cells for 2 columns")),
        ('a,"b "quoted" c"', ("not CSV", "not CSV (")),
        ('a,"never closed', ("not CSV", "not CSV (unexpected end of data")),
    ],
)
def test_a_row_that_does_not_fit_is_kept_whole_with_its_reason(tmp_path, line, problem):
    (tmp_path / "my.csv").write_text(f"question,answer\nfirst,one\n{line}\n")
    good, bad = sources.read(tmp_path / "my.csv")
    assert good.problem is None
    assert (bad.where, bad.value, bad.problem.kind) == ("line 3", line + "\n", problem[0])
    assert bad.problem.what.startswith(problem[1])


def test_after_a_bad_row_reading_goes_on(tmp_path):
    (tmp_path / "my.csv").write_text('q,a\n1,"x "y" z"\n2,b\n')
    assert [raw.problem is None for raw in sources.read(tmp_path / "my.csv")] == [False, True]


# JSON as people write it.


@pytest.mark.parametrize(
    ("line", "mend"),
    [
        ('{"instruction": "i", "output": "o",}', "Delete the comma"),
        ("{'instruction': 'i', 'output': 'o'}", "Use double quotes"),
        ('{"instruction": "i"', "Write one object a line"),
        ("[" * 100_000, "Write one object a line"),
    ],
)
def test_a_line_that_is_not_json_says_the_mend(tmp_path, line, mend):
    (tmp_path / "my.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    _, bad = sources.read(tmp_path / "my.jsonl")
    assert (bad.where, bad.value, bad.problem.kind) == ("line 2", line + "\n", "not JSON")
    assert bad.problem.mend.startswith(mend)


def test_an_array_with_a_mistake_names_the_line(tmp_path):
    (tmp_path / "my.json").write_text('[\n {"instruction": "i", "output": "o"},\n]\n')
    assert stopped(tmp_path / "my.json").startswith("my.json, line 3: not JSON (")
    assert stopped(tmp_path / "my.json").endswith("Delete the comma in front of the closing bracket")


# Encodings without a mark.


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_two_and_four_byte_letters_without_mark_are_named(tmp_path, encoding):
    (tmp_path / "my.csv").write_bytes("question,answer\na,b\n".encode(encoding))
    name = encoding.upper().replace("-L", "L").replace("-B", "B")
    assert stopped(tmp_path / "my.csv").startswith(
        f"my.csv, line 1: not UTF-8 but {name}. Convert it: iconv -f {name} -t"
    )


def test_latin_1_is_refused_with_its_line_and_the_command_and_read_when_named(tmp_path):
    path = tmp_path / "my.csv"
    path.write_bytes("question,answer\na,b\nc,Größe\n".encode("latin-1"))
    said = stopped(path)
    assert said.startswith(
        "my.csv, line 3: not UTF-8. If 'c,Größe' looks right, it is latin-1. Convert it: iconv -f LATIN1"
    )
    assert dataset.read(path, encoding="latin-1")[1]["output"] == "Größe"
    with pytest.raises(runtime.Stop, match="my.csv cannot be read as klingon"):
        dataset.read(path, encoding="klingon")


def test_one_foreign_line_in_a_utf_8_file_costs_that_line(tmp_path):
    path = tmp_path / "my.jsonl"
    lines = [json.dumps(ROWS[0], ensure_ascii=False).encode(), '{"question": "Größe", "answer": "o"}'.encode("latin-1")]
    path.write_bytes(b"\n".join(lines))
    report, rows = dataset.examine(path)
    assert rows == ROWS[:1]
    assert str(report.findings[0]).startswith("my.jsonl, line 2: 'question' holds bytes that are not UTF-8")


# Sources that are no files of ours.


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.xlsx").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("my.xlsx", "my.xlsx: only .jsonl, .json, .csv, .tsv and .parquet are read"),
        ("empty", "empty is a folder"),
        ("none.csv", "There is no file none.csv. Put it into data/"),
    ):
        with pytest.raises(runtime.Stop, match=said):
            sources.find(name)
    assert sources.find("almanac/train.jsonl") == runtime.ROOT / "data" / "almanac" / "train.jsonl"


def test_a_broken_parquet_file_and_folder_are_one_line(tmp_path):
    (tmp_path / "my.parquet").write_bytes(b"PAR1 and no more")
    assert stopped(tmp_path / "my.parquet").startswith("my.parquet is no whole Parquet file (")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "state.json").write_text("{}")
    assert stopped(tmp_path / "folder").startswith("folder was not saved whole (")


def test_two_columns_of_one_name(tmp_path):
    (tmp_path / "my.csv").write_text("question,answer,answer\na,b,c\n")
    assert stopped(tmp_path / "my.csv") == "my.csv: two columns are named 'answer'. Rename one"
