"""How good an answer or a text is, and how sure one may be of a difference: chapter 05 derives what stands here."""

import re
from collections import Counter
from collections.abc import Callable, Sequence


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation and without a, an, the."""
    return [w for w in re.findall(r"\w+", text.lower()) if w not in ("a", "an", "the")]


def f1(expected: str, said: str) -> float:
    """Token F1 between 0 and 1: the harmonic mean of precision and recall of the words of an answer.

    As in the SQuAD paper (Rajpurkar et al. 2016, section 6.1), each word as often as it occurs. Two answers without a
    word are equal.
    """
    a, b = Counter(words(expected)), Counter(words(said))
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


def bootstrap(
    values: Sequence, statistic: Callable | None = None, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a statistic (Efron 1979): its spread over samples drawn from `values`.

    Args:
        values: one entry a unit that was sampled (a question, a document), of shape (n,) or (n, columns). What belongs
            together is drawn together: for a paired difference give both marks of a question in one row.
        statistic: a function of such an array; by default the mean.

    Returns:
        (low, high). Where all values are equal they tell nothing about their spread and both are that value: for
        shares near 0 or 1 take `exam.interval`.
    """
    import numpy as np

    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    statistic = statistic or np.mean
    drawn = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(resamples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def difference(before: Sequence, after: Sequence) -> tuple[float, float, float]:
    """Mean of `after` less mean of `before`, marks of the same questions: (difference, low, high), paired bootstrap."""
    import numpy as np

    gain = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    return float(gain.mean()), *bootstrap(gain)


def mcnemar(before: Sequence, after: Sequence) -> tuple[int, int, float]:
    """Exact McNemar test (McNemar 1947; the binomial form) of two lists of right (True) and wrong answers.

    Returns:
        (questions that were lost, questions that were gained, two-sided p-value); p is 1 where nothing changed.
    """
    from scipy.stats import binomtest

    lost = sum(bool(a) and not b for a, b in zip(before, after, strict=True))
    gained = sum(bool(b) and not a for a, b in zip(before, after, strict=True))
    return lost, gained, float(binomtest(gained, lost + gained).pvalue) if lost + gained else 1.0


def token_losses(model, ids: Sequence[int], window: int, stride: int):
    """Loss in nats of each token of `ids` but the first; exp of the mean is the perplexity of the text.

    A window of `window` tokens moves on by `stride` tokens, and only tokens not scored before are scored: each sees at
    least window - stride tokens in front of it, once there are as many.

    Returns:
        fp32 tensor on the CPU, of shape (len(ids) - 1,).

    Raises:
        ValueError: a stride that would leave tokens out.
    """
    import torch

    if not 0 < stride < window:
        raise ValueError(f"stride {stride}: take 1 to {window - 1}, less than the window of {window}")
    was_training = model.training
    model.eval()
    losses, scored = [], 1
    for start in range(0, max(1, len(ids) - window + stride), stride):
        piece = torch.tensor([ids[start : start + window]], device=model.device)
        with torch.no_grad():
            logits = model(piece).logits[0, :-1].float()
        new = torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="none")
        losses.append(new[scored - start - 1 :].cpu())
        scored = start + piece.shape[1]
    model.train(was_training)
    return torch.cat(losses)
