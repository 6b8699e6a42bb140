"""One row: which columns mean what, and the one internal form that all data get.

A row is a dict with `instruction`, `input` ("" for none) and `output`. A conversation has, further, `history`, a list
of its earlier exchanges ({"instruction", "output"}, with "weight": 0 where the answer is read and not learned); a row
with a system text has `system`. Other columns are kept.
"""

import json
import re
from functools import lru_cache

# Recognised by their columns, in this order: what we call a text -> what the file calls it.
SCHEMAS = (
    {"instruction": "instruction", "output": "output"},  # Alpaca
    {"instruction": "instruction", "output": "response"},  # Dolly
    {"instruction": "prompt", "output": "completion"},
    {"instruction": "question", "output": "answer"},
    {"messages": "messages"},  # role/content
    {"messages": "conversations"},  # ShareGPT: from/value
)
OPTIONAL = {"input": ("input", "context"), "system": ("system",), "history": ("history",)}
KEYS = ("system", "history", "instruction", "input", "output")
ROLES = {"human": "user", "gpt": "assistant", "developer": "system", "model": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant")}
LEARN = ("weight", "train", "loss")  # of a turn: is its answer learned? OpenAI's name, Axolotl's, ms-swift's
FIELDS = {*KEYS, *LEARN, "role", "content", "from", "value", "type", "text"}  # of a turn, that are read
# Changes the meaning of a row or a turn, and is nothing that our text could say.
BEYOND = {"tools", "functions", "tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking"}
BEYOND |= {"image", "images", "audio", "audios", "video", "videos", "label"}
PAIRS = "This is preference data: chapter 13 trains on it"
READY = "This is ready-made text, template and all: give question and answer apart, as instruction and output"
# The template that some data sets carry in their instructions: bare in mlabonne/mini-platypus, after a preamble in
# data made for Alpaca.
CARRIED = re.compile(
    r"\s*(?:Below is an instruction[^#]*)?### Instruction:\s*(\S.*?)\s*(?:### Input:\s*(.*?)\s*)?### Response:\s*",
    re.DOTALL,
)
CONTROL = re.compile(  # what this template and others (Llama-2, ChatML, Gemma, Vicuna, Guanaco) leave in a text
    r"</?s>|\[/?INST\]|<</?SYS>>|<[|｜][^|｜<>\s]{1,40}[|｜]>|<(?:start|end)_of_turn>|<[be]os>"
    r"|### ?(?:Instruction|Input|Response|Human|Assistant|User|System|Question|Answer):"
    r"|(?:USER|ASSISTANT|HUMAN|Human|Assistant): "
)
NOTHING = {"nan", "none", "null", "na", "n/a", "#n/a"}  # what spreadsheets and pandas write for an empty cell
HALF = re.compile("[\ud800-\udfff]")  # of a character in UTF-16; from dc80 to dcff a byte that is not UTF-8


class Problem(ValueError):
    """What is wrong: `kind` in a word or two, the field, a sentence, and how to mend it.

    Raised, it costs the row; returned, it is a note.
    """

    def __init__(self, kind: str, field: str, what: str, mend: str):
        what = what if len(what) <= 300 else f"{what[:300]}..."  # which fits on a screen
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
    _within(raw, "")
    read = {*KEYS, *names.values()}
    row = {k: _intact(v, k) if isinstance(v, str) else v for k, v in raw.items() if k not in read}
    if "messages" in names:
        row |= _conversation(raw[names["messages"]], names["messages"])
    elif isinstance(raw[names["instruction"]], list) and isinstance(raw[names["output"]], list):
        both = raw[names["instruction"]] + raw[names["output"]]  # trl's conversational prompt and completion
        row |= _conversation(both, f"{names['instruction']} + {names['output']}")
        if beside := next((names[key] for key in ("input", "history") if raw.get(names.get(key))), ""):
            raise Problem("input", beside, f"{beside!r} stands beside a conversation", "Put it into its messages")
    else:
        row |= {ours: _text(raw[names[ours]], names[ours]) for ours in ("instruction", "output")}
    row["input"] = _text(raw[names["input"]], names["input"], optional=True) if "input" in names else ""
    system = "system" in names and _text(raw[names["system"]], "system", optional=True)
    if system and row.setdefault("system", system) != system:
        raise Problem("system", "system", "'system' and the system's message are two texts", "Keep one of them")
    if "history" in names and (history := raw[names["history"]]):
        row["history"] = _history(history)
    notes = _notes(row)
    return {key: row[key] for key in KEYS if key in row} | row, notes


def fields(raw: dict, columns: dict[str, str] | None = None) -> dict[tuple[str, bool], None]:
    """(name, whether `normal` reads it) of the columns of a usable row, and of the fields of its turns."""
    read = set(_recognised(tuple(raw), tuple((columns or {}).items())).values())
    turns = [(name, turn) for name in read if isinstance(raw[name], list) for turn in raw[name]]
    own = dict.fromkeys((str(name), name in read or name == "group") for name in raw)  # which `dataset.split` reads
    return own | dict.fromkeys((f"{name}[].{key}", key in FIELDS) for name, turn in turns for key in turn)


@lru_cache(maxsize=1000)
def _recognised(columns: tuple[str, ...], named: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """What we call a text -> its column. Upper and lower case are the same; columns given by name go first."""
    there = {str(column).strip().lower(): column for column in reversed(columns)}
    named, core = dict(named), {"instruction", "output", "messages"}
    schemas = [schema | named for schema in SCHEMAS if named.keys() & core <= schema.keys()] or [named]
    wanted = max(schemas, key=lambda schema: sum(c.lower() in there for c in schema.values()) / len(schema))
    if missing := [column for column in wanted.values() if column.lower() not in there]:
        kind = "prompt only" if missing == [wanted.get("output")] else "columns"
        has = ", ".join(map(str, columns)) or "nothing"
        mend = "Name the columns instruction, input, output, or say which is which (data/README.md)"
        mend = PAIRS if {"chosen", "rejected"} <= there.keys() else READY if "text" in there else mend
        raise Problem(kind, missing[0], f"no {missing[0]!r} (it has: {has})", mend)
    # Messages hold all that was said: an input beside them belongs nowhere.
    for ours in OPTIONAL if "messages" not in wanted else ("system",):
        column = next((c for c in OPTIONAL[ours] if c in there and c not in wanted.values()), None)
        wanted = {ours: column, **wanted} if column else wanted
    return {ours: there[column.lower()] for ours, column in wanted.items()}


def _within(fields: dict, place: str) -> None:
    """Refuse a row or a turn with a field that changes its meaning and has no place in the template."""
    for name in [] if BEYOND.isdisjoint(fields) else sorted(BEYOND & fields.keys()):
        if name == "label" and str(fields[name]).lower() == "false":
            raise Problem("preference", name, "'label' is false: an answer to avoid (KTO)", f"{PAIRS}. Or rename it")
        if name != "label" and fields[name] not in (None, "", [], {}, "[]"):
            kind = "tool calling" if "tool" in name or "function" in name else "beyond text"
            what = f"'{place}{name}' ({kind}) has no place in the template"
            raise Problem(kind, f"{place}{name}", what, "Say it as text, or delete the field")


def _history(value: object) -> list[dict]:
    if not isinstance(value, list) or not all(isinstance(e, dict) for e in value):
        mend = 'Write [{"instruction": "...", "output": "..."}, ...]'
        raise Problem("type", "history", f"'history' is {_short(value)}", mend)
    earlier = []
    for i, e in enumerate(value):
        said = [key for key in ("instruction", "input", "output") if key != "input" or e.get(key)]
        earlier.append({key: _text(e.get(key), f"history[{i}].{key}") for key in said})
        earlier[-1] |= {"weight": 0} if e.get("weight") == 0 else {}
    return earlier


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
        _within(turn, f"{place}.")
        said = turn.get("role") or turn.get("from")
        role = ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            mend = "Give each message a role: system, user or assistant (tool calling has no place in the template)"
            raise Problem("roles", place, f"{place} has the role {_short(said)}", mend)
        if (weight := next((turn[name] for name in LEARN if turn.get(name) is not None), 1)) not in (0, 1):
            raise Problem("weight", place, f"the weight of {place} is {_short(weight)}", "Only 0 and 1 can be obeyed")
        text = turn.get("value") if turn.get("content") is None else turn["content"]
        turns.append((role, _text(text, place, optional=role == "system"), {"weight": 0} if weight == 0 else {}))
    first = turns[0][0] == "system"
    system = turns.pop(0)[1] if first else ""
    for i, (role, *_) in enumerate(turns):
        if role != (expected := ("user", "assistant")[i % 2]):
            place = f"{field}[{i + first}]"
            mend = "Let user and assistant take turns, the user first"
            raise Problem("roles", place, f"{place} is the {role}'s, where the {expected} should speak", mend)
    if len(turns) % 2 or not turns:
        raise Problem("roles", field, f"{field!r} ends without an answer", "End with a message of the assistant")
    pairs = [{"instruction": turns[i][1], "output": turns[i + 1][1]} | turns[i + 1][2] for i in range(0, len(turns), 2)]
    while pairs and "weight" in pairs[-1]:  # behind the last answer that is learned nothing teaches
        pairs.pop()
    if not pairs:
        raise Problem("weight", field, f"{field!r} has no answer to learn: every weight is 0", "Give one a weight of 1")
    return pairs[-1] | ({"history": pairs[:-1]} if pairs[:-1] else {}) | ({"system": system} if system else {})


def _notes(row: dict) -> list[Problem]:
    """What looks wrong in a row; a template that its instruction carries is taken off."""
    notes = []
    while (carried := CARRIED.fullmatch(row["instruction"])) and (not carried[2] or row["input"] in ("", carried[2])):
        row["instruction"], row["input"] = carried[1], carried[2] or row["input"]
        what = "'instruction' carried a template, which was taken off"
        notes.append(Problem("template", "instruction", what, "Give the bare text; the template is put around it"))
    texts = [(key, row[key]) for key in ("instruction", "input", "output") if row[key]]
    texts += [("system", row["system"])] if "system" in row else []
    for i, exchange in enumerate(row.get("history", ())):
        texts += [(f"history[{i}].{key}", text) for key, text in exchange.items() if key != "weight"]
    for key, text in texts:
        if ("<" in text or "[" in text or "#" in text or ": " in text) and (found := CONTROL.search(text)):
            what = f"{key!r} holds {found[0]!r}, which is trained as the letters that it is"
            notes.append(Problem("control text", key, what, "Delete it if another template left it there"))
        if len(text) < 20 and key.endswith("output") and text.strip().lower() in NOTHING:
            what = f"{key!r} is {_short(text)}, which many programs write for an empty cell"
            notes.append(Problem("stand-in", key, what, "Delete the row if there is no answer"))
    return notes


def _text(value: object, field: str, optional: bool = False) -> str:
    """`value`, if it is a text that holds something. What is `optional` may be missing or empty, and is "" then."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "text" in part for part in value):
        plain = all(str(p.get("type") or "text").endswith("text") and isinstance(p["text"], str) for p in value)
        value = "".join(part["text"] for part in value) if plain else value  # as chat templates do
    if optional and (value is None or value != value or (isinstance(value, str) and not value.strip())):
        return ""
    if not isinstance(value, str):
        mend = "It must be a text" + (", or be left out" if optional else "")
        raise Problem("null" if value is None else "type", field, f"{field!r} is {_short(value)}", mend)
    if not value.strip():
        raise Problem("empty", field, f"{field!r} is {_short(value)}", "It must be a text that is not empty")
    return _intact(value, field)


def _intact(value: str, field: str) -> str:
    """`value`, if it holds no byte that could not be read and no half of a character."""
    if not value.isascii() and (half := HALF.search(value)):
        what = "bytes that are not UTF-8" if "\udc80" <= half[0] <= "\udcff" else "half a character"
        raise Problem("encoding", field, f"{field!r} holds {what}", "Write it again, as UTF-8")
    return value


def _short(value: object) -> str:
    return json.dumps(value, default=str)[:40]
