"""The bootstrap cell, the silence and the errors meant for the learner."""

import logging
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from utils import runtime


def python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **kwargs)


def clean_env(**extra: str) -> dict:
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HF_HUB_OFFLINE": "1", **extra}


def bootstrap_in(folder: Path, before: str = "", cell: str = runtime.BOOTSTRAP_CELL, times: int = 1, **env: str):
    code = before + ("\n" + cell) * times + "\nprint(root, sys.path.count(str(root)))"
    return python(code, cwd=folder, env=clean_env(**env))


def course(folder: Path) -> Path:
    """A stand-in for the course, whose bootstrap() prints a word."""
    (folder / "utils").mkdir(parents=True)
    (folder / "utils" / "__init__.py").touch()
    (folder / "utils" / "runtime.py").write_text("def bootstrap():\n    print('ready')\n")
    (folder / "notebooks" / "solutions").mkdir(parents=True)
    return folder


def test_import_is_cheap_and_light():
    code = (
        "import sys, time; t = time.perf_counter(); import utils.runtime; s = time.perf_counter() - t\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'huggingface_hub', 'datasets'} & set(sys.modules)\n"
        "print(s); assert not heavy, heavy"
    )
    runs = [python(code, cwd=runtime.ROOT) for _ in range(3)]
    assert all(r.returncode == 0 for r in runs), runs[0].stderr
    assert min(float(r.stdout) for r in runs) < 0.05


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


def test_bootstrap_names_what_is_missing(monkeypatch):
    have = packages.installed()
    monkeypatch.setattr(packages, "installed", lambda names=None: {n: v for n, v in have.items() if n != "trl"})
    with pytest.raises(runtime.Stop, match=r"^trl not installed .*pip install -r requirements.txt"):
        runtime.bootstrap()


def test_bootstrap_notes_a_version_outside_the_range(monkeypatch, capsys):
    have = packages.installed()
    monkeypatch.setattr(packages, "installed", lambda names=None: {**have, "transformers": "5.14.0"})
    runtime.bootstrap()
    assert "note: transformers 5.14.0 is outside the tested range" in capsys.readouterr().out


def test_bootstrap_elsewhere_never_calls_pip(monkeypatch):
    have = packages.installed()
    monkeypatch.setattr(packages, "installed", lambda names=None: {**have, "torchao": "0.10.0"})
    monkeypatch.setattr(packages, "_pip", lambda *a: pytest.fail(f"pip {a}"))
    with pytest.raises(runtime.Stop, match="torchao 0.10.0 breaks peft. Run: pip uninstall -y torchao"):
        runtime.bootstrap()


def test_bootstrap_in_colab_stops_with_the_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(packages, "mend", lambda asked: "pyarrow changed. Choose Runtime > Restart session")
    with pytest.raises(runtime.Stop, match="Restart session"):
        runtime.bootstrap()


def test_stop_is_shown_as_one_line():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shown = []
    shell._showtraceback = lambda etype, value, stb: shown.append(stb)
    shell.run_cell("from utils.runtime import Stop\nraise Stop('my.jsonl, line 3: no output. Add it.')")
    assert shown == [["Stop: my.jsonl, line 3: no output. Add it."]]


@pytest.mark.parametrize("path", ["notebooks/00_start_here.ipynb", runtime.ROOT / "notebooks" / "00_start_here.ipynb"])
def test_badge(path):
    link = "https://colab.research.google.com/github/AnshChoudhary/finetuning-Llama2-7b/blob/main/notebooks/"
    assert runtime.badge(path).endswith(f"]({link}00_start_here.ipynb)")


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


def test_a_training_run_prints_nothing_on_stderr(tmp_path):
    """The list of quiet() is complete for the whole path: 4-bit load, adapter, SFTTrainer, generate, reload."""
    script = Path(__file__).with_name("quiet_run.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(runtime.ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
