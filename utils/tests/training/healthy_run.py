"""A program for test_adapter: what a learner's notebook does with utils, from a base's folder to an adapter.

    python healthy_run.py BASE

Everything it writes goes into the current folder.
"""

# ruff: noqa: E402 - quiet() comes before the imports, as it does in a notebook
from utils import evaluation, generation, runtime
from utils.data import dataset
from utils.models import adapters, loading
from utils.training.trainer import train
from utils.tests import tiny

runtime.quiet()

import sys
from dataclasses import replace
from pathlib import Path

import peft
import transformers


adapter.OUTPUTS = Path.cwd()
base = sys.argv[1]
tokenizer = loading.load_tokenizer(base)
encoded, _ = dataset.encode(tokenizer, tiny.ROWS, tiny.RECIPE.max_length)
# The recipe of the pocket profile's kind, then of the 7B profile's.
big = replace(tiny.RECIPE, gradient_checkpointing=True, optimizer="paged_adamw_8bit", batch_size=2, accumulation=2)
for recipe in (tiny.RECIPE, big):
    model = loading.load_base(base)
    generation.answer(model, tokenizer, tiny.ROWS)
    model = adapters.add(model, recipe)
    train(model, tokenizer, encoded, recipe)
    answers = generation.answer(model, tokenizer, tiny.ROWS)
    folder = adapters.save(model, tokenizer, recipe, tiny.ROWS, {"loss": evaluation.loss(model, tokenizer, encoded)})
    again = peft.PeftModel.from_pretrained(loading.load_base(base), folder)
    assert generation.answer(again, transformers.AutoTokenizer.from_pretrained(folder), tiny.ROWS) == answers
print("healthy")
