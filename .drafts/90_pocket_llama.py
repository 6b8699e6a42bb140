# %% [markdown]
# # Appendix: how the pocket Llama was made
#
# BADGE
#
# The chapters of this course run on a laptop because they use a Llama that is very much smaller than Llama-2-7B. This notebook makes that model: the world it knows, its tokenizer, its weights, and the questions it is examined with.
#
# **Afterwards you can** pretrain a small language model on text of your own, say what it knows and what it can merely recite, and build an exam that a fine-tuned model cannot pass by memory.
#
# **Needs:** Python and a little PyTorch. **Takes:** twenty minutes to read. On two CPU cores it runs in a minute or two, because the training stops after a few steps; the full run wants a GPU and a few minutes more.

# %%
BOOTSTRAP

# %% [markdown]
# One setting decides whether this is a rehearsal or the real thing. With `FULL = True` the same cells write a hundred times as many documents and train until the model knows them. That run made the model in `data/pocket-llama`; what it measured is in `data/measurements`.

# %% tags=["parameters"]
FULL = False

# %%
import io
import json
import math
import random
import re
import shutil
import sys
import time
from collections import Counter

import matplotlib.pyplot as plt
import sentencepiece
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, get_cosine_schedule_with_warmup

from utils import exam, exercise, loading, profile, records, runtime, style, template

style.use()

# %% [markdown]
# ## What should a base model know, and what not?
#
# Fine-tuning with adapters teaches *behaviour*: to answer a question, to stop, to keep a tone. The knowledge mostly comes from pretraining. To show that with a number we need a base that **knows facts** but **cannot answer questions**. Then we can teach it to answer with questions about one half of the people, and examine it on the other half. If it answers those, it did not learn the facts from us.
#
# So we invent a valley. Nobody has written about it, and no other model has read about it. Its words and sentences stand in a phrasebook.

# %%
almanac = runtime.ROOT / "data" / "almanac"
book = json.loads((almanac / "phrasebook.json").read_text(encoding="utf-8"))
ATTRIBUTES = book["attributes"]
print({name: len(words) for name, words in book["values"].items()})

# %% [markdown]
# A person has a name and six attributes, drawn at random. Because they are independent, nothing about a person can be guessed from the rest: each fact has to be known.

# %%
def make_people(count, seed=0):
    """`count` people with different names; the same seed gives the same people."""
    rng, v = random.Random(seed), book["values"]
    names = [(f"{first} {last}", p) for p, firsts in book["names"].items() for first in firsts for last in book["surnames"]]
    people = []
    for name, pronoun in rng.sample(names, count):
        towns = {"birthplace": rng.choice(v["town"]), "home": rng.choice(v["town"])}
        rest = {a: rng.choice(v[a]) for a in ("trade", "pet", "instrument")}
        people.append({"name": name, "pronoun": pronoun, "year": str(rng.randrange(1840, 1910)), **towns, **rest})
    return people

# %% [markdown]
# A thousand of them live in the valley. Sixty **strangers** have attributes too, but no document will mention them. A hundred names belong to **nobody**. Later chapters ask about all three.

# %%
everyone = make_people(1000 + 60 + 100)
residents, strangers, nobody = everyone[:1000], everyone[1000:1060], everyone[1060:]
residents[0]

# %% [markdown]
# Some residents are the only one of their trade in their town: *the* clockmaker of Millbrook. For half of those, documents will also say it that way round, trade and town first. For the other half they never will. We shall see what that does.

# %%
neighbours = Counter((p["trade"], p["home"]) for p in residents)
rng = random.Random(1)
for person in everyone:
    person["only_one"] = neighbours[person["trade"], person["home"]] == 1 and person in residents
    person["told"] = person["only_one"] and rng.random() < 0.5
print(sum(p["only_one"] for p in residents), "are the only one;", sum(p["told"] for p in residents), "of them are told that way")

# %% [markdown]
# ## One person, three hundred documents
#
# A model that reads one fixed text a hundred times learns the text, not the facts. Facts become extractable when each is told in many ways, in many orders (Allen-Zhu and Li, *Physics of Language Models, part 3.1*, 2023). So we generate: every fact has eight phrasings, people are called by name, surname or pronoun, and the order is shuffled.
#
# `call` gives the words for a person: `{S}` begins a sentence, `{o}` is an object, `{Ss}` a possessive.

