"""nbval with this repository's settings notices a changed number and a failing cell. Shown on throw-away notebooks."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from copy import deepcopy

import nbformat
import pytest
from nbformat import v4

from utils import runtime

CELLS = [
    "from utils import runtime\nprint(' | '.join(f'{n} {v}' for n, v in runtime.versions().items()))",
    "print('exact match 98.8 %, loss 0.45, trained in 28.4 s on 2026-01-31')",
    "0.25 * 3",
    "print('outputs/adapters/' + 'deadbeef01')",
    "assert 2 + 2 == 4",
]


def stored(notebook, cell: int, old: str, new: str) -> None:
    """Change `old` to `new` in the stored output of a cell, as an edit or another result would."""
    output = notebook.cells[cell].outputs[0]
    holder, key = (output, "text") if "text" in output else (output.data, "text/plain")
    assert old in holder[key]
    holder[key] = holder[key].replace(old, new)


def failing(notebook) -> None:
    notebook.cells[4].source = "assert 2 + 2 == 5"


# name -> (what is done to the notebook, the cell that must then fail, None for no cell)
CHANGES = {
    "untouched": (lambda nb: None, None),
    "printed_figure": (lambda nb: stored(nb, 1, "98.8", "98.9"), 1),
    "printed_loss": (lambda nb: stored(nb, 1, "0.45", "0.46"), 1),
    "value": (lambda nb: stored(nb, 2, "0.75", "0.76"), 2),
    "output_gone": (lambda nb: nb.cells[2].update(outputs=[]), 2),
    "failing_cell": (failing, 4),
    # What the sanitize file hides, and nothing beside it.
    "other_versions": (lambda nb: stored(nb, 0, runtime.versions()["torch"], "2.11.0+cu128"), None),
    "other_duration": (lambda nb: stored(nb, 1, "28.4 s", "31 s"), None),
    "other_date": (lambda nb: stored(nb, 1, "2026-01-31", "2027-12-01"), None),
    "other_adapter": (lambda nb: stored(nb, 3, "deadbeef01", "0123456789abcdef"), None),
    "other_package": (lambda nb: stored(nb, 0, "torch", "torchvision"), 0),
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> dict[str, list[int]]:
    """Name of each changed notebook -> the cells that failed, from one run of pytest over all of them."""
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("strict")
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in CELLS])
    path_first = f"import sys; sys.path.insert(0, {str(runtime.ROOT)!r})\n"
    notebook.cells[0].source = path_first + notebook.cells[0].source
    NotebookClient(notebook, kernel_name="python3").execute()
    for name, (change, _) in CHANGES.items():
        changed = deepcopy(notebook)
        change(changed)
        nbformat.write(changed, folder / f"{name}.ipynb")
    report = folder / "report.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        + ["-c", "pyproject.toml", "--rootdir=.", "-p", "no:cacheprovider", str(folder)],
        cwd=runtime.ROOT,
        capture_output=True,
        timeout=300,
    )
    found = {name: [] for name in CHANGES}
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert len(cases) == len(CELLS) * len(CHANGES)  # every cell of every notebook was run
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            name = next(n for n in CHANGES if f"{n}.ipynb" in (case.get("file") or case.get("classname")))
            found[name].append(int(case.get("name").split()[-1]))
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_only_the_changed_cell_fails(failed, name):
    cell = CHANGES[name][1]
    assert failed[name] == ([] if cell is None else [cell])
