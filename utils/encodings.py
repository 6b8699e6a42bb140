"""The encoding of a text file: read from its mark, taken as UTF-8, or refused with the command that converts it."""

import codecs
from pathlib import Path

from utils.runtime import Stop

BOMS = [  # the longer first: UTF-32's mark begins like UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]


def of(path: Path) -> str:
    """The encoding of a text file by its mark, else UTF-8.

    Raises:
        Stop: no mark, and not UTF-8; the message has the command that converts it. (Where other lines do hold UTF-8
            beyond ASCII, one that does not is the mistake of that line.)
    """
    with open(path, "rb") as file:
        start = file.read(4096)
        for mark, encoding in BOMS:
            if start.startswith(mark):
                return encoding
        if b"\0" in start[:2]:  # every second byte of ASCII in UTF-16; further on a zero is a mistake of its row
            wide = "UTF-32" if b"\0\0" in start else "UTF-16"
            guess = wide + ("BE" if start.startswith(b"\0") else "LE")
            raise Stop(f"{path.name}, line 1: not UTF-8 but {guess}. {_convert(path, guess)}")
        file.seek(0)
        wrong = None
        for n, line in enumerate(file, 1):
            if not line.isascii():
                try:
                    line.decode("utf-8")
                    return "utf-8"
                except UnicodeDecodeError as error:
                    wrong = wrong or (n, line[max(0, error.start - 12) : error.end + 12].decode("latin-1"))
    if wrong:
        place, looks = f"{path.name}, line {wrong[0]}: not UTF-8.", " ".join(wrong[1].split())
        raise Stop(f"{place} If {looks!r} looks right, it is latin-1. {_convert(path, 'LATIN1')}")
    return "utf-8"


def _convert(path: Path, encoding: str) -> str:
    return f'Convert it: iconv -f {encoding} -t UTF-8 "{path.name}" > "new-{path.name}" (or save it as UTF-8)'