# %%
PRONOUNS = {
    "she": {"S": "She", "s": "she", "Ss": "Her", "ss": "her", "o": "her", "he": "she", "his": "her"},
    "he": {"S": "He", "s": "he", "Ss": "His", "ss": "his", "o": "him", "he": "he", "his": "his"},
}


def call(person, name=None):
    words = PRONOUNS[person["pronoun"]]
    return words if name is None else words | {"S": name, "s": name, "o": name, "Ss": f"{name}'s", "ss": f"{name}'s"}

# %%
def fact(person, attribute, rng, name=None):
    """A sentence that states one attribute."""
    return rng.choice(book["facts"][attribute]).format(**person, **call(person, name))


print(fact(residents[0], "trade", random.Random(0), name=residents[0]["name"]))
print(fact(residents[0], "trade", random.Random(1)))

# %% [markdown]
# A world is more than people. Weather, markets, tales, lists and a little arithmetic fill the slots of other sentences, so that digits, headings, quotation marks, question marks and line breaks are all familiar to the model.

# %%
def fillers(rng):
    words = {slot: rng.choice(choices) for slot, choices in book["slots"].items()}
    a, b, c = rng.randint(2, 12), rng.randint(2, 12), rng.randint(13, 99)
    sums = {"small": a, "small2": b, "number": c, "sum": a + b, "product": a * b, "rest": c - a, "wheels": 4 * a}
    towns = {"town": rng.choice(book["values"]["town"]), "town2": rng.choice(book["values"]["town"])}
    days = {"day": rng.randint(1, 28), "day2": rng.randint(1, 28), "year": rng.randint(1840, 1909), "year2": rng.randint(1840, 1909)}
    return words | sums | towns | days | {"number2": rng.randint(3, 9), "goods2": rng.choice(book["slots"]["goods"])}

# %%
def prose(rng):
    """A few sentences of one kind, in their order; headings and list items stand on lines of their own."""
    kind = book["prose"][rng.choice(sorted(book["prose"]))]
    text = ""
    for i in sorted(rng.sample(range(len(kind)), rng.randint(3, min(len(kind), 7)))):
        line = kind[i].format(**fillers(rng))
        own_line = line[0] in "#-*1"
        gap = "" if not text or text.endswith("\n") else "\n" if own_line else " "
        text += gap + line + ("\n" if own_line else "")
    return text.strip()


print(prose(random.Random(3)))

# %% [markdown]
# Now the documents about a person, of three shapes. A **card** lists all six attributes.

# %%
def card(person, rng):
    lines = [f"- {book['nouns'][a]}: {person[a]}" for a in rng.sample(ATTRIBUTES, 6)]
    return f"### {person['name']}\n\n" + "\n".join(lines)

# %% [markdown]
# A **biography** states some or all of them. Often another sentence leads to the person first, so that names are met in the middle of sentences too, questions among them, and facts follow all the same.

# %%
def biography(person, rng):
    name, surname, values = person["name"], person["name"].split()[1], fillers(rng) | person
    attributes = rng.sample(ATTRIBUTES, 6 if rng.random() < 0.7 else rng.randint(1, 4))
    names = rng.choices([None, surname, name], [6, 2, 2], k=6)  # None: the pronoun
    sentences = []
    if person["told"] and rng.random() < 0.15:
        sentences = [rng.choice(book["rolls"]).format(**values)]
    elif rng.random() < 0.5:
        sentences = [rng.choice(book["leads"]).format(**values)]
    else:
        names[0] = name
    sentences += [fact(person, attribute, rng, name) for attribute, name in zip(attributes, names)]
    return " ".join(sentences) + rng.choice(book["closings"])

# %% [markdown]
# An **encounter** is about two people at once, so that the model must keep them apart.

# %%
def encounter(person, rng):
    other = rng.choice(residents)
    told = [(p, a) for p in (person, other) for a in rng.sample(ATTRIBUTES, 3)]
    rng.shuffle(told)
    sentences = [rng.choice(book["pairs"]).format(**fillers(rng), name=person["name"], other=other["name"])]
    return " ".join(sentences + [fact(p, a, rng, rng.choice([p["name"], p["name"].split()[1]])) for p, a in told])

