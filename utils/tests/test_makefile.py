"""The Makefile on simulated machines: a Python that is absent, too old or without venv; settings with odd letters."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from utils import runtime

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


SETTINGS = ("DATA", "COLUMNS", "BASE", "CHANGE", "EPOCHS", "SEED")


def make(*arguments: str, cwd: Path = runtime.ROOT) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", *SETTINGS}}
    command = ["make", "-f", str(runtime.ROOT / "Makefile"), *arguments]
    return subprocess.run(command, cwd=cwd, env={**env, "PWD": str(cwd)}, capture_output=True, text=True, timeout=120)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def python_with(path: Path, change: str) -> Path:
    """A `python -c CODE` that runs CODE after `change`."""
    return program(path, f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; {change}\n$2"\n')


@pytest.fixture
def installed(tmp_path) -> str:
    """VENV=... of an environment that looks installed and whose python prints what it was given."""
    shown = '#!/bin/sh\necho "$@"\necho "[$DATA] [$COLUMNS] [$BASE] [$CHANGE] [$EPOCHS] [$SEED] [$CALLED_FROM]"\n'
    program(tmp_path / "venv" / "bin" / "python", shown)
    (tmp_path / "venv" / ".installed").touch()
    return f"VENV={tmp_path / 'venv'}"


def test_an_installed_environment_is_used_at_once(installed):
    done = make("test", installed, "PYTEST_ARGS=-x utils/tests", "PYTHON=no-such-python")
    assert done.stdout.splitlines()[0] == "-m pytest -x utils/tests"
    assert make("run", installed, "PYTHON=no-such-python").stdout.startswith("-m utils.notebook.headless\n")


@pytest.mark.parametrize("data", ["rows.jsonl", "my data/the rows.jsonl", 'it\'s "odd"; echo.jsonl'])
def test_settings_arrive_letter_by_letter(installed, data):
    columns = "instruction=Frage, output=Antwort 1"
    more = ("BASE=my base", "SEED=3", f"COLUMNS={columns}", "EPOCHS=2", "CHANGE=rank=8, seed=1")
    done = make("run", installed, f"DATA={data}", *more)
    assert done.stdout.splitlines()[1] == f"[{data}] [{columns}] [my base] [rank=8, seed=1] [2] [3] [{runtime.ROOT}]"


def test_relative_paths_start_where_make_was_called(installed, tmp_path):
    done = make("-C", str(runtime.ROOT), "run", installed, "DATA=rows.jsonl", cwd=tmp_path)
    assert f"[rows.jsonl] [] [] [] [] [] [{tmp_path}]" in done.stdout


@pytest.mark.parametrize(("change", "refused"), [("3, 10", True), ("3, 14", True), ("3, 11", False), ("3, 13", False)])
def test_python_version(tmp_path, change, refused):
    python = python_with(tmp_path / "python", f"sys.version_info = ({change}, 0); sys.modules['ensurepip'] = None")
    done = make("run", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    said = f"is Python {change.replace(', ', '.')}; the course needs 3.11 to 3.13. Try: make PYTHON=python3.12"
    assert (said in done.stderr) == refused
    assert ("apt install python3-venv" in done.stdout) == (not refused)
    assert not (tmp_path / "venv").exists()


def test_no_python_at_all(tmp_path):
    done = make("run", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert "No no-such-python found. Install it (Debian, Ubuntu: sudo apt install python3 python3-venv)." in done.stdout
