"""A source, checked: what is kept, what is rejected, and why. Rows in = rows kept + rows rejected."""

import contextlib
import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils.data import rows
from utils.data.rows import Problem
from utils.data.sources import Raw
from utils.runtime import shown

FILES = ("rejected.jsonl", "findings.csv")
SHOWN = 1000  # findings kept in memory; all of them stand in findings.csv


@dataclass(frozen=True)
class Finding:
    """One problem in its place. `rejected`: it cost the row; else it is a note."""

    file: str
    where: str
    problem: Problem
    rejected: bool

    def __str__(self) -> str:
        return " ".join(f"{self.file}, {self.where}: {self.problem}".split())


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
    fields: dict[tuple[str, bool], None] = field(default_factory=dict)  # of kept rows: name, whether it is used
    advice: str = ""

    def __str__(self) -> str:
        told = [f"{self.name}: {self.kept:,} of {self.kept + self.rejected:,} rows kept"]
        for title, counts in (("rejected", self.kinds), ("noted", self.notes)):
            if counts:
                told.append(f"{counts.total():,} {title} ({', '.join(f'{k} {n}' for k, n in counts.most_common())})")
        told = [", ".join(told) + (f"; see {shown(self.folder)}" if len(told) > 1 else "") + self.advice]
        for title, used in (("used", True), ("not used", False)):
            names = [name[:40] for name, read in self.fields if read is used]
            names = [*names[:20], f"{len(names) - 20} more"] if len(names) > 20 else names
            told.append(f"{title}: {', '.join(names) or 'nothing'}")
        return "\n".join(told)


class Row(dict):
    """A kept row. `origin`: its report, and its place."""

    __slots__ = ("origin",)


def check(raws: Iterable[Raw], report: Report, columns: dict[str, str] | None = None) -> Iterator[dict]:
    """The usable rows in the internal form, in their order; one row is held at a time.

    On the way `report` is filled in, and what it says goes to two files in its folder, which exist only if there is
    something to say: rejected.jsonl holds the rejected rows whole, with the reason; findings.csv a line a finding,
    notes included. `raws` come from `sources.read`; for `columns` see `rows.normal`.
    """
    for name in FILES:  # those of an earlier version of the data would mislead
        (report.folder / name).unlink(missing_ok=True)
    with contextlib.ExitStack() as opened:
        files, nested = None, {}  # columns that were seen -> whether there are turns in them
        for raw in raws:
            try:
                row, problems = (None, [raw.problem]) if raw.problem else rows.normal(raw.value, columns)
            except Problem as problem:
                row, problems = None, [problem.with_traceback(None)]  # which would keep the row in memory
            for problem in problems:
                files = files or _begun(report.folder, opened)
                _add(Finding(report.name, raw.where, problem, row is None), raw.value, report, *files)
            if row is None:
                report.rejected += 1
            else:
                report.kept += 1
                shape = tuple(raw.value)
                if len(report.fields) < SHOWN and nested.get(shape, len(nested) < SHOWN):
                    found = rows.fields(raw.value, columns)
                    nested[shape] = len(found) > len(shape)
                    report.fields |= found
                row = Row(row)
                row.origin = report, raw.where
                yield row


def reject(row: dict, problem: Problem) -> Report | None:
    """Take back a row that `check` kept and that cannot be used after all, once. Returns its report, if it has one."""
    report, where = getattr(row, "origin", (None, ""))
    if where:
        row.origin = report, ""
        report.kept, report.rejected = report.kept - 1, report.rejected + 1
        with contextlib.ExitStack() as opened:
            _add(Finding(report.name, where, problem, True), row, report, *_begun(report.folder, opened))
    return report


def _begun(folder: Path, opened: contextlib.ExitStack) -> tuple:
    """A report's two files, to write on into."""
    folder.mkdir(parents=True, exist_ok=True)
    # Half characters and foreign bytes are written as the escapes that JSON has for them.
    style = {"mode": "a", "encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    rejected, findings = [opened.enter_context(open(folder / name, **style)) for name in FILES]  # noqa: SIM115
    table = csv.writer(findings, lineterminator="\n")
    if not findings.tell():
        table.writerow(["file", "where", "field", "problem", "what", "mend", "rejected"])
    return rejected, table


def _add(finding: Finding, value: object, report: Report, rejected, table) -> None:
    file, where, problem = finding.file, finding.where, finding.problem
    (report.kinds if finding.rejected else report.notes)[problem.kind] += 1
    if len(report.findings) < SHOWN:
        report.findings.append(finding)
    table.writerow([file, where, problem.field, problem.kind, problem.what, problem.mend, finding.rejected])
    if finding.rejected:
        reason = {"file": file, "where": where, "problem": problem.kind, "reason": str(finding), "row": value}
        rejected.write(json.dumps(reason, ensure_ascii=False, default=str) + "\n")
