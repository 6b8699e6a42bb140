"""Rows that say the same: exact and near duplicates, contradictions, and leaks between two sets of rows."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

PERMUTATIONS, BANDS, ROWS = 128, 32, 4  # a pair of similarity s becomes a candidate with 1 - (1 - s^ROWS)^BANDS


def words(text: str) -> list[str]:
    """The words of a text in lower case; signs count as words (C++ is not C, 3 + 4 not 3 - 4), punctuation does not."""
    return re.findall(r"""\w+|[^\w\s.,;:!?"'’]""", text.lower())


def question(row: dict) -> str:
    """All that stands in front of the (last) answer, as words; the template's headings are left out."""
    earlier = [text for e in row.get("history") or [] for text in (e["instruction"], e["output"])]
    texts = [row.get("system") or "", *earlier, row["instruction"], row.get("input") or ""]
    return " ".join(words(" ".join(texts)))


def everything(row: dict) -> str:
    """Question and answer, as words."""
    answer = " ".join(words(row["output"])) or row["output"].strip()  # which may be a single "?"
    return f"{question(row)} {answer}"


def shingles(text: str) -> set[str]:
    """Runs of three words; a shorter text is one run."""
    w = words(text)
    return {" ".join(w[i : i + 3]) for i in range(max(1, len(w) - 2))}


def similarity(one: str, other: str) -> float:
    """Jaccard: the share of all shingles of two texts that both have, from 0 to 1."""
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def duplicates(keys: Iterable[str]) -> dict[int, int]:
    """Position of each key that stood earlier -> position where it stood first."""
    first: dict[str, int] = {}
    return {i: first[key] for i, key in enumerate(keys) if first.setdefault(key, i) != i}


def contradictions(rows: Sequence[dict]) -> set[int]:
    """Positions of rows whose question has different answers: which of them is right, a program cannot know."""
    answers = defaultdict(set)
    for row in rows:
        answers[question(row)].add(everything(row))
    return {i for i, row in enumerate(rows) if len(answers[question(row)]) > 1}


def near_duplicates(texts: Sequence[str], threshold: float = 0.7, against: Sequence[str] = ()) -> dict[int, int]:
    """Texts that are nearly one that is kept: position -> position of that one.

    Candidates come from MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al., "Mining of Massive
    Datasets", chapter 3; datasketch does both); `similarity` then decides. So a few that are alike may be missed.

    The first of several that are alike is kept. Texts are compared with those `against` them, if any, not with others.
    """
    from datasketch import MinHash, MinHashLSH

    def sketches(texts: Sequence[str]) -> Iterator[MinHash]:
        encoded = (sorted(s.encode() for s in shingles(t)) for t in texts)
        return MinHash.generator(encoded, num_perm=PERMUTATIONS, seed=1)

    index = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS))
    for i, sketch in enumerate(sketches(against)):
        index.insert(i, sketch)
    kept = against or texts
    found: dict[int, int] = {}
    for i, sketch in enumerate(sketches(texts)):
        alike, nearest = max(((similarity(texts[i], kept[j]), -j) for j in index.query(sketch)), default=(-1.0, 0))
        if alike >= threshold:
            found[i] = -nearest
        elif not against:
            index.insert(i, sketch)
    return found
