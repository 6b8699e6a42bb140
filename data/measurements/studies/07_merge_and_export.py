"""The records of chapter 07: which base to merge into, and the way of a 7B.

    python data/measurements/studies/07_merge_and_export.py strength --seed 0    export_strength_seed0.json
    python data/measurements/studies/07_merge_and_export.py 7b                   export_7b.json

The first takes about ten minutes on two CPU cores. The second writes a random model of Llama-2-7B's shape, merges it
with and without a GPU (without one it may take 4 GiB of memory and no more), and converts it: 45 GB of disk, about ten
minutes. It records after each step, so that what a time limit leaves undone is missing and the rest is there.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import study
import torch

from utils import evaluation, generation, presets
from utils.data import dataset, template
from utils.models import adapters, export, loading
from utils.planning import random_model
from utils.training import trainer

chosen = study.options(("strength", "7b"))
pocket = presets.PROFILES["pocket"]
# (steps, learning rate): from a training that hardly changes the weights to the course's own, and a long one.
STRENGTHS = [(20, 2e-3), (180, 2e-4), (180, 5e-4), (180, 1e-3), (180, 2e-3), (180, 4e-3), (540, 4e-3)]


def with_weights(model, changed: dict):
    """A copy of a bare model with some matrices replaced."""
    other = copy.deepcopy(model)
    for name, weight in changed.items():
        other.get_submodule(name).weight.data = weight
    return other


def ways(bare, changes: dict) -> dict:
    """The three merges: name -> model. `changes`: module name -> what the adapter adds."""
    plain = {name: bare.get_submodule(name).weight.data for name in changes}
    trained = {name: export.nf4(weight) + changes[name] for name, weight in plain.items()}
    return {
        "as trained": with_weights(bare, trained),
        "into the original": with_weights(bare, {name: plain[name] + changes[name] for name in plain}),
        "back to four bits": with_weights(bare, {name: export.nf4(weight) for name, weight in trained.items()}),
    }


def logits(model, tokenizer, rows) -> list:
    """Logits of each row's prompt and expected answer, a tensor (tokens, vocabulary) a row."""
    ids = [template.encode(tokenizer, row)["input_ids"] for row in rows]
    with torch.no_grad():
        return [model(torch.tensor([row], device=model.device)).logits[0].float() for row in ids]


def kl(ours: list, theirs: list) -> float:
    """Mean Kullback-Leibler divergence a token, in nats, of `theirs` from `ours`."""
    a, b = (torch.cat(found).log_softmax(-1) for found in (ours, theirs))
    return (a.exp() * (a - b)).sum(-1).mean().item()


def strength(chosen) -> None:
    data, tokenizer = dataset.load(pocket), loading.load_tokenizer(pocket.base)
    questions = data.exam[::40] if chosen.quick else data.exam
    bare, results = loading.load_base(pocket.base, four_bit=False), []
    for steps, rate in STRENGTHS[:1] if chosen.quick else STRENGTHS:
        recipe = replace(pocket.recipe, steps=2 if chosen.quick else steps, learning_rate=rate, seed=chosen.seed)
        model = adapters.add(loading.load_base(pocket.base), recipe)
        trainer.train(model, tokenizer, dataset.encode(tokenizer, data.train, 512)[0], recipe, live=False)
        folder = adapters.save(model, tokenizer, recipe, data.train, {})
        changes = {name: b @ a for name, (b, a) in export.deltas(folder).items()}
        weights = {name: bare.get_submodule(name).weight.data for name in changes}
        ratio = {n: ((w - export.nf4(w)).norm() / changes[n].norm()).item() for n, w in weights.items()}
        found = {"steps": recipe.steps, "learning_rate": rate, "ratio": ratio, "ways": {}}
        found["median_ratio"] = float(np.median(list(ratio.values())))
        trained = logits(model, tokenizer, questions[::20])
        reference = None
        for name, merged in ways(bare, changes).items():
            said = generation.answer(merged, tokenizer, questions)
            reference = reference or said  # of the first: as trained, which answers like the trained model, only faster
            theirs = logits(merged, tokenizer, questions[::20])
            found["ways"][name] = {
                "exam": evaluation.exact_match(questions, said),
                "right": sum(a == row["output"] for a, row in zip(said, questions, strict=True)),
                "other_answers": sum(a != b for a, b in zip(said, reference, strict=True)),
                "kl_nats": kl(trained, theirs),
                "largest_logit_difference": max(
                    (a - b).abs().max().item() for a, b in zip(trained, theirs, strict=True)
                ),
            }
        print(steps, rate, {n: (w["right"], w["other_answers"]) for n, w in found["ways"].items()}, flush=True)
        results.append(found)
    study.write(chosen, f"export_strength_seed{chosen.seed}", {"questions": len(questions), "trainings": results})


