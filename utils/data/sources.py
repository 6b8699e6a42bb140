"""Any source to raw rows, one at a time: JSONL, JSON, CSV with `,` `;` or tab, Parquet, a folder that `datasets` saved,
a data set of the Hub.
"""

import codecs
import contextlib
import csv
import json
import re
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
csv.field_size_limit(2**31 - 1)  # a long answer is no mistake


class Raw(NamedTuple):
    """One row as the file has it. With a `problem`, it could not be read, and `value` is its text."""

    where: str  # "line 7" of a text, "row 7" of what has no lines, both from 1
    value: object
    problem: Problem | None = None


def find(name: str | Path, start: Path | None = None) -> Path | None:
    """The file of that name, seen from `start` (else the current folder), else from the course's data folder.

    None if the name means a data set of the Hub: no such file exists, it does not end like a file (.csv does, a version
    such as -2.5 does not), and the Hub could have it.

    Raises:
        Stop: there is no such file, or it is of no kind that can be read.
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


def read(path: Path, encoding: str = "") -> Iterator[Raw]:
    """The rows of a file that `find` found, one after the other; only a JSON array is read whole.

    Args:
        encoding: of a text file; else UTF-8, or what the mark at its beginning says.

    Raises:
        Stop: the file as a whole cannot be read; the message says how to mend it.
    """
    if path.is_dir() or path.suffix.lower() == ".parquet":
        yield from _table(path)
        return
    encoding = encoding or _encoding(path)
    try:
        yield from (_csv if path.suffix.lower() in (".csv", ".tsv") else _json)(path, encoding)
    except (UnicodeError, LookupError) as error:
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
                    yield Raw(f"line {n}", json.loads(line))
                except (ValueError, RecursionError) as error:
                    yield Raw(f"line {n}", line, Problem("not JSON", "", f"not JSON ({error})", _mend(line)))


def _document(name: str, text: str) -> Iterator[Raw]:
    """The rows of a JSON array, or of an object that holds one under a single name."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        near = "\n".join(text.split("\n")[max(0, line - 2) : line])
        raise Stop(f"{name}, line {line}: not JSON ({error}). {_mend(near)}") from None
    if isinstance(content, dict) and len(content) == 1 and not content.keys() & {"messages", "conversations"}:
        inside = next(iter(content.values()))
        content = inside if isinstance(inside, list) else content
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
        separator = max("\t;,", key=lambda c: len(next(csv.reader([header], delimiter=c), [])))
        file.seek(0)
        taken: list[str] = []  # lines of the row that is being read
        reader = csv.reader((taken.append(line) or line for line in file), delimiter=separator, strict=True)
        names, cells = None, []
        while cells is not None:
            taken.clear()
            begins = f"line {reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                mend = 'Put a text with quotes into quotes, and double those inside: "say ""hello"""'
                yield Raw(begins, "".join(taken), Problem("not CSV", "", f"not CSV ({error})", mend))
                continue
            if not any(cell.strip() for cell in cells or []):
                continue
            if names is None:
                names = [cell.strip() for cell in cells]
                if twice := {name for name in names if name and names.count(name) > 1}:
                    raise Stop(f"{path.name}: two columns are named {min(twice)!r}. Rename one")
            elif len(cells) != len(names):
                mend = "Put a text that holds the separator or a line break into double quotes"
                what = f"{len(cells)} cells for {len(names)} columns"
                yield Raw(begins, "".join(taken), Problem("columns", "", what, mend))
            else:
                yield Raw(begins, {n: c for n, c in zip(names, cells, strict=True) if n or c})


def _encoding(path: Path) -> str:
    """The encoding of a text file by its mark, else UTF-8. Where a line holds UTF-8 beyond ASCII, another that does not
    is the mistake of that line; where none does, the file is not UTF-8, and Stop has the command that converts it.
    """
    with open(path, "rb") as file:
        start = file.read(4096)
        if marked := [encoding for encoding, marks in MARKS.items() if start.startswith(marks)]:
            return marked[0]
        if b"\0" in start[:2]:  # every second byte of ASCII in UTF-16; further on a zero is a mistake of its row
            guess = ("UTF-32" if b"\0\0" in start else "UTF-16") + ("BE" if start.startswith(b"\0") else "LE")
            wrong = f"line 1: not UTF-8 but {guess}"
        else:
            file.seek(0)
            guess, wrong = "LATIN1", ""
            for n, line in enumerate(file, 1):
                if not line.isascii():
                    try:
                        line.decode("utf-8")
                        return "utf-8"
                    except UnicodeDecodeError as error:
                        looks = " ".join(line[max(0, error.start - 12) : error.end + 12].decode("latin-1").split())
                        wrong = wrong or f"line {n}: not UTF-8. If {looks!r} looks right, it is latin-1"
    if not wrong:
        return "utf-8"
    convert = f'iconv -f {guess} -t UTF-8 "{path.name}" > "new-{path.name}"'
    raise Stop(f"{path.name}, {wrong}. Convert it: {convert} (or save it as UTF-8)")
