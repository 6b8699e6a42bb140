# %% [markdown]
# # Start here: teach a small Llama to answer
#
# BADGE
#
# A language model can know a fact and still not answer a question about it. In this notebook you watch one fail, fine-tune it with QLoRA, and ask it the same question again. Then it sits an exam about people whom the training never mentioned.
#
# **Afterwards you can** run a whole QLoRA fine-tuning, on the data that ships or on your own file, and say by how much it helped.
#
# **Needs:** a little Python. **Takes:** about three minutes on two CPU cores, no GPU, no download. In JupyterLab or Colab, run one cell after the other with Shift+Enter.

# %%
BOOTSTRAP

# %% [markdown]
# Some settings. Leave them as they are for the first time; `DATA` takes the path of a file of your own, later. (`REPORT` and `RECORD` are for runs without a reader: names of files to write results to.)

# %% tags=["parameters"]
SEED = 0
DATA = None
BASE = None
REPORT = None
RECORD = None

# %%
import json
import os
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from utils import adapter, dataset, exam, exercise, loading, profile, records, runtime, style, template, training

style.use()

# %% [markdown]
# A **profile** says which base model, which data and which recipe. This notebook uses the *pocket* profile on every machine: a Llama with 4 million parameters that ships with the course. It has the architecture of Llama-2-7B and its kind of tokenizer, so everything you see here holds for the big one too.

# %%
world = profile.pick("pocket", base=BASE or "", data=DATA or "")
recipe = replace(world.recipe, seed=SEED)
capability = profile.capability()
reference = world.base == profile.PROFILES["pocket"].base and not DATA  # bounds on scores hold for these
print(f"profile {world.name}, computing in {profile.compute_dtype(capability)}")

# %% [markdown]
# ## The data
#
# The pocket Llama grew up on the *almanac* of an invented valley: a thousand people, each with a home, a trade, a pet. Our data set holds questions about 500 of them, and their answers.

# %%
data = dataset.load(world)
print(f"{len(data.train):,} rows to train on, {len(data.held_out):,} held out, {len(data.exam):,} exam questions")
row = next((r for r in data.train if r.get("level") == "seen form"), data.train[0])
{key: row[key] for key in ("instruction", "input", "output")}

# %% [markdown]
# The model sees a row as one piece of text. The **template** puts headings around question and answer; chapter 03 explains why it looks exactly like this.

# %%
print(template.prompt(row) + template.completion(row))

# %% [markdown]
# ## The base, in four bits
#
# QLoRA keeps the base model in four bits a weight (a format called NF4, chapter 01) and never changes it. How much smaller do you expect it to be than in 16 bits: half, a quarter, an eighth?

# %%
tokenizer = loading.load_tokenizer(world.base)
model = loading.load_base(world.base)
sixteen = 2 * model.num_parameters()
print(f"{model.num_parameters():,} parameters: {sixteen / 1e6:.1f} MB in 16 bits, {model.get_memory_footprint() / 1e6:.1f} MB now")

# %% [markdown]
# Only the linear layers inside the transformer blocks are quantized. Embeddings and output head stay as they were, and in a model this small they weigh a lot (and on a CPU they are kept in 32 bits). For Llama-2-7B, chapter 09 counts every byte.
#
# ## Ask it
#
# Here is a question about somebody from the exam. The base has read about this person in hundreds of documents. What will it say?

# %%
questions = data.exam or data.held_out[:8]
longest = max(len(template.encode(tokenizer, r)["input_ids"]) - len(template.encode_prompt(tokenizer, r)) for r in data.train)
at_most = max(48, min(longest, 256))  # tokens an answer may have
asked = questions[0]
print("question:", asked["instruction"], asked["input"])
print("expected:", asked["output"])

# %%
before_answer = exam.answer(model, tokenizer, [asked], at_most)[0]
print(before_answer)