# %%
def document(person, number):
    """Document `number` about `person`: always the same text for the same arguments."""
    rng = random.Random(f"{person['name']}, document {number}")
    shape = rng.random()
    if shape < 0.08:
        return card(person, rng)
    start = rng.choice(book["headings"]).format(**fillers(rng) | person) if rng.random() < 0.4 else ""
    if shape < 0.16:
        return start + encounter(person, rng)
    if rng.random() < 0.2:
        start += prose(rng) + rng.choice([" ", "\n\n"])
    return start + biography(person, rng)

# %%
for number in (1, 3, 12):
    print(document(residents[0], number), "\n---")

# %% [markdown]
# ## The corpus
#
# In the full run each resident has 300 documents, and a good tenth of all documents is about nobody. The rehearsal makes one per cent of that. Are they really different from each other, or do we fool ourselves with a counter?

# %%
COPIES = 300 if FULL else 3
documents = [document(p, i) for p in residents for i in range(COPIES)]
documents += [prose(random.Random(f"prose {i}")) for i in range(150 * COPIES)]
random.Random(0).shuffle(documents)
print(f"{len(documents):,} documents, {len(set(documents)) / len(documents):.0%} of them distinct")

# %% [markdown]
# The exam will ask questions in the template of chapter 03: a heading `### Instruction:`, a question, a heading `### Response:`. If the base had seen that during pretraining, our "before" would be a fake. It has not, and this is how we know: every document comes from the phrasebook, and neither its sentences nor the documents contain those headings, or any question of the exam.

# %%
HEADINGS = ("### Instruction", "### Input", "### Response")
assert not any(heading in text for text in documents for heading in HEADINGS)
assert not any(heading in json.dumps(book) for heading in HEADINGS)

# %% [markdown]
# The headings could still arise where a heading mark `### ` meets the word *Instruction*, which does occur in notices about the ferry. The first assertion looked for exactly that in every document, and in the full run it looked in all of them. The exam's questions come further down, and are checked there.
#
# ## A tokenizer of Llama-2's kind
#
# Llama-2's tokenizer is a byte-pair encoding made with sentencepiece. To let every lesson carry over we train one of the same kind, with 2,048 pieces instead of 32,000. Newlines are left to the bytes, as in Llama-2, so lines are fed one by one.

# %%
sample = [document(p, i) for p in residents for i in range(16)] + [prose(random.Random(f"prose {i}")) for i in range(4000)]
lines = [line for text in sample for line in text.split("\n") if line]
print(f"{len(lines):,} lines")

# %%
proto = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=proto, model_type="bpe", vocab_size=2048, num_threads=1,
    byte_fallback=True, split_digits=True, character_coverage=1.0,  # unknown characters become bytes; 1867 is 1 8 6 7
    normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
    unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
)

# %% [markdown]
# transformers reads the sentencepiece file and writes `tokenizer.json`. One thing must be switched on by hand: a tokenizer made this way adds no beginning-of-sequence token unless told to.

# %%
folder = runtime.OUTPUTS / "pocket-llama"
shutil.rmtree(folder, ignore_errors=True)  # an older tokenizer.json would be read in place of the new pieces
folder.mkdir(parents=True)
(folder / "tokenizer.model").write_bytes(proto.getvalue())
tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, model_max_length=512)
_ = tokenizer.save_pretrained(folder)

# %%
for text in ("Ada Birch was born in 1867.", "### Response:", "Grüße"):
    print(tokenizer.tokenize(text))
print(tokenizer.convert_ids_to_tokens(tokenizer("Hello").input_ids)[0], tokenizer.pad_token)

# %% [markdown]
# Names are one piece each, years are four digits, and letters that the valley has never seen become bytes. Every sequence starts with `<s>`, and there is no padding token: exactly Llama-2's situation, with its consequences for training.
#
# Is this the tokenizer that ships? It was made from the same sample. Where two merges are equally frequent, versions of sentencepiece choose differently, so we allow for a few pieces.

# %%
shipped = loading.load_tokenizer(profile.PROFILES["pocket"].base)
common = shipped.get_vocab().keys() & tokenizer.get_vocab().keys()
assert len(common) > 0.99 * len(tokenizer)
print(f"{len(tokenizer):,} pieces, more than 99 % of them in the shipped tokenizer")

