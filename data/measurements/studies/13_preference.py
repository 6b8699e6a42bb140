"""The records of chapter 13: declining, brevity and length as preferences of the pocket model; DPO of a 7B's shape.

    python data/measurements/studies/13_preference.py trials --jobs 14 --minutes 8      as often as it takes
    python data/measurements/studies/13_preference.py collect                           preference_*.json

Every training that ends is a line of outputs/study13/lines.jsonl and an adapter beside it, and none is done twice:
start again, and the study goes on. What is chosen (learning rate, steps, beta) is chosen with seed 0 on the validation
names; the records are about the test names. `--quick` trains three steps, in outputs/study13_quick.

On a GPU, at a T4's rules (fp16, memory-efficient attention alone, 14.12 GiB for torch):

    QLORA_CAPABILITY=7.5 python data/measurements/studies/13_preference.py 7b           preference_7b.json
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace

if "7b" not in sys.argv:
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["QLORA_PROFILE"] = "pocket"

import study

from utils import runtime
from utils.runtime import ROOT

SEEDS = (0, 1, 2)
SFT = [(rate, steps) for steps in (60, 150, 450) for rate in (1e-3, 4e-3)]  # on known and unknown people
DPO = [(rate, beta, 150) for rate in (1e-4, 3e-4, 1e-3) for beta in (0.05, 0.1, 0.5)]  # after it
DPO += [(3e-4, 0.1, 300)]
BRIEF = [(rate, beta) for rate in (2e-4, 1e-3) for beta in (0.02, 0.1, 0.5)]
BETAS = (0.02, 0.1, 0.5)  # at a rate of 1e-3, with all seeds
CURVE = [i / 50 for i in range(51)]  # shares of known people declined, at which a curve is recorded


# --- which trainings there are ---------------------------------------------------------------------------------------


def job(kind: str, seed: int, parent: dict | None = None, **changes) -> dict:
    """One training: "sft" or "dpo" on `data`, from the adapter of `parent`. "probe" and "merged" train nothing."""
    return {"kind": kind, "seed": seed} | ({"parent": parent} if parent else {}) | changes


def name(settings: dict) -> str:
    return json.dumps(settings, sort_keys=True)


def start(seed: int) -> dict:
    """The course's own adapter: the pocket recipe on the almanac's training rows."""
    return job("sft", seed, data="almanac", learning_rate=4e-3, steps=180, batch_size=32)


def taught(seed: int, rate: float, steps: int) -> dict:
    return job("sft", seed, start(seed), data="decline", learning_rate=rate, steps=steps, batch_size=32)


def preferring(parent: dict, data: str, rate: float, beta: float, steps: int = 150, **more) -> dict:
    settings = {"learning_rate": rate, "beta": beta, "steps": steps, "batch_size": 16}
    return job("dpo", parent["seed"], parent, data=data, **settings, **more)


def rambling(seed: int) -> dict:
    """The course's adapter, after some steps in which three answers of four have a sentence too many."""
    return job("sft", seed, start(seed), data="rambling", learning_rate=1e-3, steps=100, batch_size=32)


def falling(seed: int, rate: float) -> dict:
    """Answers that are alike, a true and a wrong value, without an SFT term: both may become less likely."""
    return preferring(start(seed), "truth", rate, 0.1, 60)


def best(done: dict, candidates: list[dict], score) -> dict | None:
    """The candidate whose line scores best; None: not all are done."""
    lines = [done.get(name(candidate)) for candidate in candidates]
    if None in lines:
        return None
    scores = [-1.0 if "failed" in line else score(line) for line in lines]
    return candidates[scores.index(max(scores))]


def area(line: dict) -> float:
    return line["validation"]["area"]


def brief(line: dict) -> float:
    """Short and right on the validation names, in questions."""
    return line["validation"]["exact"]


