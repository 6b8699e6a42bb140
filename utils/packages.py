"""The installed packages against requirements.txt, and what Colab must change.

The decisions are pure functions of names and versions; only `mend` acts.
"""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

# requirements.txt: what stands above this line is all that learning and training need, and all that Colab gets.
LOCAL_ONLY = "# --- only on your own machine"
# peft (import_utils.is_torchao_available) raises for an older torchao, but only once an adapter is loaded or
# merged: people train for hours and then fail.
TORCHAO_MINIMUM = "0.16.0"
# Packages whose module is not called like the package.
MODULES = {"protobuf": "google.protobuf", "pillow": "PIL"}

_restart = ""  # why this kernel must be restarted; restarting forgets it


def canonical(name: str) -> str:
    """A package's name as pip compares it: lower case, with single dashes."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(requirements: Path) -> list:
    """The learning and training part of requirements.txt as `packaging.requirements.Requirement` objects."""
    from packaging.requirements import Requirement

    text = requirements.read_text(encoding="utf-8")
    above, marker, _ = text.partition(LOCAL_ONLY)
    if not marker:
        raise ValueError(f"{requirements.name} has no line that begins with {LOCAL_ONLY!r}")
    lines = (line.partition("#")[0].strip() for line in above.splitlines())
    found = [Requirement(line) for line in lines if line]
    return [r for r in found if r.marker is None or r.marker.evaluate()]


def installed(names: Iterable[str] | None = None) -> dict[str, str]:
    """Canonical name -> version of the installed packages (all of them, or those of `names`); imports none."""
    if names is None:
        names = {d.metadata["Name"] for d in metadata.distributions()} - {None}
    found = {}
    for name in names:
        try:
            found[canonical(name)] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def unmet(requirements: Iterable, have: Mapping[str, str]) -> list:
    """The requirements that the versions in `have` (canonical name -> version) do not meet."""
    return [r for r in requirements if not (v := have.get(canonical(r.name))) or not r.specifier.contains(v, True)]


def to_install(requirements: Iterable, have: Mapping[str, str]) -> list[str]:
    """Arguments for `pip install` on Colab: what is lacking, with the torch that is there held as it is.

    Colab's torch, torchvision and torchaudio are built for each other and for its driver: replacing torch alone
    ends in `operator torchvision::nms does not exist`. An empty list: nothing to do.
    """
    lacking = [str(r) for r in unmet(requirements, have) if r.name != "torch"]
    return [*lacking, f"torch=={have['torch']}"] if lacking and "torch" in have else lacking


def to_remove(have: Mapping[str, str]) -> list[str]:
    """Installed packages that break the course: a torchao that peft refuses."""
    from packaging.version import Version

    old = "torchao" in have and Version(have["torchao"]) < Version(TORCHAO_MINIMUM)
    return ["torchao"] if old else []


def outdated(before: Mapping[str, str], after: Mapping[str, str], loaded: Iterable[str]) -> list[str]:
    """Packages that changed on disk between `before` and `after` while this kernel holds the old ones.

    `loaded` is `sys.modules`. Counted are replaced or removed packages that are imported; and, since transformers
    and peft remember which packages they found, any change once one of these two is imported.
    """
    loaded = set(loaded)
    changed = {n for n in {*before, *after} if before.get(n) != after.get(n)}
    stale = {n for n in changed if n in before and MODULES.get(n, n.replace("-", "_")) in loaded}
    return sorted(stale | {n for n in changed if loaded & {"transformers", "peft"}})


def mend(requirements: list) -> str:
    """On Colab: install what is lacking, remove what breaks peft. Returns the problem left for the learner, or "".

    A second run finds nothing to do and is quick; until the kernel is restarted it repeats that it must be.
    """
    global _restart
    have = installed([*(r.name for r in requirements), "torchao"])
    install, remove = to_install(requirements, have), to_remove(have)
    if install or remove:
        before = installed()
        if install:
            print("installing", ", ".join(a for a in install if not a.startswith("torch==")), "(about a minute)")
        for command in (["install", *install] if install else [], ["uninstall", "--yes", *remove] if remove else []):
            if command and (problem := _pip(*command)):
                return problem
        importlib.invalidate_caches()
        if stale := outdated(before, installed(), sys.modules):
            _restart = f"{', '.join(stale)} changed under this running kernel. Choose Runtime > Restart session, "
            _restart += "then run the notebook from the top."
    return _restart


def _pip(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
    return f"pip {arguments[0]} failed ({lines[-1]}). Check the network, then run this cell again."
