"""Any source to raw rows, one at a time: JSONL, JSON, CSV with `,` `;` or tab, Parquet, a folder that `datasets` saved,
a data set of the Hub.
"""

import codecs
import contextlib
import csv
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from utils.data.rows import Problem
from utils.runtime import ROOT, Stop, is_hub_name

SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"}
MARKS = {  # at the beginning of a text; that of UTF-32 begins like UTF-16's, so it is looked for first
    "utf-8-sig": codecs.BOM_UTF8,
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
NO_TEXT = (b"PK\3\4", b"\xd0\xcf\x11\xe0", b"\x1f\x8b", b"<!DOC", b"<html")  # begin: xlsx and zip, xls, gzip, a page
csv.field_size_limit(2**31 - 1)  # a long answer is no mistake


class Raw(NamedTuple):
    """One row as the file has it. With a `problem`, it could not be read, and `value` is its text."""

    where: str  # "line 7" of a text, "row 7" of what has no lines, both from 1
    value: object
    problem: Problem | None = None


def find(name: str | Path, start: Path | None = None) -> Path | None:
    """The file of that name, seen from `start` (else the current folder), else from the course's data folder.

    None if the name means a data set of the Hub: no such file exists, it does not end like a file (.csv does, a version
    such as -2.5 does not), and the Hub could have it. Stop if there is no such file, or it cannot be read.
    """
    path = Path(start or "", Path(name).expanduser())
    if not path.exists() and (ROOT / "data" / name).exists():
        path = ROOT / "data" / name
    if not path.exists():
        if is_hub_name(str(name)) and not path.suffix[1:2].isalpha():
            return None
        raise Stop(f"There is no file {path}. Put it into data/ and give its name, or give its path")
    if path.is_dir() and not any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        raise Stop(f"{path} is a folder. Give a file in it (or a folder that datasets' save_to_disk made)")
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        raise Stop(f"{path.name}: only .jsonl, .json, .csv, .tsv and .parquet are read. Save it as one of these")
    return path


def read(path: Path) -> Iterator[Raw]:
    """The rows of a file that `find` found, one after the other; only a JSON array is read whole.

    Stop if the file as a whole cannot be read; the message says how to mend it.
    """
    start = b""
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(4096)
    if start.startswith(NO_TEXT):
        raise Stop(f"{path.name} is a spreadsheet, an archive or a web page. Save the table in it as CSV (UTF-8)")
    if path.is_dir() or path.suffix.lower() == ".parquet" or start.startswith(b"PAR1"):
        yield from _table(path)
        return
    encoding = _encoding(path, start)
    try:
        yield from (_csv if path.suffix.lower() in (".csv", ".tsv") else _json)(path, encoding)
    except UnicodeError as error:
        raise Stop(f"{path.name} cannot be read as {encoding} ({error}). Save it as UTF-8") from None


def hub(name: str) -> Iterator[Raw]:
    """The rows of a data set of the Hub, its split "train"; Stop if there is no network, or no such set or split."""
    from datasets import load_dataset

    try:
        table = load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Stop(f"Data set {name} cannot be had from the Hub ({reason}). Go online, or give a file") from None
    return _numbered(table)


def _table(path: Path) -> Iterator[Raw]:
    """A Parquet file, or a folder that `datasets` saved."""
    from datasets import load_from_disk
    from pyarrow import parquet

    try:
        if path.is_dir():
            rows = load_from_disk(str(path))
            if isinstance(rows, dict) and "train" not in rows:
                raise Stop(f"{path.name} has the splits {', '.join(rows)} and no 'train'. Save the one you mean alone")
            rows = rows["train"] if isinstance(rows, dict) else rows
        else:
            batches = parquet.ParquetFile(path).iter_batches(batch_size=1000)
            rows = (row for batch in batches for row in batch.to_pylist())
        yield from _numbered(rows)
    except (OSError, ValueError) as error:
        raise Stop(f"{path.name} was not saved whole ({str(error).splitlines()[0]}). Save it again") from None


def _numbered(values: Iterable[object]) -> Iterator[Raw]:
    return (Raw(f"row {n}", value) for n, value in enumerate(values, 1))


def _open(path: Path, encoding: str, newline: str):
    return open(path, encoding=encoding, newline=newline, errors="surrogateescape" if "8" in encoding else "strict")


def _once(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON; of two values of one name, json itself would keep the last."""
    if len(found := dict(pairs)) < len(pairs):
        name = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{name[:40]!r} stands twice in one object: delete one")
    return found


def _json(path: Path, encoding: str) -> Iterator[Raw]:
    """A value a line, or one document: the name's end and the first two lines tell."""
    with _open(path, encoding, "\n") as file:
        lines = filter(str.strip, file)
        first, second = next(lines, ""), next(lines, "")
        by_line = not first or (path.suffix.lower() != ".json" and not first.lstrip().startswith("["))
        with contextlib.suppress(ValueError, RecursionError):  # raised where the value goes on in the next line
            json.loads(first)
            by_line = by_line or second != ""
        file.seek(0)
        if not by_line:
            yield from _document(path.name, file.read())
        for n, line in enumerate(file, 1):
            if line.strip():
                try:
                    value = json.loads(line)
                    if isinstance(value, dict) and line.count('":') != len(value):  # nested, or with a name twice
                        value = json.loads(line, object_pairs_hook=_once)  # takes twice as long
                    yield Raw(f"line {n}", value)
                except (ValueError, RecursionError) as error:
                    yield Raw(f"line {n}", line, Problem("not JSON", "", f"not JSON ({error})", _mend(line)))


def _document(name: str, text: str) -> Iterator[Raw]:
    """The rows of a JSON array, or of an object: a list under its one name, by column (pandas), or by id."""
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        near = "\n".join(text.split("\n")[max(0, line - 2) : line + 1])
        raise Stop(f"{name}, line {line}: not JSON ({error}). {_mend(near)}") from None
    if isinstance(content, dict) and len(content) == 1 and not content.keys() & {"messages", "conversations"}:
        inside = next(iter(content.values()))
        content = inside if isinstance(inside, list) else content
    if isinstance(content, dict) and content and all(isinstance(part, dict) for part in content.values()):
        numbers = next(iter(content.values()))  # of the rows, if it is pandas that wrote this
        by_column = [{name: part.get(n) for name, part in content.items()} for n in numbers]
        content = by_column if all(map(str.isdecimal, numbers)) else list(content.values())
    return _numbered(content if isinstance(content, list) else [content])


def _mend(text: str) -> str:
    if re.search(r",\s*[}\]]", text):
        return "Delete the comma in front of the closing bracket"
    if re.match(r"\s*[{\[]\s*'", text):
        return "Use double quotes"
    return 'Write one object a line: {"instruction": "...", "input": "", "output": "..."}'


def _csv(path: Path, encoding: str) -> Iterator[Raw]:
    with _open(path, encoding, "") as file:
        header = next((line for line in file if line.strip()), "")
        said = re.fullmatch(r'"?sep=(.)"?\s*', header)  # written for Excel
        separator = said[1] if said else max("\t;,", key=lambda c: len(next(csv.reader([header], delimiter=c), [])))
        file.seek(0)
        taken: list[str] = []  # lines of the row that is being read
        reader = csv.reader((taken.append(line) or line for line in file), delimiter=separator, strict=True)
        names, cells = None, []
        while cells is not None:
            taken.clear()
            begins, problem = reader.line_num + 1, None
            try:
                cells = next(reader, None)
            except csv.Error as error:
                mend = 'Put a text with quotes into quotes, and double those inside: "say ""hello"""'
                problem = Problem("not CSV", "", f"not CSV ({error})", mend)
            if said or not (problem or any(cell.strip() for cell in cells or [])):
                said = None
            elif names is None and not problem:
                names = [cell.strip() for cell in cells]
                if twice := {name for name in names if name and names.count(name) > 1}:
                    raise Stop(f"{path.name}: two columns are named {min(twice)[:40]!r}. Rename one")
            elif len(taken) > 1 and _are_rows(taken[1:], len(names or ()), separator):
                what = f"a quotation mark is open from line {begins} to {reader.line_num}, over what looks like rows"
                mend = 'Double it if it belongs to the text (""); if the text has such lines, write JSONL'
                problem = Problem("quotation mark", "", what, mend)
                yield from (Raw(f"line {n}", line, problem) for n, line in enumerate(taken, begins) if line.strip())
            elif problem or len(cells) != len(names):
                mend = "Put a text that holds the separator or a line break into double quotes"
                told = f"{len(cells or ())} cells for {len(names or ())} columns"
                yield Raw(f"line {begins}", "".join(taken), problem or Problem("columns", "", told, mend))
            else:
                yield Raw(f"line {begins}", {n: c for n, c in zip(names, cells, strict=True) if n or c})


def _are_rows(lines: list[str], columns: int, separator: str) -> bool:
    """Whether the lines of one cell look like rows: nine of ten have as many cells as there are columns."""
    lines = [line for line in lines if line.strip()]
    fits = sum(len(next(csv.reader([line], delimiter=separator), [])) == columns for line in lines)
    return fits * (columns - 1) > 1 and fits >= 0.9 * len(lines)


def _encoding(path: Path, start: bytes) -> str:
    """The encoding of a text by the mark at its `start`, else UTF-8. Where a line holds UTF-8 beyond ASCII, another
    that does not is the mistake of that line; where none does, Stop has the command that converts the file.
    """
    first, beyond = (), set()
    if marked := [encoding for encoding, marks in MARKS.items() if start.startswith(marks)]:
        return marked[0]
    if b"\0" in start[:2]:  # every second byte of ASCII in UTF-16; further on a zero is a mistake of its row
        guess = ("UTF-32" if b"\0\0" in start else "UTF-16") + ("BE" if start.startswith(b"\0") else "LE")
        wrong = f"line 1: not UTF-8 but {guess}"
    else:
        with open(path, "rb") as file:
            for n, line in enumerate(file, 1):
                if not line.isascii():
                    try:
                        line.decode("utf-8")
                        return "utf-8"
                    except UnicodeDecodeError as error:
                        first = first or (n, line[max(0, error.start - 12) : error.end + 12])
                        beyond.update(line)
        if not first:
            return "utf-8"
        guess = "CP1252" if beyond & {*range(0x80, 0xA0)} else "LATIN1"  # latin-1 prints nothing there
        looks, name = " ".join(first[1].decode(guess, "replace").split()), guess.replace("LATIN", "latin-").lower()
        wrong = f"line {first[0]}: not UTF-8. If {looks!r} looks right, it is {name}"
    old, new = (shlex.quote(str(path.resolve().with_name(name))) for name in (path.name, f"new-{path.name}"))
    raise Stop(f"{path.name}, {wrong}. Convert it: iconv -f {guess} -t UTF-8 {old} > {new} (or save it as UTF-8)")
