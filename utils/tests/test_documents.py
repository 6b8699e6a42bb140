"""What README and cards say in numbers is what the records and the files say."""

import ast
import hashlib
import json
import random
import re
import runpy
from math import ceil

import nbformat
import pytest

from utils import evaluation, runtime
from utils.data.dataset import Data
from utils.notebook import measurements
from utils.planning import fit, memory, random_model
from utils.presets import PROFILES

README = (runtime.ROOT / "README.md").read_text(encoding="utf-8")
DATA = runtime.ROOT / "data"


def table() -> str:
    """The README's table of the exam, from the records of the three seeds."""
    runs = [measurements.read(f"exam_seed{seed}")["figures"] for seed in range(3)]
    lines = ["| level | before | after | 95 % interval |", "|---|---|---|---|"]
    for level in ("seen form", "new phrasing", "two facts", "comparison", "reverse, told", "reverse, untold"):
        asked = runs[0]["after"][level]["asked"]
        before, after = (sum(run[when][level]["exact"] for run in runs) / 3 for when in ("before", "after"))
        low, high = evaluation.interval(round(after), asked)  # every seed has the same questions: they count once
        lines.append(f"| {level} | {before / asked:.1%} | {after / asked:.1%} | {low:.1%} to {high:.1%} |")
    return "\n".join(lines)


def test_the_exam_in_the_readme_is_the_recorded_one():
    assert table() in README


def speed() -> str:
    """The README's table of training, from the records of a GPU."""
    names = {"speed_default_7b": "ways", "speed_unsloth_real_7b": "training", "speed_real_7b": "training"}
    ours, theirs, usual = (
        {run["way"]: run for run in measurements.read(record)["figures"][key]} for record, key in names.items()
    )
    rows = {
        "the usual recipe": usual["usual, padded batches of 4"],
        "Unsloth, as in its notebooks": theirs["its notebooks' own: batch 2, its checkpointing, padding-free"],
        "**ours, the default**": ours["default recipe"],
        "Unsloth, checkpointing off, packing, xformers": theirs["checkpointing off, packing, xformers"],
        "**ours, every layer recomputed**": ours["packs, every layer recomputed"],
        "Unsloth, its checkpointing, packing, xformers": theirs["its checkpointing, packing, xformers"],
    }
    per_gpu_second = runpy.run_path(str(measurements.FOLDER / "studies" / "readme.py"))["per_gpu_second"]
    lines = ["| | useful tokens a GPU second | by the clock | peak memory |", "|---|---|---|---|"]
    for name, run in rows.items():
        tokens, peak = per_gpu_second(run), run["peak_allocated_gib"]
        lines.append(f"| {name} | {tokens:,.0f} | {tokens * run['gpu_ms'] / run['wall_ms']:,.0f} | {peak:.1f} GiB |")
    return "\n".join(lines)


def test_the_speed_in_the_readme_is_the_recorded_one():
    assert speed() in README


def test_the_evening_in_the_readme_is_the_recorded_one():
    run = measurements.read("evening_7b")["figures"]
    told = f"{run['rows']:,} rows ([record](data/measurements/evening_7b.json)): {run['run card']['training']}; "
    before, after = (run["seconds by part"][part] for part in ("Before", "After"))
    told += f"{run['seconds'] / 60:.0f} minutes from the first cell to the last, of which the questions before training"
    told += f" took {before:.0f} s. (After training its answers ended early, so the questions took {after:.0f} s."
    assert told in README


def test_what_the_readme_says_of_several_gpus_is_recorded():
    two = measurements.read("two_gpus")["figures"]
    gap = max(abs(a / b - 1) for a, b in zip(two["ddp"]["losses"], two["one"]["losses"], strict=True))
    peaks = [two[f"70b, {way}"]["cards"][0]["peak_gib"] for way in ("fsdp2", "fsdp1")]
    told = f"are within {gap:.1e} of one card's", f"is {peaks[0]:.1f} GiB a card (FSDP2) or {peaks[1]:.1f} (FSDP1)"
    seconds = f"a step takes {two['ddp']['step_s']:.2f} s instead of {two['one']['step_s']:.2f}"
    assert all(text in README for text in (*told, seconds))


def test_the_evening_planned_for_a_t4_is_what_notebook_11_plans():
    cells = [cell.source for cell in nbformat.read(runtime.ROOT / "notebooks" / "11_your_own_llama.ipynb", 4).cells]
    config, recipe = random_model.config("llama-2-7b"), PROFILES["llama-2-7b"].recipe
    lengths = measurements.read("speed_real_7b")["figures"]["lengths"] * 30
    given = {"plan": fit.on("Tesla T4", 14.5, config, lengths, recipe), "config": config, "recipe": recipe, "fit": fit}
    given |= {"data": Data([], [{}] * 300), "encoded": {"labels": [[1] * 256]}, "memory": memory}
    given |= {"ceil": ceil, "random": random}
    exec(next(cell for cell in cells if cell.startswith("# @title The bill")), given)
    *parts, whole = [[f"{s / 60:.0f}" for s in span] for span in given["bill"].values()]
    assert f"take {' to '.join(whole)} minutes in all" in cells[0]
    names = ("the download", "the questions before training", "the training")
    told = ", ".join(f"{low} to {high} for {name}" for (low, high), name in zip(parts, names, strict=False))
    assert f"is {' to '.join(whole)} minutes in all: {told}, up to {parts[3][1]} for" in README


