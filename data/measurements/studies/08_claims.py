"""The records of chapter 08: what people say about QLoRA, trained and examined on the pocket model.

    python data/measurements/studies/08_claims.py all --jobs 14 --minutes 9     as often as it takes
    python data/measurements/studies/08_claims.py collect                       claims_*.json
    python data/measurements/studies/08_claims.py 7b                            claims_7b.json, on a GPU

In place of `all` one part: tuning, methods, adapter, penalty, base, forums, noisy. Every training that ends is a line
of outputs/study08/lines.jsonl, and no training is done twice: start again, and the study goes on. The trainings have
seeds 10 to 14, those of the four sentences 15 to 19, too; learning rates and penalties were chosen with seeds 0 and 1,
on questions about other people than the exam's. `--quick` trains three steps and writes to outputs/study08_quick.

`7b` trains Llama-2-7B's shape with random weights for a few steps at a T4's rules, for bytes and time alone.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace

os.environ |= {"QLORA_PROFILE": "pocket", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"QLORA_CAPABILITY": "7.5"} if "7b" in sys.argv else {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import study

from utils import runtime
from utils.runtime import ROOT

PARTS = ["tuning", "methods", "adapter", "penalty", "base", "forums", "noisy"]
TUNED_WITH, SEEDS = (0, 1), (10, 11, 12, 13, 14)
MORE_SEEDS = (15, 16, 17, 18, 19)  # added once, when five had left three comparisons open
RATES = {"full": (2.5e-4, 5e-4, 1e-3, 2e-3), "lora": (2e-3, 4e-3, 8e-3), "qlora": (2e-3, 4e-3, 8e-3)}
ALPHA_RATES = (2e-3, 4e-3)  # for alpha 32: twice the scale, so half the rate that alpha 16 took, or the same
GAMMAS, PULLS, DECAYS = (0.01, 0.1), (1e-5, 1e-4, 1e-3), (0.1, 1.0)  # pull: the largest gradient of the penalty
BASES = {"NF4": "nf4", "FP4": "fp4", "int4": "int4", "NF4, blocks of 1,024": "nf4 1024"}
LEVELS = ("seen form", "new phrasing", "two facts")
EDGES = 0.3  # of the histogram of an adapter's weights, in 61 bins


# --- which trainings there are, the most important first -------------------------------------------------------------


def job(seed: int, method: str = "qlora", **changes) -> dict:
    """One training: what differs from the recipe of the pocket profile, and from QLoRA as the course has it."""
    return {"seed": seed, "method": method} | changes


def name(settings: dict) -> str:
    return json.dumps(settings, sort_keys=True)


def best(done: dict, candidates: list[dict]) -> dict | None:
    """The settings with most right answers to the tuning questions over the seeds of the tuning; None: not all done."""
    scores = []
    for candidate in candidates:
        lines = [done.get(name(candidate | {"seed": seed})) for seed in TUNED_WITH]
        if None in lines:
            return None
        scores.append(sum(line["tuning"]["right"] for line in lines))
    return candidates[scores.index(max(scores))]


def rate_candidates(method: str) -> list[dict]:
    return [job(0, method, learning_rate=rate) for rate in RATES[method]]


def alpha_candidates() -> list[dict]:
    return [job(0, learning_rate=rate, lora_alpha=32) for rate in ALPHA_RATES]


def penalty_candidates(qlora: dict, kind: str) -> list[dict]:
    if kind == "l2":
        return [qlora | {"weight_decay": decay} for decay in DECAYS]
    return [qlora | {"lorentz": [pull * gamma, gamma]} for gamma in GAMMAS for pull in PULLS]


def stronger(settings: dict) -> dict:
    """The same Lorentzian penalty, ten times as strong."""
    strength, gamma = settings["lorentz"]
    return settings | {"lorentz": [10 * strength, gamma]}


def plan(done: dict) -> dict[str, list[dict]]:
    """Trainings by part; those that need a choice not made yet are missing, and appear once it is."""
    jobs = defaultdict(list)

    def tuned(candidates: list[dict]) -> dict | None:
        jobs["tuning"] += [c | {"seed": seed} for c in candidates for seed in TUNED_WITH]
        return best(done, candidates)

    def final(part: str, settings: dict | None, more: bool = False) -> None:
        if settings:
            jobs[part] += [settings | {"seed": seed} for seed in SEEDS + MORE_SEEDS * more]

    chosen = {method: tuned(rate_candidates(method)) for method in ("qlora", "full", "lora")}
    for method in ("qlora", "full", "lora"):
        final("methods", chosen[method], more=True)
    if not (qlora := chosen["qlora"]):
        return jobs
    quantized = qlora | {"adapter": "nf4"}
    final("adapter", quantized, more=True)
    final("adapter", qlora | {"adapter": "int8"})
    for kind in ("lorentz", "l2"):
        candidates = penalty_candidates(qlora, kind)
        jobs["penalty"] += [c | {"seed": seed} for c in candidates for seed in TUNED_WITH]
        if picked := best(done, candidates):
            final("penalty", picked, more=kind == "lorentz")
            final("penalty", picked | {"adapter": "nf4"}, more=kind == "lorentz")
            if kind == "lorentz":
                final("noisy", picked | {"rows": "noisy"})
                final("noisy", stronger(picked) | {"rows": "noisy"})
    final("noisy", qlora | {"rows": "noisy"})
    for base in BASES.values():
        final("base", qlora | {"base": base})
    final("base", qlora | {"method": "lora"})  # the same as LoRA's own, if both have the same best rate
    final("forums", tuned(alpha_candidates()))
    final("forums", qlora | {"rows": "inputs too"})
    return jobs


# --- one training, in a process of its own ---------------------------------------------------------------------------


def from_chapter(*beginnings: str, **names) -> dict:
    """What the chapter's cells define that hold a line with one of these beginnings, given the names they need."""
    cells = json.loads((ROOT / "notebooks" / "08_claims_measured.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for beginning in beginnings:
        source = next(s for s in sources if any(line.startswith(beginning) for line in s.splitlines()))
        exec(compile(source, f"<{beginning}>", "exec"), names)
    return names


def prepare(quick: bool) -> None:
    """Per process, once: data, questions, the chapter's functions."""
    global course
    import torch
    import transformers
    from bitsandbytes.functional import get_4bit_type

    from utils import presets
    from utils.data import dataset
    from utils.models import loading

    torch.set_num_threads(1)
    runtime.quiet()
    transformers.utils.logging.disable_progress_bar()
    pocket = presets.PROFILES["pocket"]
    beginnings = ("def biography(", "NF4 =", "def fake_quantize(", "def quantize_forward(", "def lorentz(")
    course = from_chapter(*beginnings, torch=torch, get_4bit_type=get_4bit_type)
    data, tokenizer = dataset.load(pocket), loading.load_tokenizer(pocket.base)
    almanac = ROOT / "data" / "almanac"
    book = json.loads((almanac / "phrasebook.json").read_text(encoding="utf-8"))
    people = [json.loads(line) for line in (almanac / "people.jsonl").read_text(encoding="utf-8").splitlines()]
    rng = random.Random(0)
    texts = [course["biography"](person, book, rng) for person in rng.sample(people[600:1000], 80)]
    ids = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]
    new = [
        {"instruction": rng.choice(book["questions"][a]["new"]).format(**person), "output": str(person[a]), "level": a}
        for a in book["attributes"]
        for person in rng.sample(people[500:600], 50)
    ]
    prose = [{"input_ids": i, "labels": [-100, *i[1:]]} for i in ids]  # nothing stands before the first token
    course |= {"prose": prose, "tokenizer": tokenizer, "data": data}
    course |= {"tuning": data.held_out + new, "exam": [row for row in data.exam if row["level"] in LEVELS]}
    course |= {"pocket": pocket, "quick": quick}
    if quick:
        course |= {key: course[key][::25] for key in ("prose", "tuning", "exam")}


def rows(kind: str) -> list[dict]:
    """The training rows; "noisy": three in ten have another row's answer to a question of the same kind."""
    if kind != "noisy":
        return course["data"].train
    rng, answers = random.Random(0), defaultdict(set)
    for row in course["data"].train:
        answers[row["level"], row["attribute"]].add(row["output"])
    found = []
    for row in course["data"].train:
        others = sorted(answers[row["level"], row["attribute"]] - {row["output"]})
        wrong = rng.random() < 0.3 and others
        found.append(row | {"output": rng.choice(others)} if wrong else row)
    return found


def model_for(settings: dict, recipe):
    """The base as the training needs it, with its adapter unless every weight is trained."""
    import torch
    from bitsandbytes.functional import get_4bit_type

    from utils.models import adapters, loading

    kind = settings.get("base", "")
    base = loading.load_base(course["pocket"].base, four_bit=settings["method"] == "qlora" and not kind)
    if settings["method"] == "full":
        return base.float().requires_grad_(True)
    if kind:
        codes = {"nf4": course["NF4"], "int4": torch.arange(-7, 8) / 7}
        codes["fp4"] = get_4bit_type("fp4", device="cpu").unique()
        for title, module in base.named_modules():
            if isinstance(module, torch.nn.Linear) and title != "lm_head":
                block = int((kind.split() + ["64"])[1])
                module.weight.data = course["round_trip"](module.weight, codes[kind.split()[0]], block)
    return adapters.add(base, recipe)


def measure(settings: dict) -> dict:
    """Train, then examine: the line of one training."""
    import record
    import torch

    from utils import evaluation, generation
    from utils.data import dataset
    from utils.training.trainer import train

    began = time.monotonic()
    keys = ("learning_rate", "lora_alpha", "rank", "seed")
    recipe = replace(course["pocket"].recipe, **{k: settings[k] for k in keys if k in settings})
    recipe = replace(recipe, steps=3) if course["quick"] else recipe
    tokenizer, model = course["tokenizer"], model_for(settings, recipe)
    encoded = dataset.encode(tokenizer, rows(settings.get("rows", "")), recipe.max_length)[0]
    if settings.get("rows") == "inputs too":
        encoded = encoded.map(lambda row: {"labels": row["input_ids"]})
    codes = {"nf4": course["NF4"], "int8": course["INT8"]}
    if "adapter" in settings:
        course["quantize_forward"](model, codes[settings["adapter"]])
    more = {"penalty": course["lorentz"](*settings["lorentz"])} if "lorentz" in settings else {}
    more |= {"weight_decay": settings["weight_decay"]} if "weight_decay" in settings else {}
    start = time.monotonic()
    log = train(model, tokenizer, encoded, recipe, live=False, fast=False, **more)
    trained = time.monotonic() - start

    def right(questions: list[dict]) -> dict:
        marks = evaluation.exact_match(questions, generation.answer(model, tokenizer, questions))
        return {level: [m["exact"], m["asked"]] for level, m in marks.items()}

    def examined() -> dict:
        return {"exam": right(course["exam"]), "prose_nats": evaluation.loss(model, tokenizer, course["prose"])}

    line = {"settings": settings, "train_seconds": trained, "losses": [[e["step"], e["loss"]] for e in log]}
    if settings["seed"] in TUNED_WITH:
        marks = right(course["tuning"])
        line["tuning"] = {"right": sum(m[0] for m in marks.values()), "asked": sum(m[1] for m in marks.values())}
    else:
        line |= examined()
        held_out = dataset.encode(tokenizer, course["data"].held_out, recipe.max_length)[0]
        line["held_out_loss"] = evaluation.loss(model, tokenizer, held_out)
        if settings["method"] != "full":
            line |= adapter_variants(model, settings, codes, examined)
    versions, hardware = runtime.versions(), record.hardware()
    line |= {"seconds": time.monotonic() - began, "versions": versions, "hardware": hardware}
    return line | {"torch_threads": torch.get_num_threads()}


def adapter_variants(model, settings: dict, codes: dict, examined) -> dict:
    """The weights' histogram; and where the claim asks for it the exam with the same adapter in another format."""
    import torch

    matrices = course["matrices"](model)
    kept = [matrix.weight.detach().clone() for matrix in matrices]
    every = torch.cat([w.flatten() for w in kept])
    found = {"histogram": torch.histc(every, 61, -EDGES, EDGES).int().tolist(), "largest": every.abs().max().item()}
    found["root_mean_square"] = every.square().mean().sqrt().item()
    plain = settings.keys() <= {"seed", "method", "learning_rate", "adapter"} and settings["method"] == "qlora"
    if not plain:
        return found
    found["variants"] = {}
    for matrix in matrices:
        matrix.__dict__.pop("forward", None)
    if settings.get("adapter"):
        found["variants"]["master weights"] = examined()
    else:
        for title, some in codes.items():
            course["round_weights"](model, some)
            found["variants"][f"{title} after training"] = examined()
            for matrix, weights in zip(matrices, kept, strict=True):
                matrix.weight.data = weights.clone()
    return found


# --- the pool, and the records ---------------------------------------------------------------------------------------


def read(folder) -> dict:
    """Lines done so far, by the name of their settings; a line cut off by a kill is done again."""
    done = {}
    if (folder / "lines.jsonl").exists():
        for text in (folder / "lines.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            done[name(line["settings"])] = line
    return done


def waiting(done: dict, parts: list[str], running: set) -> list[dict]:
    """Trainings that can start now, the most important first."""
    jobs = plan(done)
    found = {name(settings): settings for part in parts for settings in jobs[part]}
    return [settings for key, settings in found.items() if key not in done and key not in running]


def work(options: argparse.Namespace, folder) -> None:
    parts = PARTS if options.part == "all" else list(dict.fromkeys(["tuning", options.part]))
    folder.mkdir(parents=True, exist_ok=True)
    done, running, took, failed = read(folder), {}, [], set()
    began, spawn = time.monotonic(), multiprocessing.get_context("spawn")
    left = lambda: 60 * options.minutes - (time.monotonic() - began)  # noqa: E731
    pool = ProcessPoolExecutor(options.jobs, spawn, prepare, (options.quick,))
    with (folder / "lines.jsonl").open("a", encoding="utf-8") as lines:
        lines.write("\n" if lines.tell() else "")  # behind a line that a kill may have cut off
        while left() > 0:
            for settings in waiting(done, parts, failed | set(running.values())):
                if len(running) == options.jobs or (took and left() < statistics.median(took)):
                    break
                running[pool.submit(measure, settings)] = name(settings)
            if not running:
                break
            ended, _ = wait(running, timeout=max(1, left()), return_when=FIRST_COMPLETED)
            for future in ended:
                key = running.pop(future)
                if error := future.exception():  # one training may fail, the others go on; the next start tries again
                    failed.add(key)
                    print(f"failed: {key}: {error!r}", flush=True)
                    continue
                line = future.result()
                lines.write(json.dumps(line) + "\n")
                lines.flush()
                done[key] = line
                took.append(line["seconds"])
                print(f"{60 * options.minutes - left():5.0f} s  {line['seconds']:4.0f} s  {key}", flush=True)
    for process in (pool._processes or {}).values():
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    jobs = plan(done)
    state = {part: [sum(name(s) in done for s in jobs[part]), len(jobs[part])] for part in PARTS}
    print("done of planned:", state)


def arm(done: dict, settings: dict, variant: str = "", histogram: bool = False) -> dict:
    """What trainings with the same settings came to, seed by seed: five or ten; {} where one of the first is missing.

    Args:
        variant: of the adapter that was trained, in another format.
        histogram: of the first seed's adapter weights, in 61 bins.
    """
    lines = [done.get(name(settings | {"seed": seed})) for seed in SEEDS + MORE_SEEDS]
    if None in lines[: len(SEEDS)]:
        return {}
    lines = lines if None not in lines else lines[: len(SEEDS)]
    of = [line["variants"][variant] if variant else line for line in lines]
    found = {"exam": {level: [o["exam"][level][0] for o in of] for level in LEVELS}}
    found["prose_nats"] = [o["prose_nats"] for o in of]
    found["settings"] = {k: v for k, v in settings.items() if k != "seed"}
    if not variant:
        found |= {key: [line[key] for line in lines] for key in ("held_out_loss", "train_seconds")}
        if histogram:
            found |= {"histogram": lines[0]["histogram"], "root_mean_square": lines[0]["root_mean_square"]}
    return found


def collect(options: argparse.Namespace, folder) -> None:
    """The records, from the lines: one a claim, with the hardware and the versions of the trainings."""
    import record

    done = read(folder)
    machines = {json.dumps([line["hardware"], line["versions"]], sort_keys=True) for line in done.values()}
    hardware, versions = json.loads(sorted(machines)[0])
    if len(machines) > 1:  # the trainings were done in parts
        print(f"note: the lines come from {len(machines)} machines")
        hardware["cpu"] = " and ".join(sorted({line["hardware"]["cpu"] for line in done.values()}))
    record.hardware, runtime.versions = lambda: hardware, lambda: versions
    options.part = "all"  # the command that measured
    chosen = {method: best(done, rate_candidates(method)) for method in RATES}
    qlora = chosen["qlora"]
    quantized = qlora | {"adapter": "nf4"}

    def tuning(candidates: list[dict]) -> list:
        found = []
        for c in candidates:
            lines = [done.get(name(c | {"seed": seed})) for seed in TUNED_WITH]
            right = [line["tuning"]["right"] for line in lines if line]
            found.append({k: v for k, v in c.items() if k != "seed"} | {"right": right})
        return found

    any_line = next(line for line in done.values() if "exam" in line)
    shared = {
        "seeds": list(SEEDS),
        "more_seeds": list(MORE_SEEDS),
        "tuned_with": list(TUNED_WITH),
        "steps": any_line["losses"][-1][0],
    }
    shared["asked"] = {level: any_line["exam"][level][1] for level in LEVELS}
    shared["tuning_questions"] = next(line["tuning"]["asked"] for line in done.values() if "tuning" in line)

    def save(title: str, arms: dict, **more) -> None:
        missing = [label for label, found in arms.items() if not found]
        arms = {label: found for label, found in arms.items() if found}
        print(f"{title}: {len(arms)} arms" + (f"; missing: {', '.join(missing)}" if missing else ""))
        if arms:
            study.write(options, title, shared | {"arms": arms} | more)

    methods = {"full fine-tuning": "full", "LoRA": "lora", "QLoRA": "qlora"}
    arms = {label: arm(done, chosen[m]) if chosen[m] else {} for label, m in methods.items()}
    for method, rates in RATES.items():
        if chosen[method] and chosen[method]["learning_rate"] in (min(rates), max(rates)):
            print(f"note: the best learning rate of {method} is at the edge of those tried")
    save("claims_methods", arms, tuning={m: tuning(rate_candidates(m)) for m in RATES})
    formats = {
        "32 bits": arm(done, qlora),
        "NF4 after training": arm(done, qlora, "nf4 after training"),
        "int8 after training": arm(done, qlora, "int8 after training"),
        "NF4 in training": arm(done, quantized),
        "NF4 in training, master weights": arm(done, quantized, "master weights"),
        "int8 in training": arm(done, qlora | {"adapter": "int8"}),
    }
    save("claims_adapter", formats)
    noisy = qlora | {"rows": "noisy"}
    arms = {"32 bits, none": arm(done, qlora, histogram=True), "NF4, none": arm(done, quantized, histogram=True)}
    arms["noisy, none"], sweeps = arm(done, noisy), {"none": tuning([qlora])}
    for kind, title in (("lorentz", "Lorentz"), ("l2", "L2")):
        candidates = penalty_candidates(qlora, kind)
        sweeps[title], picked = tuning(candidates), best(done, candidates) or qlora | {"not": "chosen"}
        arms[f"32 bits, {title}"] = arm(done, picked, histogram=True)
        arms[f"NF4, {title}"] = arm(done, picked | {"adapter": "nf4"}, histogram=True)
        if "lorentz" in picked:
            arms["noisy, Lorentz"] = arm(done, picked | noisy)
            arms["noisy, Lorentz, ten times as strong"] = arm(done, stronger(picked) | noisy)
    save("claims_penalty", arms, tuning=sweeps, histogram_edges=EDGES)
    arms = {"NF4, double quantization": arm(done, qlora)}
    arms |= {label: arm(done, qlora | {"base": kind}) for label, kind in BASES.items()}
    save("claims_base", arms | {"32 bits": arm(done, qlora | {"method": "lora"})})
    doubled = best(done, alpha_candidates())
    arms = {"as the course has it": arm(done, qlora), "inputs too": arm(done, qlora | {"rows": "inputs too"})}
    arms["alpha 32"] = arm(done, doubled) if doubled else {}
    save("claims_forums", arms, tuning={"alpha 32": tuning(alpha_candidates())})


# --- the shape of Llama-2-7B, for bytes and time ----------------------------------------------------------------------

# label -> (method, format of the adapter, what is recomputed in the backward pass)
SEVEN = {
    "QLoRA": ("qlora", "", "none"),
    "QLoRA, adapter in NF4": ("qlora", "NF4", "none"),
    "QLoRA, adapter in int8": ("qlora", "INT8", "none"),
    "QLoRA, all layers recomputed": ("qlora", "", "all"),
    "LoRA, all layers recomputed": ("lora", "", "all"),
    "LoRA": ("lora", "", "none"),
    "full fine-tuning, 32 bits": ("full", "", "none"),
}


def seven_b(options: argparse.Namespace) -> None:
    """A few steps each, under a T4's limit and, where that is too little, without it."""
    import torch
    from benchmark.bench import Bench
    from benchmark.measure import Setting
    from bitsandbytes.functional import get_4bit_type

    from utils import hardware
    from utils.models import adapters
    from utils.planning import random_model
    from utils.training import levers

    runtime.quiet()
    bench, ways = Bench(options), {}
    recipe, names = bench.recipe, {"torch": torch, "get_4bit_type": get_4bit_type}
    names = from_chapter("NF4 =", "def fake_quantize(", "def quantize_forward(", **names)
    for label, (method, kind, checkpoint) in SEVEN.items():
        model = base = None
        hardware.free()
        bench.cap(False)
        base = random_model.build(bench.config, four_bit=method == "qlora")
        model = base.requires_grad_(True) if method == "full" else adapters.add(base, recipe)
        if hardware.has_triton():
            levers.liger(model)
        if kind:
            names["quantize_forward"](model, names[kind])
        bench.recipe = replace(recipe, optimizer="adamw_torch") if method == "full" else recipe
        found = bench.train(model, Setting(fused=False, checkpoint=checkpoint), 1, 2048)
        ways[label] = found or {"failed": bench.figures["missing"][-1]["why"]}
        study.write(options, "claims_7b", {"rules": bench.figures["rules"], "ways": ways})


def main() -> None:
    import record

    parser = argparse.ArgumentParser(prog="python data/measurements/studies/08_claims.py")
    parser.add_argument("part", choices=["all", *PARTS, "collect", "7b"])
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--minutes", type=float, default=600, help="start nothing that would take longer, then stop")
    parser.add_argument("--quick", action="store_true", help="three steps a training, to see that everything works")
    parser.add_argument("--out", type=type(ROOT), default=record.FOLDER, help="where the records go")
    options = parser.parse_args()
    folder, options.seed = ROOT / "outputs" / ("study08_quick" if options.quick else "study08"), 0
    if options.part == "7b":
        seven_b(options)
    elif options.part == "collect":
        collect(options, folder)
    else:
        work(options, folder)


if __name__ == "__main__":
    main()
