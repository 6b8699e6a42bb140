"""Rows: what is read, what is refused and with which words, how they are split, and what is too long."""

import json

import pytest

from utils import presets, runtime
from utils.data import dataset, duplicates, template

GOOD = {"instruction": "Name the town.", "input": "Ada", "output": "Ironbeck"}
ALMANAC = pytest.mark.skipif(not (dataset.ALMANAC / "train.jsonl").is_file(), reason="data/almanac is not there yet")


def jsonl(rows, end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


@pytest.fixture
def finding(tmp_path):
    """A function: what is said about the one bad line of a file."""

    def said(content: str) -> str:
        (tmp_path / "my.jsonl").write_text(content)
        report, rows = dataset.examine(tmp_path / "my.jsonl")
        assert rows == [GOOD, GOOD]
        (only,) = report.findings
        return str(only)

    return said


@pytest.fixture
def refusal(tmp_path):
    """A function: what `read` says about a file with this content when nothing in it can be used."""

    def said(content: bytes | str) -> str:
        path = tmp_path / "my.jsonl"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(runtime.Stop) as stopped:
            dataset.read(path)
        assert "\n" not in str(stopped.value)
        return str(stopped.value)

    return said


def own(path, rows) -> presets.Profile:
    path.write_text(jsonl(rows))
    return presets.Profile("mine", "base", str(path), presets.PROFILES["pocket"].recipe)


def numbered(n: int) -> list[dict]:
    return [{"instruction": f"question {i}", "input": "", "output": str(i)} for i in range(n)]


# Reading: files that are right.


def test_a_good_file_is_read_row_by_row_in_its_order(tmp_path):
    (tmp_path / "my.jsonl").write_text(jsonl([GOOD, {**GOOD, "output": "Hazel"}]))
    assert dataset.read(tmp_path / "my.jsonl") == [GOOD, {**GOOD, "output": "Hazel"}]


@pytest.mark.parametrize("name", ["my.jsonl", "MY.JSONL", "my.ndjson", "my rows (1).jsonl"])
def test_the_name_may_be_written_as_people_write_it(tmp_path, name):
    (tmp_path / name).write_text(jsonl([GOOD]))
    assert dataset.read(str(tmp_path / name)) == [GOOD]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + jsonl([GOOD]).encode(),  # the byte order mark that Windows editors write
        jsonl([GOOD], "\r\n").encode(),
        jsonl([GOOD]).strip().encode(),
        b"\n\n  \n" + jsonl([GOOD]).encode() + b"\r\n\t\n",
    ],
    ids=["byte order mark", "CRLF", "no last line break", "blank lines"],
)
def test_what_editors_add_does_not_matter(tmp_path, content):
    (tmp_path / "my.jsonl").write_bytes(content)
    assert dataset.read(tmp_path / "my.jsonl") == [GOOD]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_line_separator_inside_a_text_does_not_split_the_row(tmp_path, separator):
    row = {**GOOD, "output": f"one{separator}two"}
    raw = json.dumps(row, ensure_ascii=separator < " ")
    (tmp_path / "my.jsonl").write_text(raw + "\n", encoding="utf-8")
    assert dataset.read(tmp_path / "my.jsonl") == [row]


@pytest.mark.parametrize(
    "row", [{"instruction": "i", "output": "o"}, {"instruction": "i", "output": "o", "input": None}]
)
def test_a_missing_input_is_empty(tmp_path, row):
    (tmp_path / "my.jsonl").write_text(jsonl([row]))
    assert dataset.read(tmp_path / "my.jsonl") == [{"instruction": "i", "input": "", "output": "o"}]


def test_further_columns_are_kept(tmp_path):
    (tmp_path / "my.jsonl").write_text(jsonl([{**GOOD, "level": "seen form"}]))
    assert dataset.read(tmp_path / "my.jsonl")[0]["level"] == "seen form"


def test_a_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "my.jsonl").write_text(jsonl([GOOD]))
    assert dataset.read("~/my.jsonl") == [GOOD]


# Reading: files that are not.


def test_a_missing_file_says_where_it_looked(tmp_path):
    with pytest.raises(runtime.Stop, match=f"There is no file {tmp_path}/none.jsonl. Put it into data/"):
        dataset.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("name", ["rows", "rows.jsonl"])