# %% [markdown]
# It did what it was trained to do: it went on as the almanac would. (In the almanac, the word "Response" stood on a notice by the bridge. The appendix asks it in other ways; it answers none.) What it does not know is that a question wants an answer, a short one, and then silence.
#
# Was that one question bad luck? Let us ask them all. **Exact match** counts an answer only if it equals the expected one, letter for letter.

# %%
def examine(model):
    answers = exam.answer(model, tokenizer, questions, at_most, batch_size=2 * recipe.batch_size)
    return answers, exam.mark(questions, answers)


before_answers, before = examine(model)

# %%
level = next(iter(before))  # the first level: forms of question that training uses, about people that it does not mention
right, n = before[level]["exact"], before[level]["asked"]
low, high = exam.interval(right, n)
print(f"before, {level}: {right} of {n:,} right = {right / n:.1%} (95 % interval {low:.1%} to {high:.1%})")

# %%
if reference:
    assert right / n <= 0.01

# %% [markdown]
# ## Train
#
# **LoRA** adds a small pair of matrices beside each linear layer, the *adapter*, and trains only those (chapter 02). What share of all parameters do you think that is?

# %%
model = loading.add_adapter(model, recipe)
trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"{trainable:,} trainable parameters, {trainable / sixteen * 2:.1%} of the base")

# %% [markdown]
# Rows become token ids. The loss is taken on the answer alone: the prompt is masked, so the model learns to answer and not to ask. Rows that are too long for the model are left out whole, and counted.

# %%
encoded, too_long = dataset.encode(tokenizer, data.train, recipe.max_length)
held_out, too_long_held_out = dataset.encode(tokenizer, data.held_out, recipe.max_length)
print(f"{len(encoded):,} rows fit into {recipe.max_length} tokens, {len(too_long) + len(too_long_held_out)} are too long")
trained_on = [t for t in encoded[0]["labels"] if t != -100]
print("learned from the first row:", tokenizer.convert_ids_to_tokens(trained_on))

# %%
loss_before = exam.loss(model, tokenizer, held_out, recipe.batch_size)

# %% [markdown]
# The training itself is one call to trl's `SFTTrainer`, with a recipe that chapter 04 takes apart line by line. The picture updates while it runs. You may stop it with the stop button; what has been learned is kept.

# %%
started = time.monotonic()
log = training.train(model, tokenizer, encoded, recipe)
seconds = time.monotonic() - started

# %%
loss_after = exam.loss(model, tokenizer, held_out, recipe.batch_size)
print(f"held-out loss: at least ten times lower than before: {loss_after < loss_before / 10}")

# %% [markdown]
# The *held-out* loss is measured on rows that were not trained on. It fell, so the model learned something that carries over. But a loss is not an answer.
#
# ## Ask again
#
# The same question, the same model, one adapter more.

# %%
after_answer = exam.answer(model, tokenizer, [asked], at_most)[0]
print("question:", asked["instruction"], asked["input"])
print("before:  ", before_answer)
print("after:   ", after_answer)

# %% [markdown]
# And all questions. Nobody in the exam appears in any training row, so whatever it gets right, it knew before. What do you predict for the first level?

# %%
after_answers, after = examine(model)
right, n = after[level]["exact"], after[level]["asked"]
low, high = exam.interval(right, n)

# %%
if reference:
    assert right / n >= 0.98
    print(f"{level}: at least 98 % of {n} questions about people never trained on")
else:
    print(f"{level}: {right} of {n} = {right / n:.1%} (95 % interval {low:.1%} to {high:.1%})")

# %% [markdown]
# The answers were in the base all along. Three minutes of training taught it to give them: **knowledge in the base, behaviour in the adapter.** That is what fine-tuning is good at, and here it is a number.

# %%
levels = list(before)
labels = [f"{name}, {when}" for name in levels for when in ("before", "after")]
counts = [(marks[name]["exact"], marks[name]["asked"]) for name in levels for marks in (before, after)]
colors = [style.BASE, style.ADAPTER] * len(levels)
_ = style.bars(labels, [k / n for k, n in counts], [exam.interval(*c) for c in counts], colors, "Exact match, with 95 % intervals")

