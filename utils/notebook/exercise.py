"""Exercises that check themselves. A chapter ships unanswered, its solutions notebook answered and `strict`."""

import math
from collections.abc import Callable


def check(name: str, answer, right, hint: str, strict: bool = False) -> None:
    """Print whether `answer` (None: not tried yet) is right; beside a wrong one, `hint`: what to look at again.

    `right` is the expected value (numbers agree to one part in a thousand), or a function that is true for it. In
    solutions, which are `strict`, anything but a right answer is an AssertionError.
    """
    if answer is None:
        verdict = "your turn - replace None above"
    elif _agrees(answer, right):
        verdict = "right"
    else:
        verdict = f"not yet: {hint}"
    if strict and verdict != "right":
        raise AssertionError(f"{name}: {verdict} (answer: {answer!r})")
    print(f"{name}: {verdict}")


def _agrees(answer, right: object | Callable) -> bool:
    try:
        if callable(right):
            return bool(right(answer))
        if isinstance(right, int | float) and not isinstance(right, bool):
            return not isinstance(answer, bool) and math.isclose(float(answer), right, rel_tol=1e-3, abs_tol=1e-12)
        return bool(answer == right)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError):
        return False  # an answer of another kind (a word for a number, a wrong shape) is a wrong answer
