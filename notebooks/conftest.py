from importlib.util import find_spec

import pytest

from utils.runtime import Stop
from utils.tests.environment import hermetic

hermetic()


def pytest_collection_modifyitems(items):
    """Chapter 07 needs two optional packages and llama.cpp's converter; without them it is skipped, and says why."""
    chapter = [item for item in items if item.path.match("notebooks/07_merge_and_export.ipynb")]
    if not chapter:
        return
    missing = [name for name in ("gguf", "xllamacpp") if not find_spec(name)]
    why = f"not installed: {', '.join(missing)} (requirements.txt, extra gguf)" if missing else ""
    if not why:
        from utils.models import export

        try:
            export.converter()
        except Stop as stop:
            why = str(stop)
    for item in chapter if why else ():
        item.add_marker(pytest.mark.skip(why))
