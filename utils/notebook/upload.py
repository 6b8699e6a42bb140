"""A file from the reader's computer: Colab's dialogue, or a button in Jupyter."""

import os
import sys
from html import escape
from pathlib import Path

uploaded: list[Path] = []  # of this kernel: a cell that is run again forgets none


def ask(folder: Path) -> list[Path]:
    """The files that were chosen so far, written to `folder`. In Jupyter the list grows when another is chosen.

    Where nobody looks (`make run`) there is nothing to press.
    """
    if "google.colab" in sys.modules:
        from google.colab import files

        uploaded.extend(write(folder, *file) for file in files.upload().items())
    elif "QLORA_PROGRESS_LINES" not in os.environ:
        import ipywidgets
        from IPython.display import display

        button = ipywidgets.FileUpload(accept=".csv,.tsv,.json,.jsonl,.parquet")
        said = ipywidgets.HTML()

        def chosen(change):
            uploaded.extend(write(folder, *file) for file in files_of(change["new"]))
            said.value = f"{escape(uploaded[-1].name)} is here. Now run the cells below." if uploaded else ""

        chosen({"new": ()})  # says what is here already
        button.observe(chosen, "value")
        display(ipywidgets.HBox([button, said]))
    return uploaded


def files_of(value) -> list[tuple[str, bytes]]:
    """Names and contents of a FileUpload: {name: {content}} in ipywidgets 7, a tuple of {name, content} in 8."""
    found = value.items() if isinstance(value, dict) else [(file["name"], file) for file in value]
    return [(name, bytes(file["content"])) for name, file in found]


def write(folder: Path, name: str, content: bytes) -> Path:
    """`content` as a file in `folder`, whatever folders `name` names."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(name.replace("\\", "/")).name
    path.write_bytes(content)
    return path