def chosen(done: dict, seed: int = 0) -> dict:
    """The settings that seed 0 picked, as trainings of `seed`; what cannot be picked yet is missing."""
    found = {}
    if pick := best(done, [taught(0, *c) for c in SFT], area):
        rate, steps = pick["learning_rate"], pick["steps"]
        found["sft"] = sft = taught(seed, rate, steps)
        if after := best(done, [preferring(taught(0, rate, steps), "decline", *c) for c in DPO], area):
            rate, beta, steps = (after[key] for key in ("learning_rate", "beta", "steps"))
            found["dpo after sft"] = preferring(sft, "decline", rate, beta, steps)
            found["dpo after sft, own answers"] = preferring(sft, "decline, own", rate, beta, steps)
            found["dpo after sft, and sft"] = preferring(sft, "decline", rate, beta, steps, sft=1.0)
            # The honest rival: as many steps more of SFT on the rows that DPO prefers.
            more = [job("sft", 0, taught(0, pick["learning_rate"], pick["steps"]), **c) for c in rivals(steps)]
            if rival := best(done, more, area):
                found["more sft"] = rival | {"seed": seed, "parent": sft}
    if pick := best(done, [preferring(rambling(0), "brevity", *c) for c in BRIEF], brief):
        found["brevity"] = preferring(rambling(seed), "brevity", pick["learning_rate"], pick["beta"])
    return found


def rivals(steps: int) -> list[dict]:
    return [{"data": "decline", "learning_rate": r, "steps": steps, "batch_size": 32} for r in (3e-4, 1e-3)]


def plan(done: dict) -> list[dict]:
    """Trainings in the order of their importance; those that wait for a choice appear once it can be made."""
    first = [start(seed) for seed in SEEDS]
    search = [taught(0, *c) for c in SFT]
    direct = [preferring(start(seed), "decline", 3e-4, 0.1, sft=s) for s in (0.0, 1.0) for seed in SEEDS]
    easy = [rambling(seed) for seed in SEEDS] + [preferring(rambling(0), "brevity", *c) for c in BRIEF]
    easy += [preferring(rambling(seed), "length", 1e-3, 0.1) for seed in SEEDS]
    easy += [job("sft", s, rambling(s), data="brevity", learning_rate=1e-3, steps=150, batch_size=32) for s in SEEDS]
    easy += [preferring(rambling(seed), "brevity", 1e-3, beta) for beta in BETAS for seed in SEEDS]
    easy += [falling(seed, rate) for rate in (1e-3, 3e-3) for seed in SEEDS]
    looks = [job("probe", seed, *parent) for seed in SEEDS for parent in ((), (start(seed),))]
    picked = chosen(done)
    if sft := picked.get("sft"):
        search += [preferring(sft, "decline", *c) for c in DPO]
    if after := picked.get("dpo after sft"):
        search += [job("sft", 0, sft, **c) for c in rivals(after["steps"])]
    final = [settings for seed in SEEDS for settings in chosen(done, seed).values()]
    wanted = ("dpo after sft", "brevity")
    merged = [job("merged", s["seed"], s) for seed in SEEDS for k, s in chosen(done, seed).items() if k in wanted]
    return list({name(s): s for s in [*first, *search, *easy, *final, *direct, *looks, *merged]}.values())


# --- one training, in a process of its own ---------------------------------------------------------------------------


def prepare(quick: bool, folder) -> None:
    """Per process, once: base, tokenizer, rows."""
    global course
    import torch
    import transformers

    from data.almanac import preferences
    from utils import presets
    from utils.data import dataset
    from utils.models import loading

    torch.set_num_threads(1)
    runtime.quiet()
    transformers.utils.logging.disable_progress_bar()
    pocket = presets.PROFILES["pocket"]
    course = {"pocket": pocket, "quick": quick, "folder": folder, "tokenizer": loading.load_tokenizer(pocket.base)}
    course |= {"data": dataset.load(pocket), "pairs": preferences}


def some(rows: list[dict]) -> list[dict]:
    return rows[::25] if course["quick"] else rows


def asked(row: dict) -> dict:
    return {"instruction": row["prompt"], "input": "", "output": row["chosen"], "level": row["level"]}


def adapter_of(settings: dict):
    return course["folder"] / "adapters" / hashlib.sha256(name(settings).encode()).hexdigest()[:16]


def load(settings: dict | None, four_bit: bool = True, dequantize: bool = False):
    """The base with the adapter of a training, trainable; the bare base for None."""
    from peft import PeftModel

    from utils.models import loading

    model = loading.load_base(course["pocket"].base, four_bit=four_bit)
    model = model.dequantize() if dequantize else model
    return PeftModel.from_pretrained(model, adapter_of(settings), is_trainable=True).eval() if settings else model


