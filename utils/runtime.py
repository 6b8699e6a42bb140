"""Where a notebook runs: the course's folder, the packages, the silence, and errors meant for the learner.

`BOOTSTRAP_CELL` is the first code cell of every notebook and `badge` the link above it; a test compares all
notebooks with these two.
"""

import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

HOME = "https://github.com/AnshChoudhary/finetuning-Llama2-7b"
ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ROOT / "outputs"

BOOTSTRAP_CELL = f'''\
# Every notebook opens with this cell: find the course (in Colab: fetch it), then check this machine.
import os
import subprocess
import sys
from pathlib import Path

home, opened = "{HOME}", os.environ.get("JPY_SESSION_NAME", "")
copy = Path("/content", home.split("/")[-1])
places = [*Path("x").absolute().parents, *Path(opened or "x").absolute().parents, copy]
root = next((p for p in places if (p / "utils" / "runtime.py").is_file()), None)
if root is None and "google.colab" in sys.modules:
    root = copy
    subprocess.run(["git", "clone", "--quiet", "--depth=1", home, root], check=True)
if root is None:
    raise FileNotFoundError(f"The course is not around this notebook. Run: git clone {{home}} (and open it there)")
if str(root) not in sys.path:
    sys.path.insert(0, str(root))

from utils import runtime

runtime.bootstrap()'''

SHOWN = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets")
# What a learner sees on a healthy run and cannot act on: (start of the message as a regex, category, why).
QUIET_WARNINGS = [
    # The one name that all supported transformers know (known as activation_checkpointing from 5.2x on).
    (r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning),
    # The recipe names the paged optimizer that a T4 needs; on a CPU there is nothing to page.
    (r"Paged optimizers are not supported on CPU", UserWarning),
    # torch's profiler, of a rehearsal: each step is a cycle of its own, and its events are read before the next.
    (r"Warning: Profiler clears events at the end of each cycle", UserWarning),
]
# (logger, start of the message as a regex).
QUIET_LOGS = [
    # bitsandbytes on CPUs with AVX512_BF16 asks for the package `kernels`, which must not be installed: it
    # downloads native code at import. The built-in kernels are used instead.
    ("bitsandbytes.backends.cpu.ops", r"Failed to load CPU gemm_4bit_forward"),
    # model.dequantize() tells the dtype that the model has anyway.
    ("transformers.integrations.bitsandbytes", r"The modules are dequantized in"),
]


class Stop(Exception):
    """An error meant for the learner: one line that says what is wrong, where, and the mend.

    Jupyter, Colab and papermill show the line alone, without a traceback.
    """

    def _render_traceback_(self) -> list[str]:  # the hook that IPython looks for
        return [f"Stop: {self}"]


def badge(notebook: str | Path) -> str:
    """Markdown of the "Open in Colab" badge of a notebook, given its path (absolute, or relative to the root)."""
    path = Path(notebook)
    path = path.resolve().relative_to(ROOT) if path.is_absolute() else path
    link = HOME.replace("https://github.com/", "https://colab.research.google.com/github/")
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({link}/blob/main/{path.as_posix()})"


def quiet() -> None:
    """Silence, by message, what a learner cannot act on. The only place where anything is silenced."""
    for message, category in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, message in QUIET_LOGS:
        logger = logging.getLogger(name)
        if not any(getattr(f, "pattern", None) == message for f in logger.filters):
            logger.addFilter(_Mute(message))
    # Bars go to stderr, which differs from run to run. Downloads may switch theirs on again: huggingface_hub's
    # enable_progress_bars(). An environment variable could not be overruled, so it is set for datasets alone.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()


class _Mute(logging.Filter):
    def __init__(self, pattern: str):
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        return not re.match(self.pattern, record.getMessage())


def versions(names: Iterable[str] = SHOWN) -> dict[str, str]:
    """Version of python and of each installed package in `names`, read from the metadata (nothing is imported)."""
    from utils import packages

    return {"python": platform.python_version(), **packages.installed(names)}


def in_colab() -> bool:
    """True in a Colab kernel: its launcher imports google.colab (which other hosts have installed, but not loaded)."""
    return "google.colab" in sys.modules


def bootstrap() -> None:
    """Make this kernel ready and print the versions that matter. May be run any number of times.

    In Colab: installs what requirements.txt asks of Colab and Colab lacks (never torch), and removes a torchao that
    breaks peft. Elsewhere nothing is changed.

    Raises:
        Stop: a package is missing (elsewhere), pip failed or the kernel holds packages that were replaced (Colab).
    """
    from utils import packages

    # GNU's OpenMP reads this when torch is imported. By default a thread that waits for another spins for milliseconds
    # before it sleeps, and beside any other work on the machine a training step takes two to four times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    asked = packages.needed(ROOT / "requirements.txt")
    if in_colab() and (problem := packages.mend(asked)):
        raise Stop(problem)
    have = packages.installed([*(r.name for r in asked), "torchao"])
    lacking = packages.unmet(asked, have)
    if missing := [r.name for r in lacking if packages.canonical(r.name) not in have]:
        raise Stop(
            f"{', '.join(missing)} not installed in this kernel's Python. Run `make test` once in the course's folder "
            "and choose the kernel of its .venv, or: pip install -r requirements.txt"
        )
    if bad := packages.to_remove(have):
        raise Stop(f"{bad[0]} {have[bad[0]]} breaks peft. Run: pip uninstall -y {bad[0]}")
    quiet()
    print(" | ".join(f"{name} {version}" for name, version in versions().items()))
    for r in lacking:
        print(f"note: {r.name} {have[packages.canonical(r.name)]} is outside the tested range {r.specifier}")