STEP = """
import json, resource, sys
from utils.models import export
if room := float(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_DATA, (int(room * 2**30),) * 2)
place = getattr(export, sys.argv[2])(*sys.argv[3:])
held = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
held = max(held, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
print(json.dumps({"place": str(place), "peak_ram_gib": held / 2**20}))
"""


def step(*arguments: str, room: float = 0, gpu: bool = True) -> tuple[Path, dict]:
    """`export.NAME(...)` in a process of its own, which may hold `room` GiB of data: its result, seconds, peak."""
    environment = os.environ if gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    begun = time.monotonic()
    command = [sys.executable, "-c", STEP, str(room), *arguments]
    done = subprocess.run(command, cwd=study.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return Path(found["place"]), {"seconds": time.monotonic() - begun, "peak_ram_gib": found["peak_ram_gib"]}


def gigabytes(place: Path) -> float:
    return sum(path.stat().st_size for path in (place.iterdir() if place.is_dir() else [place])) / 1e9


def seven_b(chosen) -> None:
    steps, folder = {}, study.ROOT / "outputs" / "random-llama-2-7b"

    def record(name: str, found: dict) -> None:
        steps[name] = found
        print(name, found, flush=True)
        study.write(chosen, "export_7b", {"steps": steps})

    shutil.rmtree(folder, ignore_errors=True)
    config = random_model.config(pocket.base if chosen.quick else "llama-2-7b")
    config.architectures, begun = ["LlamaForCausalLM"], time.monotonic()
    model = random_model.build(config, four_bit=False, dtype=torch.float16)
    model.save_pretrained(folder, max_shard_size="2MB" if chosen.quick else "5GB")
    tokenizer = loading.load_tokenizer(pocket.base)
    tokenizer.save_pretrained(folder)
    shutil.copy(Path(pocket.base) / "tokenizer.model", folder)
    shards = sorted(folder.glob("*.safetensors"))
    sizes = {"gb": gigabytes(folder), "shards": len(shards), "largest_shard_gb": max(map(gigabytes, shards))}
    record("random base", sizes | {"seconds": time.monotonic() - begun})
    del model
    model = adapters.add(loading.load_base(str(folder)), pocket.recipe)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    adapter = adapters.save(model, tokenizer, pocket.recipe, [], {})
    del model
    if torch.cuda.is_available():
        merged, found = step("merge", str(adapter))
        record("merge with a GPU", found | {"gb": gigabytes(merged)})
        shutil.rmtree(merged)  # or the next would need room for both
    for room in (4, 6, 8):  # torch alone takes some of it, on a machine with many cores more
        try:
            merged, found = step("merge", str(adapter), room=room, gpu=False)
        except SystemExit as error:
            print(f"not in {room} GiB: {error}", flush=True)
            continue
        record(f"merge without a GPU, in {room} GiB", found | {"gb": gigabytes(merged)})
        break
    for kind in ("f16", "q8_0"):
        file, found = step("gguf", str(merged), kind, gpu=False)
        record(f"GGUF {kind}", found | {"gb": gigabytes(file)})
        shutil.rmtree(file.parent)


seven_b(chosen) if chosen.part == "7b" else strength(chosen)