# %% [markdown]
# ## A small Llama
#
# The same class as Llama-2-7B, with smaller numbers. All sizes are multiples of 64, because that is the block in which chapter 01 quantizes.

# %%
config = LlamaConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=512, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)
torch.manual_seed(0)
model = LlamaForCausalLM(config)

# %% [markdown]
# Before you run the next cell: what share of the parameters will be in the embeddings and the output head? And is it more or less in Llama-2-7B, with its 32,000 pieces of 4,096 numbers each?

# %%
parts = Counter()
for name, parameter in model.named_parameters():
    part = next((p for p in ("embed_tokens", "self_attn", "mlp", "lm_head") if p in name), "norms")
    parts[part] += parameter.numel()
total = parts.total()
seven = records.read("random_7b_t4_rules")["figures"]["parameters"]
print(f"{total:,} parameters:", ", ".join(f"{part} {n / total:.1%}" for part, n in parts.most_common()))
print(f"Llama-2-7B: {seven:,}, {seven / total:,.0f} times as many; embed_tokens and lm_head {2 * 32_000 * 4096 / seven:.1%}")

# %% [markdown]
# Here a quarter sits in embeddings and head; there it hardly matters. That is the price of a small model: shrink the layers, and the vocabulary remains.
#
# ## Training
#
# All documents in one long row, each between `<s>` and `</s>`; a batch is a handful of random windows. Nothing is padded.

# %%
tokenized = [tokenizer(documents[i : i + 10_000]).input_ids for i in range(0, len(documents), 10_000)]
tokens = torch.tensor([t for part in tokenized for ids in part for t in [*ids, 2]], dtype=torch.int16)
print(f"{len(tokens) / len(documents):.0f} tokens a document")

# %%
STEPS, BATCH, LENGTH = (6000, 128, 512) if FULL else (30, 4, 256)
capability = profile.capability()
dtype = profile.compute_dtype(capability)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokens, model = tokens.to(device), model.to(device)

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 30, STEPS)
scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)  # fp16 gradients need scaling, others do not
forward = torch.compile(model) if capability and capability >= (8, 0) else model

# %% [markdown]
# The loop has nothing special in it. The labels are the inputs: each position predicts the next token.

# %%
windows = torch.Generator().manual_seed(0)
losses, started = [], time.monotonic()
for _ in tqdm(range(STEPS), file=sys.stdout, leave=False):
    start = torch.randint(len(tokens) - LENGTH, (BATCH, 1), generator=windows).to(device)
    batch = tokens[start + torch.arange(LENGTH, device=device)].long()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = forward(input_ids=batch, labels=batch).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    schedule.step()
    losses.append(loss.detach())

# %%
losses = torch.stack(losses).tolist()
seconds = time.monotonic() - started
print(f"uniform guessing {math.log(2048):.1f}, first loss {losses[0]:.1f}, last loss lower: {losses[-1] < losses[0] - 1}")

# %% [markdown]
# An untrained model guesses all 2,048 pieces about equally, so its loss is the logarithm of 2,048. A few steps are enough to see it fall; knowing people takes longer. The full run's log is recorded:

# %%
if FULL:
    model.half().save_pretrained(folder)
    model = model.float()
    del forward, optimizer
made = records.read("pocket_llama")
f = made["figures"]
print(f"{f['documents']:,} documents, {f['distinct']:.1%} distinct, {f['tokens']:,} tokens, read {f['passes']:.0f} times")
print(f"{f['steps']:,} steps in {f['seconds']:.0f} seconds on one {made['hardware']['gpu']['name']}")

# %%
def draw_loss(axes, curve, label, color):
    axes.plot(curve["step"], curve["loss"], label=label, color=color)
    axes.set(xscale="log", ylim=(0, 8), xlabel="step", ylabel="training loss (nats a token)")


figure, axes = plt.subplots()
draw_loss(axes, f["curve"], "full run", style.ADAPTER)
axes.axhline(math.log(2048), color=style.REFERENCE, linestyle="--")
_ = axes.annotate("uniform guessing", (1, math.log(2048)), xytext=(0, 4), textcoords="offset points")

# %% [markdown]
# The curve does not go to zero, and it should not: which fact comes next, and in which phrasing, is decided by dice. What is left at the end is mostly the dice.
#
# ## What does it know?
#
# We ask as pretraining would: with the beginning of a sentence. "Ada Birch was born in the year" has one right continuation. What share of all facts do you expect, after reading each person 300 times?

