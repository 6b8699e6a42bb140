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
ANYWAY = ("base.name", "versions.", "split.")  # what may change in a run that goes on, with a note


class Checkpoints:
    """The checkpoints of one run in a `folder` of its own: one in `every` optimizer steps, the newest `keep` of them.

    `mirror` is a second folder, such as one on Drive, for a copy of each. If that fails, training goes on and says so.
    """

    def __init__(self, folder: str | Path, every: int = 50, keep: int = 2, mirror: str | Path | None = None):
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.places, drive = [Path(place) for place in (folder, mirror) if place], Path("/content/drive")
        if not drive.is_mount() and (lost := [place for place in self.places if place.is_relative_to(drive)]):
            raise Stop(f'{lost[0]}: Drive is not mounted. Run: from google.colab import drive; drive.mount("{drive}")')

    def claim(self, run: dict) -> None:
        """Say which run this is: dicts of what decides its result, by part. What ANYWAY names may change, with a note.

        Stop if the folder, or its mirror, has checkpoints of another run; it names what differs.
        """
        if not is_main():
            return
        if begun := next((p for p in self.places if _in(p) and (p / "run.json").is_file()), None):
            runs = json.loads((begun / "run.json").read_text("utf-8")), run
            before, now = ({f"{part}.{k}": v for part in r for k, v in r[part].items()} for r in runs)
            names = [k for k in {**before, **now} if before.get(k) != now.get(k)]
            differing = "; ".join(f"{k} was {before.get(k)}, is {now.get(k)}" for k in names)
            if any(not name.startswith(ANYWAY) for name in names):
                told = f"{shown(begun)} has checkpoints of another run: {differing}"
                raise Stop(f"{told}. Go on with what it was, or give this run a folder of its own")
            if differing:
                print(f"note: begun elsewhere ({differing}); the result may differ in its last bits")
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".run.json.new", "w", encoding="utf-8") as file:
            file.write(json.dumps(run, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())  # on the disk, before it gets its name
        os.replace(file.name, self.folder / "run.json")

    def latest(self) -> Path | None:
        """The newest whole checkpoint, None if there is none. One that only the mirror has is fetched."""
        return from_main(self._latest() if is_main() else None)

    def _latest(self) -> Path | None:
        for unfinished in self.folder.glob(".unfinished-*"):
            if any(unfinished.iterdir()):
                print(f"skipped a checkpoint that was being written when the run ended ({unfinished.name})")
            shutil.rmtree(unfinished)
        found = [(step, -i, path) for i, place in enumerate(self.places) for step, path in _in(place).items()]
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

        Stop if the disk is full.
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
            told = (
                f"The disk is full: checkpoint {step} was not saved in {shown(self.folder)}, older ones are untouched"
            )
            raise Stop(f"{told}. Make room and run this again: it goes on from the last one") from None
        if is_main():
            self._prune(self.folder)
            for mirror in self.places[1:]:
                self._copy_to(mirror, final)

    def delete(self) -> None:
        """Remove them all, the mirror's too: the run has ended and its adapter is saved."""
        for place in self.places:
            shutil.rmtree(place, ignore_errors=True)

    def _copy_to(self, mirror: Path, path: Path) -> None:
        try:
            mirror.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / "run.json", mirror / "run.json")
            for unfinished in mirror.glob(".unfinished-*"):
                shutil.rmtree(unfinished)
            copy(path, mirror)
            self._prune(mirror)
        except OSError as error:
            print(f"note: {path.name} could not be copied to {shown(mirror)} ({error.strerror or error})")

    def _prune(self, place: Path) -> None:
        for old in list(_in(place).values())[: -self.keep]:
            shutil.rmtree(old)


def copy(folder: Path, place: Path) -> Path:
    """Copy `folder` into the folder `place`, where it appears when it is whole. Returns the copy.

    OSError if the place is full or has gone, or what was written is not what was read.
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
    damaged = [name for name, digest in listed.items() if found.get(name) != digest]
    return f"damaged, {damaged[0]} is not what was saved" if damaged else ""


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _in(place: Path) -> dict[int, Path]:
    """The checkpoints in a folder by their step, the oldest first."""
    steps = (path.name.removeprefix("checkpoint-") for path in place.glob("checkpoint-*"))
    return {step: place / f"checkpoint-{step}" for step in sorted(int(s) for s in steps if s.isdecimal())}


def _is_full(error: Exception, folder: Path) -> bool:
    """True for a full disk or quota. safetensors hides the system's error in its text, torch.save does not give it."""
    told = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
    return told or shutil.disk_usage(folder).free < 2**20
