"""Any source to raw rows: text files, Parquet, a folder that `datasets` saved, a data set of the Hub."""

import re
from collections.abc import Iterator
from pathlib import Path

from utils import textfile
from utils.runtime import ROOT, Stop
from utils.textfile import Raw


def is_named(source: str, start: Path | None = None) -> bool:
    """Whether `source` names a file, seen from `start`, and not a data set of the Hub.

    A file is what exists, what ends like one (.csv, but not a version such as -2.5), and what cannot be a Hub name.
    """
    there = Path(start or "", source).exists() or (ROOT / "data" / source).exists()
    return there or Path(source).suffix[1:2].isalpha() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source)


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
    if path.is_file() and path.suffix.lower() not in textfile.SUFFIXES | {".parquet"}:
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
    return _parquet(path) if path.suffix.lower() == ".parquet" else textfile.read(path, encoding)


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
