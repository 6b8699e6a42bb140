"""Checkpoints without a trainer: whole or not there, one run a folder, a mirror that is slow, full or gone."""

import errno
import json
import os
import threading

import pytest

from utils.training import checkpoints

RUN = {
    "base": {"name": "a", "fingerprint": "f0"},
    "data": {"rows": 5},
    "recipe": {"rank": 4, "seed": 0},
    "versions": {"trl": "1"},
}


def save(saved: Checkpoints, step: int, text: str = "weights") -> None:
    with saved.saving(step) as unfinished:
        made = unfinished / f"checkpoint-{step}"
        made.mkdir()
        (made / "adapter.safetensors").write_text(text)
        (made / "training_args.bin").write_text("hub_token")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_checkpoint_is_found(tmp_path):
    saved = Checkpoints(tmp_path / "run")
    assert saved.latest() is None
    save(saved, 5)
    assert saved.latest() == tmp_path / "run" / "checkpoint-5"
    assert names(saved.latest()) == ["adapter.safetensors", "whole.json"]  # no pickled arguments


def test_the_newest_is_the_one_with_most_steps_and_older_ones_go(tmp_path):
    saved = Checkpoints(tmp_path / "run", keep=2)
    for step in (50, 100, 1000):
        save(saved, step)
    assert names(tmp_path / "run") == ["checkpoint-100", "checkpoint-1000"]
    assert saved.latest().name == "checkpoint-1000"


@pytest.mark.parametrize("harm", ["truncate", "change", "remove", "no list"])
def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path, capsys, harm):
    saved = Checkpoints(tmp_path / "run")
    save(saved, 1)
    save(saved, 2)
    file = tmp_path / "run" / "checkpoint-2" / "adapter.safetensors"
    if harm == "truncate":
        os.truncate(file, 3)
    elif harm == "change":
        file.write_text("weighty")
    elif harm == "remove":
        file.unlink()
    else:
        file.with_name(folders.MANIFEST).unlink()
    assert saved.latest().name == "checkpoint-1"
    assert "checkpoint-2: " in capsys.readouterr().out
    assert names(tmp_path / "run") == ["checkpoint-1"]


def test_an_error_while_saving_leaves_nothing_behind(tmp_path):
    saved = Checkpoints(tmp_path / "run")
    save(saved, 1)
    with pytest.raises(ZeroDivisionError), saved.saving(2) as unfinished:
        (unfinished / "checkpoint-2").mkdir()
        raise ZeroDivisionError
    assert names(tmp_path / "run") == ["checkpoint-1"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors says it
    ],
)
def test_a_full_disk_is_explained_and_older_checkpoints_stay(tmp_path, error):
    saved = Checkpoints(tmp_path / "run")
    save(saved, 1)
    with pytest.raises(Stop, match="The disk is full: checkpoint 2 was not saved .* Make room"), saved.saving(2):
        raise error
    assert saved.latest().name == "checkpoint-1"


def test_a_full_disk_is_seen_though_torch_does_not_say_so(tmp_path, monkeypatch):
    saved = Checkpoints(tmp_path / "run")
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(Stop, match="The disk is full"), saved.saving(2):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


# One run a folder.


def test_the_same_run_goes_on(tmp_path, capsys):
    saved = Checkpoints(tmp_path / "run")
    saved.claim(RUN)
    save(saved, 1)
    Checkpoints(tmp_path / "run").claim(RUN)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": {"rank": 8, "seed": 0}}, "recipe.rank was 4, is 8"),
        ({"data": {"rows": 6}}, "data.rows was 5, is 6"),
        ({"base": {"name": "b", "fingerprint": "f1"}}, "base.name was a, is b; base.fingerprint was f0, is f1"),
        ({"recipe": {"rank": 4, "seed": 0, "new": 1}}, "recipe.new was None, is 1"),
    ],
)
def test_another_run_is_refused_and_the_difference_named(tmp_path, change, named):
    saved = Checkpoints(tmp_path / "run")
    saved.claim(RUN)
    save(saved, 1)
    with pytest.raises(Stop, match=f"another run: {named}. Go on"):
        Checkpoints(tmp_path / "run").claim(RUN | change)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == RUN


def test_a_folder_without_a_checkpoint_may_be_taken_over(tmp_path):
    Checkpoints(tmp_path / "run").claim(RUN)
    Checkpoints(tmp_path / "run").claim(RUN | {"recipe": {"rank": 8}})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"] == {"rank": 8}


