"""Hygiene of every notebook, read as files (nbval runs them and compares their outputs)."""

import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from utils import runtime

FOLDER = runtime.ROOT / "notebooks"
SOLUTIONS = FOLDER / "solutions"
NOTEBOOKS = [*sorted(FOLDER.glob("*.ipynb")), *sorted(SOLUTIONS.glob("*.ipynb"))]
CHAPTERS = [path for path in NOTEBOOKS if path.parent == FOLDER]

TOKENS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}"
)
PATHS = re.compile(
    rf"(?<![\w.:/])(/(home|root|Users|tmp|mnt|private|var)/|[A-Z]:\\Users\\)|{re.escape(str(runtime.ROOT))}/"
)
ESCAPES = re.compile(r"^\s*#\s*(NBVAL_IGNORE_OUTPUT|NBVAL_SKIP|PYTEST_VALIDATE_IGNORE_OUTPUT)\s*$", re.MULTILINE)
LENGTH_MEDIAN, LENGTH_MAX = 5, 25  # non-blank lines of a code cell
ESCAPED_SHARE = 0.25  # of the code cells may keep their outputs from being compared


def name(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def load(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook) -> list:
    """(position, cell) of the code cells that hold anything, in order; the position counts all cells from 0."""
    return [(i, c) for i, c in enumerate(notebook.cells) if c.cell_type == "code" and c.source.strip()]


def lines(cell) -> int:
    return sum(bool(line.strip()) for line in cell.source.split("\n"))


def badge(path: Path) -> str:
    """The line that opens a notebook in Colab."""
    link = runtime.HOME.replace("https://github.com/", "https://colab.research.google.com/github/")
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({link}/blob/main/{path.relative_to(runtime.ROOT).as_posix()})"


def problems(path: Path, text: str | None = None) -> list[str]:
    """What is wrong with the notebook, a line each that names the cell. `text` stands in for the file's content."""
    text = path.read_text(encoding="utf-8") if text is None else text
    notebook = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        return [f"not a valid notebook: {error.message}"]
    found = []
    if "widgets" in notebook.metadata:
        found.append("metadata.widgets: code hosts show 'Invalid Notebook'; execute without storing widget state")
    cells = code_cells(notebook)
    for expected, (i, cell) in enumerate(cells, 1):
        if cell.execution_count != expected:
            found.append(f"cell {i}: execution count {cell.execution_count}, not {expected}: run all cells in order")
        if lines(cell) > LENGTH_MAX:
            found.append(f"cell {i}: {lines(cell)} lines, at most {LENGTH_MAX}")
        if "trust_remote_code=True" in cell.source.replace(" ", ""):
            found.append(f"cell {i}: trust_remote_code=True runs code from the Hub")
        if re.search(r"\bpip3?['\", ]+install", cell.source):
            found.append(f"cell {i}: pip install belongs into the bootstrap")
        found += [f"cell {i}: stored error {o.ename}" for o in cell.outputs if o.output_type == "error"]
        found += [f"cell {i}: stored text on stderr" for o in cell.outputs if o.get("name") == "stderr"]
    for i, cell in enumerate(notebook.cells):
        for text in strings([cell.source, cell.get("outputs", [])]):
            found += [f"cell {i}: looks like a token: {m[0][:8]}..." for m in TOKENS.finditer(text)]
            found += [f"cell {i}: a path of a machine: {text[m.start() : m.end() + 30]}" for m in PATHS.finditer(text)]
    if cells:
        escaped = [i for i, cell in cells if ESCAPES.search(cell.source)]
        if len(escaped) > ESCAPED_SHARE * len(cells):
            found.append(f"{len(escaped)} of {len(cells)} code cells escape comparison: {escaped}")
        if (median := statistics.median(lines(cell) for _, cell in cells)) > LENGTH_MEDIAN:
            found.append(f"the median code cell has {median:g} lines, at most {LENGTH_MEDIAN}")
    first = next((c.source for c in notebook.cells if c.cell_type == "markdown"), "")
    if badge(path) not in first.split("\n"):
        found.append(f"the first text cell lacks the line {badge(path)}")
    if not cells or cells[0][1].source != runtime.BOOTSTRAP_CELL:
        found.append("the first code cell is not runtime.BOOTSTRAP_CELL")
    return found


def strings(stored) -> list[str]:
    """All texts in a cell's source and outputs; pictures are left out."""
    if isinstance(stored, str):
        return [stored]
    if isinstance(stored, dict):
        stored = [v for k, v in stored.items() if not k.startswith("image/")]
    return [text for part in stored for text in strings(part)] if isinstance(stored, list) else []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_hygiene(path):
    assert problems(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_renders_as_html(path):
    from nbconvert import HTMLExporter

    assert "</html>" in HTMLExporter().from_filename(str(path))[0]


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_exercises_have_solutions(path):
    exercises = [c.source for _, c in code_cells(load(path)) if re.search(r"\bcheck\(", c.source)]
    if not exercises:
        pytest.skip("a chapter without exercises")
    solution = SOLUTIONS / path.name
    assert solution.is_file(), f"solutions/{path.name} is missing"
    solved = [c.source for _, c in code_cells(load(solution))]
    names = re.findall(r"""\bcheck\(\s*(['"].+?['"])""", "\n".join(exercises))
    unsolved = [n for n in names if not any(n in s and "strict=True" in s for s in solved)]
    assert not unsolved, f"solutions/{path.name} has no check(..., strict=True) for {unsolved}"


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_a_chapter_keeps_the_time_that_it_promises(path):
    """Up to "Going deeper": prose at 200 words a minute, 15 seconds a code cell."""
    cells = load(path).cells
    end = next((i for i, cell in enumerate(cells) if re.search("^#+ Going deeper", cell.source, re.M)), len(cells))
    words = sum(len(cell.source.split()) for cell in cells[:end] if cell.cell_type == "markdown")
    minutes = words / 200 + sum(cell.cell_type == "code" for cell in cells[:end]) / 4
    stated = re.search(r"(\d+) minutes to read", cells[0].source)
    assert stated and abs(int(stated[1]) - minutes) <= 2.5
    assert minutes <= 35 and end <= 115
    if "your_own" in path.name:  # a run, and no lesson
        assert minutes <= 15


def test_few_outputs_escape_comparison():
    cells = [cell for path in CHAPTERS for _, cell in code_cells(load(path))]
    assert sum(bool(ESCAPES.search(c.source)) or "nbval" in str(c.metadata.get("tags")) for c in cells) <= 6


NUMBER = re.compile(
    r"(?<![\w.,^{])(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?!\w|-\w|\.\d|,\d)(?:&nbsp;|\s)*(%|million|billion)?"
)
SCALE = {"": 1, "%": 0.01, "million": 1e6, "billion": 1e9}
NAMED = re.compile(  # formulas, code, links, names, dates, references: numbers that are no claims
    r"(?s)\$.*?\$|`[^`]*`|\]\([^)]*\)|https?://\S+|[A-Za-z_/]-?#?\d[\w-]*|\b95 %|\b\d+( |-)bits?\b|\d+.minutes to read"
    r"|(?m:^\W*\d+\.\s)|\b(19\d\d|20[0-2]\d)\b(-\d\d)*|(?i:\b(chapter|notebook|part|section|cell|lever|exercise|seed"
    r"|appendix|figure)s? \d[\d.]*((,| and| to| or|, and) \d\d?\b)*)"
)


def unfounded(notebook) -> list[str]:
    """Numbers of the prose that no code, output or exercise's check has; they may be rounded."""

    def numbers(text):
        found = NUMBER.findall(re.sub(r"(?<=\d)_(?=\d)", "", text))
        return {(n + d + u, float((n + d).replace(",", "")) * SCALE[u], len(d[1:]), u) for n, d, u in found}

    def stands(value, decimals, unit):
        half = 0.5001 * SCALE[unit] / 10**decimals  # of the last digit
        return any(abs(v - value) <= (half if (k > decimals and u == unit) or unit[1:] else 1e-9) for v, k, u in known)

    cells = code_cells(notebook)
    texts = [c.source for _, c in cells if "source_hidden" not in str(c.metadata) or "check(" in c.source]
    texts += [text for _, c in cells for text in strings(c.get("outputs", []))]
    known = {n[1:] for text in texts for n in numbers(text)}
    prose = "\n".join(NAMED.sub(" ", c.source) for c in notebook.cells if c.cell_type == "markdown")
    return sorted({n for n, *found in numbers(prose) if not stands(*found)})


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_numbers_in_prose_are_computed_or_have_a_source(path):
    given = json.loads(Path(__file__).with_name("numbers.json").read_text(encoding="utf-8")).get(path.stem, {})
    assert set(unfounded(load(path))) <= set(given)


def test_a_changed_number_in_prose_is_found():
    cell = nbformat.v4.new_code_cell("x = 2_048", outputs=[nbformat.v4.new_output("stream", text="12.23 GiB, 7.9 %")])
    for prose, found in {"2,048, 12.2 GiB, 7.9 %": [], "2,049 and 12.3, 8.1 %": ["12.3", "2,049", "8.1%"]}.items():
        assert unfounded(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_markdown_cell(prose)])) == found


