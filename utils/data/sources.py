"""Any source to raw rows, one at a time: JSONL, JSON, CSV with `,` `;` or tab, Parquet, a folder that `datasets` saved,
a data set of the Hub.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.data.rows import Problem
from utils.runtime import ROOT, Stop, is_hub_name

SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv"}  # of text files
BOMS = [  # the longer first: UTF-32's mark begins like UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
csv.field_size_limit(2**31 - 1)  # a long answer is no mistake


class Raw(NamedTuple):
    """One row as the file has it. With a `problem`, it could not be read, and `value` is its text."""

    where: str  # "line 7" of a text, "row 7" of what has no lines, both from 1
    value: object
    problem: Problem | None = None


def is_named(source: str, start: Path | None = None) -> bool:
    """Whether `source` names a file, seen from `start`, and not a data set of the Hub.

    A file is what exists, what ends like one (.csv, but not a version such as -2.5), and what cannot be a Hub name.
    """
    there = Path(start or "", source).exists() or (ROOT / "data" / source).exists()
    return there or Path(source).suffix[1:2].isalpha() or not is_hub_name(source)


def find(name: str | Path, start: Path | None = None) -> Path:
    """The file of that name: seen from `start` (else the current folder), else in the course's data folder.

    Raises:
        Stop: there is none, or it is of no kind that can be read.
    """
    path = Path(start or "", Path(name).expanduser())
    if not path.exists() and (ROOT / "data" / name).exists():
        path = ROOT / "data" / name
    if not path.exists():
        raise Stop(f"There is no file {path}. Put it into data/ and give its name, or give its path")
    if path.is_dir() and not any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        raise Stop(f"{path} is a folder. Give a file in it (or a folder that datasets' save_to_disk made)")
    if path.is_file() and path.suffix.lower() not in SUFFIXES | {".parquet"}:
        raise Stop(f"{path.name}: only .jsonl, .json, .csv, .tsv and .parquet are read. Save it as one of these")
    return path


def read(path: Path, encoding: str = "") -> Iterator[Raw]:
    """The rows of a file that `find` found, one after the other.

    Args:
        encoding: of a text file; else UTF-8, or what the mark at its beginning says.

    Raises:
        Stop: the file as a whole cannot be read; the message says how to mend it.
    """
    if path.is_dir():
        return _folder(path)
    return _parquet(path) if path.suffix.lower() == ".parquet" else _text(path, encoding)


def _parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1000)
        for n, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield Raw(f"row {n}", row)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise Stop(f"{path.name} is no whole Parquet file ({str(error).splitlines()[0]}). Save it again") from None


def _folder(path: Path) -> Iterator[Raw]:
    from datasets import load_from_disk

    try:
        table = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise Stop(f"{path.name} was not saved whole ({str(error).splitlines()[0]}). Save it again") from None
    return _table(table, path.name)


def hub(name: str) -> Iterator[Raw]:
    """The rows of a data set of the Hub: its split "train".

    Raises:
        Stop: no network, no such data set, no such split.
    """
    from datasets import load_dataset

    try:
        table = load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Stop(f"Data set {name} cannot be had from the Hub ({reason}). Go online, or give a file") from None
    return _table(table, name)


def _table(table, name: str) -> Iterator[Raw]:
    if isinstance(table, dict):
        if "train" not in table:
            raise Stop(f"{name} has the splits {', '.join(table)} and no 'train'. Save the one you mean alone")
        table = table["train"]
    return (Raw(f"row {n}", row) for n, row in enumerate(table, 1))


def _text(path: Path, encoding: str) -> Iterator[Raw]:
    """The rows of a text file; only a JSON array is read whole."""
    encoding = encoding or encoding_of(path)
    try:
        yield from (_csv if path.suffix.lower() in (".csv", ".tsv") else _json)(path, encoding)
    except (UnicodeError, LookupError) as error:
        raise Stop(f"{path.name} cannot be read as {encoding} ({error}). Save it as UTF-8") from None


def _open(path: Path, encoding: str, newline: str):
    return open(path, encoding=encoding, newline=newline, errors="surrogateescape" if "8" in encoding else "strict")


def _json(path: Path, encoding: str) -> Iterator[Raw]:
    with _open(path, encoding, "\n") as file:
        lines = (line for line in file if line.strip())
        first, second = next(lines, ""), next(lines, None)
    try:
        alone = isinstance(json.loads(first), dict) and (second is not None or path.suffix.lower() != ".json")
    except (ValueError, RecursionError):
        alone = path.suffix.lower() != ".json" and not first.lstrip().startswith("[")
    return _lines(path, encoding) if alone or not first else _document(path, encoding)


def _lines(path: Path, encoding: str) -> Iterator[Raw]:
    with _open(path, encoding, "\n") as file:
        for n, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield Raw(f"line {n}", json.loads(line))
                except (ValueError, RecursionError) as error:
                    yield Raw(f"line {n}", line, Problem("not JSON", "", f"not JSON ({error})", _mend(line)))


def _mend(text: str) -> str:
    if re.search(r",\s*[}\]]", text):
        return "Delete the comma in front of the closing bracket"
    if re.match(r"\s*[{\[]\s*'", text):
        return "Use double quotes"
    return 'Write one object a line: {"instruction": "...", "input": "", "output": "..."}'


def _document(path: Path, encoding: str) -> Iterator[Raw]:
    """A JSON array, or an object that holds one under a single name."""
    with _open(path, encoding, "\n") as file:
        text = file.read()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        near = "\n".join(text.split("\n")[max(0, line - 2) : line])
        raise Stop(f"{path.name}, line {line}: not JSON ({error}). {_mend(near)}") from None
    rows = content if isinstance(content, list) else [content]
    if isinstance(content, dict) and len(content) == 1 and not content.keys() & {"messages", "conversations"}:
        inside = next(iter(content.values()))
        rows = inside if isinstance(inside, list) else rows
    return (Raw(f"row {n}", value) for n, value in enumerate(rows, 1))


def _csv(path: Path, encoding: str) -> Iterator[Raw]:
    with _open(path, encoding, "") as file:
        header = next((line for line in file if line.strip()), "")
        separator = max("\t;,", key=lambda c: len(next(csv.reader([header], delimiter=c), [])))
        file.seek(0)
        taken: list[str] = []  # lines of the row that is being read
        reader = csv.reader((taken.append(line) or line for line in file), delimiter=separator, strict=True)
        names = None
        while True:
            taken.clear()
            begins = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                mend = 'Put a text with quotes into quotes, and double those inside: "say ""hello"""'
                yield Raw(f"line {begins}", "".join(taken), Problem("not CSV", "", f"not CSV ({error})", mend))
                continue
            if not any(cell.strip() for cell in cells):
                continue
            if names is None:
                names = [cell.strip() for cell in cells]
                if twice := {name for name in names if name and names.count(name) > 1}:
                    raise Stop(f"{path.name}: two columns are named {min(twice)!r}. Rename one")
            elif len(cells) != len(names):
                mend = "Put a text that holds the separator or a line break into double quotes"
                what = f"{len(cells)} cells for {len(names)} columns"
                yield Raw(f"line {begins}", "".join(taken), Problem("columns", "", what, mend))
            else:
                yield Raw(f"line {begins}", {n: c for n, c in zip(names, cells, strict=True) if n or c})


