"""Records a measurement: data/measurements/<name>.json, the figures that prose may quote, and how they were made."""

import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from utils import runtime
from utils.notebook.measurements import FOLDER

DIGITS = 6  # significant digits kept: more than any measurement here has, fewer than a float prints


def write(name: str, figures: dict, command: str, folder: Path = FOLDER) -> Path:
    """Record `figures` (nested dicts and lists of numbers, strings, None; arrays and tensors are turned into lists).

    Args:
        name: file name without suffix, of letters, digits, dash and underscore.
        figures: what was measured; put the unit into each key ("seconds", "peak_gib").
        command: the command or notebook that measures it again, from the root of the repository.

    Raises:
        ValueError: a bad name, a number that is not finite, or a text that holds a path of this machine.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"{name!r}: use letters, digits, dash and underscore")
    record = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": runtime.versions(),
        "figures": _plain(figures, "figures"),
    }
    text = _as_json(record)
    for private in {str(runtime.ROOT), str(Path.home())} - {"/"}:
        if private + os.sep in text:
            raise ValueError(f"{name}: holds the path {private}; record paths relative to the repository")
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def hardware() -> dict:
    """CPU model and the cores this process may use, RAM in GiB; GPU name, memory in GiB and driver where one is used.

    A GPU counts only when this process has imported torch and sees it: one that was not used is not recorded.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": _cpu_model(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["ram_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": gpu.name, "count": torch.cuda.device_count(), "cuda": torch.version.cuda}
        found["gpu"]["memory_gib"] = round(gpu.total_memory / 2**30, 1)
        if driver := _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]):
            found["gpu"]["driver"] = driver
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (m := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        return m[1].strip()
    return _first_line(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor() or platform.machine()


def _first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip().split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _plain(value, where: str):
    """`value` as what JSON can hold: floats to DIGITS significant digits, keys as sorted strings."""
    if hasattr(value, "tolist"):  # numpy and torch, scalars too
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}: record finite numbers, or None for what could not be measured")
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {str(k): _plain(value[k], f"{where}.{k}") for k in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise ValueError(f"{where} is a {type(value).__name__}: record numbers, strings, lists and dicts")


def _as_json(record: dict) -> str:
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    # A list without further nesting on one line: a loss curve is not a thousand lines.
    return re.sub(
        r"\[\n[^\[\]{}]*\]", lambda m: re.sub(r"\n\s*", " ", m[0]).replace("[ ", "[").replace(" ]", "]"), text
    )