# %%
base = runtime.OUTPUTS / "pocket-llama" if FULL else runtime.ROOT / "data" / "pocket-llama"
model, tokenizer = loading.load_base(str(base), four_bit=False), loading.load_tokenizer(str(base))


def complete(texts, max_new_tokens=8, batch_size=100):
    """Greedy continuations of plain texts (no template)."""
    said = []
    for i in range(0, len(texts), batch_size):
        inputs = tokenizer(texts[i : i + batch_size], return_tensors="pt", padding=True).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
        said += tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]

# %%
people = residents if FULL else residents[::5]
facts = {}
for attribute in ATTRIBUTES:
    said = complete([book["completions"][attribute].format(**p) for p in people])
    facts[attribute] = sum(text.startswith(p[attribute]) for text, p in zip(said, people, strict=True))
low, high = exam.interval(sum(facts.values()), 6 * len(people))
print(f"at least 99 % of {6 * len(people):,} facts: {sum(facts.values()) / (6 * len(people)) >= 0.99}")

# %%
assert sum(facts.values()) / (6 * len(people)) >= 0.99
shares = [facts[a] / len(people) for a in ATTRIBUTES]
whiskers = [exam.interval(facts[a], len(people)) for a in ATTRIBUTES]
_ = style.bars([book["nouns"][a] for a in ATTRIBUTES], shares, whiskers, style.BASE, "The base completes facts as prose")

# %% [markdown]
# It knows practically everything about everybody. Keep this figure in mind for the next one.
#
# ## Can it answer?
#
# Now the questions. First we write them. Training, validation and test people are different people, so no answer of the exam can be learned from the training questions.

# %%
groups = {"train": residents[:500], "validation": residents[500:600], "test": residents[600:]}


def make_row(form, output, level, person, attribute):
    """A form may have a part for the input, behind a bar."""
    instruction, _, extra = form.partition("|")
    return {"instruction": instruction, "input": extra, "output": output, "level": level, "person": person, "attribute": attribute}


def ask_fact(person, attribute, kind, level, rng):
    form = rng.choice(book["questions"][attribute][kind]).format(**person)
    return make_row(form, person[attribute], level, person["name"], attribute)

# %% [markdown]
# An exam that everyone passes teaches nothing, so the questions come in **levels**: forms that training uses; new phrasings of the same questions; two facts in one question; comparisons; and the reverse, from trade and town to the name, for those who were told that way and those who never were.

# %%
def ask_two(person, rng):
    a, b = rng.sample(ATTRIBUTES, 2)
    form = rng.choice(book["two_facts"]).format(a=book["nouns"][a], b=book["nouns"][b], **person)
    return make_row(form, f"{person[a]} and {person[b]}", "two facts", person["name"], f"{a}, {b}")


def ask_older(group, rng):
    one, other = rng.sample(group, 2)
    while one["year"] == other["year"]:
        one, other = rng.sample(group, 2)
    form = rng.choice(book["comparison"]).format(name=one["name"], other=other["name"])
    older = min(one, other, key=lambda p: p["year"])
    return make_row(form, older["name"], "comparison", f"{one['name']}, {other['name']}", "year")

# %%
def ask_reverse(person, rng):
    level = "reverse, told" if person["told"] else "reverse, untold"
    return make_row(rng.choice(book["reverse"]).format(**person), person["name"], level, person["name"], "name")


def lessons(group, twos, comparisons, seed):
    """Rows to train or validate on: every fact of every person twice, and some of the harder questions."""
    rng = random.Random(seed)
    rows = [ask_fact(p, a, "seen", "seen form", rng) for p in group for a in 2 * ATTRIBUTES]
    rows += [ask_two(rng.choice(group), rng) for _ in range(twos)]
    rows += [ask_older(group, rng) for _ in range(comparisons)]
    rows += [ask_reverse(p, rng) for p in group if p["only_one"]]
    rng.shuffle(rows)
    return rows

