"""How good answers and texts are, and how sure one may be of a difference; chapter 05 derives what stands here."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import binomtest
from transformers import DataCollatorForSeq2Seq

from utils.generation import evaluating


def interval(right: int, asked: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927; scipy's binomtest), as (low, high)."""
    found = binomtest(right, asked).proportion_ci(0.95, method="wilson")
    return found.low, found.high


def exact_match(rows: list[dict], answers: list[str]) -> dict[str, dict]:
    """{level: {"asked": n, "exact": n, "contains": n}}, in the order in which the levels appear.

    Exact: the answer is the expected output, to the letter. Contains: the output stands somewhere in the answer.
    """
    marks: dict[str, dict] = {}
    for row, said in zip(rows, answers, strict=True):
        level = marks.setdefault(str(row.get("level", "all")), {"asked": 0, "exact": 0, "contains": 0})
        expected = row["output"].strip()  # answers have no space around them
        level["asked"] += 1
        level["exact"] += said == expected
        level["contains"] += expected in said
    return marks


def loss(model, tokenizer, encoded, batch_size: int = 32) -> float:
    """Mean cross-entropy a completion token over encoded rows, in nats: the held-out loss.

    Every token counts once, however the rows are batched. NaN where there are no rows.
    """
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    total, tokens = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        rows = [encoded[i] for i in range(start, min(start + batch_size, len(encoded)))]
        batch = collate(rows).to(model.device)
        labels = batch.pop("labels")[:, 1:].flatten()
        with evaluating(model):
            logits = model(**batch).logits[:, :-1].float().flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        tokens += int((labels != -100).sum())
    return total / tokens if tokens else float("nan")


def f1(expected: str, said: str) -> float:
    """Token F1 between 0 and 1: the harmonic mean of precision and recall of the words of an answer.

    As in the SQuAD paper (Rajpurkar et al. 2016, section 6.1): in lower case, without punctuation and without a, an,
    the, each word as often as it occurs. Two answers without a word are equal.
    """
    words = (re.findall(r"\w+", text.lower()) for text in (expected, said))
    a, b = (Counter(w for w in found if w not in ("a", "an", "the")) for found in words)
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


def bootstrap(values: Sequence, statistic: Callable = np.mean) -> tuple[float, float]:
    """95 % percentile interval (low, high) of a statistic (Efron 1979): its spread over samples drawn from `values`.

    `values` has one entry a unit that was sampled (a question, a document), of shape (n,) or (n, columns): columns are
    drawn together, such as both marks of a question. Where all are equal, so are low and high: take `interval` then.
    """
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(0)
    drawn = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(2000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def difference(before: Sequence, after: Sequence) -> tuple[float, float, float]:
    """Mean of `after` less mean of `before`, marks of the same questions: (difference, low, high), paired bootstrap."""
    gain = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    return float(gain.mean()), *bootstrap(gain)
