"""What Colab must install, remove and restart, decided on simulated machines; and requirements.txt itself."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from utils import runtime

REQUIREMENTS = runtime.ROOT / "requirements.txt"
FREEZE = runtime.ROOT.parent / "shared" / "reference" / "colab-gpu-pip-freeze.txt"
# A machine as Colab's was in 2026, as far as it matters here.
COLAB = {
    "torch": "2.11.0+cu128",
    "transformers": "5.15.0",
    "peft": "0.20.0",
    "accelerate": "1.14.0",
    "datasets": "4.0.0",
    "pyarrow": "18.1.0",
    "torchao": "0.10.0",
    "sentencepiece": "0.2.2",
    "protobuf": "5.29.6",
    "matplotlib": "3.10.0",
    "numpy": "2.1.3",
    "packaging": "26.3",
    "scipy": "1.16.3",
    "pandas": "2.2.3",
    "ipywidgets": "7.7.1",
    "tqdm": "4.67.3",
    "filelock": "3.32.3",
}


@pytest.fixture
def asked() -> list:
    return packages.needed(REQUIREMENTS)


@pytest.fixture
def machine(monkeypatch):
    """A simulated Colab: installed and loaded packages, and a pip that does as it is told and notes the calls."""

    state = SimpleNamespace(have=dict(COLAB), loaded={}, calls=[], status=0)

    def pip(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "--quiet"]
        verb, arguments = command[4], [a for a in command[5:] if not a.startswith("-")]
        state.calls.append((verb, arguments))
        if state.status == 0 and verb == "install":
            found = {"trl": "1.16.0", "bitsandbytes": "0.50.2", "datasets": "4.8.5", "pyarrow": "26.0.1"}
            state.have.update({**found, "datasketch": "2.0.0"})
        elif state.status == 0:
            for name in arguments:
                del state.have[name]
        return subprocess.CompletedProcess(command, state.status, "", "ERROR: a\nERROR: no network")

    def installed(names=None):
        return {n: v for n, v in state.have.items() if names is None or n in names}

    monkeypatch.setattr(packages, "subprocess", SimpleNamespace(run=pip))
    monkeypatch.setattr(packages, "installed", installed)
    monkeypatch.setattr(packages, "_restart", "")
    monkeypatch.setattr(packages, "sys", SimpleNamespace(executable=sys.executable, modules=state.loaded))
    return state


def test_every_requirement_has_a_range_and_a_reason():
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        requirement, _, reason = line.partition("#")
        assert Requirement(requirement).specifier, line
        assert reason.strip(), line
    names = [packages.canonical(Requirement(line.partition("#")[0]).name) for line in lines]
    assert len(set(names)) == len(names)
    assert "kernels" not in names  # importing bitsandbytes would download and run native code


def test_colab_part_is_what_training_needs_and_no_more(asked):
    names = {r.name for r in asked}
    assert {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate"} <= names
    assert not names & {"jupyter", "papermill", "nbval", "pytest", "ruff", "nbconvert"}


def test_a_lost_marker_is_noticed(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch>=2\njupyter>=1  # all of it\n")
    with pytest.raises(ValueError, match="only on your own machine"):
        packages.needed(tmp_path / "requirements.txt")


def test_this_environment_meets_the_colab_part(asked):
    assert packages.unmet(asked, packages.installed()) == []


def test_colabs_list_meets_all_but_four(asked):
    if not FREEZE.is_file():
        pytest.skip("Colab's package list is not part of the repository")
    have = dict(re.findall(r"^([\w.-]+)==(\S+)$", FREEZE.read_text(), re.MULTILINE))
    have = {packages.canonical(name): version for name, version in have.items()}
    assert {n: have[n] for n in COLAB} == COLAB  # the simulated machine above is the real one
    assert {r.name for r in packages.unmet(asked, have)} == {"datasets", "trl", "bitsandbytes", "datasketch"}


def test_colab_gets_what_it_lacks_and_torch_is_held(asked):
    arguments = packages.to_install(asked, COLAB)
    assert {Requirement(a).name for a in arguments} == {"datasets", "trl", "bitsandbytes", "datasketch", "torch"}
    assert "torch==2.11.0+cu128" in arguments


def test_torch_is_never_installed(asked):
    met = {**COLAB, "datasets": "4.8.5", "trl": "1.16.0", "bitsandbytes": "0.50.2", "datasketch": "2.0.0"}
    assert packages.to_install(asked, met) == []
    assert packages.to_install(asked, {**met, "torch": "2.20.0"}) == []


@pytest.mark.parametrize(
    ("version", "gone"), [("0.10.0", ["torchao"]), ("0.9.1", ["torchao"]), ("0.16.0", []), ("0.18.0", [])]
)
def test_only_an_old_torchao_is_removed(version, gone):
    assert packages.to_remove({"torchao": version}) == gone
    assert packages.to_remove({}) == []


def test_the_torchao_bound_is_that_of_peft():
    peft = importlib.util.find_spec("peft").origin  # found, not imported: that would load torch
    source = Path(peft).with_name("import_utils.py").read_text(encoding="utf-8")
    bound = re.search(r'TORCHAO_MINIMUM_VERSION = packaging.version.parse\("([\d.]+)"\)', source)
    assert bound, "peft no longer states its minimum torchao this way: look again at utils/packages.py"
    assert Version(bound[1]) == Version(packages.TORCHAO_MINIMUM)


@pytest.mark.parametrize(
    ("loaded", "expected"),
    [
        (set(), []),
        ({"torch", "numpy"}, []),
        ({"pyarrow", "numpy"}, ["pyarrow"]),  # an IPython extension or pandas had imported it
        ({"google.protobuf"}, ["protobuf"]),
        ({"transformers"}, ["bitsandbytes", "protobuf", "pyarrow", "torchao"]),  # remembers what it did not find
    ],
)
def test_restart_only_when_the_kernel_holds_old_packages(loaded, expected):
    before = {"pyarrow": "18", "protobuf": "5", "torchao": "0.10", "numpy": "2", "torch": "2.11"}
    after = {"pyarrow": "26", "protobuf": "6", "bitsandbytes": "0.50", "numpy": "2", "torch": "2.11"}
    assert packages.outdated(before, after, loaded) == expected


def test_fresh_colab_kernel_installs_once_and_goes_on(machine, asked, capsys):
    assert packages.mend(asked) == ""
    verbs = [verb for verb, _ in machine.calls]
    assert verbs == ["install", "uninstall"]
    assert "installing" in capsys.readouterr().out
    assert packages.mend(asked) == ""
    assert len(machine.calls) == 2  # the second run asked pip nothing
    assert capsys.readouterr().out == ""


def test_replaced_under_a_running_kernel_asks_for_a_restart_until_it_happens(machine, asked, monkeypatch):
    machine.loaded["pyarrow"] = object()
    first = packages.mend(asked)
    assert first.startswith("pyarrow changed under this running kernel. Choose Runtime > Restart session")
    assert packages.mend(asked) == first  # running the cell again does not help
    assert len(machine.calls) == 2
    monkeypatch.setattr(packages, "_restart", "")  # a new kernel imports the module anew
    assert packages.mend(asked) == ""


def test_a_failed_pip_is_one_line_and_is_tried_again(machine, asked):
    machine.status = 1
    assert (
        packages.mend(asked) == "pip install failed (ERROR: no network). Check the network, then run this cell again."
    )
    machine.status = 0
    assert packages.mend(asked) == ""


def test_installed_reads_names_as_pip_does():
    assert packages.installed(["HuggingFace_Hub", "no-such-package-here"]).keys() == {"huggingface-hub"}