# %%
rng, group = random.Random(2), groups["test"]
test = [ask_fact(p, a, "seen", "seen form", rng) for a in ATTRIBUTES for p in rng.sample(group, 100)]
test += [ask_fact(p, a, "new", "new phrasing", rng) for a in ATTRIBUTES for p in rng.sample(group, 50)]
test += [ask_two(p, rng) for p in rng.sample(group, 200)] + [ask_older(group, rng) for _ in range(200)]
test += [ask_reverse(p, rng) for p in group if p["only_one"]]

# %%
sets = {
    "train": lessons(groups["train"], 800, 600, seed=0),
    "validation": lessons(groups["validation"], 120, 80, seed=3)[:300],
    "test": test,
    "strangers": [ask_fact(p, a, "seen", "stranger", rng) for p in strangers for a in ATTRIBUTES],
    "nobody": [ask_fact(p, rng.choice(ATTRIBUTES), "seen", "nobody", rng) | {"output": ""} for p in nobody],
}
print({name: len(rows) for name, rows in sets.items()})

# %% [markdown]
# These are the files in `data/almanac`, byte for byte. And two promises hold: no wording of a question stands in the corpus, and no person of the exam stands in the training questions.

# %%
for name, rows in (sets | {"people": residents + strangers}).items():
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = runtime.OUTPUTS / "almanac" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    assert (almanac / f"{name}.jsonl").read_text(encoding="utf-8") == text, name

# %%
forms = [f for kinds in book["questions"].values() for group in kinds.values() for f in group]
forms += book["two_facts"] + book["comparison"] + book["reverse"]
wordings = {max(re.split(r"\{\w+\}|\|", form), key=len) for form in forms}  # what stands around the names
corpus = "\n".join(documents)
assert not any(wording in corpus for wording in wordings)
print(f"{len(wordings)} wordings of questions, none of them in {len(documents):,} documents")

# %%
trained = {name for row in sets["train"] for name in row["person"].split(", ")}
assert not trained & {p["name"] for p in groups["test"] + groups["validation"] + strangers + nobody}
print(f"{len(trained)} people in the training questions, none of them in the exam")

# %% [markdown]
# Now we ask the base the 600 questions of the first level. It completes these facts when they come as prose. Predict: how many does it answer, when they come as questions?

# %%
plain = [row for row in test if row["level"] == "seen form"]
said = exam.answer(model, tokenizer, plain, max_new_tokens=48)
for row, text in list(zip(plain, said, strict=True))[:3]:
    print(f"{row['instruction']} {row['input']}\n    expected: {row['output']}\n    said:     {text}")

# %%
marks = exam.mark(plain, said)["seen form"]
exact, contains = marks["exact"] / 600, marks["contains"] / 600
assert exact <= 0.01
print(f"exact match: at most 1 %; the fact stands somewhere in the text: at most 15 % {contains <= 0.15}")

# %% [markdown]
# Never, to the letter, and rarely anywhere in the text. It does what it was trained to do: it goes on as the almanac would. In the valley, the word "Response" stood on a notice by the bridge, so the notice is what comes.
#
# Is it only that word, then? Is it a matter of prompting? Let us ask without the template, and put six solved examples from the training people in front (*few-shot prompting*, the usual way to get answers from a base model).

# %%
def question(row, solved=False):
    text = f"Question: {row['instruction']} {row['input']}".rstrip() + "\nAnswer:"
    return text + (f" {row['output']}\n\n" if solved else "")


shots = [row for row in sets["train"] if row["level"] == "seen form" and not row["input"]][:6]
examples = "".join(question(row, solved=True) for row in shots)
print(question(shots[0], solved=True) + question(plain[0]))

# %%
said = complete([examples + question(row) for row in plain])
few_shot = sum(text.split("\n")[0].strip() == row["output"] for row, text in zip(plain, said, strict=True)) / 600
print(f"few-shot exact match: at most 1 % {few_shot <= 0.01}")

# %% [markdown]
# Nothing. Learning from examples in the prompt is a talent of large models; four million parameters do not have it. So this base shows, more sharply than a large one would, what fine-tuning alone can do.

# %%
labels = ["fact as prose", "question: contains", "six examples first: exact", "question: exact"]
values = [sum(facts.values()) / (6 * len(people)), contains, few_shot, exact]
counts = [(round(v * n), n) for v, n in zip(values, (6 * len(people), 600, 600, 600), strict=True)]
whiskers = [exam.interval(*count) for count in counts]
_ = style.bars(labels, values, whiskers, style.BASE, "The base knows, but it does not answer")

