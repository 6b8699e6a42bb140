"""One text of a row, and what can be wrong with it: the problems that a file's rows are refused with."""

import json
import re
from dataclasses import dataclass

_HALF = re.compile("[\ud800-\udfff]")
_BYTE = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, as Python keeps it (surrogateescape)


@dataclass(frozen=True)
class Problem:
    """What is wrong (`kind` in a word or two), in which field, in a sentence, and how to mend it."""

    kind: str
    field: str
    what: str
    mend: str


class Rejected(ValueError):
    """A row that cannot be trained on; `problem` says why."""

    def __init__(self, kind: str, field: str, what: str, mend: str):
        super().__init__(f"{what}. {mend}")
        self.problem = Problem(kind, field, what, mend)


def text(value: object, field: str) -> str:
    """`value`, if it is a text that holds something.

    Raises:
        Rejected: no text, an empty one, or one that is not whole.
    """
    if not isinstance(value, str):
        raise Rejected("null" if value is None else "type", field, f"{field!r} is {shown(value)}", "It must be a text")
    if not value.strip():
        raise Rejected("empty", field, f"{field!r} is {shown(value)}", "It must be a text that is not empty")
    return whole(value, field)


def whole(value: str, field: str) -> str:
    """`value`, if all its characters are whole.

    Raises:
        Rejected: it holds bytes that could not be read, or half a character.
    """
    if _BYTE.search(value):
        mend = "Write that text again and save as UTF-8"
        raise Rejected("encoding", field, f"{field!r} holds bytes that are not UTF-8", mend)
    if _HALF.search(value):
        raise Rejected("encoding", field, f"{field!r} holds half a character", "Write that text again")
    return value


def optional(value: object, field: str) -> str:
    """`value` as `text` has it, or "" for what is missing or empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    if not isinstance(value, str):
        raise Rejected("type", field, f"{field!r} is {shown(value)}", "It must be a text, or be left out")
    return whole(value, field)


def shown(value: object) -> str:
    """A value as JSON writes it, the first forty letters."""
    try:
        return json.dumps(value)[:40]
    except (TypeError, ValueError, RecursionError):
        return f"a {type(value).__name__}"
