"""The playground as people meet it: in JupyterLab, in a browser, with the mouse.

Set BROWSER_SCREENSHOTS to a folder to look at what the browser saw.
"""

import os
import shutil
from pathlib import Path

import psutil
import pytest

from utils import runtime
from utils.tests.notebook import browser

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())

NOTEBOOK = runtime.ROOT / "notebooks" / "06_inference.ipynb"
REDRAWN = """old => {
  const picture = document.querySelector('img.widget-image')
  return picture.src != old && picture.complete && picture.naturalWidth > 300
}"""


@pytest.fixture
def copy():
    """The cells with sliders and playground, beside the course: the first one finds it there. Nothing of it stays."""
    folder = runtime.OUTPUTS / "browser"
    shutil.rmtree(folder, ignore_errors=True)
    yield browser.excerpt(NOTEBOOK, folder, shows="display(").relative_to(runtime.ROOT).as_posix()
    shutil.rmtree(folder, ignore_errors=True)


def look(page, name: str) -> None:
    if folder := os.environ.get("BROWSER_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def say(page, kind: str, containing: str = "", seconds: float = 30) -> str:
    """What the panel shows in one of its places, once it holds `containing`."""
    place = page.locator(f".playground-{kind}").filter(has_text=containing)
    place.wait_for(timeout=1000 * seconds)
    return place.inner_text()


def test_somebody_moves_a_slider_asks_in_the_playground_and_reads_the_answer(copy):
    stored, others = NOTEBOOK.read_bytes(), set(psutil.Process().children(recursive=True))
    with browser.lab(runtime.ROOT) as page:
        browser.open_notebook(page, copy)
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
        assert say(page, "base") not in ("", "Fallowmoor")
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

        started = set(psutil.Process().children(recursive=True)) - others
        assert any("ipykernel" in " ".join(process.cmdline()) for process in started)
    alive = psutil.wait_procs(started, timeout=5)[1]
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert NOTEBOOK.read_bytes() == stored
