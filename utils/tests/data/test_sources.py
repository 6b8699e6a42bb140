"""Any file to raw rows: each format, each separator, each encoding; and the words for those that cannot be read."""

import json
import subprocess
import sys

import datasets
import pandas
import pytest

from utils import runtime
from utils.data import sources

ROWS = [
    {"instruction": "Translate: Größe, 世界 🎈", "input": "a, b; c\td", "output": 'He said "no".\nTwice.'},
    {"instruction": "Name the town.", "input": "", "output": "Ironbeck"},
]


def as_csv(rows, separator=",", end="\n") -> str:
    def cell(text):
        return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',;\t"\n') else text

    lines = [list(rows[0]), *(row.values() for row in rows)]
    return "".join(separator.join(map(cell, line)) + end for line in lines)


def as_jsonl(rows, end="\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def read(path):
    return [raw.value for raw in sources.read(sources.find(path))]


def stopped(path) -> str:
    with pytest.raises(runtime.Stop) as stop:
        read(path)
    assert "\n" not in str(stop.value)
    return str(stop.value)


# Names.


@pytest.mark.parametrize("name", ["my.jsonl", "MY.JSONL", "my.ndjson", "my rows (1).jsonl"])
def test_the_name_may_be_written_as_people_write_it(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text(as_jsonl(ROWS), encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert read(str(tmp_path / name)) == read(f"~/{name}") == ROWS
    assert sources.find(name, start=tmp_path) == tmp_path / name


def test_names_that_are_no_file_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.xlsx").write_bytes(b"PK")
    (tmp_path / "empty.jsonl").mkdir()
    for name, said in (
        ("my.xlsx", "my.xlsx: only .jsonl, .json, .csv, .tsv and .parquet are read"),
        ("empty.jsonl", "empty.jsonl is a folder. Give a file in it"),
        ("none.csv", "There is no file none.csv. Put it into data/"),
    ):
        with pytest.raises(runtime.Stop, match=said):
            sources.find(name)
    assert sources.find("almanac/train.jsonl") == runtime.ROOT / "data" / "almanac" / "train.jsonl"


@pytest.mark.parametrize("name", ["owner/rows", "rows", "owner/OpenRows-2.5", "owner/rows-v1.0"])
def test_a_hub_name_is_no_file(name):
    assert sources.find(name) is None


@pytest.mark.parametrize("name", ["rows.jsonl", "owner/rows.jsonl", "rows.csv", "~/rows", "/rows"])
def test_a_file_name_is_never_asked_of_the_hub(name):
    with pytest.raises(runtime.Stop, match="There is no file .*rows"):
        sources.find(name)


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
        "jsonl": as_jsonl(ROWS, end),
        "json": json.dumps(ROWS, ensure_ascii=False, indent=2).replace("\n", end),
    }[kind]
    (tmp_path / f"my.{kind}").write_bytes(text.encode(encoding))
    assert read(tmp_path / f"my.{kind}") == ROWS


@pytest.mark.parametrize("change", [str.strip, "\n\n  \n{}\r\n\t\n".format], ids=["no last line break", "blank lines"])
def test_what_editors_add_does_not_matter(tmp_path, change):
    (tmp_path / "my.jsonl").write_bytes(change(as_jsonl(ROWS)).encode())
    assert read(tmp_path / "my.jsonl") == ROWS


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_line_separator_inside_a_text_does_not_split_the_row(tmp_path, separator):
    row = {"instruction": "i", "output": f"one{separator}two"}
    (tmp_path / "my.jsonl").write_text(json.dumps(row, ensure_ascii=separator < " ") + "\n", encoding="utf-8")
    assert read(tmp_path / "my.jsonl") == [row]


TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "😀"}]}


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        *((name, json.dumps(ROWS, indent=n), ROWS) for name in ("my.json", "my.jsonl") for n in (None, 2)),
        *(("my.json", json.dumps({"data": ROWS}, indent=n), ROWS) for n in (None, 2)),
        ("my.jsonl", json.dumps({"data": ROWS}), [{"data": ROWS}]),  # a line that is an object is a row there
        ("lines.json", as_jsonl(ROWS), ROWS),
        ("one.json", json.dumps(ROWS[0], indent=1), ROWS[:1]),
        ("talk.json", json.dumps(TALK), [TALK]),
        ("bad_first.jsonl", "[1, 2]\n" + as_jsonl(ROWS), [[1, 2], *ROWS]),
        ("empty.json", "\n\n", []),
    ],
)
def test_json_of_lines_and_as_one_document(tmp_path, name, text, rows):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read(tmp_path / name) == rows