def encoding_of(path: Path) -> str:
    """The encoding of a text file by its mark, else UTF-8.

    Raises:
        Stop: no mark, and not UTF-8; the message has the command that converts it. (Where other lines do hold UTF-8
            beyond ASCII, one that does not is the mistake of that line.)
    """
    with open(path, "rb") as file:
        start = file.read(4096)
        for mark, encoding in BOMS:
            if start.startswith(mark):
                return encoding
        if b"\0" in start[:2]:  # every second byte of ASCII in UTF-16; further on a zero is a mistake of its row
            wide = "UTF-32" if b"\0\0" in start else "UTF-16"
            guess = wide + ("BE" if start.startswith(b"\0") else "LE")
            raise Stop(f"{path.name}, line 1: not UTF-8 but {guess}. {_convert(path, guess)}")
        file.seek(0)
        wrong = None
        for n, line in enumerate(file, 1):
            if not line.isascii():
                try:
                    line.decode("utf-8")
                    return "utf-8"
                except UnicodeDecodeError as error:
                    wrong = wrong or (n, line[max(0, error.start - 12) : error.end + 12].decode("latin-1"))
    if wrong:
        place, looks = f"{path.name}, line {wrong[0]}: not UTF-8.", " ".join(wrong[1].split())
        raise Stop(f"{place} If {looks!r} looks right, it is latin-1. {_convert(path, 'LATIN1')}")
    return "utf-8"


def _convert(path: Path, encoding: str) -> str:
    return f'Convert it: iconv -f {encoding} -t UTF-8 "{path.name}" > "new-{path.name}" (or save it as UTF-8)'
