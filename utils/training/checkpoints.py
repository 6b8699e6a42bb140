"""Checkpoints of a run: each is whole or not there at all, belongs to one run, and may have a copy elsewhere.

<folder>/run.json            what the run is: base, data, recipe
<folder>/checkpoint-<step>/  adapter, optimizer, schedule, random numbers, log; and whole.json, its list of files
<folder>/.unfinished-*/      one that was being written when the process died
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from utils.hardware import from_main, is_main, wait_for_all
from utils.runtime import Stop, shown, whole

MANIFEST = "whole.json"
ANYWAY = ("base.name", "versions.")  # what may change in a run that goes on, with a note


class Checkpoints:
    """The checkpoints of one run in `folder`, the newest `keep` of them.

    Args:
        folder: of this run alone; made when the first checkpoint is saved.
        every: optimizer steps between two checkpoints.
        keep: older ones are deleted.
        mirror: a second folder, such as one on Google Drive, that gets a copy of each checkpoint. If that fails,
            training goes on and says so.
    """

    def __init__(self, folder: str | Path, every: int = 50, keep: int = 2, mirror: str | Path | None = None):
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.mirror = _reachable(Path(mirror)) if mirror else None

    def claim(self, run: dict) -> None:
        """Say which run this is: nested dicts of what decides its result. What ANYWAY names may change, with a note.

        Raises:
            Stop: the folder, or its mirror, has checkpoints of another run; names what differs.
        """
        if not is_main():
            return
        for place in self._places():
            if not _in(place) or not (place / "run.json").is_file():
                continue
            before, now = (dict(_flat(r)) for r in (json.loads((place / "run.json").read_text("utf-8")), run))
            names = [k for k in {**before, **now} if before.get(k) != now.get(k)]
            differing = "; ".join(f"{k} was {before.get(k)}, is {now.get(k)}" for k in names)
            if any(not name.startswith(ANYWAY) for name in names):
                raise Stop(
                    f"{shown(place)} has checkpoints of another run: {differing}. "
                    "Go on with what it was, or give this run a folder of its own"
                )
            if differing:
                print(f"note: begun elsewhere ({differing}); the result may differ in its last bits")
            break
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / ".run.json.new"
        unfinished.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, self.folder / "run.json")

    def latest(self) -> Path | None:
        """The newest whole checkpoint, None if there is none. One that only the mirror has is fetched."""
        return from_main(self._latest() if is_main() else None)

    def _latest(self) -> Path | None:
        for unfinished in self.folder.glob(".unfinished-*"):
            if any(unfinished.iterdir()):
                print(f"skipped a checkpoint that was being written when the run ended ({unfinished.name})")
            shutil.rmtree(unfinished)
        found = [(_step(path), -i, path) for i, place in enumerate(self._places()) for path in _in(place)]
        for _, _, path in sorted(found, reverse=True):
            if flaw := _flaw(path):
                print(f"skipped {shown(path)}: {flaw}")
                if path.parent == self.folder:
                    shutil.rmtree(path)
            elif path.parent == self.folder:
                return path
            else:
                print(f"fetching {path.name} from {shown(path.parent)}")
                return copy(path, self.folder)
        return None

    @contextmanager
    def saving(self, step: int) -> Iterator[Path]:
        """A folder to write checkpoint-<step> into; it takes its place, whole, when the block ends without an error.

        Raises:
            Stop: the disk is full.
        """
        final = self.folder / f"checkpoint-{step}"
        try:
            with whole(final) if is_main() else nullcontext() as mine:
                made = from_main(mine)
                yield made.parent
                wait_for_all()  # each process has written its own random numbers
                if is_main():
                    # The trainer's own arguments, pickled: nobody reads them, and they may hold a token.
                    made.joinpath("training_args.bin").unlink(missing_ok=True)
                    (made / MANIFEST).write_text(json.dumps(_digests(made), indent=2) + "\n", encoding="utf-8")
        except Exception as error:
            if not _is_full(error, self.folder):
                raise
            raise Stop(
                f"The disk is full: checkpoint {step} was not saved in {shown(self.folder)}, older ones are "
                "untouched. Make room and run this again: it goes on from the last one"
            ) from None
        if is_main():
            self._prune(self.folder)
            if self.mirror:
                self._to_mirror(final)

    def delete(self) -> None:
        """Remove them all, the mirror's too: the run has ended and its adapter is saved."""
        for place in self._places():
            shutil.rmtree(place, ignore_errors=True)

    def _to_mirror(self, path: Path) -> None:
        try:
            self.mirror.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / "run.json", self.mirror / "run.json")
            for unfinished in self.mirror.glob(".unfinished-*"):
                shutil.rmtree(unfinished)
            copy(path, self.mirror)
            self._prune(self.mirror)
        except OSError as error:
            print(f"note: {path.name} could not be copied to {shown(self.mirror)} ({error.strerror or error})")

    def _places(self) -> list[Path]:
        return [self.folder, self.mirror] if self.mirror else [self.folder]

    def _prune(self, place: Path) -> None:
        for old in sorted(_in(place), key=_step)[: -self.keep]:
            shutil.rmtree(old)


def copy(folder: Path, place: Path) -> Path:
    """Copy `folder` into the folder `place`, where it appears when it is whole. Returns the copy.

    Raises:
        OSError: the place is full or has gone, or what was written is not what was read.
    """
    with whole(place / folder.name) as new:
        shutil.copytree(folder, new, dirs_exist_ok=True)
        if _digests(new) != _digests(folder):
            raise OSError("the copy is not what was copied")
    return place / folder.name


def _flaw(folder: Path) -> str:
    """What is wrong with a saved folder, in words; empty if it is whole."""
    try:
        listed = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return f"half-written, it has no {MANIFEST}"
    found = _digests(folder)
    for name, digest in listed.items():
        if name not in found:
            return f"half-written, it has no {name}"
        if found[name] != digest:
            return f"damaged, {name} is not what was saved"
    return ""


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _in(place: Path) -> list[Path]:
    return [path for path in place.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _reachable(mirror: Path) -> Path:
    drive = Path("/content/drive")
    if mirror.is_relative_to(drive) and not drive.is_mount():
        raise Stop(f'{mirror}: Drive is not mounted. Run: from google.colab import drive; drive.mount("{drive}")')
    return mirror


def _is_full(error: Exception, folder: Path) -> bool:
    """True for a full disk or quota. safetensors hides the system's error in its text, torch.save does not give it."""
    full = {errno.ENOSPC, errno.EDQUOT}
    told = getattr(error, "errno", None) in full or any(os.strerror(number) in str(error) for number in full)
    return told or shutil.disk_usage(folder).free < 2**20


def _flat(run: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in run.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