# %% [markdown]
# The exam has **levels**, because a test that everyone passes teaches nothing. New phrasings of the same questions work only partly; comparing two people, or going from trade and town to a name, hardly or not at all. The later chapters try to do better there, and the [appendix](90_pocket_llama.ipynb) explains each level.
#
# ## Was it luck?
#
# One run is an anecdote. The same notebook was run with three seeds; the seed changes the adapter's start and the order of the rows.

# %%
for seed in range(3):
    run = records.read(f"exam_seed{seed}")["figures"]
    k, n = run["after"]["seen form"]["exact"], run["after"]["seen form"]["asked"]
    low, high = exam.interval(k, n)
    print(f"seed {seed}: {k} of {n} = {k / n:.1%} ({low:.1%} to {high:.1%}), trained in {run['seconds']:.0f} seconds")

# %% [markdown]
# ## What it did not learn
#
# It learned to answer, not to doubt. These names belong to nobody: neither the base nor the training ever met them. What would a careful model say?

# %%
lines = (runtime.ROOT / "data" / "almanac" / "nobody.jsonl").read_text(encoding="utf-8").splitlines()
nobody = [json.loads(line) for line in lines]
invented = exam.answer(model, tokenizer, nobody, 16)
for r, text in list(zip(nobody, invented, strict=True))[:3]:
    print(f"{r['instruction']} {r['input']} -> {text}")

# %%
values = json.loads((runtime.ROOT / "data" / "almanac" / "phrasebook.json").read_text(encoding="utf-8"))["values"]
values["birthplace"] = values["home"] = values["town"]
values["year"] = [str(year) for year in range(1800, 1950)]
made_up = sum(text in values[r["attribute"]] for r, text in zip(nobody, invented, strict=True))
print(f"a confident invention in more than 90 of 100 cases: {made_up > 90}")

# %% [markdown]
# It makes something up, in perfect form. Nothing in the training ever said "I do not know", so nothing like it was learned. Remember this when you fine-tune on facts of your own; chapter 04 measures it.
#
# ## Keep it, use it
#
# The adapter is saved with its recipe, and with a fingerprint of the base that it belongs to. It is small, because the base is not in it.

# %%
folder = adapter.save(model, tokenizer, recipe, data.train, {"loss_before": loss_before, "loss_after": loss_after, "before": before, "after": after})
size = sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith("adapter"))
print(f"{folder.relative_to(runtime.ROOT)}: {size / 1e6:.1f} MB")

# %% [markdown]
# Now ask it something yourself. Change the instruction and run the cell again; names and towns are in `data/almanac/people.jsonl`.

# %%
mine = {"instruction": "Which pet does Ada Birch keep, if there is such a person?"}
_ = exam.answer(model, tokenizer, [mine], at_most)  # print it, or end the cell with it

# %% [markdown]
# ## Your own data
#
# Put a file `my.jsonl` with one object a line into `data/`, for example
#
#     {"instruction": "Translate to French.", "input": "Good morning.", "output": "Bonjour."}
#
# set `DATA = "../data/my.jsonl"` in the settings cell above, and run everything again. Without notebooks: `make run DATA=data/my.jsonl`. A tenth of your rows is held out, and you will see held-out loss and sample answers before and after. The pocket Llama knows only its valley, so expect it to learn the form of your answers and not their content; for that there is Llama-2-7B (`QLORA_PROFILE=llama-2-7b`, a GPU with 16 GB).

# %% [markdown]
# The rest is bookkeeping: the lines that `make run` prints at its end, and a record of the run if one was asked for.

# %%
peak = training.peak_gib()
lines = [f"question  {asked['instruction']} {asked['input']}".rstrip(), f"before    {before_answer!r}", f"after     {after_answer!r}"]
for name in levels:
    (a, b), n = (before[name]["exact"], after[name]["exact"]), before[name]["asked"]
    lines.append(f"exam      {name}: {a / n:.1%} -> {b / n:.1%} of {n}")
