"""Checkpoints without a trainer: whole or not there, one run a folder, a mirror that is full or gone."""

import errno
import json

import pytest

from utils.runtime import Stop
from utils.training import checkpoints
from utils.training.checkpoints import Checkpoints

RUN = {
    "base": {"name": "a", "fingerprint": "f0"},
    "data": {"rows": 5},
    "recipe": {"rank": 4, "seed": 0},
    "versions": {"trl": "1"},
}


def save(saved: Checkpoints, *steps: int) -> None:
    for step in steps:
        with saved.saving(step) as unfinished:
            made = unfinished / f"checkpoint-{step}"
            made.mkdir(exist_ok=True)
            (made / "adapter.safetensors").write_text("weights")
            (made / "training_args.bin").write_text("hub_token")


def begun(folder, mirror=None) -> Checkpoints:
    """A run with one checkpoint."""
    saved = Checkpoints(folder, mirror=mirror)
    saved.claim(RUN)
    save(saved, 1)
    return saved


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_has_most_steps_and_older_ones_go(tmp_path):
    saved = Checkpoints(tmp_path / "run", keep=2)
    assert saved.latest() is None
    save(saved, 50, 100, 1000)
    assert names(tmp_path / "run") == ["checkpoint-100", "checkpoint-1000"]
    assert saved.latest() == tmp_path / "run" / "checkpoint-1000"
    assert names(saved.latest()) == ["adapter.safetensors", "whole.json"]  # no pickled arguments


@pytest.mark.parametrize("harm", ["weighty", "wei", "adapter.safetensors", "whole.json"])  # a text, or what is lost
def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path, capsys, harm):
    saved = Checkpoints(tmp_path / "run")
    save(saved, 1, 2)
    folder = saved.latest()
    (folder / harm).unlink() if "." in harm else (folder / "adapter.safetensors").write_text(harm)
    assert saved.latest().name == "checkpoint-1"
    assert "checkpoint-2: " in capsys.readouterr().out
    assert names(tmp_path / "run") == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ZeroDivisionError("other errors pass"), "other errors pass"),
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full: checkpoint 2 was not saved .* Make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "The disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "The disk is full"),  # safetensors
    ],
)
def test_an_error_while_saving_leaves_nothing_behind_and_a_full_disk_is_explained(tmp_path, error, told):
    saved = Checkpoints(tmp_path / "run")
    save(saved, 1)
    with pytest.raises((Stop, ZeroDivisionError), match=told), saved.saving(2):
        raise error
    assert names(tmp_path / "run") == ["checkpoint-1"]


def test_a_full_disk_is_seen_though_torch_does_not_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
    with pytest.raises(Stop, match="The disk is full"), Checkpoints(tmp_path / "run").saving(2):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


def test_the_same_run_goes_on_and_an_empty_folder_may_be_taken_over(tmp_path, capsys):
    Checkpoints(tmp_path / "run").claim(RUN | {"recipe": {"rank": 8}})
    begun(tmp_path / "run")
    saved = begun(tmp_path / "run")
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == RUN
    saved.claim(RUN | {"versions": {"trl": "2"}, "base": {"name": "b/a", "fingerprint": "f0"}})  # with a note
    told = capsys.readouterr().out
    assert "versions.trl was 1, is 2" in told and "base.name was a, is b/a" in told


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
    begun(tmp_path / "run", mirror=tmp_path / "drive")
    with pytest.raises(Stop, match=f"run has checkpoints of another run: {named}. Go on"):
        Checkpoints(tmp_path / "run").claim(RUN | change)
    with pytest.raises(Stop, match=f"drive has checkpoints of another run: {named}"):
        Checkpoints(tmp_path / "new", mirror=tmp_path / "drive").claim(RUN | change)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == RUN


def test_the_mirror_has_the_newest_and_all_are_deleted_when_the_run_has_ended(tmp_path):
    saved = begun(tmp_path / "run", mirror=tmp_path / "drive")
    save(saved, 2, 3)
    assert names(tmp_path / "drive") == ["checkpoint-2", "checkpoint-3", "run.json"]
    saved.delete()
    assert names(tmp_path) == []


@pytest.mark.parametrize("harm", ["full", "gone", "bent"])
def test_a_mirror_that_fails_is_told_and_the_run_goes_on(tmp_path, monkeypatch, capsys, harm):
    copytree = checkpoints.shutil.copytree

    def harmed(source, target, **named):
        if harm == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        copytree(source, target, **named)
        (target / "adapter.safetensors").write_text("not what was copied")

    monkeypatch.setattr(checkpoints.shutil, "copytree", harmed)
    if harm == "gone":
        (tmp_path / "drive").write_text("no folder any more")
    saved = begun(tmp_path / "run", mirror=tmp_path / "drive")
    assert "checkpoint-1 could not be copied to" in capsys.readouterr().out
    assert saved.latest() == tmp_path / "run" / "checkpoint-1"
    assert not list(tmp_path.glob("drive/*checkpoint-*"))


def test_a_copy_cut_off_in_the_mirror_is_no_checkpoint(tmp_path, capsys):
    begun(tmp_path / "run", mirror=tmp_path / "drive")
    (tmp_path / "drive" / ".unfinished-x" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "drive" / "checkpoint-3").mkdir()
    other = Checkpoints(tmp_path / "other", mirror=tmp_path / "drive")
    assert other.latest() == tmp_path / "other" / "checkpoint-1"
    assert "checkpoint-3: half-written" in capsys.readouterr().out
    other.claim(RUN)
    save(other, 4)
    assert not (tmp_path / "drive" / ".unfinished-x").exists()


def test_drive_must_be_mounted():
    with pytest.raises(Stop, match="Drive is not mounted. Run: from google.colab import drive"):
        Checkpoints("unused", mirror="/content/drive/MyDrive/qlora")
