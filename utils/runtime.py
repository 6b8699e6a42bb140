"""Where a notebook runs: the course's folder, the packages, the silence, and errors meant for the learner.

`BOOTSTRAP_CELL` is the first code cell of every notebook; a test compares them.
"""

import importlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

HOME = "https://github.com/AnshChoudhary/finetuning-Llama2-7b"
ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = Path(os.environ.get("QLORA_OUTPUTS", ROOT / "outputs")).absolute()  # elsewhere where ROOT is read-only

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
# What a learner sees on a healthy run and cannot act on: (start of the message as a regex, category).
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
    # Of Liger's kernels, those for other chips.
    ("liger_kernel.backends.registry", r"Backend impl '.*' could not be imported"),
    # model.dequantize() tells the dtype that the model has anyway.
    ("transformers.integrations.bitsandbytes", r"The modules are dequantized in"),
]

# requirements.txt: what stands above this line is all that learning and training need, and all that Colab gets.
LOCAL_ONLY = "# --- only on your own machine"
# peft (import_utils.is_torchao_available) raises for an older torchao, but only once an adapter is loaded or
# merged: people train for hours and then fail.
TORCHAO_MINIMUM = "0.16.0"
MODULES = {"protobuf": "google.protobuf", "ipython": "IPython"}  # packages whose module is not called like the package

restart = ""  # why this kernel must be restarted; restarting forgets it


class Stop(Exception):
    """An error meant for the learner: one line that says what is wrong, where, and the mend.

    Jupyter, Colab and papermill show it without a traceback, and below it where appendix 91 says more.
    """

    def _render_traceback_(self) -> list[str]:  # the hook that IPython looks for
        return [f"Stop: {self}", *(f'More: 91_when_it_breaks, section "{name}"' for name in sections(str(self))[:1])]


def sections(message: str) -> list[str]:
    """Headings of appendix 91 that the table at its top has for a message; none if that notebook is not there."""
    text = "".join(path.read_text("utf-8") for path in (ROOT / "notebooks").glob("91_*.ipynb")).replace('\\"', '"')
    table = re.findall(r"\| `(.+?)` \| \[.+?\]\(#(.+?)\) \|", text)
    hits = [to for words, to in table if re.search(re.escape(words).replace(r"\.\.\.", ".*"), message, re.I | re.S)]
    return [name for name in re.findall(r'"## (.+?)\\n"', text) if name.replace(" ", "-") in hits]


def shown(path: Path) -> str:
    """A path as a reader knows it: from the course's folder if it lies in it."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def is_hub_name(text: str) -> bool:
    """Whether `text` could name something on the Hub: "gpt2", "meta-llama/Llama-2-7b-hf"."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text))


@contextmanager
def whole(final: Path) -> Iterator[Path]:
    """A new folder to write into; it takes the place of `final` when the block ends without an error.

    Whenever the process dies, `final` is what it was or what it should be, and never half of it.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=".unfinished-") as unfinished:
        new, old = Path(unfinished, final.name), Path(unfinished, "old")
        new.mkdir()
        yield new
        for path in new.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # on the disk, before it gets its name
        if final.exists():
            os.replace(final, old)
        try:
            os.replace(new, final)
        except BaseException:
            if old.exists():
                os.replace(old, final)
            raise


def quiet() -> None:
    """Silence, by message, what a learner cannot act on. The only place where anything is silenced."""
    for message, category in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, _ in QUIET_LOGS:
        logging.getLogger(name).addFilter(_muted)  # which is in there once, however often
    # Bars go to stderr, which differs from run to run. Downloads may switch theirs on again: huggingface_hub's
    # enable_progress_bars(). An environment variable could not be overruled, so it is set for datasets alone.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()


def _muted(record: logging.LogRecord) -> bool:
    return not any(name == record.name and re.match(text, record.getMessage()) for name, text in QUIET_LOGS)


def bootstrap() -> None:
    """Make this kernel ready and print the versions that matter; in Colab, `mend` what is installed. May be run again.

    Stop if a package is missing (elsewhere), if pip failed or the kernel holds packages that were replaced (Colab).
    """
    # GNU's OpenMP reads this when torch is imported. By default a thread that waits for another spins for milliseconds
    # before it sleeps, and beside any other work on the machine a training step takes two to four times as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    asked = needed(ROOT / "requirements.txt")
    # Colab's launcher imports google.colab; other hosts may have it installed, but not loaded.
    if "google.colab" in sys.modules and (problem := mend(asked)):
        raise Stop(problem)
    have = installed([*(r.name for r in asked), "torchao"])
    lacking = unmet(asked, have)
    if missing := [r.name for r in lacking if r.name not in have]:
        wanted = " ".join(f"'{r.name}{r.specifier}'" for r in lacking)
        told = f"{', '.join(missing)} not installed in this kernel's Python. Run `make test` once in the course's"
        raise Stop(f"{told} folder and choose the kernel of its .venv, or: pip install {wanted}")
    if bad := to_remove(have):
        raise Stop(f"{bad[0]} {have[bad[0]]} breaks peft. Run: pip uninstall -y {bad[0]}")
    quiet()
    print(" | ".join(f"{name} {version}" for name, version in versions().items()))
    for r in lacking:
        print(f"note: {r.name} {have[r.name]} is outside the tested range {r.specifier}")


def versions() -> dict[str, str]:
    """Version of python and of each installed package of SHOWN, read from the metadata (nothing is imported)."""
    return {"python": platform.python_version(), **installed(SHOWN)}


def needed(requirements: Path) -> list:
    """The learning and training part of requirements.txt as `packaging` Requirements, with canonical names."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    above, marker, _ = requirements.read_text(encoding="utf-8").partition(LOCAL_ONLY)
    if not marker:
        raise ValueError(f"{requirements.name} has no line that begins with {LOCAL_ONLY!r}")
    found = [Requirement(bare) for line in above.splitlines() if (bare := line.partition("#")[0].strip())]
    for requirement in found:
        requirement.name = canonicalize_name(requirement.name)
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES") != "" and shutil.which("nvidia-smi")  # without importing torch
    extra = {"extra": "gpu" if gpu else ""}  # pip alone leaves out what only an extra wants
    return [r for r in found if r.marker is None or r.marker.evaluate(extra)]


