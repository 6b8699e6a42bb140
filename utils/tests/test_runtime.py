"""The bootstrap cell, the silence, errors meant for the learner; and what Colab must install, remove and restart."""

import importlib.util
import logging
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from utils import runtime


def python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **kwargs)


def bootstrap_in(folder: Path, before: str = "", cell: str = runtime.BOOTSTRAP_CELL, times: int = 1, **env: str):
    code = before + ("\n" + cell) * times + "\nprint(root, sys.path.count(str(root)))"
    return python(code, cwd=folder, env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HF_HUB_OFFLINE": "1", **env})


def course(folder: Path) -> Path:
    """A stand-in for the course, whose bootstrap() prints a word."""
    (folder / "utils").mkdir(parents=True)
    (folder / "utils" / "__init__.py").touch()
    (folder / "utils" / "runtime.py").write_text("def bootstrap():\n    print('ready')\n")
    (folder / "notebooks" / "solutions").mkdir(parents=True)
    return folder


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'matplotlib', 'numpy', 'pandas', 'huggingface_hub', 'datasets', 'packaging'}"
    assert python(f"import sys, utils.runtime; assert not {heavy} & set(sys.modules)", cwd=runtime.ROOT).returncode == 0


@pytest.mark.parametrize("start", ["", "notebooks", "notebooks/solutions"])
def test_cell_finds_the_root_above(tmp_path, start):
    root = course(tmp_path / "the course").resolve()
    done = bootstrap_in(root / start, times=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"ready\nready\n{root} 1\n"


def test_cell_finds_the_root_of_the_opened_notebook(tmp_path):
    root = course(tmp_path / "course").resolve()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = bootstrap_in(elsewhere, JPY_SESSION_NAME=str(root / "notebooks" / "00_start_here.ipynb"))
    assert done.stdout == f"ready\n{root} 1\n", done.stderr


def test_cell_says_when_the_course_is_nowhere(tmp_path):
    done = bootstrap_in(tmp_path)
    assert done.returncode == 1
    assert "The course is not around this notebook" in done.stderr.splitlines()[-1]
    assert f"git clone {runtime.HOME}" in done.stderr.splitlines()[-1]


def test_cell_clones_in_colab_once(tmp_path):
    remote = course(tmp_path / "remote")
    git = ["git", "-C", str(remote), "-c", "user.name=t", "-c", "user.email=t@t.example"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    content = tmp_path / "content"
    content.mkdir()
    cell = runtime.BOOTSTRAP_CELL.replace(runtime.HOME, remote.as_uri()).replace('"/content"', repr(str(content)))
    assert cell.count(str(tmp_path)) == 2  # both places were there to be replaced
    colab = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')\n"
    fresh = bootstrap_in(content, before=colab, cell=cell, times=2)
    assert fresh.stdout == f"ready\nready\n{content / 'remote'} 1\n", fresh.stderr
    remote.rename(tmp_path / "gone")  # from now on a second clone would fail
    restarted = bootstrap_in(content, before=colab, cell=cell)
    assert restarted.stdout == f"ready\n{content / 'remote'} 1\n", restarted.stderr


def test_bootstrap_twice_prints_the_same_and_needs_no_import_of_torch():
    done = python(
        "import sys; from utils import runtime; runtime.bootstrap(); runtime.bootstrap()\n"
        "assert 'torch' not in sys.modules",
        cwd=runtime.ROOT,
    )
    first, second = done.stdout.splitlines()
    assert first == second == " | ".join(f"{n} {v}" for n, v in runtime.versions().items())
    assert list(runtime.versions()) == ["python", *runtime.SHOWN]
    assert done.stderr == ""


def test_bootstrap_elsewhere_says_what_is_wrong_and_never_calls_pip(monkeypatch, capsys):
    have = runtime.installed()
    monkeypatch.setattr(runtime, "installed", lambda names=None: have)
    monkeypatch.setattr(runtime.subprocess, "run", lambda *a, **k: pytest.fail(f"pip {a}"))
    have["transformers"] = "5.14.0"
    runtime.bootstrap()
    assert "note: transformers 5.14.0 is outside the tested range" in capsys.readouterr().out
    have["torchao"] = "0.10.0"
    with pytest.raises(runtime.Stop, match="torchao 0.10.0 breaks peft. Run: pip uninstall -y torchao"):
        runtime.bootstrap()
    del have["trl"]
    with pytest.raises(runtime.Stop, match=r"^trl not installed .*pip install 'transformers.*trl"):
        runtime.bootstrap()


def test_bootstrap_in_colab_stops_with_the_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(runtime, "mend", lambda asked: "pyarrow changed. Choose Runtime > Restart session")
    with pytest.raises(runtime.Stop, match="Restart session"):
        runtime.bootstrap()


def test_stop_is_shown_without_a_traceback_and_with_its_section():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shown = []
    shell._showtraceback = lambda etype, value, stb: shown.append(stb)
    shell.run_cell("from utils.runtime import Stop\nraise Stop('my.jsonl, line 3: no output. Add it.')")
    shell.run_cell("raise Stop('my.csv, line 2: not UTF-8. Convert it')")
    assert shown[0] == ["Stop: my.jsonl, line 3: no output. Add it."]
    assert shown[1][1:] == ['More: 91_when_it_breaks, section "Not UTF-8"']


def test_quiet_is_narrow():
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        runtime.quiet()
        runtime.quiet()
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
        warnings.warn("Paged optimizers are not supported on CPU. Falling back", UserWarning, stacklevel=1)
        warnings.warn("Warning: Profiler clears events at the end of each cycle.Only", UserWarning, stacklevel=1)
        warnings.warn("`gradient_clipping` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("a loss of nan", UserWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == ["`gradient_clipping` is deprecated", "a loss of nan"]
    assert len(log.filters) == 1
    known, other = (
        logging.LogRecord(log.name, logging.WARNING, "", 0, text, (), None)
        for text in ("Failed to load CPU gemm_4bit_forward from kernels-community: no", "Failed to load the weights")
    )
    assert not log.filter(known)
    assert log.filter(other)


# What Colab must change, decided on simulated machines; and requirements.txt itself.

REQUIREMENTS = runtime.ROOT / "requirements.txt"
FREEZE = runtime.ROOT.parent / "shared" / "reference" / "colab-gpu-pip-freeze.txt"
# A machine as Colab's was in 2026, as far as it matters here.
PINS = "torch==2.11.0+cu128 transformers==5.15.0 peft==0.20.0 accelerate==1.14.0 datasets==4.0.0 pyarrow==18.1.0"
PINS += " torchao==0.10.0 sentencepiece==0.2.2 protobuf==5.29.6 matplotlib==3.10.0 numpy==2.1.3 packaging==26.3"
PINS += " scipy==1.16.3 pandas==2.2.3 ipywidgets==7.7.1 ipython==7.34.0 tqdm==4.67.3 filelock==3.32.3"
COLAB = dict(pin.split("==") for pin in PINS.split())
LACKING = {"datasets": "4.8.5", "pyarrow": "26.0.1", "trl": "1.16.0", "bitsandbytes": "0.50.2", "datasketch": "2.0.0"}


@pytest.fixture
def asked() -> list:
    return runtime.needed(REQUIREMENTS)


@pytest.fixture
def machine(monkeypatch):
    """A simulated Colab: installed and loaded packages, and a pip that does as it is told and notes the calls."""

    state = SimpleNamespace(have=dict(COLAB), loaded={}, calls=[], status=0)

    def pip(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "--quiet"]
        verb, arguments = command[4], [a for a in command[5:] if not a.startswith("-")]
        state.calls.append((verb, arguments))
        if state.status == 0 and verb == "install":
            state.have.update(LACKING)
        elif state.status == 0:
            for name in arguments:
                del state.have[name]
        return subprocess.CompletedProcess(command, state.status, "", "ERROR: a\nERROR: no network")

    def installed(names=None):
        return {n: v for n, v in state.have.items() if names is None or n in names}

    monkeypatch.setattr(runtime, "subprocess", SimpleNamespace(run=pip))
    monkeypatch.setattr(runtime, "installed", installed)
    monkeypatch.setattr(runtime, "restart", "")
    monkeypatch.setattr(runtime, "sys", SimpleNamespace(executable=sys.executable, modules=state.loaded))
    return state


def test_every_requirement_has_a_range_and_a_reason():
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        requirement, _, reason = line.partition("#")
        assert Requirement(requirement).specifier, line
        assert reason.strip(), line
    names = [canonicalize_name(Requirement(line.partition("#")[0]).name) for line in lines]
    assert len(set(names)) == len(names)
    assert "kernels" not in names  # importing bitsandbytes would download and run native code


def test_colab_part_is_what_training_needs_and_no_more(asked):
    names = {r.name for r in asked}
    assert {"torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate"} <= names
    assert not names & {"jupyter", "papermill", "nbval", "pytest", "ruff", "nbconvert"}


@pytest.mark.parametrize(("gpu", "hidden"), [(True, False), (True, True), (False, False)])
def test_fused_kernels_are_asked_for_where_a_gpu_is(monkeypatch, gpu, hidden):
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if gpu else None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "" if hidden else "0")
    names = {r.name for r in runtime.needed(REQUIREMENTS)}
    assert ("liger-kernel" in names) == (gpu and not hidden)
    assert not [a for a in runtime.to_install(runtime.needed(REQUIREMENTS), COLAB) if "extra" in a]


def test_a_lost_marker_is_noticed(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch>=2\njupyter>=1  # all of it\n")
    with pytest.raises(ValueError, match="only on your own machine"):
        runtime.needed(tmp_path / "requirements.txt")


def test_this_environment_meets_the_colab_part_and_names_are_read_as_pip_does(asked):
    assert runtime.unmet(asked, runtime.installed()) == []
    assert runtime.installed(["HuggingFace_Hub", "no-such-package-here"]).keys() == {"huggingface-hub"}


def test_colabs_list_meets_all_but_five(asked):
    if not FREEZE.is_file():
        pytest.skip("Colab's package list is not part of the repository")
    have = dict(re.findall(r"^([\w.-]+)==(\S+)$", FREEZE.read_text(), re.MULTILINE))
    have = {canonicalize_name(name): version for name, version in have.items()}
    assert {n: have[n] for n in COLAB} == COLAB  # the simulated machine above is the real one
    assert {r.name for r in runtime.unmet(asked, have)} == LACKING.keys()


def test_colab_gets_what_it_lacks_and_torch_is_held_and_never_installed(asked):
    arguments = runtime.to_install(asked, COLAB)
    assert {Requirement(a).name for a in arguments} == {*LACKING, "torch"}
    assert "torch==2.11.0+cu128" in arguments
    for torch in (COLAB["torch"], "2.20.0"):
        assert runtime.to_install(asked, COLAB | LACKING | {"torch": torch}) == []


def test_only_a_torchao_that_peft_refuses_is_removed():
    assert runtime.to_remove({"torchao": "0.10.0"}) == runtime.to_remove({"torchao": "0.9.1"}) == ["torchao"]
    assert runtime.to_remove({"torchao": "0.16.0"}) == runtime.to_remove({}) == []
    peft = importlib.util.find_spec("peft").origin  # found, not imported: that would load torch
    source = Path(peft).with_name("import_utils.py").read_text(encoding="utf-8")
    bound = re.search(r'TORCHAO_MINIMUM_VERSION = packaging.version.parse\("([\d.]+)"\)', source)
    assert bound, "peft no longer states its minimum torchao this way: look again at utils/runtime.py"
    assert Version(bound[1]) == Version(runtime.TORCHAO_MINIMUM)


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
    assert runtime.outdated(before, after, loaded) == expected


def test_fresh_colab_kernel_installs_once_and_goes_on(machine, asked, capsys):
    assert runtime.mend(asked) == ""
    verbs = [verb for verb, _ in machine.calls]
    assert verbs == ["install", "uninstall"]
    assert "installing" in capsys.readouterr().out
    assert runtime.mend(asked) == ""
    assert len(machine.calls) == 2  # the second run asked pip nothing
    assert capsys.readouterr().out == ""


def test_replaced_under_a_running_kernel_asks_for_a_restart_until_it_happens(machine, asked, monkeypatch):
    machine.loaded["pyarrow"] = object()
    first = runtime.mend(asked)
    assert first.startswith("pyarrow changed under this running kernel. Choose Runtime > Restart session")
    assert runtime.mend(asked) == first  # running the cell again does not help
    assert len(machine.calls) == 2
    monkeypatch.setattr(runtime, "restart", "")  # a new kernel imports the module anew
    assert runtime.mend(asked) == ""


def test_a_failed_pip_is_one_line_and_is_tried_again(machine, asked):
    machine.status = 1
    assert runtime.mend(asked) == "pip install failed (ERROR: no network). Check the network, then run this cell again."
    machine.status = 0
    assert runtime.mend(asked) == ""


def test_outputs_may_lie_elsewhere(tmp_path):
    command = [sys.executable, "-c", "from utils.models import adapters; print(adapters.folder_of({}).parent)"]
    world = {**os.environ, "QLORA_OUTPUTS": str(tmp_path)}
    said = subprocess.run(command, cwd=runtime.ROOT, env=world, capture_output=True, text=True, timeout=120)
    assert said.stdout.strip() == str(tmp_path / "adapters"), said.stderr
