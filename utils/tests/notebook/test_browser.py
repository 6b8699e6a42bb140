"""The playground, and the upload of a file, as people meet them: in JupyterLab, in a browser, with the mouse.

Set BROWSER_SCREENSHOTS to a folder to look at what the browser saw; BROWSER_ALL to one, and every notebook is run.
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
RUN = runtime.ROOT / "notebooks" / "11_your_own_llama.ipynb"
REDRAWN = """old => {
  const picture = document.querySelector('img.widget-image')
  return picture.src != old && picture.complete && picture.naturalWidth > 300
}"""


@pytest.fixture
def folder():
    """Beside the course, so that a copy's first cell finds it. Nothing of it stays."""
    place = runtime.OUTPUTS / "browser"
    shutil.rmtree(place, ignore_errors=True)
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def copy(folder):
    """The cells with sliders and playground."""
    return browser.excerpt(NOTEBOOK, folder, shows="display(").relative_to(runtime.ROOT).as_posix()


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


def test_somebody_uploads_a_file_reads_what_became_of_it_and_asks_in_the_chat_box(folder):
    copy = browser.excerpt(RUN, folder, shows="ask_button.on_click").relative_to(runtime.ROOT).as_posix()
    name = "browser test, rows.csv"
    rows = "question;answer;source\n" + "".join(f"What is {n}?;{n};me\n" for n in range(30)) + "Who?;;me\n"
    try:
        with browser.lab(runtime.ROOT) as page:
            browser.open_notebook(page, copy)
            browser.run_all(page)
            with page.expect_file_chooser() as chooser:
                page.locator(".widget-upload").click()
            chooser.value.set_files({"name": name, "mimeType": "text/csv", "buffer": rows.encode()})
            page.get_by_text(f"{name} is here").wait_for(timeout=30_000)
            browser.run_all(page)
            page.get_by_text(f"{name}: 30 of 31 rows kept").wait_for(timeout=60_000)

            page.get_by_placeholder("Ask something").fill("What is <b>7</b>?")
            page.get_by_role("button", name="Ask", exact=True).click()
            page.locator(".chat").filter(has_text="What is <b>7</b>?").wait_for(timeout=60_000)  # as letters
            look(page, "chat")
    finally:
        (runtime.OUTPUTS / "uploads" / name).unlink(missing_ok=True)
        shutil.rmtree(runtime.OUTPUTS / "data" / name, ignore_errors=True)


@pytest.mark.skipif(
    "BROWSER_ALL" not in os.environ, reason="every notebook in a browser takes half an hour: BROWSER_ALL"
)
@pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOK.parent.glob("*.ipynb")))
def test_run_all_in_a_browser(name, folder):
    """From a fresh start: no error, no raw markup, no dead widget; pictures from top to bottom."""
    folder.mkdir(parents=True)
    copy = Path(shutil.copy(NOTEBOOK.with_stem(name), folder)).relative_to(runtime.ROOT).as_posix()
    with browser.lab(runtime.ROOT) as page:
        browser.open_notebook(page, copy)
        browser.run_all(page)
        assert page.evaluate(browser.RAW) == []
        assert not page.get_by_text("Error displaying widget").count()
        assert not page.locator(".jp-RenderedLatex .MathJax_Error, mjx-merror").count()
        browser.pictures(page, Path(os.environ["BROWSER_ALL"]).absolute(), name)