def test_parquet_and_folders_of_datasets(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "my.parquet")
    table.save_to_disk(tmp_path / "folder")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("my.parquet", "folder", "splits"):
        assert read(tmp_path / name) == ROWS, name
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "no_train")
    assert "no_train has the splits test and no 'train'" in stopped(tmp_path / "no_train")


def test_a_broken_parquet_file_and_folder_are_one_line(tmp_path):
    (tmp_path / "my.parquet").write_bytes(b"PAR1 and no more")
    assert stopped(tmp_path / "my.parquet").startswith("my.parquet was not saved whole (")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "state.json").write_text("{}")
    assert stopped(tmp_path / "folder").startswith("folder was not saved whole (")


# What a CSV file does to people (cells stay texts: no NA, no 7 for 007).


def test_the_place_is_the_line_where_the_row_begins(tmp_path):
    (tmp_path / "my.csv").write_text("\n" + as_csv(ROWS + ROWS), newline="", encoding="utf-8")
    assert [raw.where for raw in sources.read(tmp_path / "my.csv")] == ["line 3", "line 5", "line 6", "line 8"]


LINES = "a poem, of\nfour lines, and, of\n\nno quotes"  # which look like no rows


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("q,a,\n1,NA,\n2,None,x\n", [{"q": "1", "a": "NA"}, {"q": "2", "a": "None", "": "x"}]),
        ("q,a\n1,007\n2,1e5\n", [{"q": "1", "a": "007"}, {"q": "2", "a": "1e5"}]),
        (f'q,a\n1,"{LINES}"\n', [{"q": "1", "a": LINES}]),
        ("sep=|\nq|a\na,b|c;d\n", [{"q": "a,b", "a": "c;d"}]),  # Excel's line that names the separator
    ],
)
def test_cells_stay_as_they_are_written(tmp_path, text, rows):
    (tmp_path / "my.csv").write_text(text)
    assert read(tmp_path / "my.csv") == rows


@pytest.mark.parametrize(
    ("line", "kind", "what"),
    [
        ("Name two colours,red, blue", "columns", "3 cells for 2 columns"),
        ("alone", "columns", "1 cells for 2 columns"),
        ('a,"b "quoted" c"', "not CSV", "not CSV ("),
        ('a,"never closed', "not CSV", "not CSV (unexpected end of data"),
    ],
)
def test_a_row_that_does_not_fit_is_kept_whole_with_its_reason(tmp_path, line, kind, what):
    (tmp_path / "my.csv").write_text(f"question,answer\nfirst,one\n{line}\n")
    good, bad = sources.read(tmp_path / "my.csv")
    assert good.problem is None
    assert (bad.where, bad.value, bad.problem.kind) == ("line 3", line + "\n", kind)
    assert bad.problem.what.startswith(what)


def test_after_a_bad_row_reading_goes_on(tmp_path):
    (tmp_path / "my.csv").write_text('q,a\n1,"x "y" z"\n2,b\n')
    assert [raw.problem is None for raw in sources.read(tmp_path / "my.csv")] == [False, True]


def test_two_columns_of_one_name(tmp_path):
    (tmp_path / "my.csv").write_text("question,answer,answer\na,b,c\n")
    assert stopped(tmp_path / "my.csv") == "my.csv: two columns are named 'answer'. Rename one"


@pytest.mark.parametrize("apart", [3, 500])
@pytest.mark.parametrize(
    "closing", ['{} end",b', '{} end" more,b', "{},b"], ids=["closed", "badly closed", "left open"]
)
def test_stray_quotes_far_apart_cost_the_rows_between_them_one_by_one(tmp_path, apart, closing):
    lines = ["q,a", "1,first", '2,"stray', *(f"{i},a" for i in range(3, 2 + apart)), closing.format("x"), "9,last"]
    (tmp_path / "my.csv").write_text("\n".join(lines) + "\n")
    found = list(sources.read(tmp_path / "my.csv"))
    assert len(found) == len(lines) - 1
    assert found[0].value == {"q": "1", "a": "first"}
    bad = [raw for raw in found if raw.problem]
    assert [raw.value for raw in bad] == [line + "\n" for line in lines[2 : 2 + len(bad)]]
    assert len(bad) == apart + (2 if closing == "{},b" else 1)  # left open, it takes the last line, too
    assert "a quotation mark is open from line 3 to" in bad[-1].problem.what