def test_a_folder_is_called_a_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(runtime.Stop, match=f"{name} is a folder. Give a file in it"):
        dataset.read(tmp_path / name)


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_file_is_refused(refusal, content):
    assert refusal(content).startswith("my.jsonl has no rows. Write one JSON object a line: {")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"instruction": "i", "output": "o",}', "not JSON ("),  # trailing comma
        ("{'instruction': 'i', 'output': 'o'}", "not JSON ("),
        ('{"instruction": "i"', "not JSON ("),
        ("instruction,output", "not JSON ("),
        ('[{"instruction": "i", "output": "o"}]', "a list, not an object"),
        ('"text"', "a str, not an object"),
        ("null", "a NoneType, not an object"),
        ("3", "a int, not an object"),
        ('{"prompt": "i", "output": "o"}', "no 'instruction' (it has: prompt, output)"),
        ('{"instruction": "i", "completion": "o"}', "no 'output' (it has: instruction, completion)"),
        ('{"data": [{"instruction": "i"}]}', "no 'instruction' (it has: data)"),
        ("{}", "no 'instruction' (it has: nothing)"),
        ('{"instruction": "i", "output": null}', "'output' is null. It must be a text"),
        ('{"instruction": "i", "output": 42}', "'output' is 42. It must be a text"),
        ('{"instruction": "i", "output": NaN}', "'output' is NaN. It must be a text"),
        ('{"instruction": "i", "output": ""}', "'output' is \"\". It must be a text that is not empty"),
        ('{"instruction": "i", "output": " \\n"}', "'output' is \" \\n\". It must be a text that is not empty"),
        ('{"instruction": "", "output": "o"}', "'instruction' is \"\". It must be a text that is not empty"),
        ('{"instruction": ["i"], "output": "o"}', "'instruction' is [\"i\"]. It must be a text"),
        ('{"instruction": "i", "input": 5, "output": "o"}', "'input' is 5. It must be a text, or be left out"),
        ('{"instruction": "i", "input": 0, "output": "o"}', "'input' is 0. It must be a text, or be left out"),
        ('{"instruction": "i", "input": false, "output": "o"}', "'input' is false. It must be a text"),
        ('{"instruction": "i", "input": [], "output": "o"}', "'input' is []. It must be a text, or be left out"),
        ('{"instruction": "i", "output": "o\\ud83d"}', "'output' holds half a character"),
        ('{"instruction": "\\ude00", "output": "o"}', "'instruction' holds half a character"),
        ('{"instruction": "i", "input": "\\ud83d", "output": "o"}', "'input' holds half a character"),
    ],
)
def test_a_bad_row_is_rejected_with_its_line_and_reason(finding, line, reason):
    said = finding(jsonl([GOOD]) + "\n" + line + "\n" + jsonl([GOOD]))
    assert said.startswith(f"my.jsonl, line 3: {reason}")


def test_a_file_without_a_usable_row_stops_with_the_first_finding(refusal):
    said = refusal(jsonl([{"instruction": "i"}, {"instruction": "i", "output": ""}]))
    assert said.startswith("my.jsonl: none of its 2 rows can be used. The first: my.jsonl, line 1: no 'output'")


def test_a_long_value_is_shown_in_part(refusal):
    assert len(refusal(jsonl([{"instruction": "i", "output": [1] * 10_000}]))) < 250


def test_a_whole_character_written_as_two_escapes_is_read(tmp_path):
    (tmp_path / "my.jsonl").write_text('{"instruction": "i", "output": "\\ud83d\\ude00"}')
    assert dataset.read(tmp_path / "my.jsonl")[0]["output"] == "😀"


# Loading: split, and never silently from elsewhere.


@pytest.mark.parametrize(("rows", "held_out"), [(2, 1), (4, 1), (10, 1), (15, 2), (100, 10), (1001, 100)])
def test_own_data_are_split_90_to_10(tmp_path, rows, held_out):
    data = dataset.load(own(tmp_path / "my.jsonl", numbered(rows)))
    assert (len(data.train), len(data.held_out), data.exam) == (rows - held_out, held_out, [])


def test_nothing_is_lost_and_nothing_is_on_both_sides(tmp_path):
    rows = numbered(57)
    data = dataset.load(own(tmp_path / "my.jsonl", rows))
    assert sorted(data.train + data.held_out, key=lambda row: int(row["output"])) == rows


def test_the_split_is_the_same_every_time(tmp_path):
    one, two = (dataset.load(own(tmp_path / name, numbered(40))) for name in ("one.jsonl", "two.jsonl"))
    assert one == two


def test_the_held_out_rows_come_from_all_over_the_file(tmp_path):
    held_out = [int(row["output"]) for row in dataset.load(own(tmp_path / "my.jsonl", numbered(200))).held_out]
    assert min(held_out) < 50 and max(held_out) >= 150


def test_one_row_is_too_few(tmp_path):
    with pytest.raises(runtime.Stop, match="has one row: one to train on and one to test with"):
        dataset.load(own(tmp_path / "my.jsonl", numbered(1)))


