"""The playground as people meet it: in JupyterLab, in a browser, with the mouse."""

import shutil
import time

import nbformat
import pytest

from utils import runtime
from utils.tests import browser

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())


@pytest.fixture(scope="module")
def copy():
    """A notebook's copy beside the course, where its first cell finds it; nothing of it stays."""
    folder = runtime.OUTPUTS / "browser"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield lambda name: shutil.copy(runtime.ROOT / "notebooks" / name, folder)
    shutil.rmtree(folder)
