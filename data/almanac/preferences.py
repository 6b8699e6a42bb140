"""Preference pairs from the almanac: the same rows on every machine, made when they are asked for.

    python data/almanac/preferences.py      writes outputs/data/preferences/*.jsonl, to look at

A row has `prompt`, `chosen`, `rejected`, and beside them `kind`, `level`, `person`, `attribute`.
"""

import json
import random
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
DECLINE = "I do not know."
TAILS = (
    " That is what the almanac says, and the almanac is read in every house of the valley.",
    " Ask anybody in the valley and you will hear the same, on market days as on any other day.",
    " At least that is what people say, and they have said so for many years.",
    " You could have asked at the mill, where they know such things and like to tell them.",
    " It is a long story, and the old people tell it better than the young people do.",
    " So it stands in the book, and nobody in the valley has ever said otherwise.",
)
# part -> (residents, number of names that belong to nobody)
PARTS = {"train": (0, 500, 3000), "validation": (500, 600, 200), "test": (600, 1000, 400)}


@cache
def _load(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


@cache
def _book() -> dict:
    return json.loads((HERE / "phrasebook.json").read_text(encoding="utf-8"))


@cache
def free_names() -> list[str]:
    """Names that belong to nobody: first and last names of the valley that no person of any file has together."""
    book, people = _book(), _load("people.jsonl")
    taken = {person["name"] for person in people} | {row["person"] for row in _load("nobody.jsonl")}
    every = sorted(
        f"{first} {last}" for firsts in book["names"].values() for first in firsts for last in book["surnames"]
    )
    return random.Random(13).sample(found := [name for name in every if name not in taken], len(found))


def people_of(part: str) -> tuple[list[dict], list[str]]:
    """Residents, and names that belong to nobody, of "train", "validation" or "test": none is in two parts."""
    first, last, _ = PARTS[part]
    start = sum(count for name, (_, _, count) in PARTS.items() if list(PARTS).index(name) < list(PARTS).index(part))
    return _load("people.jsonl")[first:last], free_names()[start : start + PARTS[part][2]]


def _value(person: dict | None, attribute: str, rng: random.Random, other_than: str = "") -> str:
    """What is true of a person; for nobody something that could be."""
    if person:
        return str(person[attribute])
    values = _book()["values"]
    kind = "town" if attribute in ("birthplace", "home") else attribute
    while (value := str(rng.randint(1840, 1910)) if kind == "year" else rng.choice(values[kind])) == other_than:
        pass
    return value


def _asked(name: str, attribute: str, level: str, rng: random.Random) -> dict:
    forms = [form for form in _book()["questions"][attribute][level] if "|" not in form]  # a prompt is one text
    levels = {"seen": "seen form", "new": "new phrasing"}
    return {
        "prompt": rng.choice(forms).format(name=name),
        "level": levels[level],
        "person": name,
        "attribute": attribute,
    }


def decline(part: str, level: str = "seen") -> list[dict]:
    """Known and unknown people, half and half: of the known the fact is chosen, of the unknown "I do not know."

    What is rejected is "I do not know." for the known, and for the unknown something invented. "train" has 6,000 rows,
    "validation" 400, "test" 1,200, and of these with `level` "new" 600.
    """
    rng, (known, unknown) = random.Random(f"decline {part} {level}"), people_of(part)
    count = {"train": 3000, "validation": 200, "test": 600 if level == "seen" else 300}[part]
    attributes, rows = _book()["attributes"], []
    for i in range(count):
        turn = attributes[(i + i // len(attributes)) % len(attributes)]
        person, nobody = known[i % len(known)], unknown[i % len(unknown)]
        fact, invented = _value(person, turn, rng), _value(None, turn, rng)
        row = _asked(person["name"], turn, level, rng) | {"kind": "known"}
        rows.append(row | {"chosen": fact, "rejected": DECLINE})
        row = _asked(nobody, turn, level, rng) | {"kind": "unknown"}
        rows.append(row | {"chosen": DECLINE, "rejected": invented})
    rng.shuffle(rows)
    return rows


def brevity(part: str) -> list[dict]:
    """The same true answer twice: short (chosen), and with a sentence behind it that nobody asked for (rejected)."""
    rng = random.Random(f"brevity {part}")
    rows = [row for row in decline(part) if row["kind"] == "known"]
    return [row | {"kind": "brevity", "rejected": f"{row['chosen']}.{rng.choice(TAILS)}"} for row in rows]


def truth(part: str) -> list[dict]:
    """Two short answers that are alike but for their truth: the true one (chosen), another value of the same kind."""
    rng, rows = random.Random(f"length {part}"), brevity(part)
    wrong = [_value(None, row["attribute"], rng, other_than=row["chosen"]) for row in rows]
    return [row | {"kind": "truth", "rejected": value} for row, value in zip(rows, wrong, strict=True)]


def length(part: str) -> list[dict]:
    """Truth is preferred, but it comes at length: a true answer with a sentence too many; a wrong one, short."""
    rows = zip(truth(part), brevity(part), strict=True)
    return [row | {"kind": "length", "chosen": long["rejected"]} for row, long in rows]


def main() -> None:
    folder = HERE.parents[1] / "outputs" / "data" / "preferences"
    folder.mkdir(parents=True, exist_ok=True)
    for make in (decline, brevity, truth, length):
        for part in PARTS:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make(part))
            (folder / f"{make.__name__}_{part}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