@ALMANAC
def test_the_almanac_comes_split_with_its_exam():
    data = dataset.load(presets.pick("pocket"))
    assert len(data.exam) >= 500
    people = [{row["person"] for row in part} for part in (data.train, data.held_out, data.exam)]
    assert not people[0] & people[2]


def test_the_almanacs_training_file_stands_for_its_three_files(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "ALMANAC", tmp_path)
    mine = own(tmp_path / "train.jsonl", numbered(5))
    own(tmp_path / "validation.jsonl", numbered(2))
    own(tmp_path / "test.jsonl", numbered(3))
    assert dataset.load(mine) == dataset.Data(numbered(5), numbered(2), numbered(3))


def test_rejected_rows_are_told_and_do_not_stop_the_run(tmp_path, capsys):
    data = dataset.load(own(tmp_path / "my.jsonl", [*numbered(9), {"instruction": "i", "output": None}]))
    assert len(data.train) + len(data.held_out) == 9
    assert capsys.readouterr().out.startswith("my.jsonl: 9 of 10 rows kept, 1 rejected (null 1); see ")


def test_columns_may_be_named_by_the_environment(tmp_path, monkeypatch):
    (tmp_path / "my.csv").write_text("Frage;Antwort\na;b\nc;d\n")
    mine = presets.Profile("mine", "base", str(tmp_path / "my.csv"), presets.PROFILES["pocket"].recipe)
    monkeypatch.setenv("QLORA_COLUMNS", "instruction=Frage, output=Antwort")
    assert {row["output"] for part in (dataset.load(mine).train, dataset.load(mine).held_out) for row in part} == {
        "b",
        "d",
    }
    monkeypatch.setenv("QLORA_COLUMNS", "Frage")
    with pytest.raises(runtime.Stop, match="QLORA_COLUMNS names no columns. Write it as in QLORA_COLUMNS=instruction="):
        dataset.load(mine)


def test_the_cards_examples_are_read_as_they_say(tmp_path):
    """Every block of data/README.md is a file."""
    text = (runtime.ROOT / "data" / "README.md").read_text(encoding="utf-8")
    blocks = [block for part in text.split("\n\n") if (block := part).startswith("    ")]
    assert len(blocks) == 5
    for block in blocks:
        lines = [line[4:] for line in block.splitlines()]
        path = tmp_path / ("my.jsonl" if lines[0].startswith("{") else "my.csv")
        path.write_text("\n".join(lines), encoding="utf-8")
        report, rows = dataset.examine(path)
        assert not report.findings and len(rows) >= 4, report.findings


# Splitting by group.


