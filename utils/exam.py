"""Asking a model, and marking what it says."""

from utils import template


def answer(model, tokenizer, rows: list[dict], max_new_tokens: int = 16, batch_size: int = 100) -> list[str]:
    """Greedy answers to the prompts of `rows`, in their order, without surrounding space.

    Prompts are padded on the left (on the right the model would continue the padding) and sorted by length, so that
    little is padded.
    """
    import torch
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    prompts = [template.encode_prompt(tokenizer, row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    answers = [""] * len(rows)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer.pad({"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs.to(model.device), generation_config=greedy)
        texts = tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text.strip()
    model.train(was_training)
    return answers


def interval(right: int, asked: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share (Wilson 1927; scipy's binomtest), as (low, high)."""
    from scipy.stats import binomtest

    found = binomtest(right, asked).proportion_ci(0.95, method="wilson")
    return found.low, found.high


def mark(rows: list[dict], answers: list[str]) -> dict[str, dict]:
    """Marks by level, in the order in which the levels appear.

    Exact match: the answer is the expected output, to the letter. Contains: the output stands somewhere in the
    answer.

    Returns:
        {level: {"asked": n, "exact": n, "contains": n}}
    """
    marks: dict[str, dict] = {}
    for row, said in zip(rows, answers, strict=True):
        level = marks.setdefault(row.get("level", "all"), {"asked": 0, "exact": 0, "contains": 0})
        expected = row["output"].strip()  # as the template writes it
        level["asked"] += 1
        level["exact"] += said == expected
        level["contains"] += expected in said
    return marks


def loss(model, tokenizer, encoded, batch_size: int = 32) -> float:
    """Mean cross-entropy a completion token over encoded rows, in nats: the held-out loss.

    Every token counts once, however the rows are batched.
    """
    import torch
    from transformers import DataCollatorForSeq2Seq

    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    for start in range(0, len(encoded), batch_size):
        rows = [encoded[i] for i in range(start, min(start + batch_size, len(encoded)))]
        batch = collate(rows).to(model.device)
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        labels = batch["labels"][:, 1:]
        summed = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        total += summed.item()
        tokens += int((labels != -100).sum())
    model.train(was_training)
    return total / tokens
