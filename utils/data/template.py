"""The one prompt template. Training, evaluation and inference all come here.

    {system}              (this line and an empty one only when the row has a system text)

    ### Instruction:
    {instruction}

    ### Input:            (these two lines only when there is an input)
    {input}

    ### Response: {output}</s>

The prompt ends without a space and the completion starts with exactly one: so the prompt has the same tokens alone
and in front of its completion, and the first word of the answer is the piece that the base knows from prose.

A conversation is a row with a `history`: its earlier exchanges, each with `instruction` and `output`. As token ids it
is its exchanges one behind the other, each exactly as if it stood alone: one BOS in front of all, one EOS behind each
answer. Every answer and its EOS are learned, because each is a place where the model must stop (but where the exchange
has the weight 0); a row of one exchange has one EOS. What the model wrote, its EOS included, is thus an exact prefix of
the next prompt.
"""

import re


def question(exchange: dict) -> str:
    """What stands in front of one answer: `instruction`, and `system` and `input` where there are such."""
    text = f"{exchange['system'].strip()}\n\n" if (exchange.get("system") or "").strip() else ""
    text += f"### Instruction:\n{exchange['instruction'].strip()}\n\n"
    if (exchange.get("input") or "").strip():
        text += f"### Input:\n{exchange['input'].strip()}\n\n"
    return text + "### Response:"


def completion(row: dict) -> str:
    """The answer as the model should write it, without the end-of-sequence token: one space, then the output.

    An indentation or a line break at its beginning stays (code lives on it); one space is the template's own.
    """
    text = row["output"].rstrip()
    return text if re.match(r" \S", text) else " " + text


def exchanges(row: dict) -> list[dict]:
    """The exchanges of a row, the last one last. The system text belongs to the first."""
    every = [*(row.get("history") or []), {k: row.get(k) for k in ("instruction", "input", "output")}]
    return [{**every[0], "system": row.get("system")}, *every[1:]]


def prompt(row: dict) -> str:
    """Everything up to the (last) answer, for people to read; `encode_prompt` has an EOS behind each earlier answer."""
    *earlier, last = exchanges(row)
    return "".join(f"{question(e)}{completion(e)}\n\n" for e in earlier) + question(last)


def encode(tokenizer, row: dict) -> dict[str, list[int]]:
    """Token ids of a training row, and its labels.

    input_ids: BOS; then for each exchange its question, its answer, EOS. labels: the same, with -100 (ignored by the
    loss) in place of BOS and questions. Text is text: a literal "</s>" in a row is not the end-of-sequence token.
    ValueError: a question's tokens change when the answer follows, so that labels cannot be told apart.
    """
    ids = _bos(tokenizer)
    labels = [-100] * len(ids)
    for exchange in exchanges(row):
        before = _ids(tokenizer, question(exchange))
        whole = _ids(tokenizer, question(exchange) + completion(exchange)) + [tokenizer.eos_token_id]
        if whole[: len(before)] != before:
            raise ValueError(f"the prompt's tokens change in front of the completion: {exchange['instruction'][:60]!r}")
        ids += whole
        learned = len(whole) - len(before) if exchange.get("weight", 1) else 0
        labels += [-100] * (len(whole) - learned) + whole[len(whole) - learned :]
    return {"input_ids": ids, "labels": labels}


def encode_prompt(tokenizer, row: dict) -> list[int]:
    """Token ids of everything up to the (last) answer, as `encode` has them."""
    *earlier, last = exchanges(row)
    ids = _bos(tokenizer)
    for exchange in earlier:
        ids += _ids(tokenizer, question(exchange) + completion(exchange)) + [tokenizer.eos_token_id]
    return ids + _ids(tokenizer, question(last))


def _bos(tokenizer) -> list[int]:
    # BOS is added here, once, whatever this tokenizer's own setting is (some have none, such as Qwen's).
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _ids(tokenizer, text: str) -> list[int]:
    # Rows beyond the tokenizer's own limit are counted and reported by `dataset`: no warning is needed here.
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


# The same for a list of messages, in Jinja: what chat programs read. Sentencepiece's tokenizers, those with <unk>, were
# trained with a space behind a control token. llama.cpp puts it there; transformers, which alone tells a template of
# unk_token, does not.
CHAT = (
    "{% set space = ' ' if unk_token is defined else '' %}{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ space + m['content'] | trim }}\n\n{% elif m['role'] == 'user' %}"
    "{{ space if loop.first or messages[loop.index0 - 1]['role'] != 'system' else '' }}"
    "### Instruction:\n{{ m['content'] | trim }}\n\n### Response:"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