def first_pieces(model, rows: list[dict]):
    """Log-probabilities (rows, vocabulary) of the first piece of the answer, and the last states of all layers."""
    import torch

    from utils.data import template
    from utils.generation import evaluating

    tokenizer, found, states = course["tokenizer"], [], []
    for i in range(0, len(rows), 100):
        prompts = [template.encode_prompt(tokenizer, asked(row)) for row in rows[i : i + 100]]
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        with evaluating(model):
            out = model(**batch, logits_to_keep=1, output_hidden_states=True)
        found.append(out.logits[:, -1].float().log_softmax(-1))
        states.append(torch.stack([layer[:, -1].float() for layer in out.hidden_states], 1))
    return torch.cat(found), torch.cat(states)


def margins(model, rows: list[dict]):
    """log p("I do not know.") less that of the best other answer, by their first piece; above 0 the model declines.

    No other answer of the almanac begins with the piece of "I", so the first piece decides.
    """
    tokenizer, (scores, _) = course["tokenizer"], first_pieces(model, rows)
    piece = tokenizer("### Response: I", add_special_tokens=False).input_ids[-1]
    declining = scores[:, piece].clone()
    scores[:, piece] = -float("inf")
    return (declining - scores.max(-1).values).numpy()


def auc(unknown, known) -> float:
    """Share of pairs (an unknown, a known) in which the unknown scores higher: the area under the curve."""
    from scipy.stats import rankdata

    ranks = rankdata([*unknown, *known])[: len(unknown)]
    return float((ranks.sum() - len(unknown) * (len(unknown) + 1) / 2) / (len(unknown) * len(known)))


def log_probabilities(model, rows: list[dict]) -> dict:
    """Mean log-probability, in nats, of the chosen and of the rejected answers, the end-of-sequence token with them."""
    import torch

    from utils.data import template
    from utils.generation import evaluating

    tokenizer, found = course["tokenizer"], {}
    for side in ("chosen", "rejected"):
        summed = []
        for i in range(0, len(rows), 50):
            encoded = [template.encode(tokenizer, asked(row) | {"output": row[side]}) for row in rows[i : i + 50]]
            ids, labels = (
                torch.nn.utils.rnn.pad_sequence([torch.tensor(e[key]) for e in encoded], True, padding_value=fill)
                for key, fill in (("input_ids", tokenizer.pad_token_id), ("labels", -100))
            )
            with evaluating(model):
                scores = model(ids).logits[:, :-1].float().transpose(1, 2)
            summed.append(-torch.nn.functional.cross_entropy(scores, labels[:, 1:], reduction="none").sum(1))
        found[side] = torch.cat(summed).mean().item()
    return found


def told_apart(score, rows: list[dict], curve: bool = False) -> dict:
    """How well a score (high for unknown) tells unknown from known people: area with interval, and what 0 declines."""
    import numpy as np

    kinds = np.array([row["kind"] == "unknown" for row in rows])
    unknown, known = score[kinds], score[~kinds]
    found = {"area": auc(unknown, known), "asked": [len(unknown), len(known)]}
    found |= {"unknown declined": int((unknown > 0).sum()), "known declined": int((known > 0).sum())}
    if curve:  # people are what was sampled: all questions about one are drawn together
        people, rng, drawn = [row["person"] for row in rows], np.random.default_rng(0), []
        groups = [defaultdict(list), defaultdict(list)]
        for person, kind, value in zip(people, kinds, score, strict=True):
            groups[int(kind)][person].append(value)
        lists = [list(group.values()) for group in groups]
        for _ in range(300):
            k, u = ([v for i in rng.integers(len(g), size=len(g)) for v in g[i]] for g in lists)
            drawn.append(auc(u, k))
        found["interval"] = np.percentile(drawn, [2.5, 97.5]).tolist()
        thresholds = np.quantile(known, [1 - share for share in CURVE])
        found["curve"] = [float((unknown >= t).mean()) for t in thresholds]
    return found


