"""JupyterLab in a headless Chromium: a server of our own on this machine alone, and a page to look at and to click.

    with browser.lab(folder) as page:
        browser.open_notebook(page, "notebooks/06_inference.ipynb")
        browser.run_all(page)

The server listens on 127.0.0.1 with a token, on a free port, with all its files in a temporary folder. When the block
is left it is ended, with the kernels that it started.
"""

import ast
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import symtable
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil  # comes with ipykernel

SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # else only the cells in sight are on the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # no network, no question
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


def missing() -> str:
    """Why the page cannot be looked at here, or ""."""
    if metadata.version("ipywidgets") < "8":
        return "JupyterLab 4 shows no widgets of ipywidgets 7, which Colab has: it has a front end of its own for them"
    try:
        import jupyterlab  # noqa: F401
        import playwright.sync_api  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed"
    return "" if CHROMIUM else "no Chromium is installed (Debian: apt-get install chromium)"


@contextlib.contextmanager
def lab(root: Path) -> Iterator:
    """A browser page (playwright's Page) with `root` served by JupyterLab; `page.lab` is the server's address."""
    from playwright.sync_api import sync_playwright

    with contextlib.ExitStack() as stack:
        own = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        address = stack.enter_context(_server(root, Path(own)))
        play = stack.enter_context(sync_playwright())
        arguments = ["--disable-dev-shm-usage"] + ["--no-sandbox"] * (os.geteuid() == 0)
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=arguments, env={**os.environ, "HOME": own})
        stack.callback(chromium.close)
        page = chromium.new_page(viewport={"width": 1300, "height": 1000})
        page.lab = address
        yield page


@contextlib.contextmanager
def _server(root: Path, own: Path) -> Iterator[str]:
    folders = {f"JUPYTER_{kind}_DIR": str(own / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    token, settings = secrets.token_hex(16), own / "settings"
    for name, content in SETTINGS.items():
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"),
        *(f"--ServerApp.root_dir={root}", f"--IdentityProvider.token={token}", "--ServerApp.open_browser=False"),
        *(f"--LabApp.user_settings_dir={settings}", f"--LabApp.workspaces_dir={own / 'workspaces'}"),
        "--LabApp.expose_app_in_browser=True",
        *("--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"),
    ]
    environment = {**os.environ, **folders, "HOME": str(own), "IPYTHONDIR": str(own / "ipython")}
    with open(own / "log", "w") as log:
        server = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield _address(server, own, token)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [server, *server.children(recursive=True)]
            server.terminate()  # ends its kernels, too
            for process in psutil.wait_procs(family, timeout=10)[1]:
                process.kill()


def _address(server, own: Path, token: str) -> str:
    """http://127.0.0.1:PORT/...?token=..., once it answers."""
    until = time.monotonic() + 60
    while time.monotonic() < until and server.poll() is None:
        for path in (own / "runtime").glob("jpserver-*.json"):
            with contextlib.suppress(ValueError, OSError):
                url = json.loads(path.read_text())["url"]
                urllib.request.urlopen(f"{url}api/status?token={token}", timeout=5).close()
                return f"{url}lab/tree/{{}}?token={token}"
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start: {(own / 'log').read_text()[-2000:]}")


def excerpt(notebook: Path, folder: Path, shows: str) -> Path:
    """A copy with the first code cell, those whose source contains `shows`, and those they stand on; none has been run.

    A cell stands on the last one in front of it that binds a name which it reads. What a cell changes without binding
    a name is not seen.
    """
    import nbformat

    copy = nbformat.read(notebook, as_version=nbformat.NO_CONVERT)
    first, *others = (cell for cell in copy.cells if cell.cell_type == "code")
    kept, needed = [], set()
    for cell in reversed(others):
        bound, read = set(), set()
        for statement in ast.parse(cell.source).body:
            its, needs = _names(symtable.symtable(ast.unparse(statement), cell.id, "exec"))
            read |= needs - bound - (set() if isinstance(statement, ast.Assign) else its)  # model = add(model) reads it
            bound |= its
        if shows in cell.source or bound & needed:
            needed = needed - bound | read
            kept.insert(0, cell)
    copy.cells = [first, *kept]
    for cell in copy.cells:
        cell.outputs, cell.execution_count = [], None
        cell.metadata.pop("jupyter", None)  # a folded cell shows no number, and so not that it has been run
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(copy, folder / notebook.name)
    return folder / notebook.name


def _names(scope: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    """The notebook's names that a piece of code binds, and those that it reads, functions included."""
    symbols, top = scope.get_symbols(), scope.get_type() == "module"
    bound = {s.get_name() for s in symbols if top and (s.is_assigned() or s.is_imported())}
    read = {s.get_name() for s in symbols if s.is_referenced() and (top or s.is_global())}
    for inner in scope.get_children():
        read |= _names(inner)[1]
    return bound, read


def open_notebook(page, path: str) -> None:
    """Open a notebook, given from the served folder, and wait for its kernel."""
    page.goto(page.lab.format(path))
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.get_by_text("| Idle").wait_for(timeout=60_000)  # the status bar; while it says Connecting, nothing runs


ENDED = """() => {
  const cells = jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type == 'code')
  const error = cells.flatMap(cell => cell.model.sharedModel.outputs).find(output => output.output_type == 'error')
  return error ? error.ename + ': ' + error.evalue : cells.every(cell => cell.model.executionCount) && 'all'
}"""
# Words of the text cells in which Markdown, LaTeX or HTML was left as it is written; code and formulas may look so.
RAW = """() => [...document.querySelectorAll('.jp-RenderedMarkdown')].map(cell => {
  const copy = cell.cloneNode(true)
  copy.querySelectorAll('code, pre, mjx-container').forEach(part => part.remove())
  return copy.textContent
}).filter(text => /\\*\\*|\\]\\(|\\$|<\\w+>|^#+ /m.test(text))"""


def pictures(page, folder: Path, name: str) -> None:
    """The open notebook from top to bottom, at two widths in two themes: NAME-1100-light-00.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    page.evaluate("jupyterapp.shell.collapseLeft()")
    scrolled = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer"
    for width, theme in ((1100, "Light"), (700, "Light"), (1100, "Dark"), (700, "Dark")):
        page.set_viewport_size({"width": width, "height": 2000})
        page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {theme}")
        page.wait_for_timeout(1500)
        high, seen = page.eval_on_selector(scrolled, "e => [e.scrollHeight, e.clientHeight]")
        for i in range(-(-high // seen)):
            page.eval_on_selector(scrolled, "(e, top) => e.scrollTop = top", i * seen)
            page.wait_for_timeout(200)
            page.screenshot(path=folder / f"{name}-{width}-{theme.lower()}-{i:02d}.png")


def run_all(page) -> None:
    """Run all cells (the menu's command) and wait until each has its number.

    Raises:
        AssertionError: a cell failed.
    """
    for name in ("Run", "Run All Cells"):
        page.get_by_role("menuitem", name=name, exact=True).click()
    ended = page.wait_for_function(ENDED, timeout=900_000, polling=250).json_value()
    assert ended == "all", ended
