"""Rows of instruction, input and output: read, checked, split, and turned into token ids."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from utils import template
from utils.profile import PROFILES, Profile
from utils.runtime import Stop

ALMANAC = Path(PROFILES["pocket"].data).parent
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Data:
    """What a run trains on and is tested with; each is a list of rows (dicts)."""

    train: list[dict]
    held_out: list[dict]  # never trained on; for the held-out loss
    exam: list[dict] = field(default_factory=list)  # questions with one right answer; only the almanac has them


def load(profile: Profile) -> Data:
    """The data of a profile: the almanac, a JSONL file of one's own, or a data set from the Hub.

    The almanac comes split by person. Other data are shuffled (always the same way) and split 90 to 10.

    Raises:
        Stop: a file that cannot be read as instruction, input and output; the message names the line and the mend.
    """
    if Path(profile.data).resolve() == ALMANAC / "train.jsonl":
        names = ("train", "validation", "test")
        return Data(*(read(ALMANAC / f"{name}.jsonl") for name in names))
    rows = read(profile.data) if _is_file_name(profile.data) else _from_hub(profile.data)
    rows = random.Random(0).sample(rows, len(rows))
    held_out = max(1, round(HELD_OUT_SHARE * len(rows)))
    if len(rows) < 2:
        raise Stop(f"{profile.data} has one row: one to train on and one to test with are the least. Add rows")
    return Data(rows[held_out:], rows[:held_out])


def read(path: str | Path) -> list[dict]:
    """Rows of a JSONL file: on each line an object with `instruction`, `output` and, if needed, `input`.

    Raises:
        Stop: what is wrong, with the file, the line and the mend.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise Stop(f"{path} is a folder. Give the JSONL file in it")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise Stop(f"{path.name}: only JSONL is read here, one JSON object a line, in a file named *.jsonl. Convert it")
    try:
        text = _text(path.read_bytes(), path.name)
    except FileNotFoundError:
        raise Stop(f"There is no file {path}. Give a path from where you are, or an absolute one") from None
    rows = [_checked(line, f"{path.name}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise Stop(f"{path.name} has no rows. Write one JSON object a line: {_EXAMPLE}")
    return rows


_EXAMPLE = '{"instruction": "...", "input": "", "output": "..."}'


def _text(content: bytes, name: str) -> str:
    """UTF-8 as text. Zero bytes are those of UTF-16, which without its mark can pass as UTF-8."""
    wrong = content.find(b"\0")
    try:
        if wrong < 0:
            return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = error.start
    line = content[:wrong].count(b"\n") + 1
    raise Stop(f"{name}, line {line}: not UTF-8. Save the file as UTF-8")


def _checked(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise Stop(f"{where}: not JSON ({error}). Write one object a line: {_EXAMPLE}") from None
    if not isinstance(row, dict):
        raise Stop(f"{where}: a {type(row).__name__}, not an object. Write one object a line: {_EXAMPLE}")
    for key in ("instruction", "output"):
        if key not in row:
            raise Stop(f"{where}: no {key!r} (it has: {', '.join(row) or 'nothing'}). Name the columns: {_EXAMPLE}")
        if not isinstance(row[key], str) or not row[key].strip():
            raise Stop(f"{where}: {key!r} is {json.dumps(row[key])[:40]}. It must be a text that is not empty")
    if row.get("input") is None:
        row["input"] = ""
    if not isinstance(row["input"], str):
        raise Stop(f"{where}: 'input' is {json.dumps(row['input'])[:40]}. It must be a text, or be left out")
    for key in ("instruction", "input", "output"):
        if any("\ud800" <= character <= "\udfff" for character in row[key]):
            raise Stop(f"{where}: {key!r} holds half a character (a lone surrogate). Write that text again")
    return row


def _is_file_name(data: str) -> bool:
    """What exists, or ends like a file (.csv, but not a version such as -2.5), is a file; the rest is a Hub name."""
    suffix = Path(data).suffix
    return Path(data).exists() or suffix[1:2].isalpha() or Path(data).is_absolute() or data.startswith("~")


def _from_hub(name: str) -> list[dict]:
    from datasets import load_dataset

    try:
        table = load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Stop(f"Data set {name} cannot be had from the Hub ({reason}). Go online, or give a JSONL file") from None
    rows = [_checked(json.dumps(row), f"{name}, row {n}") for n, row in enumerate(table)]
    # mlabonne/mini-platypus carries a template in its instructions; ours is put around the bare text.
    head, tail = "### Instruction:\n", "### Response:"
    for row in rows:
        row["instruction"] = row["instruction"].removeprefix(head).rstrip().removesuffix(tail).strip()
    return rows


def encode(tokenizer, rows: list[dict], max_length: int):
    """Token ids and labels of `rows`, and the rows that are too long to be trained on.

    A row that does not fit is left out, whole: cut off, it would lose its end-of-sequence token, and the model would
    learn never to stop.

    Returns:
        (datasets.Dataset with input_ids and labels, list of rows longer than `max_length` tokens)
    """
    from datasets import Dataset

    encoded = [template.encode(tokenizer, row) for row in rows]
    too_long = [row for row, e in zip(rows, encoded, strict=True) if len(e["input_ids"]) > max_length]
    fitting = [e for e in encoded if len(e["input_ids"]) <= max_length]
    if not fitting:
        raise Stop(f"All {len(rows)} rows are longer than {max_length} tokens. Shorten them, or raise max_length")
    return Dataset.from_list(fitting), too_long
