# %% [markdown]
# # Solutions: how the pocket Llama was made
#
# BADGE
#
# The exercises of [90_pocket_llama](../90_pocket_llama.ipynb), answered. Try them there first.

# %%
BOOTSTRAP

# %%
import json
import math

from utils import dataset, exercise, runtime

almanac = runtime.ROOT / "data" / "almanac"
book = json.loads((almanac / "phrasebook.json").read_text(encoding="utf-8"))
test = dataset.read(almanac / "test.jsonl")

# %% [markdown]
# **1.** A choice among *n* equally likely values holds log2(*n*) bits, and the six attributes are independent.

# %%
sizes = [70, 24, 24, 40, 24, 24]
bits = 1000 * sum(math.log2(n) for n in sizes)
print(f"{bits:,.0f} bits")

# %%
exercise.check("bits", bits, right=lambda b: math.isclose(b, 1000 * sum(map(math.log2, sizes)), rel_tol=0.01), hint="log2 of the choices, added up, for 1,000 people", strict=True)

# %% [markdown]
# About 30,000 bits of attributes for more than four million parameters: at two bits a parameter there would be room for hundreds of valleys. (The names take some room, too.)
#
# **2.** The rule "always the first" is the level that a comparison has to beat.

# %%
older = [row for row in test if row["level"] == "comparison"]
first_named = sum(row["person"].split(", ")[0] == row["output"] for row in older) / len(older)
print(f"{first_named:.1%}")

# %%
exercise.check("first named", first_named, right=sum(row["person"].split(", ")[0] == row["output"] for row in older) / 200, hint="row['person'] holds both names, in the order of the question", strict=True)

# %% [markdown]
# **3.** Any text will do that states two values of the book.

# %%
mine = "Here is what the neighbours say about the reader. The reader works as a teacher. These days the reader lives in Millbrook and keeps a cat."

# %%
stated = [v for values in book["values"].values() for v in values]
exercise.check("document", mine, right=lambda text: sum(v in text for v in stated) >= 2, hint="name at least two values of book['values'], such as a town and a trade", strict=True)
