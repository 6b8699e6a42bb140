"""Duplicates, near duplicates, contradictions, leaks: what is one, and what only looks like one."""

import random

import pytest

from utils.data import duplicates

LONG = [f"word{i}" for i in range(80)]


def row(instruction: str, output: str = "o", **more) -> dict:
    return {"instruction": instruction, "input": "", "output": output, **more}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Where is Ada?", "  where is ADA", True),
        ("What is 3 + 4?", "What is 3 - 4?", False),
        ("What is C?", "What is C++?", False),
        ("What is 3.5?", "What is 35?", False),
        ("🎈", "🧺", False),
        ("Größe", "GRÖSSE", False),
        ("سلام", "سلام", True),
    ],
)
def test_two_questions_are_the_same_when_only_typing_differs(one, other, same):
    assert (duplicates.question(row(one)) == duplicates.question(row(other))) is same


def test_an_answer_of_punctuation_alone_is_still_an_answer():
    assert duplicates.everything(row("a", "?")) != duplicates.everything(row("a", "!"))


def test_history_and_system_belong_to_the_question():
    later = row("And then?", history=[{"instruction": "a", "output": "b"}])
    assert len({duplicates.question(r) for r in (row("And then?"), later, {**later, "system": "s"})}) == 3


def test_the_first_of_several_stays():
    assert duplicates.duplicates(["a", "b", "a", "a", "b"]) == {2: 0, 3: 0, 4: 1}


def test_near_duplicates_are_found_and_their_original_is_named():
    edited = " ".join(LONG[:40] + ["new"] + LONG[40:])
    other = " ".join(reversed(LONG))
    assert duplicates.near_duplicates([" ".join(LONG), other, edited]) == {2: 0}
    assert duplicates.near_duplicates([edited, other], against=[" ".join(LONG)]) == {0: 0}
    assert duplicates.near_duplicates([edited, " ".join(LONG)], threshold=0.99) == {}
    assert duplicates.near_duplicates(["a b c d", "e f g h"], threshold=0.0) == {}  # never even candidates


def test_nearly_all_planted_near_duplicates_are_found():
    rng = random.Random(0)
    texts, planted = [], {}
    for i in range(200):
        words = [f"w{rng.randrange(5000)}" for _ in range(60)]
        texts.append(" ".join(words))
        for place in rng.sample(range(60), 1 + i % 4):
            words[place] = "changed"
        texts.append(" ".join(words))
        if duplicates.similarity(*texts[-2:]) >= 0.7:
            planted[len(texts) - 1] = len(texts) - 2
    found = duplicates.near_duplicates(texts, 0.7)
    assert len(planted) > 100
    assert len(found.items() & planted.items()) >= 0.99 * len(planted) and found.keys() <= planted.keys()


def test_a_contradiction_takes_all_its_rows():
    rows = [row("a", "1"), row("A?", "2"), row("b", "1"), row("b", "1")]
    assert duplicates.contradictions(rows) == {0, 1}
