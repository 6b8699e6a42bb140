"""One row: which columns mean what, and the one internal form that all data get.

A row is a dict with `instruction`, `input` ("" for none) and `output`. A conversation has, further, `history`, a list
of its earlier exchanges ({"instruction", "output"}); a row with a system text has `system`. Other columns are kept.
"""

import json
import re
from functools import lru_cache

# Recognised by their columns, in this order: what we call a text -> what the file calls it.
SCHEMAS = (
    {"instruction": "instruction", "output": "output"},  # Alpaca
    {"instruction": "prompt", "output": "completion"},
    {"instruction": "question", "output": "answer"},
    {"messages": "messages"},  # role/content
    {"messages": "conversations"},  # ShareGPT: from/value
)
OPTIONAL = ("input", "system", "history")
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant")}
# The template that some data sets carry in their instructions: bare in mlabonne/mini-platypus, after a preamble in
# data made for Alpaca.
CARRIED = re.compile(
    r"\s*(?:Below is an instruction[^#]*)?### Instruction:\s*(\S.*?)\s*(?:### Input:\s*(.*?)\s*)?### Response:\s*",
    re.DOTALL,
)
CONTROL = re.compile(r"</?s>|\[/?INST\]|<<SYS>>|<\|[a-z_]+\|>|### (?:Instruction|Response):")
NOTHING = {"nan", "none", "null", "na", "n/a", "#n/a"}  # what spreadsheets and pandas write for an empty cell
FOREIGN = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, as Python keeps it (surrogateescape)
HALF = re.compile("[\ud800-\udfff]")  # of a character that UTF-16 writes in two


class Problem(ValueError):
    """What is wrong: `kind` in a word or two, the field, a sentence, and how to mend it.

    Raised, it costs the row; returned, it is a note.
    """

    def __init__(self, kind: str, field: str, what: str, mend: str):
        super().__init__(f"{what}. {mend}")
        self.kind, self.field, self.what, self.mend = kind, field, what, mend


def normal(raw: object, columns: dict[str, str] | None = None) -> tuple[dict, list[Problem]]:
    """A raw row in the internal form, and notes: what looks wrong in a row that can be used.

    Args:
        raw: what a file holds for one row.
        columns: names given by the user, such as {"instruction": "Frage", "output": "Antwort"}, or
            {"messages": "dialogue"}; else the columns decide.

    Raises:
        Problem: the row cannot be used.
    """
    if not isinstance(raw, dict):
        mend = 'Write {"instruction": "...", "output": "..."}'
        raise Problem("not an object", "", f"a {type(raw).__name__}, not an object", mend)
    names = _recognised(tuple(raw), tuple((columns or {}).items()))
    row = {k: _intact(v, k) if isinstance(v, str) else v for k, v in raw.items() if k not in names.values()}
    if "messages" in names:
        row |= _conversation(raw[names["messages"]], names["messages"])
    elif isinstance(raw[names["instruction"]], list) and isinstance(raw[names["output"]], list):
        both = raw[names["instruction"]] + raw[names["output"]]  # trl's conversational prompt and completion
        row |= _conversation(both, f"{names['instruction']} + {names['output']}")
    else:
        row |= {ours: _text(raw[names[ours]], names[ours]) for ours in ("instruction", "output")}
    row["input"] = _text(raw.get(names.get("input")), "input", optional=True)
    if system := _text(raw.get(names.get("system")), "system", optional=True):
        row["system"] = system
    if history := raw.get(names.get("history")):
        row["history"] = _history(history)
    notes = _notes(row)
    first = ("system", "history", "instruction", "input", "output")
    return {key: row[key] for key in first if key in row} | row, notes


