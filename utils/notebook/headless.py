"""`make run`: notebook 11 from the first cell to the last without a browser, then what came of it and where it is.

    DATA=my.csv BASE=folder-or-hub-name python -m utils.notebook.headless

Settings come from the environment, so that any path survives the shell: DATA (a file of any kind that data/README.md
names, or a Hub name), COLUMNS (instruction=Frage,output=Antwort), BASE (a folder or a Hub name), CHANGE (fields of
the recipe: rank=8, learning_rate=7e-5), EPOCHS and SEED (whole numbers). Each replaces the value in the notebook's cell
tagged `parameters`. What its cell tagged `summary` prints is said at the end.
"""

import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from utils import presets, runtime
from utils.data import sources
from utils.runtime import Stop, shown

NOTEBOOK = runtime.ROOT / "notebooks" / "11_your_own_llama.ipynb"


def parameters(settings: Mapping[str, str], called_from: Path) -> dict:
    """The settings of an environment, checked before anything is started; paths start from `called_from`.

    Stop if DATA is no file that can be read, BASE neither a folder nor a Hub name, EPOCHS or SEED no whole number, or
    CHANGE none of a recipe.
    """
    found = {}
    if data := settings.get("DATA", ""):
        try:
            path = sources.find(data, called_from)
            found["DATA"] = str(path.resolve()) if path else data
        except Stop as stop:
            raise Stop(f"DATA={data}: {stop}") from None
    if base := settings.get("BASE", ""):
        path = called_from / Path(base).expanduser()
        if not path.is_dir() and not runtime.is_hub_name(base):
            raise Stop(f"BASE={base} is neither a folder (looked for {path}) nor a Hub name (owner/name).")
        found["BASE"] = str(path.resolve()) if path.is_dir() else base
    for name in ("EPOCHS", "SEED"):
        if number := settings.get(name, ""):
            if not number.isdecimal():
                raise Stop(f"{name}={number} is not a whole number from 0.")
            found[name] = int(number)
    presets.PROFILES["pocket"].recipe.changed(settings.get("CHANGE", ""))
    return found | {name: settings[name] for name in ("COLUMNS", "CHANGE") if settings.get(name)}


def run(notebook: Path, given: dict, folder: Path) -> list[str]:
    """Execute `notebook` with the parameters `given` into the new folder `folder`; returns the lines to print.

    Stop if a cell failed, or the run was interrupted; it says where the partly executed notebook is.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from nbconvert import HTMLExporter

    folder.mkdir(parents=True)
    executed = folder / notebook.name
    try:
        made = papermill.execute_notebook(
            notebook,
            executed,
            parameters=given,
            kernel_name="python3",
            language="python",  # Colab saves notebooks without language_info
            cwd=notebook.parent,
            extra_arguments=["--IPKernelApp.log_level=50"],  # what fails in a cell arrives as an error
            stdout_file=_Terminal(),
            progress_bar={"desc": notebook.stem, "bar_format": "{desc} |{bar:30}| cell {n_fmt}/{total_fmt}, {elapsed}"},
        )
    except papermill.PapermillExecutionError as error:
        name = "" if error.ename == "Stop" else f"{error.ename}: "
        raise Stop(f"{name}{error.evalue}\nThe notebook up to there: {shown(executed)}") from None
    except DeadKernelError:
        told = "the notebook's process was ended from outside; most often the memory was full"
        raise Stop(f"{told}. Run the same again: it goes on from its last checkpoint") from None
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the tasks just cut off would each report it at exit
        raise Stop(f"interrupted.\nThe notebook up to there: {shown(executed)}") from None

    page = executed.with_suffix(".html")
    page.write_text(HTMLExporter().from_notebook_node(made)[0], encoding="utf-8")
    told = [cell for cell in made.cells if "summary" in cell.metadata.get("tags", [])]
    lines = "".join(output.get("text", "") for cell in told for output in cell.outputs).splitlines()
    return [*lines, f"notebook  {shown(executed)}", f"page      {shown(page)}"]


# How the lines begin that are shown in a terminal, too: the data, and the training.
TOLD = ("step ", "goes on after ", "used: ", "not used: ", "Groups of rows", "All rows ask", "There is nothing to hold")


class _Terminal:
    """Of what the notebook prints, shows what rows were kept and how training goes, above papermill's bar."""

    def write(self, text: str) -> None:
        from tqdm import tqdm

        for line in text.splitlines():
            if line.startswith(TOLD) or " rows kept" in line or " are too long" in line:
                tqdm.write(line)

    def flush(self) -> None:
        pass


def main() -> int:
    """Run notebook 11 with the settings of the environment. Returns the exit status."""
    os.environ["QLORA_PROGRESS_LINES"] = "1"  # read by the kernel, which inherits it
    os.environ.setdefault("QLORA_PROFILE", "pocket")  # a GPU alone is no reason to download 13.5 GB
    try:
        given = parameters(os.environ, Path(os.environ.get("CALLED_FROM") or Path.cwd()))
        print("\n".join(["", *run(NOTEBOOK, given, runtime.OUTPUTS / "runs" / time.strftime("%Y-%m-%d_%H-%M-%S"))]))
    except (Stop, KeyboardInterrupt) as stop:
        print("", *Stop(str(stop) or "interrupted.")._render_traceback_(), sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
