from importlib.util import find_spec

import pytest

from utils.tests.environment import hermetic

hermetic()


def pytest_collection_modifyitems(items):
    """Chapter 07 needs packages that are optional; without them it is skipped, and says so."""
    missing = [name for name in ("gguf", "xllamacpp") if not find_spec(name)]
    for item in items:
        if missing and item.path.name == "07_merge_and_export.ipynb":
            item.add_marker(pytest.mark.skip(f"not installed: {', '.join(missing)} (requirements.txt, extra gguf)"))