# JSON as people write it.


@pytest.mark.parametrize("text", ['{"output": "a", "output": "b"}', '{"m": [{"v": 1, "v": 2}]}', '{"a" : 1, "a" : 2}'])
def test_a_name_that_stands_twice_in_an_object(tmp_path, text):
    (tmp_path / "my.jsonl").write_text(text + '\n{"q": "\\"x\\": 1", "a": {"b": 1}}\n')
    bad, good = sources.read(tmp_path / "my.jsonl")
    assert (bad.value, good.value) == (text + "\n", {"q": '"x": 1', "a": {"b": 1}})
    assert "stands twice in one object" in bad.problem.what
    (tmp_path / "my.json").write_text(f"[{text}]")
    assert stopped(tmp_path / "my.json").startswith("my.json, line 1: not JSON (")


def test_tables_by_column_and_by_id_are_turned_into_rows(tmp_path):
    frame = pandas.DataFrame(ROWS, columns=["instruction", "input", "output"])
    filtered, by_id = frame.set_index(pandas.Index([5, 17])), json.dumps({"x": ROWS[0], "y": ROWS[1]})
    for text in (frame.to_json(), frame.to_json(orient="index"), filtered.to_json(), by_id):
        (tmp_path / "my.json").write_text(text)
        assert read(tmp_path / "my.json") == ROWS, text


@pytest.mark.parametrize(
    ("line", "mend"),
    [
        ('{"instruction": "i", "output": "o",}', "Delete the comma"),
        ("{'instruction': 'i', 'output': 'o'}", "Use double quotes"),
        ('{"instruction": "i"', "Write one object a line"),
        ("instruction,output", "Write one object a line"),
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
    said = stopped(tmp_path / "my.json")
    assert said.startswith(f"my.json, line {2 if sys.version_info >= (3, 13) else 3}: not JSON (")
    assert said.endswith("Delete the comma in front of the closing bracket")


# Encodings without a mark.


@pytest.mark.parametrize("name", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
def test_two_and_four_byte_letters_without_mark_are_named(tmp_path, name):
    (tmp_path / "my.csv").write_bytes("question,answer\na,b\n".encode(name))
    said = f"my.csv, line 1: not UTF-8 but {name}. Convert it: iconv -f {name} -t"
    assert stopped(tmp_path / "my.csv").startswith(said)


def test_a_text_of_marked_utf_16_that_is_cut_off(tmp_path):
    (tmp_path / "my.csv").write_bytes("question,answer\n".encode("utf-16")[:-1])
    assert stopped(tmp_path / "my.csv").startswith("my.csv cannot be read as utf-16 (")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le"])
def test_another_encoding_is_named_with_its_line_and_the_printed_command_makes_it_right(tmp_path, encoding):
    text = "question,answer\nc,Größe\nd," + ("“5 €”…" if encoding == "cp1252" else "né") + "\n"
    path = tmp_path / "it's my $file.csv"
    path.write_bytes(text.encode(encoding))
    wrong, command = stopped(path).split(". Convert it: ")
    guess = (
        "1: not UTF-8 but UTF-16LE" if "16" in encoding else "2: not UTF-8. If 'c,Größe' looks right, it is " + encoding
    )
    assert wrong == f"{path.name}, line {guess}"
    subprocess.run(command.removesuffix(" (or save it as UTF-8)"), shell=True, check=True, cwd="/")
    assert (tmp_path / f"new-{path.name}").read_text(encoding="utf-8") == text


def test_what_is_no_text_is_told_and_parquet_is_read_whatever_the_name(tmp_path):
    for name, start in (("my.csv", b"PK\3\4..."), ("my.json", b"\x1f\x8b..."), ("my.jsonl", b"\xd0\xcf\x11\xe0...")):
        (tmp_path / name).write_bytes(start)
        assert stopped(tmp_path / name).startswith(f"{name} is a spreadsheet, an archive or a web page. Save the table")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "my.csv")
    assert read(tmp_path / "my.csv") == ROWS


# The Hub.


@pytest.mark.parametrize("error", [ConnectionError(), ValueError(""), FileNotFoundError("two\nlines")])
def test_a_hub_error_of_any_kind_is_one_line(monkeypatch, error):
    def load_dataset(name, split):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(runtime.Stop, match=r"^Data set owner/rows cannot be had from the Hub \([^\n]+\). Go online"):
        sources.hub("owner/rows")