# The checks above are themselves checked: a clean notebook has no problem, each spoiled one has exactly its own.


def clean() -> dict:
    """A notebook as a dict, without any problem at notebooks/sample.ipynb."""
    cell = nbformat.v4.new_code_cell("1 + 1", execution_count=2)
    cell.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=2)]
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# Sample\n\n" + badge(FOLDER / "sample.ipynb")),
            nbformat.v4.new_code_cell(runtime.BOOTSTRAP_CELL, execution_count=1),
            cell,
            nbformat.v4.new_markdown_cell("See notebooks/home/x and https://example.org/home/y: no machine's paths."),
            nbformat.v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nx = 1", execution_count=3),
            nbformat.v4.new_code_cell("x = 2", execution_count=4),
            nbformat.v4.new_code_cell("# NBVAL_SKIP\nx = 3", execution_count=5),
        ]
    )
    return json.loads(nbformat.writes(notebook))


def spoil(change) -> list[str]:
    notebook = clean()
    change(notebook)
    return problems(FOLDER / "sample.ipynb", json.dumps(notebook))


def put(position: int, **fields):
    return lambda notebook: notebook["cells"][position].update(fields)


def output(text: str):
    return put(5, outputs=[{"output_type": "stream", "name": "stdout", "text": text}])


def error(notebook):
    failed = {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}
    notebook["cells"][5]["outputs"] = [failed]