@lru_cache(maxsize=1000)
def _recognised(columns: tuple[str, ...], named: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """What we call a text -> its column. Upper and lower case are the same; columns given by name go first."""
    there = {str(column).strip().lower(): column for column in reversed(columns)}
    schemas = [dict(named)] if named else SCHEMAS
    wanted = max(schemas, key=lambda schema: sum(c.lower() in there for c in schema.values()) / len(schema))
    if missing := [column for column in wanted.values() if column.lower() not in there]:
        kind = "prompt only" if missing == [wanted.get("output")] else "columns"
        has = ", ".join(map(str, columns)) or "nothing"
        mend = "Name the columns instruction, input, output, or say which is which (data/README.md)"
        raise Problem(kind, missing[0], f"no {missing[0]!r} (it has: {has})", mend)
    wanted = {name: name for name in OPTIONAL if name not in wanted.values()} | wanted
    return {ours: there[column.lower()] for ours, column in wanted.items() if column.lower() in there}


def _history(value: object) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(e, dict) for e in value):
        mend = 'Write [{"instruction": "...", "output": "..."}, ...]'
        raise Problem("type", "history", f"'history' is {_short(value)}", mend)
    said = ("instruction", "output")
    return [{key: _text(e.get(key), f"history[{i}].{key}") for key in said} for i, e in enumerate(value)]


def _conversation(value: object, field: str) -> dict:
    """Instruction and output, history and system text of a list of {"role", "content"} or {"from", "value"}."""
    if isinstance(value, str):  # a cell of a CSV file
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Problem("type", field, f"{field!r} is {_short(value)}", "Write a list of messages") from None
    if not isinstance(value, list) or not value:
        raise Problem("roles", field, f"{field!r} is {_short(value)}", "Write a list of messages, user and assistant")
    turns = []
    for i, turn in enumerate(value):
        turn, place = turn if isinstance(turn, dict) else {}, f"{field}[{i}]"
        said = turn.get("role", turn.get("from"))
        role = ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            mend = "Give each message a role: system, user or assistant"
            raise Problem("roles", place, f"{place} has the role {_short(said)}", mend)
        turns.append((role, _text(turn.get("content", turn.get("value")), place)))
    system = turns.pop(0)[1] if turns[0][0] == "system" else ""
    for i, (role, _) in enumerate(turns):
        if role != (expected := ("user", "assistant")[i % 2]):
            place = f"{field}[{i + bool(system)}]"
            mend = "Let user and assistant take turns, the user first"
            raise Problem("roles", place, f"{place} is the {role}'s, where the {expected} should speak", mend)
    if len(turns) % 2 or not turns:
        raise Problem("roles", field, f"{field!r} ends without an answer", "End with a message of the assistant")
    pairs = [{"instruction": turns[i][1], "output": turns[i + 1][1]} for i in range(0, len(turns), 2)]
    return pairs[-1] | ({"history": pairs[:-1]} if pairs[:-1] else {}) | ({"system": system} if system else {})


def _notes(row: dict) -> list[Problem]:
    """What looks wrong in a row; a template that its instruction carries is taken off."""
    notes = []
    while carried := CARRIED.fullmatch(row["instruction"]):
        row["instruction"], row["input"] = carried[1], carried[2] or row["input"]
        what = "'instruction' carried a template, which was taken off"
        notes.append(Problem("template", "instruction", what, "Give the bare text; the template is put around it"))
    for key in ("instruction", "input", "output"):
        if found := CONTROL.search(row[key]):
            what = f"{key!r} holds {found[0]!r}, which is trained as the letters that it is"
            notes.append(Problem("control text", key, what, "Delete it if another template left it there"))
    if row["output"].strip().lower() in NOTHING:
        what = f"'output' is {_short(row['output'])}, which many programs write for an empty cell"
        notes.append(Problem("stand-in", "output", what, "Delete the row if there is no answer"))
    return notes


def _text(value: object, field: str, optional: bool = False) -> str:
    """`value`, if it is a text that holds something. What is `optional` may be missing or empty, and is "" then."""
    if optional and (value is None or (isinstance(value, str) and not value.strip())):
        return ""
    if not isinstance(value, str):
        mend = "It must be a text" + (", or be left out" if optional else "")
        raise Problem("null" if value is None else "type", field, f"{field!r} is {_short(value)}", mend)
    if not value.strip():
        raise Problem("empty", field, f"{field!r} is {_short(value)}", "It must be a text that is not empty")
    return _intact(value, field)


def _intact(value: str, field: str) -> str:
    """`value`, if it holds no byte that could not be read and no half of a character."""
    if FOREIGN.search(value):
        raise Problem("encoding", field, f"{field!r} holds bytes that are not UTF-8", "Write it again, as UTF-8")
    if HALF.search(value):
        raise Problem("encoding", field, f"{field!r} holds half a character", "Write it again")
    return value


def _short(value: object) -> str:
    return json.dumps(value, default=str)[:40]
