"""From a source to what a run trains on: read and checked, split, turned into token ids."""

import os
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from utils.data import duplicates, sources, template
from utils.data.validation import Report, check
from utils.presets import PROFILES, Profile
from utils.runtime import OUTPUTS, Stop

ALMANAC = Path(PROFILES["pocket"].data).parent
HELD_OUT = 0.1  # share of the rows that is kept for the held-out loss


@dataclass(frozen=True)
class Data:
    """What a run trains with and is tested with; each is a list of rows, as `utils.data.rows` has them."""

    train: list[dict]
    held_out: list[dict]  # never trained on; for the held-out loss
    exam: list[dict] = field(default_factory=list)  # questions with one right answer; only the almanac has them


def load(profile: Profile) -> Data:
    """The data of a profile: the almanac, a file of one's own, or a data set from the Hub.

    The almanac comes split by person. Other data are split 90 to 10, rows with the same question, or the same value in
    a column `group`, together; if rows were rejected or noted, a line says so. The environment variable QLORA_COLUMNS
    may name the columns: "instruction=Frage,output=Antwort". Stops as `examine` does.
    """
    if Path(profile.data).resolve() == ALMANAC / "train.jsonl":
        return Data(*(read(ALMANAC / f"{name}.jsonl") for name in ("train", "validation", "test")))
    report, rows = examine(profile.data)
    if report.findings:
        print(report)
    if len(rows) < 2:
        raise Stop(f"{profile.data} has one row: one to train on and one to test with are the least. Add rows")
    return Data(*split(rows, by="group"))


def read(source: str | Path, columns: dict | None = None, encoding: str = "") -> list[dict]:
    """The usable rows of a file or a Hub data set; `examine` also gives the report on the others."""
    return examine(source, columns, encoding)[1]


def examine(source: str | Path, columns: dict | None = None, encoding: str = "") -> tuple[Report, list[dict]]:
    """Read and check a source. Rejected rows, with reasons, go to outputs/data/<name>/.

    Args:
        source: a file (seen from here or from the course's data folder), a folder of datasets, or a Hub name.
        columns: which column is which ({"instruction": "Frage"}), if the names are none of those in data/README.md.
        encoding: of a text file that is neither UTF-8 nor marked.

    Raises:
        Stop: no row can be used (the message names the first problem), or the source cannot be read at all.
    """
    path = sources.find(source)
    name = path.name if path else str(source)
    report = Report(name, OUTPUTS / "data" / name.replace("/", "--"))
    raws = sources.read(path, encoding) if path else sources.hub(name)
    rows = list(check(raws, report, columns or _named_columns()))
    if rows:
        return report, rows
    if report.findings:
        raise Stop(f"{name}: none of its {report.rejected:,} rows can be used. The first: {report.findings[0]}")
    raise Stop(f'{name} has no rows. Write one JSON object a line: {{"instruction": "...", "output": "..."}}')


def _named_columns() -> dict[str, str]:
    pairs = [pair.split("=", 1) for pair in os.environ.get("QLORA_COLUMNS", "").split(",") if pair.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise Stop("QLORA_COLUMNS names no columns. Write it as in QLORA_COLUMNS=instruction=Frage,output=Antwort")
    return {ours.strip(): theirs.strip() for ours, theirs in pairs}


def split(rows: list[dict], by: str | Callable[[dict], object] = "group") -> tuple[list[dict], list[dict]]:
    """Two parts, shuffled, the second of about a tenth of the rows; rows of one group are in one part.

    Args:
        by: a column, or a function of a row, with the same value for all rows of a group. A row without a value, and
            every row if there is no such column, is grouped with those that ask the same question.
    """
    groups = defaultdict(list)
    for row in random.Random(0).sample(rows, len(rows)):
        value = by(row) if callable(by) else row.get(by)
        groups[duplicates.question(row) if value is None else (value,)].append(row)
    if len(groups) == 1:  # all rows ask the same (a style to learn): there is nothing to keep apart
        groups = {i: [row] for i, row in enumerate(next(iter(groups.values())))}
    wanted, held_out, train = max(1, round(HELD_OUT * len(rows))), [], []
    for group in groups.values():
        (held_out if len(held_out) < wanted else train).extend(group)
    return train, held_out


def encode(tokenizer, rows: list[dict], max_length: int):
    """Token ids and labels of `rows`, and the rows that are too long to be trained on.

    A row that does not fit is left out, whole: cut off, it would lose its end-of-sequence token, and the model would
    learn never to stop.

    Returns:
        (datasets.Dataset with input_ids and labels, list of rows longer than `max_length` tokens)
    """
    from datasets import Dataset

    encoded = [template.encode(tokenizer, row) for row in rows]
    too_long = [row for row, e in zip(rows, encoded, strict=True) if len(e["input_ids"]) > max_length]
    fitting = [e for e in encoded if len(e["input_ids"]) <= max_length]
    if not fitting:
        raise Stop(f"All {len(rows)} rows are longer than {max_length} tokens. Shorten them, or raise max_length")
    return Dataset.from_list(fitting), too_long
