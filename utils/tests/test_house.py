"""The house: imports go one way between the rooms of utils, it stays small, and ruff finds nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from utils import runtime

UTILS = runtime.ROOT / "utils"
MODULES = {
    ".".join(path.relative_to(UTILS).with_suffix("").parts): path
    for path in sorted(UTILS.rglob("*.py"))
    if "tests" not in path.relative_to(UTILS).parts and path.name != "__init__.py"
}
# Each room, or module beside the rooms, and what it may import; no room but notebook has leaves and roots.
MAY = {
    "runtime": set(),
    "hardware": {"runtime"},
    "presets": {"runtime", "hardware"},
    "data": {"runtime", "hardware", "presets"},
    "models": {"runtime", "hardware", "presets", "data"},
    "generation": {"runtime", "hardware", "presets", "data", "models"},
    "evaluation": {"runtime", "hardware", "presets", "data", "models", "generation"},
    "training": {"runtime", "hardware", "presets", "data", "models", "notebook.figures"},
    "planning": {"runtime", "hardware", "presets", "data", "models", "training", "notebook.measurements"},
    "notebook.figures": set(),
    "notebook.exercise": set(),
    "notebook.measurements": {"runtime"},
    "notebook.upload": set(),
    "notebook.headless": {"runtime", "presets", "data"},
}


def room(module: str) -> str:
    return module if module.startswith("notebook.") else module.split(".")[0]


def imported(path: Path) -> set[str]:
    """Modules of utils that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "utils":
            # from utils.data import rows, or from utils.data.rows import Problem
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    found = {name.removeprefix("utils.") for name in found if name.startswith("utils.")}
    return found & set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    rooms = {room(other) for other in imported(MODULES[module])}
    assert rooms <= MAY[room(module)] | {room(module)}


def test_no_circle_within_a_room():
    left = {module: imported(path) for module, path in MODULES.items()}
    while leaves := [module for module, needs in left.items() if not needs & set(left)]:
        for module in leaves:
            del left[module]
    assert not left


def test_the_house_is_small():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in UTILS.rglob("*.py"))
    tests = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (UTILS / "tests").rglob("*.py"))
    assert lines - tests <= 4105
    assert tests <= 6110


def test_ruff_is_content():
    for command in (["check", "--output-format=concise", "notebooks"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "utils", "data"]
        done = subprocess.run(ruff, cwd=runtime.ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_names_of_torch_cuda_exist():
    """What only a GPU would run is not run here, so a misspelt name would wait for a reader's GPU."""
    import torch

    used = {name for path in MODULES.values() for name in re.findall(r"torch\.cuda\.(\w+)", path.read_text("utf-8"))}
    assert used
    assert not [name for name in used if not hasattr(torch.cuda, name)]
