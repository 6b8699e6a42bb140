"""A source, checked: what is kept, what is rejected, and why. Rows in = rows kept + rows rejected."""

import contextlib
import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils.data import rows
from utils.data.rows import Problem, Rejected
from utils.data.sources import Raw
from utils.runtime import shown

SHOWN = 1000  # findings kept in memory; all of them stand in findings.csv


@dataclass(frozen=True)
class Finding:
    """One problem in its place. `rejected`: it cost the row; else it is a note."""

    file: str
    where: str
    problem: Problem
    rejected: bool

    def __str__(self) -> str:
        return " ".join(f"{self.file}, {self.where}: {self.problem.what}. {self.problem.mend}".split())


@dataclass
class Report:
    """What became of the rows of `name`. Rejected rows and all findings are files in `folder`."""

    name: str
    folder: Path
    kept: int = 0
    rejected: int = 0
    kinds: Counter = field(default_factory=Counter)  # of rejections
    notes: Counter = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)  # the first SHOWN

    def __str__(self) -> str:
        told = [f"{self.name}: {self.kept:,} of {self.kept + self.rejected:,} rows kept"]
        for title, counts in (("rejected", self.kinds), ("noted", self.notes)):
            if counts:
                told.append(f"{counts.total():,} {title} ({', '.join(f'{k} {n}' for k, n in counts.most_common())})")
        return ", ".join(told) + (f"; see {shown(self.folder)}" if len(told) > 1 else "")


def check(raws: Iterable[Raw], report: Report, columns: dict[str, str] | None = None) -> Iterator[dict]:
    """The usable rows in the internal form, in their order; one row is held at a time.

    On the way `report` is filled in, and what it says goes to two files in its folder, which exist only if there is
    something to say: rejected.jsonl holds the rejected rows whole, with the reason; findings.csv a line a finding,
    notes included.

    Args:
        raws: rows as `sources.read` yields them.
        columns: see `rows.normal`.
    """
    with _Ledger(report) as ledger:
        for raw in raws:
            try:
                if raw.problem:
                    raise Rejected(**vars(raw.problem))
                row, notes = rows.normal(raw.value, columns)
            except Rejected as error:
                report.rejected += 1
                ledger.add(Finding(report.name, raw.where, error.problem, True), raw.value)
                continue
            for problem in notes:
                ledger.add(Finding(report.name, raw.where, problem, False), raw.value)
            report.kept += 1
            yield row


class _Ledger:
    """The two files of a report, which are begun with the first finding."""

    def __init__(self, report: Report):
        self.report, self.opened = report, contextlib.ExitStack()
        self.paths = [report.folder / name for name in ("rejected.jsonl", "findings.csv")]
        self.rejected = self.table = None

    def __enter__(self):
        for path in self.paths:  # those of an earlier version of the data would mislead
            path.unlink(missing_ok=True)
        return self

    def __exit__(self, *error):
        self.opened.close()

    def add(self, finding: Finding, value: object) -> None:
        problem = finding.problem
        (self.report.kinds if finding.rejected else self.report.notes)[problem.kind] += 1
        if len(self.report.findings) < SHOWN:
            self.report.findings.append(finding)
        if self.table is None:
            self._begin()
        line = [finding.file, finding.where, problem.field, problem.kind, problem.what, problem.mend, finding.rejected]
        self.table.writerow(line)
        if finding.rejected:
            reason = {"file": finding.file, "where": finding.where, "problem": problem.kind, "reason": str(finding)}
            self.rejected.write(json.dumps(reason | {"row": value}, ensure_ascii=False, default=str) + "\n")

    def _begin(self) -> None:
        self.report.folder.mkdir(parents=True, exist_ok=True)
        # Half characters and foreign bytes are written as the escapes that JSON has for them.
        style = {"mode": "w", "encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
        self.rejected, table = [self.opened.enter_context(open(path, **style)) for path in self.paths]  # noqa: SIM115
        self.table = csv.writer(table, lineterminator="\n")
        self.table.writerow(["file", "where", "field", "problem", "what", "mend", "rejected"])