def examined(model, settings: dict) -> dict:
    """What the records need of a model: declining (area, shares, curve, exam), or brevity (length, right answers)."""
    from utils import evaluation, generation

    pairs, tokenizer = course["pairs"], course["tokenizer"]
    if settings["data"] in ("rambling", "brevity", "length"):
        found = {}
        for part in ("validation", "test"):
            rows = some(pairs.brevity(part)[:300])
            answers = generation.answer(model, tokenizer, [asked(row) for row in rows], 40)
            both = list(zip(answers, rows, strict=True))
            found[part] = {"asked": len(rows), "exact": sum(a == r["chosen"] for a, r in both)}
            found[part]["begins right"] = sum(a.startswith(r["chosen"]) for a, r in both)
            found[part]["pieces"] = statistics.mean(len(tokenizer(a).input_ids) for a in answers)
        return found
    found = {"validation": told_apart(margins(model, rows := some(pairs.decline("validation"))), rows)}
    for level in ("seen", "new"):
        rows = some(pairs.decline("test", level))
        found["test" if level == "seen" else "new phrasing"] = told_apart(margins(model, rows), rows, curve=True)
    exam = some(course["data"].exam)
    answers = generation.answer(model, tokenizer, exam)
    marks = evaluation.exact_match(exam, answers)
    found["exam"] = {level: [m["exact"], m["asked"]] for level, m in marks.items()}
    found["exam declined"] = dict.fromkeys(marks, 0)
    for row, said in zip(exam, answers, strict=True):
        found["exam declined"][row["level"]] += said == pairs.DECLINE
    rows = some([row for row in pairs.decline("test") if row["kind"] == "unknown"])
    answers = generation.answer(model, tokenizer, [asked(row) for row in rows])
    book = json.loads((ROOT / "data" / "almanac" / "phrasebook.json").read_text(encoding="utf-8"))
    values = {v for group in book["values"].values() for v in group} | {str(year) for year in range(1800, 2000)}
    found["unknown"] = {"asked": len(rows), "declined": sum(a == pairs.DECLINE for a in answers)}
    found["unknown"]["invented"] = sum(a in values for a in answers)
    return found


def train_sft(model, settings: dict, recipe) -> tuple[list[dict], None]:
    import random

    from utils.data import dataset
    from utils.training.trainer import train

    pairs, rng = course["pairs"], random.Random(settings["seed"])
    rows = {
        "almanac": lambda: course["data"].train,
        "decline": lambda: [asked(row) for row in pairs.decline("train")],
        "brevity": lambda: [asked(row) for row in pairs.brevity("train")],
        "rambling": lambda: [
            asked(r | {"chosen": r["rejected" if rng.random() < 0.75 else "chosen"]}) for r in pairs.brevity("train")
        ],
    }[settings["data"]]()
    encoded, _ = dataset.encode(course["tokenizer"], rows, recipe.max_length)
    return train(model, course["tokenizer"], encoded, recipe, live=False, fast=False), None


def train_dpo(model, settings: dict, recipe) -> tuple[list[dict], dict]:
    from utils import generation
    from utils.training import preference, trainer

    pairs, tokenizer = course["pairs"], course["tokenizer"]
    data, _, own = settings["data"].partition(", ")
    rows = getattr(pairs, data)("train")[: recipe.steps * recipe.batch_size]
    if own:  # what the policy itself invents, in place of something drawn; where it declines already, what was drawn
        unknown = [row for row in rows if row["kind"] == "unknown"]
        answers = generation.answer(model, tokenizer, [asked(row) for row in unknown])
        said = {row["prompt"]: a for row, a in zip(unknown, answers, strict=True) if a and a != pairs.DECLINE}
        rows = [row | {"rejected": said.get(row["prompt"], row["rejected"])} for row in rows]
    encoded = preference.encode(tokenizer, rows, recipe.max_length)
    losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, settings["sft"]]} if settings.get("sft") else {}
    held_out = some(getattr(pairs, data)("validation")[:200])
    before = log_probabilities(model, held_out)
    made = preference.build(model, tokenizer, encoded, recipe, fast=False, beta=settings["beta"], **losses)
    try:
        log = trainer.run(made, live=False)
    except runtime.Stop as stop:  # every margin of a step is so large that the sigmoid's gradient is 0: all is learned
        if "exactly zero" not in str(stop) or made.state.global_step < 5:
            raise
        log = [entry for entry in made.state.log_history if "loss" in entry]
        model.eval()
    model.delete_adapter("ref")
    return log, {"before": before, "after": log_probabilities(model, held_out)}


LOGGED = ("step", "loss", "logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies")


