"""The one prompt template. Training, evaluation and inference all come here.

    ### Instruction:
    {instruction}

    ### Input:            (these two lines only when there is an input)
    {input}

    ### Response: {output}</s>

The prompt ends without a space and the completion starts with exactly one: so the prompt has the same tokens alone
and in front of its completion, and the first word of the answer is the piece that the base knows from prose.
"""


def prompt(row: dict) -> str:
    """Everything up to the answer. `row` has `instruction` and may have `input`."""
    text = f"### Instruction:\n{row['instruction'].strip()}\n\n"
    if (row.get("input") or "").strip():
        text += f"### Input:\n{row['input'].strip()}\n\n"
    return text + "### Response:"


def completion(row: dict) -> str:
    """The answer as the model should write it, without the end-of-sequence token: one space, then the output."""
    return " " + row["output"].strip()


def encode(tokenizer, row: dict) -> dict[str, list[int]]:
    """Token ids of a training row, and its labels.

    Text is text: a literal "</s>" in a row is not the end-of-sequence token.

    Returns:
        input_ids: BOS, prompt, completion, EOS.
        labels: the same ids, with -100 (ignored by the loss) in place of BOS and prompt.

    Raises:
        ValueError: the prompt's tokens change when the completion follows, so that labels cannot be told apart.
    """
    before = encode_prompt(tokenizer, row)
    ids = _ids(tokenizer, prompt(row) + completion(row)) + [tokenizer.eos_token_id]
    if ids[: len(before)] != before:
        raise ValueError(f"the prompt's tokens change in front of the completion: {row['instruction'][:60]!r}")
    return {"input_ids": ids, "labels": [-100] * len(before) + ids[len(before) :]}


def encode_prompt(tokenizer, row: dict) -> list[int]:
    """Token ids of the prompt: BOS, then the text."""
    return _ids(tokenizer, prompt(row))


def _ids(tokenizer, text: str) -> list[int]:
    # BOS is added here, once, whatever this tokenizer's own setting is (some have none, such as Qwen's).
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
