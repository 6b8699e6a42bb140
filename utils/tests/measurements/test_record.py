"""Recorded measurements: written and read back, rounded, ordered, free of this machine's paths."""

import ast
import json
import math
import re

import numpy as np
import pytest

from utils import runtime
from utils.notebook import measurements
from utils.tests.measurements import RECORD as record


def write(folder, figures, name="trial", command="make run"):
    return record.write(name, figures, command, folder=folder)


def test_written_and_read_back_rounded_and_in_one_order(tmp_path):
    figures = {"steps": 200, "curve": np.array([[1e-9 / 3, 2.0]]), "note": "ü", "b": {"y": np.float64(1 / 3), "x": 1}}
    text = write(tmp_path, figures | {"d": (True, None)}).read_bytes()
    record = measurements.read("trial", folder=tmp_path)
    assert list(record) == ["command", "date", "hardware", "versions", "figures"]
    kept = {"b": {"x": 1, "y": 0.333333}, "curve": [[3.33333e-10, 2.0]], "d": [True, None], "note": "ü", "steps": 200}
    assert (record["command"], record["figures"]) == ("make run", kept)
    assert record["versions"] == runtime.versions()
    assert record["hardware"]["cpu"] and record["hardware"]["cores"] >= 1
    assert write(tmp_path, dict(reversed(kept.items()))).read_bytes() == text and text.endswith(b"}\n")


def test_a_flat_list_takes_one_line(tmp_path):
    text = write(tmp_path, {"curve": [0.5] * 300, "words": ["a [b", "c"]}).read_text()
    assert len(text.splitlines()) < 60
    assert json.loads(text)["figures"]["words"] == ["a [b", "c"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float32("nan")])
def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path, bad):
    with pytest.raises(ValueError, match=r"figures\.loss\[1\] is (nan|inf)"):
        write(tmp_path, {"loss": [1.0, bad]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../x", "a b", "", "x.json"])
def test_bad_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="letters, digits"):
        write(tmp_path, {}, name=name)


def test_a_path_of_this_machine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="relative to the repository"):
        write(tmp_path, {"adapter": str(runtime.OUTPUTS / "adapters")})
    with pytest.raises(ValueError, match="relative to the repository"):
        write(tmp_path, {}, command=f"python {runtime.ROOT}/utils/x.py")
    with pytest.raises(ValueError, match="PosixPath"):
        write(tmp_path, {"adapter": runtime.OUTPUTS})


def test_a_missing_or_broken_record_says_the_mend(tmp_path):
    with pytest.raises(runtime.Stop, match=r"^data/measurements/no-such.json is missing.*git checkout data/"):
        measurements.read("no-such")
    for text in ("{", "{}"):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(runtime.Stop, match="no record"):
            measurements.read("broken", folder=tmp_path)


def test_every_shipped_record_is_whole():
    for path in measurements.FOLDER.glob("*.json"):
        record = measurements.read(path.stem)
        assert list(record) == ["command", "date", "hardware", "versions", "figures"], path.name
        assert record["command"] and record["figures"], path.name


@pytest.mark.parametrize("study", sorted(measurements.FOLDER.glob("studies/[0-9]*.py")), ids=lambda path: path.stem)
def test_what_a_study_takes_from_its_chapter_is_there(study):
    """Names of cells, and headings up to which they run: a chapter changes often, its study is run rarely."""
    source = study.read_text("utf-8")
    if not (named := re.search(r'study\.chapter\(\s*"(\w+)"', source)):
        return
    cells = json.loads((runtime.ROOT / "notebooks" / f"{named[1]}.ipynb").read_text("utf-8"))["cells"]
    prose, code = ("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == k) for k in ("markdown", "code"))
    bound = {getattr(node, "id", getattr(node, "name", None)) for node in ast.walk(ast.parse(code)) if _binds(node)}
    assert set(re.findall(r"\brun\[\"(\w+)\"\]", source)) <= bound
    for heading in re.findall(r'until="([^"]+)"', source):
        assert re.search(rf"^{re.escape(heading)}", prose, re.MULTILINE), heading


def _binds(node) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Store) or isinstance(
        node, (ast.FunctionDef, ast.ClassDef, ast.alias)
    )
