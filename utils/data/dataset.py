"""From a source to what a run trains on: read and checked, split, turned into token ids."""

import os
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from utils.data import duplicates, sources, template
from utils.data.rows import KEYS, Problem
from utils.data.validation import Report, check, reject
from utils.presets import PROFILES, Profile
from utils.runtime import OUTPUTS, Stop

ALMANAC = Path(PROFILES["pocket"].data).parent
HELD_OUT, AT_MOST = 0.1, 0.2  # share of the rows that is kept for the held-out loss; where groups are large


@dataclass(frozen=True)
class Data:
    """What a run trains with and is tested with; each is a list of rows, as `utils.data.rows` has them."""

    train: list[dict]
    held_out: list[dict]  # never trained on; for the held-out loss
    exam: list[dict] = field(default_factory=list)  # questions with one right answer; only the almanac has them


def load(profile: Profile) -> Data:
    """The data of a profile: the almanac, a file of one's own, or a data set from the Hub.

    The almanac comes split by person. Other data are split 90 to 10, rows with the same question, or the same value in
    a column `group`, together; the report is printed. The environment variable QLORA_COLUMNS may name the columns:
    "instruction=Frage,output=Antwort". Stops as `examine` does.
    """
    if Path(profile.data).resolve() == ALMANAC / "train.jsonl":
        return Data(*(read(ALMANAC / f"{name}.jsonl") for name in ("train", "validation", "test")))
    report, rows = examine(profile.data)
    print(report)
    return Data(*split(rows, by="group"))


def read(source: str | Path, columns: dict | None = None) -> list[dict]:
    """The usable rows of a file or a Hub data set; `examine` also gives the report on the others."""
    return examine(source, columns)[1]


def examine(source: str | Path, columns: dict | None = None) -> tuple[Report, list[dict]]:
    """Read and check a source: a file (seen from here or from data/), a folder of datasets, a Hub name.

    Rejected rows, with reasons, go to outputs/data/<name>/. `columns` says which column is which ({"instruction":
    "Frage"}), if the names are none of those in data/README.md. Stop: no row can be used (the message names the first
    problem), the source cannot be read at all, or `columns` has a key that is none of ours.
    """
    if not columns:
        pairs = [pair.split("=", 1) for pair in os.environ.get("QLORA_COLUMNS", "").split(",") if pair.strip()]
        if any(len(pair) != 2 or not all(map(str.strip, pair)) for pair in pairs):
            raise Stop("QLORA_COLUMNS names no columns. Write it as in QLORA_COLUMNS=instruction=Frage,output=Antwort")
        columns = {ours.strip(): theirs.strip() for ours, theirs in pairs}
    if unknown := sorted(columns.keys() - {*KEYS, "messages"}):
        raise Stop(f"There is no column {unknown[0]!r} to be named: only {', '.join(KEYS)} and messages")
    path = sources.find(source)
    name = path.name if path else str(source)
    report = Report(name, OUTPUTS / "data" / name.replace("/", "--"))
    raws = sources.read(path) if path else sources.hub(name)
    rows = list(check(raws, report, columns))
    if rows:
        return report, rows
    if report.findings:
        raise Stop(f"{name}: none of its {report.rejected:,} rows can be used. The first: {report.findings[0]}")
    raise Stop(f'{name} has no rows. Write one JSON object a line: {{"instruction": "...", "output": "..."}}')


def split(rows: list[dict], by: str | Callable[[dict], object] = "group") -> tuple[list[dict], list[dict]]:
    """Two parts, shuffled, the second of about a tenth of the rows; rows of one group are in one part.

    The second has at most a fifth, whatever the groups. Where each is larger, the smallest is held out, where there is
    but one, single rows, and of one row none; a line says so. `by` is a column, or a function of a row, with the same
    value for all rows of a group. A row without a value is grouped with those that ask the same question.
    """
    groups = defaultdict(list)
    for row in random.Random(0).sample(rows, len(rows)):
        value = by(row) if callable(by) else row.get(by)
        group = value if isinstance(value, str) else repr(value)  # a column may hold anything
        groups[duplicates.question(row) if group in ("", "None", "nan") else (group,)].append(row)
    if len(groups) == 1 < len(rows):  # a style to learn: there is nothing to keep apart
        print("All rows ask the same, or are of one group: single rows are held out")
        groups = {i: [row] for i, row in enumerate(next(iter(groups.values())))}
    wanted, held_out, train = max(1, round(HELD_OUT * len(rows))), [], []
    for group in groups.values():
        fits = len(held_out) < wanted and len(held_out) + len(group) <= AT_MOST * len(rows)
        (held_out if fits else train).extend(group)
    if not held_out:
        held_out = min(groups.values(), key=len) if len(groups) > 1 else []
        train = [row for group in groups.values() if group is not held_out for row in group]
        if len(held_out) != 1:
            print(f"Groups of rows: {len(groups):,}. Held out: {len(held_out):,} of {len(rows):,} rows")
    return train, held_out


def encode(tokenizer, rows: list[dict], max_length: int):
    """(datasets.Dataset with input_ids and labels of `rows`, list of the rows that are too long to be trained on).

    A row that does not fit (into the base's context, too, which `load_tokenizer` notes) is left out, whole: cut off, it
    would lose its end-of-sequence token, and the model would learn never to stop. It goes to rejected.jsonl with its
    length, and the report is printed again, with the max_length that keeps 95 % of the rows. Stop if no row fits, and
    the rest of their file, if there is one, is smaller.
    """
    from datasets import Dataset

    encoded = [template.encode(tokenizer, row) for row in rows]
    lengths, reads = [len(e["input_ids"]) for e in encoded], tokenizer.model_max_length
    too_long = [(row, n) for row, n in zip(rows, lengths, strict=True) if n > min(max_length, reads)]
    if too_long:
        enough = sorted(lengths)[ceil(0.95 * len(rows)) - 1]
        every = f", {max(lengths):,} keeps all" if max(lengths) <= reads else ""
        mend = f"max_length {enough:,} keeps 95 % of rows{every}"
        mend = mend if max_length < reads >= enough else f"The base reads {reads:,} at most"
        problems = [(row, Problem("too long", "", f"{n:,} tokens are too many", mend)) for row, n in too_long]
        reports = {id(report): report for row, problem in problems if (report := reject(row, problem))}
        for report in reports.values():
            report.advice = f"; {mend}"
            print(report)
        if len(too_long) == len(rows) and all(report.kept < len(rows) for report in reports.values()):
            raise Stop(f"All {len(rows)} rows are longer than {min(max_length, reads)} tokens. Shorten them: {mend}")
    fitting = [e for e, n in zip(encoded, lengths, strict=True) if n <= min(max_length, reads)]
    columns = {key: [e[key] for e in fitting] for key in ("input_ids", "labels")}
    return Dataset.from_dict(columns), [row for row, _ in too_long]