def measure(settings: dict) -> dict:
    """Train, then examine: the line of one training."""
    import record

    from utils.models import adapters, loading

    began, parent = time.monotonic(), settings.get("parent")
    line = {"settings": settings}
    if settings["kind"] == "probe":
        line |= probe(settings)
    elif settings["kind"] == "merged":
        line |= merged(settings)
    else:
        changes = {k: settings[k] for k in ("learning_rate", "steps", "batch_size", "seed")}
        recipe = replace(course["pocket"].recipe, **changes, epochs=100)
        recipe = replace(recipe, steps=3) if course["quick"] else recipe
        model = load(parent) if parent else adapters.add(loading.load_base(course["pocket"].base), recipe)
        log, moved = {"sft": train_sft, "dpo": train_dpo}[settings["kind"]](model, settings, recipe)
        line["train_seconds"] = time.monotonic() - began
        line |= {"held-out log-probabilities": moved} if moved else {}
        line["log"] = [[entry.get(key) for key in LOGGED] for entry in log]
        with runtime.whole(adapter_of(settings)) as new:
            model.save_pretrained(new)
        line |= examined(model, settings)
    versions, hardware = runtime.versions(), record.hardware()
    return line | {"seconds": time.monotonic() - began, "versions": versions, "hardware": hardware}


def merged(settings: dict) -> dict:
    """The same examination after three merges: into the dequantized base, into the original, and that in NF4 again."""
    import tempfile

    from transformers import AutoModelForCausalLM

    from utils.models import loading

    parent, found = settings["parent"], {}
    ways = {"adapter": {}, "dequantized": {"dequantize": True}, "original": {"four_bit": False}}
    for way, how in ways.items():
        model = load(parent, **how)
        model = model if way == "adapter" else model.merge_and_unload()
        found[way] = examined(model, parent)
        if way == "dequantized":
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                course["tokenizer"].save_pretrained(folder)
                import torch

                again = AutoModelForCausalLM.from_pretrained(folder, quantization_config=loading.nf4(torch.float32))
                loading.keep_trainable(again)
                again.generation_config = model.generation_config
                found["quantized again"] = examined(again.eval(), parent)
    return {"ways": found}


def probe(settings: dict) -> dict:
    """Does a model know whom it knows? Areas on the test names of: confidence, and a linear probe of each layer.

    The probe is a logistic regression on the state at the prompt's last token, trained on 500 known and 500 unknown
    people of the training part; its penalty is chosen on the validation names.
    """
    import torch

    pairs, model = course["pairs"], load(settings.get("parent"))
    seen, parts = set(), {}
    rows = [row for row in pairs.decline("train") if row["person"] not in seen and not seen.add(row["person"])]
    known = [row for row in rows if row["kind"] == "known"]
    parts["train"] = some(known + [row for row in rows if row["kind"] == "unknown"][: len(known)])
    parts |= {part: some(pairs.decline(part)) for part in ("validation", "test")}
    scores, states = {}, {}
    for part, rows in parts.items():
        scores[part], states[part] = first_pieces(model, rows)
    confidence = -scores["test"].max(-1).values.numpy()
    found = {"confidence": told_apart(confidence, parts["test"], curve=True), "layers": []}
    target = torch.tensor([float(row["kind"] == "unknown") for row in parts["train"]])
    for layer in range(states["train"].shape[1]):
        mean, std = states["train"][:, layer].mean(0), states["train"][:, layer].std(0).clamp(min=1e-6)
        x = {part: (states[part][:, layer] - mean) / std for part in parts}
        tried = []
        for penalty in (1e-3, 1e-2, 1e-1, 1.0):
            w = logistic(x["train"], target, penalty)
            tried.append((told_apart((x["validation"] @ w).numpy(), parts["validation"])["area"], penalty, w))
        _, penalty, w = max(tried, key=lambda t: t[0])
        areas = {
            part: told_apart((x[part] @ w).numpy(), parts[part], curve=part == "test") for part in ("train", "test")
        }
        found["layers"].append({"penalty": penalty, "train area": areas["train"]["area"]} | areas["test"])
    return found


def logistic(x, y, penalty: float):
    """Weights of a logistic regression without offset (both kinds are as many), by Newton's method of torch."""
    import torch

    w = torch.zeros(x.shape[1], requires_grad=True)
    steps = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        steps.zero_grad()
        fit = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y)
        loss = fit + penalty * w.square().sum() / 2
        loss.backward()
        return loss

    steps.step(closure)
    return w.detach()


