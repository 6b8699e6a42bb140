"""Text files to raw rows, one at a time: JSONL, JSON, CSV with `,` `;` or tab."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils import encodings
from utils.fields import Problem
from utils.runtime import Stop

SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv"}
csv.field_size_limit(2**31 - 1)  # a long answer is no mistake


class Raw(NamedTuple):
    """One row as the file has it. With a `problem`, it could not be read, and `value` is its text."""

    where: str  # "line 7" of a text, "row 7" of what has no lines, both from 1
    value: object
    problem: Problem | None = None


def read(path: Path, encoding: str = "") -> Iterator[Raw]:
    """The rows of a text file (.jsonl, .json, .csv, .tsv), one after the other; only a JSON array is read whole.

    Args:
        encoding: of the file; else UTF-8, or what the mark at its beginning says.

    Raises:
        Stop: the file as a whole cannot be read; the message says how to mend it.
    """
    encoding = encoding or encodings.of(path)
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
