"""Folders and files that are whole or not there at all, whenever the process dies."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

MANIFEST = "whole.json"


def seal(folder: Path) -> None:
    """Add the list of files with their hashes, and have all of them on the disk, so that renaming comes last."""
    write(folder / MANIFEST, json.dumps(_digests(folder), indent=2) + "\n")
    for path in folder.rglob("*"):
        _sync(path)


def flaw(folder: Path) -> str:
    """What is wrong with a sealed folder, in words; empty if it is whole."""
    try:
        listed = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return f"half-written, it has no {MANIFEST}"
    for name, digest in listed.items():
        if not (folder / name).is_file():
            return f"half-written, it has no {name}"
        if _digest(folder / name) != digest:
            return f"damaged, {name} is not what was saved"
    return ""


def copy(folder: Path, place: Path) -> Path:
    """Copy `folder` into the folder `place`, where it appears when it is whole. Returns the copy.

    Raises:
        OSError: the place is full or has gone, or what was written is not what was read.
    """
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".unfinished-") as unfinished:
        made, final = Path(unfinished, folder.name), place / folder.name
        shutil.copytree(folder, made)
        for path in made.rglob("*"):
            _sync(path)
        if _digests(made) != _digests(folder):
            raise OSError("the copy is not what was copied")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(made, final)
    return final


def _sync(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def write(path: Path, text: str) -> None:
    """Replace a file at once: it holds the old text or the new one, never half of it."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(text, encoding="utf-8")
    _sync(unfinished)
    os.replace(unfinished, path)


def _digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