HOME_FOLDER = "/".join(["", "home", "ada", "course"])  # in pieces: a search for such paths should not end here


def test_a_clean_notebook_has_no_problem():
    assert spoil(lambda notebook: None) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda nb: nb["cells"][2].pop("outputs"), "not a valid notebook"),
        (lambda nb: nb["metadata"].update(widgets={}), "metadata.widgets"),
        (put(2, execution_count=7), "cell 2: execution count 7, not 2"),
        (put(2, execution_count=None), "cell 2: execution count None"),
        (error, "cell 5: stored error ValueError"),
        (put(5, outputs=[{"output_type": "stream", "name": "stderr", "text": "w"}]), "cell 5: stored text on stderr"),
        (put(2, source="x = 1\n" * 26), "cell 2: 26 lines"),
        (put(2, source="f(trust_remote_code = True)"), "cell 2: trust_remote_code=True"),
        (put(2, source="!pip install x"), "cell 2: pip install"),
        (put(2, source="run(['pip', 'install', 'x'])"), "cell 2: pip install"),
        (put(2, source="login('hf_" + "a1" * 17 + "')"), "cell 2: looks like a token"),
        (output("hf_" + "a1" * 17), "cell 5: looks like a token"),
        (output("saved in " + HOME_FOLDER), "cell 5: a path of a machine"),
        (output("saved in\n" + HOME_FOLDER), "cell 5: a path of a machine"),
        (output("saved in C:\\Users\\ada"), "cell 5: a path of a machine"),
        (output("/tmp/ipykernel_1/1.py:1: UserWarning"), "cell 5: a path of a machine"),
        (put(3, source=f"see {runtime.ROOT}/data"), "cell 3: a path of a machine"),
        (put(2, source="# NBVAL_IGNORE_OUTPUT\nx"), "2 of 5 code cells escape"),
        (put(0, source="# Sample"), "the first text cell lacks the line [![Open in Colab]"),
        (put(0, source=badge(FOLDER / "other.ipynb")), "the first text cell lacks the line"),
        (put(1, source=runtime.BOOTSTRAP_CELL + "\n"), "the first code cell is not"),
    ],
)
def test_each_problem_is_found(change, problem):
    found = spoil(change)
    assert len(found) == 1, found
    assert found[0].startswith(problem)


def test_long_cells_are_found():
    def change(notebook):
        for position in (2, 4, 5):
            notebook["cells"][position]["source"] = "x = 1\n\n" * 6

    assert spoil(change) == ["the median code cell has 6 lines, at most 5"]
