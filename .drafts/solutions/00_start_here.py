# %% [markdown]
# # Solutions: start here
#
# BADGE
#
# The exercises of [00_start_here](../00_start_here.ipynb), answered. Try them there first.

# %%
BOOTSTRAP

# %% [markdown]
# The exercises need the trained model. If notebook 00 has run, its adapter is taken from `outputs/adapters`; if not, it is trained now.

# %%
from collections import Counter

from utils import adapter, dataset, exam, exercise, loading, profile

world = profile.pick("pocket")
recipe, data, tokenizer = world.recipe, dataset.load(world), loading.load_tokenizer(world.base)
questions = data.exam
asked = questions[0]

# %%
before_answer = exam.answer(loading.load_base(world.base), tokenizer, [asked], 48)[0]
model = adapter.trained(world.base, tokenizer, data.train, recipe)
after_answers = exam.answer(model, tokenizer, questions, 48)

# %% [markdown]
# **1.** An optimizer step reads `batch_size` rows, `accumulation` times.

# %%
rows_seen = recipe.steps * recipe.batch_size * recipe.accumulation
print(f"{rows_seen:,} rows seen, {len(data.train):,} rows in the file")

# %%
exercise.check("rows seen", rows_seen, right=recipe.steps * recipe.batch_size * recipe.accumulation, hint="an optimizer step reads batch_size rows, accumulation times", strict=True)

# %% [markdown]
# Less than one pass: most rows are seen once, and some never.
#
# **2.** Count the wrong answers by attribute.

# %%
pairs = [(r, a) for r, a in zip(questions, after_answers, strict=True) if r["level"] == "new phrasing"]
wrong = Counter(r["attribute"] for r, a in pairs if a != r["output"])
hardest = wrong.most_common(1)[0][0]

# %%
exercise.check("hardest", hardest, right=lambda name: wrong[name] == max(wrong.values(), default=-1), hint="count the rows where the answer differs from row['output'], by attribute", strict=True)

# %% [markdown]
# **3.** Without the adapter the base says what it said before, to the letter: training has not touched it.

# %%
with model.disable_adapter():
    off = exam.answer(model, tokenizer, [asked], 48)[0]

# %%
exercise.check("adapter off", off, right=before_answer, hint="call exam.answer inside the with block; it returns a list", strict=True)
