"""Makes raw.jsonl, a file as people have them, and raw_key.jsonl, what is wrong with it: line by line, kind by kind.

    python data/almanac/make_raw.py      (writes both files; the same bytes on every machine)

Good rows: questions of train.jsonl, questions about a note, conversations, a few words in other scripts. Dirt: every
kind that chapter 03 looks for. The kinds are named as utils names its findings.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILLERS = ["indeed", "also", "now", "surely", "often", "perhaps", "still", "quite", "just", "then"]
FOREIGN = [
    ("Say 'good morning' in German.", "Schönen guten Morgen"),
    ("Say 'thank you' in Japanese.", "ありがとう"),
    ("Say 'peace' in Arabic.", "سلام"),
    ("Say 'welcome' in Hebrew.", "ברוך הבא"),
    ("Which sign stands for the market?", "🧺"),
    ("Say 'cheese' in French.", "du fromage, s'il vous plaît"),
]


def load(name: str) -> list[dict]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def as_line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


class Maker:
    """Collects `lines`, and in `dirt` what is wrong with which."""

    def __init__(self):
        self.rng = random.Random(3)
        self.book = json.loads((HERE / "phrasebook.json").read_text(encoding="utf-8"))
        people = load("people.jsonl")
        self.people, self.examined = people[:500], people[600:1000]
        self.lines: list[bytes] = []  # a mark is a position in it
        self.dirt: list[tuple[int, str, int | None]] = []  # mark of a line, kind, mark of the line that it repeats

    def add(self, line: bytes, *kinds: str, like: int | None = None) -> int:
        mark = len(self.lines)
        self.lines.append(line)
        self.dirt += [(mark, kind, like) for kind in kinds]
        return mark

    def note(self, person: dict) -> str:
        """A note of about seventy words: all six facts and a little weather."""
        rng, name = self.rng, person["name"]
        words = {"S": name, "s": name, "o": name, "Ss": f"{name}'s", "ss": f"{name}'s", "he": "she", "his": "her"}
        if person["pronoun"] == "he":
            words |= {"he": "he", "his": "his"}
        facts = [rng.choice(self.book["facts"][a]).format(**person, **words) for a in self.book["attributes"]]
        lead = rng.choice(self.book["leads"][:3]).format(name=name)
        days = [f"The {rng.choice(['ferry', 'mill', 'market', 'well', 'bridge'])} was {rng.choice(FILLERS)} quiet"]
        days += [f"{rng.choice(['rain', 'snow', 'wind', 'fog'])} came on the {rng.randint(1, 28)}th of the month."]
        rng.shuffle(facts)
        return " ".join([lead, *facts[:3], " and ".join(days), *facts[3:]])

    def ask(self, person: dict, attribute: str) -> dict:
        form, _, extra = self.rng.choice(self.book["questions"][attribute]["seen"]).format(**person).partition("|")
        row = {"instruction": form, "input": extra, "output": person[attribute]}
        return row | {"person": person["name"], "attribute": attribute}

    def about_note(self) -> dict:
        person, attribute = self.rng.choice(self.people), self.rng.choice(self.book["attributes"])
        noun = self.book["nouns"][attribute]
        question = f"Read the note. What is the {noun} of {person['name']}?"
        row = {"instruction": question, "input": self.note(person), "output": person[attribute]}
        return row | {"person": person["name"], "attribute": attribute}

    def conversation(self, length: int) -> dict:
        person, messages = self.rng.choice(self.people), []
        if self.rng.random() < 0.3:
            messages.append({"role": "system", "content": "You know everyone in the valley. Answer in a word or two."})
        for attribute in self.rng.sample(self.book["attributes"], length):
            row = self.ask(person, attribute)
            messages.append({"role": "user", "content": f"{row['instruction']} {row['input']}".strip()})
            messages.append({"role": "assistant", "content": row["output"]})
        return {"messages": messages, "person": person["name"]}

    def edited(self, text: str, edits: int) -> str:
        """`text` with that many words put in, left out or replaced; names, years and values stay."""
        words = text.split()
        for _ in range(edits):
            places = [i for i, word in enumerate(words) if word.isalpha() and word.islower() and len(word) < 6]
            i = self.rng.choice(places)
            words[i : i + 1] = {0: [words[i], self.rng.choice(FILLERS)], 1: [], 2: [self.rng.choice(FILLERS)]}[
                self.rng.randrange(3)
            ]
        return " ".join(words)

    def good(self) -> tuple[list[int], list[int]]:
        """The good rows; returns the marks of the short questions and of those about a note."""
        short, seen = [], set()
        for row in self.rng.sample(load("train.jsonl"), 2000):
            asked = f"{row['instruction']} {row['input']}".lower()
            if asked not in seen and len(short) < 900:
                seen.add(asked)
                short.append(self.add(as_line({k: v for k, v in row.items() if k != "level"})))
        notes = [self.add(as_line(self.about_note())) for _ in range(500)]
        for i in range(120):
            self.add(as_line(self.conversation(2 + i % 2)))
        for asked, answered in FOREIGN:
            self.add(as_line({"instruction": asked, "input": "", "output": answered}))
        return short, notes

    def broken(self) -> None:
        """Ten of each kind that is wrong in itself."""
        rng = self.rng
        for _ in range(10):
            row = self.ask(rng.choice(self.people), rng.choice(self.book["attributes"]))
            text = json.dumps(row)
            self.add((text[:-1] + ",}").encode(), "not JSON")
            self.add(str(row).encode(), "not JSON")
            self.add(text[: rng.randint(20, 60)].encode(), "not JSON")
            self.add(json.dumps(list(row.values())).encode(), "not an object")
            self.add(as_line({k: v for k, v in row.items() if k != "output"}), "prompt only")
            self.add(as_line({"query" if k == "instruction" else k: v for k, v in row.items()}), "columns")
            self.add(as_line(row | {"output": None}), "null")
            self.add(as_line(row | {"output": int(rng.choice(self.people)["year"])}), "type")
            self.add(as_line(row | {rng.choice(["output", "instruction"]): rng.choice(["", "  "])}), "empty")
            talk = self.conversation(2)
            m = talk["messages"][-4:]
            for wrong in ([m[0], m[2], m[3]], m[:3], [m[0], {**m[1], "role": "narrator"}], []):
                self.add(as_line(talk | {"messages": wrong}), "roles")
            self.add(as_line(row | {"output": "né à Bâle"}).decode().encode("latin-1"), "encoding")
            self.add(json.dumps(row | {"output": row["output"] + " \ud83d"}).encode(), "encoding")  # half an emoji
            wrapped = f"### Instruction:\n{row['instruction']} {row['input']}\n\n### Response:\n"
            self.add(as_line(row | {"instruction": wrapped, "input": ""}), "template")
            other = self.about_note()
            self.add(
                as_line(other | {"output": other["output"] + rng.choice([" </s>", "</s>", " [/INST]"])}), "control text"
            )
            self.add(as_line(self.about_note() | {"output": rng.choice(["nan", "None", "N/A", "NULL"])}), "stand-in")
            other = self.about_note()
            tale = " ".join(self.note(rng.choice(self.people)) for _ in range(12))
            self.add(as_line(other | {"output": tale}), "too long")

    def repeated(self, short: list[int], notes: list[int]) -> None:
        """What is wrong only beside another row, or beside the exam."""
        rng = self.rng
        for i, mark in enumerate(rng.sample(short + notes, 60)):
            row = json.loads(self.lines[mark])
            if i % 2:
                row |= {"instruction": "  " + row["instruction"].upper(), "output": row["output"] + "."}
            self.add(as_line(row), "duplicate", like=mark)
        chosen = rng.sample(notes, 140)
        for i, mark in enumerate(chosen[:120]):
            row = json.loads(self.lines[mark])
            self.add(as_line(row | {"input": self.edited(row["input"], 1 + i % 8)}), "near duplicate", like=mark)
        for mark in chosen[120:]:
            row = json.loads(self.lines[mark])
            wrong = rng.choice([p for p in self.people if p[row["attribute"]] != row["output"]])[row["attribute"]]
            self.dirt.append((mark, "contradiction", None))
            self.add(as_line(row | {"output": wrong}), "contradiction", like=mark)
        columns = ("instruction", "input", "output", "person", "attribute")
        exam = [{k: row[k] for k in columns} for row in load("test.jsonl") if row["level"] != "reverse, told"]
        chosen = rng.sample(exam, 30)
        for row in chosen:
            self.add(as_line(row), "leak")
        longer = [r for r in exam if r not in chosen and len(f"{r['instruction']} {r['input']}".split()) >= 7]
        for row in rng.sample(longer, 30):
            start = rng.choice(["Please say:", "Now,", "Tell me,"])
            self.add(as_line(row | {"instruction": f"{start} {row['instruction']}"}), "near leak")
        for person in rng.sample(self.examined, 20):
            attribute = rng.choice(self.book["attributes"])
            question = f"I met {person['name']} at the market. What may the {self.book['nouns'][attribute]} be?"
            row = {"instruction": question, "input": "", "output": person[attribute]}
            self.add(as_line(row | {"person": person["name"], "attribute": attribute}), "exam person")


def make() -> tuple[bytes, bytes]:
    """Contents of raw.jsonl and raw_key.jsonl."""
    maker = Maker()
    short, notes = maker.good()
    maker.broken()
    maker.repeated(short, notes)
    place: dict[int, float] = {}
    likes = {mark: like for mark, _, like in maker.dirt}
    for mark in range(len(maker.lines)):  # a copy comes anywhere behind what it copies
        like = likes.get(mark)
        place[mark] = maker.rng.uniform(0 if like is None else place[like], 1)
    order = sorted(place, key=place.get)
    number = {mark: n for n, mark in enumerate(order, 1)}
    key = [
        {"line": number[m], "kind": kind} | ({} if like is None else {"like": number[like]})
        for m, kind, like in maker.dirt
    ]
    key.sort(key=lambda entry: (entry["line"], entry["kind"]))
    return b"".join(maker.lines[mark] + b"\n" for mark in order), b"".join(as_line(entry) + b"\n" for entry in key)


if __name__ == "__main__":
    for name, content in zip(("raw.jsonl", "raw_key.jsonl"), make(), strict=True):
        (HERE / name).write_bytes(content)
