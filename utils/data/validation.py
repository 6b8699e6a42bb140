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
    notes included. `raws` come from `sources.read`; for `columns` see `rows.normal`.
    """
    paths = [report.folder / name for name in ("rejected.jsonl", "findings.csv")]
    for path in paths:  # those of an earlier version of the data would mislead
        path.unlink(missing_ok=True)
    with contextlib.ExitStack() as opened:
        files = None
        for raw in raws:
            try:
                row, problems = (None, [raw.problem]) if raw.problem else rows.normal(raw.value, columns)
            except Problem as problem:
                row, problems = None, [problem.with_traceback(None)]  # which would keep the row in memory
            for problem in problems:
                files = files or _begun(paths, opened)
                _add(Finding(report.name, raw.where, problem, row is None), raw.value, report, *files)
            if row is None:
                report.rejected += 1
            else:
                report.kept += 1
                yield row


def _begun(paths: list[Path], opened: contextlib.ExitStack) -> tuple:
    """A report's two files, to write into."""
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    # Half characters and foreign bytes are written as the escapes that JSON has for them.
    style = {"mode": "w", "encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    rejected, findings = [opened.enter_context(open(path, **style)) for path in paths]  # noqa: SIM115
    table = csv.writer(findings, lineterminator="\n")
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
