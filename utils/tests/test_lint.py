"""ruff finds nothing in the code of utils and of the notebooks, under the rules in pyproject.toml."""

import subprocess
import sys

from utils import runtime


def test_ruff_is_content():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "utils", "notebooks"]
    done = subprocess.run(command, cwd=runtime.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
