"""ruff finds nothing in the code of utils and of the notebooks, under the rules in pyproject.toml."""

import re
import subprocess
import sys

from utils import runtime


def test_ruff_is_content():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "utils", "notebooks"]
    done = subprocess.run(command, cwd=runtime.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_names_of_torch_cuda_exist():
    """What only a GPU would run is not run here, so a misspelt name would wait for a reader's GPU."""
    import torch

    paths = [path for path in (runtime.ROOT / "utils").rglob("*.py") if "tests" not in path.parts]
    texts = {path.name: path.read_text("utf-8") for path in paths}
    used = {(name, found) for name, text in texts.items() for found in re.findall(r"torch\.cuda\.(\w+)", text)}
    assert used
    assert not [(name, found) for name, found in used if not hasattr(torch.cuda, found)]
