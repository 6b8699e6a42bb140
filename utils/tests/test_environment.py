"""Tests and the kernels they start run in the pocket world, whatever the developer's shell says."""

import os
import shutil
import subprocess
import sys

import nbformat
from nbformat import v4

from utils import runtime

WORLD = {"QLORA_PROFILE": "pocket", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "QLORA_BASE": None}


def test_this_process():
    assert {name: os.environ.get(name) for name in WORLD} == WORLD


def test_kernels_of_a_plain_pytest(tmp_path):
    shutil.copy(runtime.ROOT / "notebooks" / "conftest.py", tmp_path)
    source = f"import os\nprint({{name: os.environ.get(name) for name in {list(WORLD)}}})"
    output = v4.new_output("stream", name="stdout", text=f"{WORLD}\n")
    cell = v4.new_code_cell(source, execution_count=1, outputs=[output])
    nbformat.write(v4.new_notebook(cells=[cell]), tmp_path / "world.ipynb")
    shell = {"QLORA_PROFILE": "llama-2-7b", "QLORA_BASE": "elsewhere", "CUDA_VISIBLE_DEVICES": "0"}
    environment = {**os.environ, **shell, "HF_HUB_OFFLINE": "0"}
    command = f"{sys.executable} -m pytest -c pyproject.toml --rootdir=. -p no:cacheprovider".split()
    how = {"cwd": runtime.ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*command, str(tmp_path)], **how)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