# --- the queue, and the records --------------------------------------------------------------------------------------


def read(folder, failed: bool = False) -> dict:
    """Lines done so far, by the name of their settings, and those that failed; what a kill cut off is done again.

    "rambles" counted the sentences of the training alone, and a model rambles in its own words: it is left out.
    """
    done = {}
    if (folder / "lines.jsonl").exists():
        for text in (folder / "lines.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text, object_hook=lambda found: {k: v for k, v in found.items() if k != "rambles"})
            except ValueError:
                continue
            if failed or "failed" not in line:
                done[name(line["settings"])] = line
    return done


def ready(settings: dict, done: dict) -> bool:
    """Whether a training can start: what it begins with is there, and has not failed."""
    parent = settings.get("parent")
    return not parent or "failed" not in done.get(name(parent), {"failed": "not done"})


def trials(options: argparse.Namespace, folder) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    done, running, took = read(folder), {}, []
    began, spawn = time.monotonic(), multiprocessing.get_context("spawn")
    left = lambda: 60 * options.minutes - (time.monotonic() - began)  # noqa: E731
    pool = ProcessPoolExecutor(options.jobs, spawn, prepare, (options.quick, folder))
    with (folder / "lines.jsonl").open("a", encoding="utf-8") as lines:
        lines.write("\n" if lines.tell() else "")  # behind a line that a kill may have cut off
        while left() > 0:
            busy = {name(settings) for settings in running.values()} | done.keys()
            can = [s for s in plan(done) if name(s) not in busy and ready(s, done)]
            for settings in can:
                if len(running) == options.jobs or (took and left() < statistics.median(took)):
                    break
                running[pool.submit(measure, settings)] = settings
            if not running:
                break
            ended, _ = wait(running, timeout=max(1, left()), return_when=FIRST_COMPLETED)
            for future in ended:
                key = name(settings := running.pop(future))
                if error := future.exception():  # one may fail, the others go on; the next start tries it again
                    line = {"settings": settings, "failed": repr(error), "seconds": 0.0}
                    print(f"failed: {error!r}", flush=True)
                else:
                    line = future.result()
                    took.append(line["seconds"])
                lines.write(json.dumps(line) + "\n")
                lines.flush()
                done[key] = line
                print(f"{60 * options.minutes - left():5.0f} s  {line['seconds']:4.0f} s  {key[-150:]}", flush=True)
    for process in (pool._processes or {}).values():
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    jobs = plan(done)
    failed = sum("failed" in line for line in done.values())
    print(f"done: {sum(name(s) in done for s in jobs)} of {len(jobs)} planned so far; failed: {failed}")


def collect(options: argparse.Namespace, folder) -> None:
    """The records, from the lines, with the hardware and the versions of the trainings."""
    import record

    done = read(folder, failed=True)
    machines = {json.dumps([x["hardware"], x["versions"]], sort_keys=True) for x in done.values() if "failed" not in x}
    hardware, versions = json.loads(sorted(machines)[0])
    if len(machines) > 1:  # the trainings were done in parts
        print(f"note: the lines come from {len(machines)} machines")
    record.hardware, runtime.versions = lambda: hardware, lambda: versions
    options.part, options.seed = "trials", 0  # the command that measured

    def lines(makers: dict) -> dict:
        """Arm -> what its seeds came to; an arm with a seed missing is left out, with a line."""
        found = {}
        for arm, make in makers.items():
            settings = [make(seed) for seed in SEEDS]
            got = [done.get(name(s)) if s else None for s in settings]
            if missing := sum(line is None or "failed" in line for line in got):
                print(f"missing: {arm}, {missing} of {len(got)} seeds")
                continue
            skip = ("settings", "versions", "hardware", "log")
            found[arm] = {"settings": {k: v for k, v in settings[0].items() if k not in ("seed", "parent")}}
            found[arm]["seeds"] = [{k: v for k, v in line.items() if k not in skip} for line in got]
            if got[0].get("log"):
                found[arm]["log of seed 0"] = got[0]["log"]
        return found

    def searched(candidates: list[dict], score) -> list[dict]:
        keys, found = ("learning_rate", "steps", "beta"), []
        for c in candidates:
            if line := done.get(name(c)):
                result = {"failed": line["failed"]} if "failed" in line else {"validation": score(line)}
                found.append({k: c[k] for k in keys if k in c} | result)
        return found

    of = {seed: chosen(done, seed) for seed in SEEDS}
    arms = ["sft", "more sft", "dpo after sft", "dpo after sft, own answers", "dpo after sft, and sft"]
    makers = {"start": start} | {arm: lambda seed, arm=arm: of[seed].get(arm) for arm in arms}
    makers["dpo"] = lambda seed: preferring(start(seed), "decline", 3e-4, 0.1, sft=0.0)
    makers["dpo and sft"] = lambda seed: preferring(start(seed), "decline", 3e-4, 0.1, sft=1.0)
    for rate in (1e-3, 3e-3):
        makers[f"falling, rate {rate:g}"] = lambda seed, rate=rate: falling(seed, rate)
    makers["probe of the base"] = lambda seed: job("probe", seed)
    makers["probe of the start"] = lambda seed: job("probe", seed, start(seed))
    makers["merged"] = lambda seed: (s := of[seed].get("dpo after sft")) and job("merged", seed, s)
    figures = {"arms": lines(makers), "curve at": CURVE, "logged": LOGGED}
    figures["searched"] = {"sft": searched([taught(0, *c) for c in SFT], area)}
    if sft := of[0].get("sft"):
        figures["searched"]["dpo"] = searched([preferring(sft, "decline", *c) for c in DPO], area)
    study.write(options, "preference_decline", figures)
    makers = {"rambling": rambling, "dpo": lambda seed: of[seed].get("brevity")}
    makers["sft"] = lambda s: job("sft", s, rambling(s), data="brevity", learning_rate=1e-3, steps=150, batch_size=32)
    makers["length"] = lambda seed: preferring(rambling(seed), "length", 1e-3, 0.1)
    for beta in BETAS:
        makers[f"beta {beta:g}"] = lambda seed, beta=beta: preferring(rambling(seed), "brevity", 1e-3, beta)
    makers["merged"] = lambda seed: (s := of[seed].get("brevity")) and job("merged", seed, s)
    figures = {"arms": lines(makers), "logged": LOGGED}
    figures["searched"] = searched([preferring(rambling(0), "brevity", *c) for c in BRIEF], brief)
    kept = ("log", "test", "held-out log-probabilities")  # of every beta and rate, with seed 0
    figures["of seed 0"] = {
        f"rate {rate:g}, beta {beta:g}": {k: line[k] for k in kept}
        for rate, beta in BRIEF
        if "log" in (line := done.get(name(preferring(rambling(0), "brevity", rate, beta)), {}))
    }
    study.write(options, "preference_brevity", figures)


# --- a 7B's shape, on a GPU ------------------------------------------------------------------------------------------


def rehearse(options: argparse.Namespace, folder) -> None:
    """Ten steps of DPO on a random model of Llama-2-7B's shape, for some lengths of pairs: memory and time.

    What is planned is chapter 09's count for two rows a pass, and one adapter more, the reference. Each run that ends
    is a line of 7b.jsonl in the folder: started again, the rest is done.
    """
    import numpy as np
    import torch
    from datasets import Dataset

    from utils import hardware, presets
    from utils.models import adapters, loading
    from utils.notebook import measurements
    from utils.planning import memory, random_model
    from utils.planning.rehearsal import Watch
    from utils.training import preference, trainer

    if torch.cuda.is_available():
        os.environ.setdefault("QLORA_CAPABILITY", "7.5")
    target = "llama-2-7b"
    config, tokenizer = random_model.config(target), loading.load_tokenizer(presets.PROFILES["pocket"].base)
    if options.quick:
        config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 256, 512
        config.num_attention_heads = config.num_key_value_heads = 4
    lengths = measurements.read("speed_real_7b")["figures"]["lengths"]
    steps = (1, 2) if options.quick else (3, 16)
    folder.mkdir(parents=True, exist_ok=True)
    (lines := folder / "7b.jsonl").touch()
    runs = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]

    def done(run: dict) -> None:
        runs.append(run)
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        print(run, flush=True)
        record_7b(options, runs)

    def pairs(longest: int, count: int) -> Dataset:
        """Prompts of 40 % of a row; two answers of the rest, the rejected one by up to half longer or shorter."""
        draw, found = np.random.default_rng(0), []
        ids = lambda size: draw.integers(3, 2000 if options.quick else config.vocab_size, int(size)).tolist()  # noqa: E731
        for whole in [longest, *draw.choice(lengths, count - 1)]:
            whole = min(int(whole), longest)
            prompt, answer = ids(max(1, 0.4 * whole)), max(2, round(0.6 * whole))
            other = min(max(2, round(answer * draw.uniform(0.5, 1.5))), longest - len(prompt))
            found.append({"prompt_ids": prompt, "chosen_ids": ids(answer), "rejected_ids": ids(other)})
        return Dataset.from_list(found)

    for longest, recompute in ((512, 0), (1024, 0), (1024, 1), (2048, 1))[: 2 if options.quick else None]:
        longest = 64 if options.quick else longest
        if any((run["longest"], run["recomputed"]) == (longest, recompute) for run in runs):
            continue
        recipe = replace(presets.PROFILES[target].recipe, max_length=longest, pack_length=0, steps=sum(steps))
        recipe = replace(recipe, epochs=100, gradient_checkpointing=recompute, learning_rate=2e-5)
        recipe = replace(recipe, accumulation=1 if options.quick else 4)
        hardware.free()
        model = adapters.add(random_model.build(config), recipe)
        held, watch = hardware.reset_peak(), Watch(*steps)
        data = pairs(longest, sum(steps) * recipe.accumulation)
        two = replace(recipe, batch_size=2)  # a pair is two rows
        planned = sum(memory.at_peak(config, two).values()) + 4 * sum(memory.adapter(config, recipe.rank))
        run = {"longest": longest, "recomputed": recompute, "planned_gib": planned / hardware.GIB}
        run |= {"held_gib": held, "adapter_gib": 4 * sum(memory.adapter(config, recipe.rank)) / hardware.GIB}
        try:
            made = preference.build(model, tokenizer, data, recipe, callbacks=[watch], beta=0.1)
            log = trainer.run(made, live=False)
        except runtime.Stop as stop:
            if "memory is full" not in str(stop):
                raise
            done(run | {"fits": False})
            model = made = None
            continue
        rows = [len(r["prompt_ids"]) + len(r[f"{s}_ids"]) for r in data for s in preference.SIDES]
        seconds = statistics.mean(watch.seconds)
        run |= {
            "fits": True,
            "peak_gib": max(watch.peaks),
            "seconds_a_step": seconds,
            "pairs_a_step": recipe.accumulation,
            "seconds": watch.seconds,
        }
        run |= {"tokens_a_second": statistics.mean(rows) * 2 * recipe.accumulation / seconds}
        run |= {"losses": [entry["loss"] for entry in log], "first_margin": log[0]["rewards/margins"]}
        frozen = {n: p for n, p in model.named_parameters() if ".ref." in n}
        run["ref_bytes"], run["trainable"] = (
            sum(p.nbytes for p in frozen.values()),
            sorted({str(p.dtype) for p in model.parameters() if p.requires_grad}),
        )
        done(run)
        model = made = frozen = None


