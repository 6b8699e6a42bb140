"""A file that a reader chose, in Colab and with both versions of the Jupyter button (test_browser presses it)."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from utils.notebook import upload

ROWS = "question,answer\nGrüße?,ja\n".encode()


@pytest.mark.parametrize(
    "value",
    [{"my rows.csv": {"content": ROWS}}, ({"name": "my rows.csv", "content": memoryview(ROWS)},)],
    ids=["ipywidgets 7", "ipywidgets 8"],
)
def test_a_chosen_file_is_read(value):
    assert upload.files_of(value) == [("my rows.csv", ROWS)]


def test_colab_asks_with_its_own_dialogue(tmp_path, monkeypatch):
    colab = ModuleType("google.colab")
    colab.files = SimpleNamespace(upload=lambda: {"rows.csv": ROWS})
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(upload, "uploaded", [])
    assert [path.read_bytes() for path in upload.ask(tmp_path)] == [ROWS]


@pytest.mark.parametrize("name", ["../../rows.csv", "/etc/rows.csv", "C:\\files\\rows.csv"])
def test_a_name_leads_nowhere_else(tmp_path, name):
    assert upload.write(tmp_path, name, ROWS) == tmp_path / "rows.csv"