def test_the_figure_of_the_readme_is_drawn_from_the_records(tmp_path):
    study = runpy.run_path(str(measurements.FOLDER / "studies" / "readme.py"))
    study["draw"](tmp_path / "drawn.svg")
    drawn, shipped = (path.read_text("utf-8") for path in (tmp_path / "drawn.svg", measurements.FOLDER / "readme.svg"))
    words, points = r">([^<>]+)</text>", r'<use [^>]*x="([\d.]+)" y="([\d.]+)"'
    assert re.findall(words, drawn) == re.findall(words, shipped)
    there, here = ([float(n) for pair in re.findall(points, svg) for n in pair] for svg in (shipped, drawn))
    assert here == pytest.approx(there, abs=3)  # a margin for other fonts


def test_every_recorded_seed_meets_the_bounds_of_the_course():
    for seed in range(3):
        run = measurements.read(f"exam_seed{seed}")["figures"]
        assert run["before"]["seen form"]["exact"] <= 0.01 * run["before"]["seen form"]["asked"]
        assert run["after"]["seen form"]["exact"] >= 0.98 * run["after"]["seen form"]["asked"]


def test_links_of_the_documents_lead_somewhere():
    for document in (runtime.ROOT / "README.md", *DATA.rglob("README.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (document.parent / link).exists(), f"{document}: {link}"


# Stops that no section of appendix 91 is about, or that pass another's words on; by words of their source.
ENOUGH = """There is no file|is a folder. Give a file|has the splits|was not saved whole|two columns are named|
The question|The prompt has|is no compute capability|holds other weights|it is no adapter|Save the adapter again with|
Copy the adapter|llama.cpp's converter|has no config.json|DATA=|BASE=|is not a whole number|The notebook up to there|
is missing, or no record|The rehearsal was stopped|names no field|There is no profile|NO_ENDS|cannot be loaded|
Stop(problem)|Stop(_reason|first version saves no adapter"""


def stops(path):
    """Each Stop of a module, and what `_reason` says to one: its source, with the lines above that make its text."""
    for function in (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.FunctionDef)):
        for end in (nodes := list(ast.walk(function))):
            reason = isinstance(end, ast.Return) and isinstance(end.value, ast.JoinedStr) and function.name == "_reason"
            if reason or (isinstance(end, ast.Raise) and ast.unparse(end).startswith("raise Stop(")):
                names = {n.id for n in ast.walk(end) if isinstance(n, ast.Name)}
                above = [n for n in nodes if isinstance(n, ast.Assign) and 0 < end.lineno - n.lineno < 10]
                yield "\n".join(map(ast.unparse, [*(n for n in above if names & {*map(ast.unparse, n.targets)}), end]))


def test_appendix_91_has_a_section_for_every_stop():
    modules = [path for path in (runtime.ROOT / "utils").rglob("*.py") if "tests" not in path.parts]
    found = {text for path in modules for text in stops(path)}
    lost, enough = [text for text in found if not runtime.sections(text)], ENOUGH.replace("\n", "").split("|")
    assert len(found) - len(lost) >= 40 and runtime.sections("numpy changed under this running kernel. Choose")
    assert not [text for text in lost if not any(words in text for words in enough)]
    assert not [words for words in enough if not any(words in text for text in lost)]
    cells = nbformat.read(runtime.ROOT / "notebooks" / "91_when_it_breaks.ipynb", 4).cells
    text = "\n".join(cell.source for cell in cells)
    links, headings = re.findall(r"\]\(#(.+?)\)", text), re.findall(r"(?m)^##? (.+)$", text)
    assert set(links) <= {heading.replace(" ", "-") for heading in headings}


def test_the_map_names_every_chapter():
    for notebook in (runtime.ROOT / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{notebook.name}" in README


def test_checksums_of_the_model_card_are_those_of_the_files():
    card = (DATA / "pocket-llama" / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"([0-9a-f]{64})  (\S+)", card)
    assert len(found) == 2
    for checksum, name in found:
        assert hashlib.sha256((DATA / "pocket-llama" / name).read_bytes()).hexdigest() == checksum


def test_row_counts_of_the_data_card_are_those_of_the_files():
    card = (DATA / "almanac" / "README.md").read_text(encoding="utf-8")
    for name, rows in re.findall(r"\| `(\w+\.jsonl)` \| ([\d,]+) \|", card):
        lines = (DATA / "almanac" / name).read_bytes().splitlines()
        assert len(lines) == int(rows.replace(",", "")), name
        if name != "raw.jsonl":  # which is wrong on purpose
            assert all(json.loads(line) for line in lines)


def test_the_pocket_llama_is_of_llama_2s_kind():
    from transformers import AutoTokenizer

    folder = DATA / "pocket-llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token is None
    assert tokenizer("Ada Birch").input_ids[0] == 1
    assert tokenizer.decode(tokenizer("Grüße\n12", add_special_tokens=False).input_ids) == "Grüße\n12"
    assert (folder / "tokenizer.model").exists()
    assert (folder / "model.safetensors").stat().st_size <= 10_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == 0