def test_other_versions_and_a_base_that_moved_are_noted(tmp_path, capsys):
    saved = Checkpoints(tmp_path / "run")
    saved.claim(RUN)
    save(saved, 1)
    saved.claim(RUN | {"versions": {"trl": "2"}, "base": {"name": "elsewhere/a", "fingerprint": "f0"}})
    told = capsys.readouterr().out
    assert "versions.trl was 1, is 2" in told
    assert "base.name was a, is elsewhere/a" in told


# The mirror.


def test_the_mirror_has_the_newest_when_the_run_is_over(tmp_path):
    saved = Checkpoints(tmp_path / "run", mirror=tmp_path / "drive")
    saved.claim(RUN)
    for step in (1, 2, 3):
        save(saved, step)
    saved.finish()
    assert "checkpoint-3" in names(tmp_path / "drive")
    assert len([n for n in names(tmp_path / "drive") if n.startswith("checkpoint-")]) <= 2
    assert not folders.flaw(tmp_path / "drive" / "checkpoint-3")


def test_a_slow_mirror_does_not_hold_up_the_run(tmp_path, monkeypatch):
    started, gate, copies, copy = threading.Event(), threading.Event(), [], folders.copy

    def slow(folder, place):
        copies.append(folder.name)
        started.set()
        gate.wait(30)
        return copy(folder, place)

    monkeypatch.setattr(folders, "copy", slow)
    saved = Checkpoints(tmp_path / "run", mirror=tmp_path / "drive")
    saved.claim(RUN)
    for step in (1, 2, 3, 4):
        save(saved, step)  # would wait here
    assert started.wait(30)
    assert copies == ["checkpoint-1"]  # which has been deleted meanwhile: only the newest two are kept
    gate.set()
    saved.finish()
    assert copies == ["checkpoint-1", "checkpoint-4"]
    assert names(tmp_path / "drive") == ["checkpoint-4", "run.json"]


def test_a_full_mirror_is_told_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders.shutil, "copytree", full)
    saved = Checkpoints(tmp_path / "run", mirror=tmp_path / "drive")
    saved.claim(RUN)
    save(saved, 1)
    saved.finish()
    assert "checkpoint-1 could not be copied to" in capsys.readouterr().out
    assert saved.latest() == tmp_path / "run" / "checkpoint-1"
    assert not [n for n in names(tmp_path / "drive") if n.startswith("checkpoint-")]


def test_a_mirror_that_has_vanished_is_told_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "drive").write_text("no folder any more")
    saved = Checkpoints(tmp_path / "run", mirror=tmp_path / "drive")
    saved.claim(RUN)
    save(saved, 1)
    saved.finish()
    assert "could not be copied" in capsys.readouterr().out


def test_a_copy_cut_off_in_the_mirror_is_no_checkpoint(tmp_path, capsys):
    first = Checkpoints(tmp_path / "run", mirror=tmp_path / "drive")
    first.claim(RUN)
    save(first, 1)
    first.finish()
    (tmp_path / "drive" / ".unfinished-x" / "checkpoint-2").mkdir(parents=True)
    damaged = tmp_path / "drive" / "checkpoint-3"
    damaged.mkdir()
    assert Checkpoints(tmp_path / "other", mirror=tmp_path / "drive").latest() == tmp_path / "other" / "checkpoint-1"
    assert "checkpoint-3: half-written" in capsys.readouterr().out


def test_another_run_in_the_mirror_is_refused(tmp_path):
    first = Checkpoints(tmp_path / "run", mirror=tmp_path / "drive")
    first.claim(RUN)
    save(first, 1)
    first.finish()
    with pytest.raises(Stop, match="drive has checkpoints of another run: data.rows was 5, is 6"):
        Checkpoints(tmp_path / "other", mirror=tmp_path / "drive").claim(RUN | {"data": {"rows": 6}})


def test_drive_must_be_mounted():
    with pytest.raises(Stop, match="Drive is not mounted. Run: from google.colab import drive"):
        Checkpoints("unused", mirror="/content/drive/MyDrive/qlora")


def test_all_are_deleted_when_the_run_has_ended(tmp_path):
    saved = Checkpoints(tmp_path / "run", mirror=tmp_path / "drive")
    saved.claim(RUN)
    save(saved, 1)
    saved.finish()
    saved.delete()
    assert names(tmp_path) == []
