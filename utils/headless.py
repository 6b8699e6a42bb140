"""`make run`: notebook 00 from the first cell to the last without a browser, then where everything is.

    DATA=my.csv BASE=folder-or-hub-name python -m utils.headless

Settings come from the environment, so that any path survives the shell: DATA (a file of any kind that data/README.md
names, or a Hub name), BASE (a folder or a Hub name), SEED (a whole number). Each becomes the parameter of the same name
in the notebook's cell tagged `parameters`; what is not given keeps the value written there. The notebook writes what to
say at the end into the JSON file REPORT: {"adapter": path, "lines": [text, ...]}.
"""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from utils import dataset, files, runtime

NOTEBOOK = runtime.ROOT / "notebooks" / "00_start_here.ipynb"


def parameters(settings: Mapping[str, str], called_from: Path) -> dict:
    """Check the settings before anything is started, and make paths absolute.

    Args:
        settings: an environment; DATA, BASE and SEED are read, an empty one counts as not given.
        called_from: folder that relative paths start from.

    Raises:
        runtime.Stop: DATA is no file that can be read, BASE neither a folder nor a Hub name, SEED no whole number.
    """
    found = {}
    if data := settings.get("DATA", ""):
        try:
            named = files.is_named(data, called_from)
            found["DATA"] = str(files.find(data, called_from).resolve()) if named else data
        except runtime.Stop as stop:
            raise runtime.Stop(f"DATA={data}: {stop}") from None
    if base := settings.get("BASE", ""):
        path = called_from / Path(base).expanduser()
        if path.is_dir():
            base = str(path.resolve())
        elif not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base):  # "gpt2" or "meta-llama/Llama-2-7b-hf"
            raise runtime.Stop(f"BASE={base} is neither a folder (looked for {path}) nor a Hub name (owner/name).")
        found["BASE"] = base
    if seed := settings.get("SEED", ""):
        if not seed.isdecimal():
            raise runtime.Stop(f"SEED={seed} is not a whole number from 0.")
        found["SEED"] = int(seed)
    return found


def run(notebook: Path, given: dict, folder: Path) -> list[str]:
    """Execute `notebook` with the parameters `given` and REPORT, into the new folder `folder`.

    Returns:
        The lines to print: where the notebook, its HTML and the adapter are, and the report's own lines.

    Raises:
        runtime.Stop: a cell failed, or the run was interrupted; says where the partly executed notebook is.
    """
    import papermill

    folder.mkdir(parents=True)
    executed, report = folder / notebook.name, folder / "report.json"
    try:
        papermill.execute_notebook(
            notebook,
            executed,
            parameters={**given, "REPORT": str(report)},
            kernel_name="python3",
            language="python",  # Colab saves notebooks without language_info
            cwd=notebook.parent,
            # The kernel's own log (its transport, its sockets when interrupted) is nothing a learner can act on;
            # what fails in a cell arrives as an error, not through this log. 50 is logging.CRITICAL.
            extra_arguments=["--IPKernelApp.log_level=50"],
            stdout_file=_Terminal(),
            progress_bar={"desc": notebook.stem, "bar_format": "{desc} |{bar:30}| cell {n_fmt}/{total_fmt}, {elapsed}"},
        )
    except papermill.PapermillExecutionError as error:
        name = "" if error.ename == "Stop" else f"{error.ename}: "
        raise runtime.Stop(f"{name}{error.evalue}\nThe notebook up to there: {shown(executed)}") from None
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the tasks just cut off would each report it at exit
        raise runtime.Stop(f"interrupted.\nThe notebook up to there: {shown(executed)}") from None

    page = executed.with_suffix(".html")
    page.write_text(_as_html(executed), encoding="utf-8")
    told = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    lines = [f"notebook  {shown(executed)}", f"page      {shown(page)}"]
    if "adapter" in told:
        lines.insert(0, f"adapter   {shown(Path(told['adapter']))}")
    return [*told.get("lines", []), *lines]


class _Terminal:
    """Takes what the notebook prints and shows the training's lines (progress.LiveLoss) above papermill's bar."""

    def write(self, text: str) -> None:
        from tqdm import tqdm

        for line in text.splitlines():
            if line.startswith("step "):
                tqdm.write(line)

    def flush(self) -> None:
        pass


def shown(path: Path) -> str:
    """`path` as one would type it: relative to the current folder when it lies below it."""
    path = path if path.is_absolute() else runtime.ROOT / path
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _as_html(notebook: Path) -> str:
    from nbconvert import HTMLExporter

    return HTMLExporter().from_filename(str(notebook))[0]


def main() -> int:
    """Run notebook 00 with the settings of the environment. Returns the exit status."""
    os.environ["QLORA_PROGRESS_LINES"] = "1"  # read by the kernel, which inherits it
    try:
        given = parameters(os.environ, Path(os.environ.get("CALLED_FROM") or Path.cwd()))
        if "DATA" in given:
            print(dataset.examine(given["DATA"])[0])  # what was kept and rejected, before minutes of training
        folder = runtime.OUTPUTS / "runs" / time.strftime("%Y-%m-%d_%H-%M-%S")
        print("\n".join(["", *run(NOTEBOOK, given, folder)]))
    except runtime.Stop as stop:
        print(f"\nStop: {stop}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the notebook began, or while its page was written
        print("\nStop: interrupted.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