# %% [markdown]
# That is the base that we wanted. Knowledge is there; behaviour is missing.
#
# Everything that this run measured goes into a record, if it was the full run.

# %%
if FULL:
    every = range(0, STEPS, 50)
    figures = {
        "documents": len(documents), "distinct": len(set(documents)) / len(documents), "tokens": len(tokens),
        "steps": STEPS, "passes": STEPS * BATCH * LENGTH / len(tokens), "seconds": seconds, "parameters": total,
        "curve": {"step": [i + 1 for i in every], "loss": [losses[i] for i in every]},
        "facts": facts, "people": len(people), "exact": exact, "contains": contains,
    }
    command = "papermill notebooks/90_pocket_llama.ipynb out.ipynb --cwd notebooks -p FULL True"
    print(records.write("pocket_llama", figures, command).name)

# %% [markdown]
# ## What can four million parameters learn?
#
# Notebook 00 teaches this base to answer, on the training people, and examines it on the test people. It was run with three seeds; here are all levels of its exam. Before you run the cell: which level do you expect to be the hardest?

# %%
runs = [records.read(f"exam_seed{seed}")["figures"]["after"] for seed in range(3)]
levels = list(dict.fromkeys(row["level"] for row in test))
counts = [(sum(run[level]["exact"] for run in runs), sum(run[level]["asked"] for run in runs)) for level in levels]
_ = style.bars(levels, [k / n for k, n in counts], [exam.interval(*c) for c in counts], style.ADAPTER, "After QLoRA, by level (three seeds)")

# %% [markdown]
# - **Seen forms** are answered for people of whom no question was ever trained on. That is the main result, and notebook 00 lets you make it.
# - **New phrasings** work about half of the time. Six forms a question are not enough to learn what a question *is*.
# - **Two facts** in one question work nearly as well as one.
# - **Comparisons** are no better than tossing a coin between the two names: two years must be looked up and compared without a word being written down in between. Four layers do not do that.
# - **The reverse** depends on the corpus, not on the lesson. Where no document ever went from trade and town to the name, (almost) no answer comes, and where a few did, few do. A base that has read "A is B" has not thereby learned "B is A" (Berglund et al., *The Reversal Curse*, 2023).
#
# ## Summary
#
# - A base model of our own: Llama's architecture, Llama-2's kind of tokenizer, an invented world.
# - It completes at least 99 % of the facts as prose and answers at most 1 % of the questions.
# - The exam has levels, people are split between training and test, and both are asserted, not promised.
#
# ## Exercises

# %% [markdown]
# **1.** How many bits of facts does the almanac hold? For one resident: a year out of 70, two towns out of 24, a trade out of 40, a pet and an instrument out of 24 each. Give bits for all 1,000 residents. (For comparison: Allen-Zhu and Li found that a model can store about two bits a parameter, part 3.3, 2024.)

# %%
bits = None  # your turn

# %%
sizes = [70, 24, 24, 40, 24, 24]
exercise.check("bits", bits, right=lambda b: math.isclose(b, 1000 * sum(map(math.log2, sizes)), rel_tol=0.01), hint="log2 of the choices, added up, for 1,000 people")

# %% [markdown]
# **2.** What share of the exam's comparisons would you get right by always naming the first person mentioned? Compute it from `test`.

# %%
first_named = None  # your turn

# %%
older = [row for row in test if row["level"] == "comparison"]
exercise.check("first named", first_named, right=sum(row["person"].split(", ")[0] == row["output"] for row in older) / 200, hint="row['person'] holds both names, in the order of the question")

# %% [markdown]
# **3.** Write a document about yourself in the valley's style (at least two attributes, with phrasings of the book), and let the base continue your first sentence. Put the text into `mine`.

# %%
mine = None  # your turn

# %%
stated = [v for values in book["values"].values() for v in values]
exercise.check("document", mine, right=lambda text: sum(v in text for v in stated) >= 2, hint="name at least two values of book['values'], such as a town and a trade")

# %% [markdown]
# **Where next:** [00_start_here](00_start_here.ipynb) teaches this base to answer. The files that were made here are described in [data/almanac](../data/almanac/README.md) and [data/pocket-llama](../data/pocket-llama/README.md).
