"""Tests of what makes the recorded measurements; it stands beside the records, outside of utils."""

import importlib.util

from utils import runtime

FOLDER = runtime.ROOT / "data" / "measurements"


def load(name: str):
    """A module of data/measurements, which is no package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORD = load("record")
