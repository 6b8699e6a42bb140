"""What all studies share: the command line, and a chapter's own cells to measure with.

    python data/measurements/studies/04_training.py learning_rate --seed 1

writes the record training_learning_rate_seed1.json. `--quick` makes the shortest run that goes through every line, for
tests; its figures mean nothing.
"""

import argparse
import contextlib
import io
import json
import linecache
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "measurements")]
os.environ.setdefault("MPLBACKEND", "agg")

import record  # noqa: E402  (from data/measurements)

from utils import runtime  # noqa: E402


def options(parts: Sequence[str]) -> argparse.Namespace:
    """The command line of the study that calls: which of its parts, `seed`, `quick`, and `out`, the records' folder."""
    script = Path(sys.argv[0])
    parser = argparse.ArgumentParser(prog=f"python data/measurements/studies/{script.name}")
    parser.add_argument("part", choices=parts)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the shortest run, to see that everything works")
    parser.add_argument("--out", type=Path, default=record.FOLDER, help="where the record goes")
    runtime.quiet()
    return parser.parse_args()


def write(chosen: argparse.Namespace, name: str, figures: dict) -> None:
    """Record `figures` under `name`, with the command that made them."""
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("QLORA_", "ATEN_", "DATA"))]
    command = [*settings, "python", f"data/measurements/studies/{Path(sys.argv[0]).name}", chosen.part]
    command += ["--seed", str(chosen.seed)] if chosen.seed else []
    command += ["--quick"] if chosen.quick else []
    print(record.write(name, figures, " ".join(command), chosen.out).name)


def chapter(name: str, until: str = "", bounds: bool = True, **parameters) -> dict:
    """The names that a chapter's code cells define, after running them in order, in notebooks/.

    Args:
        name: of the notebook, without its ending.
        until: the beginning of a line of a text cell, such as a heading; the cells before it are run. All by default.
        bounds: False leaves out the chapter's asserts, which a quick run cannot meet.
        parameters: replace those of the notebook's cell tagged `parameters`.
    """
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    names, stopped = {"__name__": name, "display": lambda *shown, **how: None}, not until
    os.chdir(ROOT / "notebooks")
    for i, cell in enumerate(cells):
        source = "".join(cell["source"]) + "\n"
        if cell["cell_type"] == "markdown":
            if until and any(line.startswith(until) for line in source.splitlines()):
                stopped = True
                break
            continue
        file = f"<{name}, cell {i}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # for inspect.getsource
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, file, "exec", optimize=-1 if bounds else 1), names)  # its own code
        if "parameters" in cell["metadata"].get("tags", []):
            names |= parameters
    if not stopped:
        raise ValueError(f"{name} has no line that begins with {until!r}")
    return names