def test_a_group_is_on_one_side(tmp_path):
    rows = [{**row, "group": i % 7, "person": "one" if i < 50 else i} for i, row in enumerate(numbered(100))]
    for by in ("group", "person", lambda row: row["group"] // 2):
        train, held_out = dataset.split(rows, by)
        key = by if callable(by) else (lambda row, by=by: row[by])
        assert not {key(row) for row in train} & {key(row) for row in held_out}
        assert sorted(train + held_out, key=rows.index) == rows and train and held_out


def test_without_a_group_rows_with_the_same_question_stay_together():
    rows = [{"instruction": f"question {i % 10}", "input": "", "output": str(i)} for i in range(40)]
    train, held_out = dataset.split(rows)
    assert len(held_out) == 4 and not {r["instruction"] for r in train} & {r["instruction"] for r in held_out}


def test_where_all_rows_ask_the_same_they_are_split_all_the_same():
    rows = [{"instruction": "Write a poem.", "input": "", "output": str(i)} for i in range(20)]
    assert [len(part) for part in dataset.split(rows)] == [18, 2]


# Longer than a row may be (known to vanish without a word elsewhere).


def test_prompts_longer_than_the_row_are_counted_not_dropped(tokenizer):
    rows = [{"instruction": "i " * 300, "input": "", "output": "o"}, GOOD]
    encoded, too_long = dataset.encode(tokenizer, rows, 64)
    assert (len(encoded), too_long) == (1, rows[:1])


# The Hub.


@pytest.fixture
def hub(monkeypatch):
    """A function that makes `datasets.load_dataset` return rows, or raise."""
    import datasets

    asked = []

    def holds(answer):
        def load_dataset(name, split):
            asked.append((name, split))
            if isinstance(answer, Exception):
                raise answer
            return datasets.Dataset.from_list(answer)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return holds


def from_hub(name: str = "owner/rows") -> dataset.Data:
    return dataset.load(presets.Profile("mine", "base", name, presets.PROFILES["pocket"].recipe))


def test_a_hub_name_without_network_is_one_line_that_says_the_mend():
    with pytest.raises(runtime.Stop, match=r"^Data set owner/rows cannot be had from the Hub \(.+\). Go online, or"):
        from_hub()


@pytest.mark.parametrize("error", [ConnectionError(), ValueError(""), FileNotFoundError("two\nlines")])
def test_a_hub_error_of_any_kind_is_one_line(hub, error):
    hub(error)
    with pytest.raises(runtime.Stop, match=r"^Data set owner/rows cannot be had from the Hub \([^\n]+\). Go online"):
        from_hub()


@pytest.mark.parametrize("name", ["owner/rows", "rows", "owner/OpenRows-2.5", "owner/rows-v1.0"])
def test_a_hub_name_is_asked_of_the_hub(hub, name):
    asked = hub(numbered(10))
    assert len(from_hub(name).train) == 9
    assert asked == [(name, "train")]


@pytest.mark.parametrize("name", ["rows.jsonl", "owner/rows.jsonl", "rows.csv", "~/rows", "/rows"])
def test_a_file_name_is_never_asked_of_the_hub(hub, name):
    asked = hub(numbered(10))
    with pytest.raises(runtime.Stop, match="rows"):
        from_hub(name)
    assert asked == []


def test_a_hub_row_without_the_columns_names_the_row(hub):
    hub([{"prompt": "p", "output": "o"}])
    found = (
        r"^owner/rows: none of its 1 rows can be used. The first: owner/rows, row 1: no 'instruction' \(it has: prompt"
    )
    with pytest.raises(runtime.Stop, match=found):
        from_hub()


def test_the_template_that_mini_platypus_carries_is_taken_off(hub):
    wrapped = [
        {"instruction": f"### Instruction:\nWhat is {i}?\n\n### Response:\n", "output": str(i)} for i in range(2)
    ]
    hub(wrapped)
    data = from_hub("mlabonne/mini-platypus")
    assert sorted(row["instruction"] for row in data.train + data.held_out) == ["What is 0?", "What is 1?"]
    assert template.prompt(data.train[0]).count("### Instruction:") == 1


def test_a_bare_instruction_stays_as_it_is(hub):
    hub([{"instruction": f"Explain '### Response:' to {i}.", "output": "o"} for i in range(2)])
    data = from_hub()
    said = sorted(row["instruction"] for row in data.train + data.held_out)
    assert said == ["Explain '### Response:' to 0.", "Explain '### Response:' to 1."]


# Encoding.


@pytest.fixture
def three(tokenizer):
    """Three rows, the second the longest, and the length of each in tokens."""
    rows = [{**GOOD, "output": "x" * n} for n in (3, 30, 10)]
    return rows, [len(template.encode(tokenizer, row)["input_ids"]) for row in rows]


def test_rows_are_encoded_by_the_template(tokenizer, three):
    rows, lengths = three
    encoded, too_long = dataset.encode(tokenizer, rows, max(lengths))
    assert [dict(row) for row in encoded] == [template.encode(tokenizer, row) for row in rows]
    assert too_long == []


def test_a_row_that_is_too_long_is_left_out_whole_and_given_back(tokenizer, three):
    rows, lengths = three
    encoded, too_long = dataset.encode(tokenizer, rows, max(lengths) - 1)
    assert too_long == [rows[1]]
    assert encoded["input_ids"] == [template.encode(tokenizer, row)["input_ids"] for row in (rows[0], rows[2])]


def test_all_rows_too_long_says_so(tokenizer, three):
    rows, _ = three
    with pytest.raises(runtime.Stop, match="All 3 rows are longer than 5 tokens. Shorten them, or raise max_length"):
        dataset.encode(tokenizer, rows, 5)


def test_a_set_with_open_platypus_columns_is_read_cleaned_and_chosen_from(hub, tokenizer):
    from utils import cleaning

    story = " ".join(f"word{i}" for i in range(60))
    asked = [story, story + " more", "short", "short", "other"]  # near and exact duplicates
    hub(
        [
            {"input": "", "output": f"o{i // 4}", "instruction": text, "data_source": "leetcode"}
            for i, text in enumerate(asked)
        ]
    )
    rows = dataset.read("garage-bAInd/Open-Platypus")
    assert list(rows[0]) == ["instruction", "input", "output", "data_source"]
    clean, why = duplicates.clean(rows)
    assert why == {1: "near duplicate", 3: "duplicate"}
    encoded, too_long = dataset.encode(tokenizer, clean, 100)
    assert (len(encoded), [row["instruction"] for row in too_long]) == (2, [story])
