"""Checkpoints of a run: each is whole or not there at all, belongs to one run, and may have a copy elsewhere.

<folder>/run.json            what the run is: base, data, recipe
<folder>/checkpoint-<step>/  adapter, optimizer, schedule, random numbers, log; and whole.json, its list of files
<folder>/.unfinished-*/      one that was being written when the process died
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from utils import folders
from utils.runtime import ROOT, Stop

ANYWAY = ("base.name", "versions.")  # what may change in a run that goes on, with a note


class Checkpoints:
    """The checkpoints of one run in `folder`, the newest `keep` of them.

    Args:
        folder: of this run alone; made when the first checkpoint is saved.
        every: optimizer steps between two checkpoints.
        keep: older ones are deleted.
        mirror: a second folder, such as one on Google Drive, that gets a copy of each checkpoint in the background.
            If it is slow, training does not wait and copies are left out; if it fails, training goes on and says so.
    """

    def __init__(self, folder: str | Path, every: int = 50, keep: int = 2, mirror: str | Path | None = None):
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.mirror = _reachable(Path(mirror)) if mirror else None
        self._copy: Future | None = None
        self._copier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")

    _replace = staticmethod(os.replace)

    def claim(self, run: dict) -> None:
        """Say which run this is: nested dicts of what decides its result. What ANYWAY names may change, with a note.

        Raises:
            Stop: the folder, or its mirror, has checkpoints of another run; names what differs.
        """
        for place in self._places():
            if not self._in(place) or not (place / "run.json").is_file():
                continue
            before, now = (dict(_flat(r)) for r in (json.loads((place / "run.json").read_text("utf-8")), run))
            differing = [
                f"{k} was {before.get(k)}, is {now.get(k)}" for k in {**before, **now} if before.get(k) != now.get(k)
            ]
            if any(not d.startswith(ANYWAY) for d in differing):
                raise Stop(
                    f"{_shown(place)} has checkpoints of another run: {'; '.join(differing)}. "
                    "Go on with what it was, or give this run a folder of its own"
                )
            if differing:
                print(f"note: begun elsewhere ({'; '.join(differing)}); the result may differ in its last bits")
            break
        self.folder.mkdir(parents=True, exist_ok=True)
        folders.write(self.folder / "run.json", json.dumps(run, indent=2) + "\n")

    def latest(self) -> Path | None:
        """The newest whole checkpoint, None if there is none. One that only the mirror has is fetched."""
        for unfinished in self.folder.glob(".unfinished-*"):
            if any(unfinished.iterdir()):
                print(f"skipped a checkpoint that was being written when the run ended ({unfinished.name})")
            shutil.rmtree(unfinished)
        found = [(_step(path), -i, path) for i, place in enumerate(self._places()) for path in self._in(place)]
        for _, _, path in sorted(found, reverse=True):
            if flaw := folders.flaw(path):
                print(f"skipped {_shown(path)}: {flaw}")
                if path.parent == self.folder:
                    shutil.rmtree(path)
            elif path.parent == self.folder:
                return path
            else:
                print(f"fetching {path.name} from {_shown(path.parent)}")
                return folders.copy(path, self.folder)
        return None

    @contextmanager
    def saving(self, step: int) -> Iterator[Path]:
        """A folder to write checkpoint-<step> into; it takes its place, whole, when the block ends without an error.

        Raises:
            Stop: the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".unfinished-") as unfinished:
            try:
                yield Path(unfinished)
                made, final = Path(unfinished, f"checkpoint-{step}"), self.folder / f"checkpoint-{step}"
                # The trainer's own arguments, pickled: nobody reads them, and they may hold a token.
                made.joinpath("training_args.bin").unlink(missing_ok=True)
                folders.seal(made)
                shutil.rmtree(final, ignore_errors=True)
                self._replace(made, final)
            except Exception as error:
                if not _is_full(error, self.folder):
                    raise
                raise Stop(
                    f"The disk is full: checkpoint {step} was not saved in {_shown(self.folder)}, older ones are "
                    "untouched. Make room and run this again: it goes on from the last one"
                ) from None
        self._prune(self.folder)
        if self.mirror and (self._copy is None or self._copy.done()):
            self._copy = self._copier.submit(self._to_mirror, final)

    def finish(self) -> None:
        """Wait until the mirror has the newest checkpoint."""
        if self.mirror and (newest := max(self._in(self.folder), key=_step, default=None)):
            if self._copy:
                self._copy.result()
            if not (self.mirror / newest.name).is_dir():
                self._to_mirror(newest)

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
            folders.copy(path, self.mirror)
            self._prune(self.mirror)
        except OSError as error:
            if path.is_dir():  # else it was pruned while a slow copy was under way: the next one is newer
                print(f"note: {path.name} could not be copied to {_shown(self.mirror)} ({error.strerror or error})")

    def _places(self) -> list[Path]:
        return [self.folder, self.mirror] if self.mirror else [self.folder]

    def _in(self, place: Path) -> list[Path]:
        return [path for path in place.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]

    def _prune(self, place: Path) -> None:
        for old in sorted(self._in(place), key=_step)[: -self.keep]:
            shutil.rmtree(old)


def _reachable(mirror: Path) -> Path:
    drive = Path("/content/drive")
    if mirror.is_relative_to(drive) and not drive.is_mount():
        raise Stop(f'{mirror}: Drive is not mounted. Run: from google.colab import drive; drive.mount("{drive}")')
    return mirror


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


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


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