def record_7b(options: argparse.Namespace, runs: list[dict]) -> None:
    """Written after every run: a time limit may cut off the next one."""
    import torch

    from utils import hardware, presets

    rules = {"attention": "memory-efficient", "cap_gib": hardware.T4_GIB} if torch.cuda.is_available() else {}
    recipe = replace(presets.PROFILES["llama-2-7b"].recipe, pack_length=0, learning_rate=2e-5, accumulation=4)
    options.part, options.seed = "7b", 0
    study.write(options, "preference_7b", {"runs": runs, "rules": rules, "recipe": asdict(recipe)})


def main() -> None:
    import record

    parser = argparse.ArgumentParser(prog="python data/measurements/studies/13_preference.py")
    parser.add_argument("part", choices=["trials", "collect", "7b"])
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=600, help="start nothing that would take longer, then stop")
    parser.add_argument("--quick", action="store_true", help="three steps a training, to see that everything works")
    parser.add_argument("--out", type=type(ROOT), default=record.FOLDER, help="where the records go")
    options = parser.parse_args()
    runtime.quiet()
    folder = ROOT / "outputs" / ("study13_quick" if options.quick else "study13")
    {"trials": trials, "collect": collect, "7b": rehearse}[options.part](options, folder)


if __name__ == "__main__":
    main()