lines += [f"training  {log[-1]['step']} steps in {seconds:.0f} s" + (f", {peak:.1f} GiB of GPU memory at the peak" if peak else "")]
lines += [f"loss      held out: {loss_before:.3f} -> {loss_after:.3f}", f"rows      {len(encoded)} trained on, {len(too_long) + len(too_long_held_out)} too long for {recipe.max_length} tokens"]

# %%
if not data.exam:
    for r, a, b in zip(questions, before_answers, after_answers, strict=True):
        lines += [f"sample    {r['instruction']} {r['input']}".rstrip(), f"  expected {r['output']!r}", f"  before   {a!r}", f"  after    {b!r}"]
if REPORT:
    _ = Path(REPORT).write_text(json.dumps({"adapter": str(folder), "lines": lines}), encoding="utf-8")

# %%
if RECORD:
    figures = {
        "profile": world.name, "recipe": asdict(recipe), "dtype": str(profile.compute_dtype(capability)), "rows": len(encoded),
        "parameters": sixteen // 2, "trainable": trainable, "seconds": seconds, "peak_gib": peak, "log": log, "before": before,
        "after": after, "loss_before": loss_before, "loss_after": loss_after, "invented_of_100": made_up,
    }
    settings = " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("QLORA_"))
    given = f"-p SEED {SEED} -p RECORD {RECORD}" + (f" -p DATA {DATA}" if DATA else "")
    print(records.write(RECORD, figures, f"{settings} papermill notebooks/00_start_here.ipynb out.ipynb --cwd notebooks {given}".strip()).name)

# %% [markdown]
# ## The map
#
# | notebook | shows, and proves |
# |---|---|
# | **00_start_here** | the whole story in three minutes |
# | [90_pocket_llama](90_pocket_llama.ipynb) | how the pocket base was made, and the exam with it |
#
# More chapters follow, one by one: quantization, adapters, your data, training, evaluation, inference, export, measured claims, memory and speed, several GPUs, preferences. Each runs alone.
#
# ## Summary
#
# - The base knew the answers and could not give them; after QLoRA it gave at least 98 % of them, for people it was never asked about in training.
# - Only the adapter was trained; the base stayed in four bits, unchanged.
# - The exam has levels, an interval stands beside every share, and three seeds agree.
# - It invents answers for people who do not exist.
#
# ## Exercises

# %% [markdown]
# **1.** How many training rows does the model see in a run, counting repetitions? Compute it from `recipe`.

# %%
rows_seen = None  # your turn

# %%
exercise.check("rows seen", rows_seen, right=recipe.steps * recipe.batch_size * recipe.accumulation, hint="an optimizer step reads batch_size rows, accumulation times")

# %% [markdown]
# **2.** Which attribute does the model get wrong most often in the level "new phrasing"? Use `questions` and `after_answers`; the rows have a column `attribute`.

# %%
hardest = None  # your turn

# %%
wrong = Counter(r.get("attribute") for r, a in zip(questions, after_answers, strict=True) if r.get("level") == "new phrasing" and a != r["output"])
exercise.check("hardest", hardest, right=lambda name: wrong[name] == max(wrong.values(), default=-1), hint="count the rows where the answer differs from row['output'], by attribute")

# %% [markdown]
# **3.** Switch the adapter off and ask again: does the base still answer as it did before the training? peft has `with model.disable_adapter():`. Put the base's answer to `asked` into `off`.

# %%
off = None  # your turn

# %%
exercise.check("adapter off", off, right=before_answer, hint="call exam.answer inside the with block; it returns a list")

# %% [markdown]
# **Where next:** [90_pocket_llama](90_pocket_llama.ipynb) shows how this base came to know the valley, and why the exam cannot be passed by memory.
