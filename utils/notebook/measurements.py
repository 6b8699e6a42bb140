"""Recorded measurements: data/measurements/<name>.json. What makes them stands beside them; chapters only read."""

import json
from pathlib import Path

from utils.runtime import ROOT, Stop, shown

FOLDER = ROOT / "data" / "measurements"


def read(name: str, folder: Path = FOLDER) -> dict:
    """The record `name`: a dict with command, date, hardware, versions, figures. Stop if it is missing or no record."""
    path = folder / f"{name}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        record = {}
    if "figures" not in record:
        raise Stop(f"{shown(path)} is missing, or no record. It ships with the course: git checkout {shown(path)}")
    return record