def installed(names: Iterable[str] = ()) -> dict[str, str]:
    """Canonical name -> version of the installed packages (those of `names`, or all); imports none."""
    from packaging.utils import canonicalize_name

    found = {}
    for name in names or {d.name for d in metadata.distributions()} - {None}:
        with suppress(metadata.PackageNotFoundError):
            found[canonicalize_name(name)] = metadata.version(name)
    return found


def unmet(requirements: Iterable, have: Mapping[str, str]) -> list:
    """The requirements that the versions in `have` (canonical name -> version) do not meet."""
    return [r for r in requirements if not (v := have.get(r.name)) or not r.specifier.contains(v, True)]


def to_install(requirements: Iterable, have: Mapping[str, str]) -> list[str]:
    """Arguments for `pip install` on Colab: what is lacking (perhaps nothing), with the torch that is there held.

    Its torch and torchvision are built for each other: torch alone replaced, `torchvision::nms does not exist`.
    """
    lacking = [f"{r.name}{r.specifier}" for r in unmet(requirements, have) if r.name != "torch"]
    return [*lacking, f"torch=={have['torch']}"] if lacking and "torch" in have else lacking


def to_remove(have: Mapping[str, str]) -> list[str]:
    """Installed packages that break the course: a torchao that peft refuses."""
    from packaging.version import Version

    return ["torchao"] if Version(have.get("torchao", TORCHAO_MINIMUM)) < Version(TORCHAO_MINIMUM) else []


def outdated(before: Mapping[str, str], after: Mapping[str, str], loaded: Iterable[str]) -> list[str]:
    """Packages that changed on disk between `before` and `after` while this kernel holds the old ones: those that are
    `loaded` (sys.modules); and any, once transformers or peft is, which remember what packages they found.
    """
    loaded = set(loaded)
    changed = {n for n in {*before, *after} if before.get(n) != after.get(n)}
    stale = {n for n in changed if n in before and MODULES.get(n, n.replace("-", "_")) in loaded}
    return sorted(stale | {n for n in changed if loaded & {"transformers", "peft"}})


def mend(requirements: list) -> str:
    """On Colab: install what is lacking, remove what breaks peft. Returns the problem left for the learner, or "".

    A second run finds nothing to do and is quick; until the kernel is restarted it repeats that it must be.
    """
    global restart
    have = installed([*(r.name for r in requirements), "torchao"])
    install, remove = to_install(requirements, have), to_remove(have)
    before = installed() if install or remove else {}
    if install:
        print("installing", ", ".join(a for a in install if not a.startswith("torch==")), "(about a minute)")
    for command in filter(None, (install and ["install", *install], remove and ["uninstall", "--yes", *remove])):
        done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *command], capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
            return f"pip {command[0]} failed ({lines[-1]}). Check the network, then run this cell again."
    importlib.invalidate_caches()
    if before and (stale := outdated(before, installed(), sys.modules)):
        restart = f"{', '.join(stale)} changed under this running kernel. Choose Runtime > Restart session, "
        restart += "then run the notebook from the top."
    return restart
