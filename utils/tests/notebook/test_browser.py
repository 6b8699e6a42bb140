"""The playground as people meet it: in JupyterLab, in a browser, with the mouse.

Set BROWSER_SCREENSHOTS to a folder to look at what the browser saw.
"""

import os
import shutil
from pathlib import Path

import pytest

from utils import presets, runtime
from utils.data import dataset
from utils.models import loading
from utils.training.cache import trained_adapter
from utils.tests import browser

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=f"no browser: {browser.missing()}")

NOTEBOOK = runtime.ROOT / "notebooks" / "06_inference.ipynb"
SCREENSHOTS = os.environ.get("BROWSER_SCREENSHOTS")


@pytest.fixture(scope="module")
def served():
    """A folder beside the course for a notebook's copy, whose first cell finds the course; nothing of it stays."""
    folder = runtime.OUTPUTS / "browser"
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def trained():
    """The adapter, trained here if nobody has done it: the page then finds it."""
    world = presets.pick("pocket")
    trained_adapter(world.base, loading.load_tokenizer(world.base), dataset.load(world).train, world.recipe)


def look(page, name: str) -> None:
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


def say(page, kind: str, containing: str = "", seconds: float = 30) -> str:
    """What the panel shows in one of its places, once it holds `containing`."""
    place = page.locator(f".playground-{kind}").filter(has_text=containing)
    place.wait_for(timeout=1000 * seconds)
    return place.inner_text()


REDRAWN = """old => {
  const picture = document.querySelector('img.widget-image')
  return picture.src != old && picture.complete && picture.naturalWidth > 300
}"""


def test_somebody_moves_a_slider_asks_in_the_playground_and_reads_the_answer(trained, served):
    stored = NOTEBOOK.read_bytes()
    copy = browser.excerpt(NOTEBOOK, served, shows="display(")  # the sliders of sampling, and the playground
    with browser.lab(runtime.ROOT) as page:
        browser.open_notebook(page, copy.relative_to(runtime.ROOT).as_posix())
        browser.run_all(page)
        before = page.locator("img.widget-image").get_attribute("src")
        page.locator(".noUi-handle").first.press("ArrowRight")
        page.wait_for_function(REDRAWN, arg=before, timeout=30_000)
        look(page, "drawn")

        question = page.get_by_placeholder("Ask something")
        question.scroll_into_view_if_needed()
        question.fill("In which town was Hugo Lark born?")
        page.get_by_role("button", name="Ask", exact=True).click()
        assert say(page, "adapter", "Fallowmoor") == "Fallowmoor"
        say(page, "status", "done")
        base = say(page, "base")
        assert base and base != "Fallowmoor"
        assert "In which town was Hugo Lark born?" in say(page, "history")
        look(page, "answered")

        question.fill("<b>What</b> is the trade of Hugo Lark?")
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_role("button", name="Stop", exact=True).click()
        say(page, "status", "stopped by you")
        assert "<b>What</b>" in say(page, "history")  # as letters
        look(page, "stopped")

        question.fill("")
        page.get_by_role("button", name="Ask", exact=True).click()
        assert say(page, "status", "empty") == "The question is empty. Write one"
        look(page, "empty")
    assert NOTEBOOK.read_bytes() == stored


def test_the_server_is_gone_afterwards_with_its_kernels(served):
    (served / "x").mkdir(parents=True, exist_ok=True)
    with browser.lab(served) as page:
        port = page.lab.split(":")[2].split("/")[0]
        browser.started(page)
        children = browser.descendants(os.getpid())
        assert len(children) > 3
    assert not [pid for pid in children if Path(f"/proc/{pid}/cmdline").exists() and _alive(pid)]
    assert port


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
