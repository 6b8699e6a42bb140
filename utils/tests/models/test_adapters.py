"""Adapters: added once, saved whole under the name of what made them, loaded onto their base and refused by any other.

What chapter 06 asserts (a fresh process) is not asserted again here.
"""

import json
import os
import shutil
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from utils import generation, runtime
from utils.data import template
from utils.models import adapters, loading
from utils.tests import tiny


@pytest.fixture(scope="module")
def saved(stirred, tokenizer, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "OUTPUTS", tmp_path_factory.mktemp("outputs"))
        log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "eval_loss": 1.0}]
        return adapters.save(stirred, tokenizer, tiny.RECIPE, tiny.ROWS, {"exact": 0.5}, log)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the saved adapter that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(adapters, "OUTPUTS", tmp_path)
    return tmp_path


@pytest.fixture
def never_loads(monkeypatch) -> list:
    """What `adapters.load` asks of `load_base`, which stops there."""
    asked = []

    def load_base(*arguments):
        asked.append(arguments)
        raise runtime.Stop("not loaded")

    monkeypatch.setattr(loading, "load_base", load_base)
    return asked


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(call, *arguments, **named) -> str:
    with pytest.raises(runtime.Stop) as stopped:
        call(*arguments, **named)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


# Added.


def test_a_second_adapter_is_never_added(adapted):
    assert adapters.add(adapted, tiny.RECIPE) is adapted
    said = refused(adapters.add, adapted.get_base_model(), tiny.RECIPE)
    assert "already carries an adapter. Load the base again (load_base)" in said


def test_the_recipes_seed_decides_the_first_weights(adapted):
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(123)
        model = adapters.add(base, replace(tiny.RECIPE, seed=seed))
        weights = torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])
        model.unload()
        return weights

    base = adapted.unload()
    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


# Saved.


def test_the_folder_holds_what_made_the_adapter_and_no_pickle(base, stirred, saved):
    files = content(saved)
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "run.json", "log.csv"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert files["log.csv"].decode().split() == ["step,loss,eval_loss", "1,2.0,", "2,1.5,1.0"]
    run = json.loads(files["run.json"])
    assert (run["base"], run["exact"], run["versions"]) == (base, 0.5, runtime.versions())
    assert run["base_fingerprint"] == loading.fingerprint(loading.bare(stirred))
    assert run["recipe"]["learning_rate"] == 1e-2


def test_the_saved_tokenizer_is_the_one_that_was_used(saved, tokenizer):
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(saved)
    assert (again.pad_token, again.padding_side) == ("<unk>", "left")
    assert [template.encode(again, row) for row in tiny.ROWS] == [template.encode(tokenizer, row) for row in tiny.ROWS]


def test_equal_runs_share_one_folder_and_the_later_one_stays(stirred, tokenizer, outputs, monkeypatch):
    monkeypatch.setattr(stirred, "trained_steps", 6, raising=False)
    run = stirred, tokenizer, tiny.RECIPE, tiny.ROWS
    first, second = adapters.save(*run, {"exact": 0.1}), adapters.save(*run, {"exact": 0.2})
    assert first == second == adapters.folder_of(adapters.made_by(stirred, tiny.RECIPE, tiny.ROWS, 6))
    assert json.loads((first / "run.json").read_text())["exact"] == 0.2
    assert list((outputs / "adapters").iterdir()) == [first]


def test_what_decides_the_weights_decides_the_folder_and_nothing_else(stirred, monkeypatch):
    def name(recipe=tiny.RECIPE, rows=tiny.ROWS, steps=6) -> str:
        return adapters.folder_of(adapters.made_by(stirred, recipe, rows, steps)).name

    first = name()
    others = [name(replace(tiny.RECIPE, seed=1)), name(replace(tiny.RECIPE, learning_rate=2e-2))]
    others += [name(rows=tiny.ROWS[1:]), name(rows=tiny.ROWS[::-1]), name(steps=12)]
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "versions", lambda: {**runtime.versions(), "torch": "0"})
        others.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(loading, "fingerprint", lambda model: "0" * 12)
        others.append(name())
    assert len({first, *others}) == 8
    monkeypatch.setattr(stirred.config, "_name_or_path", "/elsewhere/base")
    assert name() == first


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_folder_whole(stirred, tokenizer, outputs, monkeypatch, call, failure):
    run = stirred, tokenizer, tiny.RECIPE, tiny.ROWS
    folder = adapters.save(*run, {"exact": 0.1})
    before, replace_, calls = content(folder), os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == call:
            raise failure
        replace_(source, target)

    monkeypatch.setattr("os.replace", failing)
    with pytest.raises(type(failure)):
        adapters.save(*run, {"exact": 0.2})
    assert content(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("report", "log", "kept"),
    [
        ({"exact": np.float32(0.5), "at": datetime(2026, 1, 1), "x": torch.ones(2), "y": {1}}, [{"step": 1}], 0.5),
        ({"exact": float("nan"), ("a", "b"): 1}, [{"step": 1}], None),
        ({"exact": 0.25}, [{"loss": 1.0}], 0.25),
    ],
    ids=["all written", "a report that is no JSON", "a log without steps"],
)
def test_no_report_log_or_column_costs_the_adapter(stirred, tokenizer, outputs, capsys, report, log, kept):
    rows = [row | {"when": datetime(2026, 1, 1), "price": Decimal(1), "raw": b"x"} for row in tiny.ROWS]
    folder = adapters.save(stirred, tokenizer, tiny.RECIPE, rows, report, log)
    run = json.loads((folder / "run.json").read_text())
    assert (run["base_fingerprint"], run.get("exact")) == (loading.fingerprint(loading.bare(stirred)), kept)
    assert (folder / "tokenizer.json").is_file() and len(adapters.tensors(folder)) == 28
    assert ("note: the adapter is saved, but not all" in capsys.readouterr().out) == (kept != 0.5)


# Loaded. Which base: what the adapter says, and where that base is now.


def test_the_loaded_model_answers_as_the_one_that_was_saved(stirred, tokenizer, saved):
    model, its_tokenizer = adapters.load(saved)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    expected = generation.answer(stirred, tokenizer, tiny.ROWS)
    assert generation.answer(model, its_tokenizer, tiny.ROWS) == expected
    with model.disable_adapter():
        assert generation.answer(model, its_tokenizer, tiny.ROWS) != expected


def test_a_moved_base_under_another_name_is_loaded_if_you_say_so_without_four_bits_too(base, folder, tmp_path):
    renamed = str(shutil.copytree(base, tmp_path / "my-llama"))
    model, _ = adapters.load(folder, base=renamed, renamed=True, four_bit=False)
    assert torch.uint8 not in {p.dtype for p in model.parameters()}


def test_another_name_is_refused_before_anything_is_loaded(folder, never_loads):
    said = refused(adapters.load, folder, base="owner/my-llama")
    assert said.startswith("The adapter was made for base; this base is my-llama. Load base, or train")
    assert said.endswith("say renamed=True")
    assert never_loads == []


@pytest.mark.parametrize(
    ("run", "given", "asked"),
    [
        ({"base": "owner/model", "base_revision": "a" * 40}, "", ("owner/model", True, "a" * 40)),
        ({"base": "owner/model", "base_revision": "a" * 40}, "mirror/model", ("mirror/model", True, "main")),
        ({"base": "/content/course/data/pocket-llama"}, "", (str(runtime.ROOT / "data/pocket-llama"), True, "main")),
    ],
    ids=["the revision that made it", "a mirror, whose commits are others", "the course on another machine"],
)
def test_the_base_that_made_it_is_found(folder, never_loads, run, given, asked):
    edit(folder / "run.json", **run)
    refused(adapters.load, folder, base=given)
    assert never_loads == [asked]


def test_without_a_run_json_pefts_config_names_the_base(base, folder, never_loads):
    (folder / "run.json").unlink()
    assert adapters.made_for(folder) == {"base": base, "revision": "", "fingerprint": ""}
    edit(folder / "adapter_config.json", base_model_name_or_path=None)
    assert refused(adapters.load, folder).endswith("Give base=")
    assert refused(adapters.load, folder, base=base) == "not loaded"


# A base that is checked.


def test_its_own_base_passes_with_and_without_a_revision(stirred, folder, monkeypatch):
    adapters.check(stirred, folder)
    edit(folder / "run.json", base_revision="a" * 40)
    adapters.check(stirred, folder)  # a folder has no revision
    monkeypatch.setattr(stirred.config, "_commit_hash", "a" * 40, raising=False)
    adapters.check(stirred, folder)


def test_another_name_other_numbers_and_another_commit_are_refused(stirred, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(stirred.config, "_name_or_path", "another-llama")
        assert "made for base; this base is another-llama. Load base" in refused(adapters.check, stirred, folder)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "fingerprint", lambda model: "c" * 12)
        assert "this one has cccccccccccc: same name, other weights. Load" in refused(adapters.check, stirred, folder)
    edit(folder / "run.json", base_revision="a" * 40)
    monkeypatch.setattr(stirred.config, "_commit_hash", "b" * 40, raising=False)
    assert "made for revision aaaaaaaa of base; this is bbbbbbbb" in refused(adapters.check, stirred, folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_hidden_layers": 3}, "another shape than the adapter's: 3 layers, the adapter has 2. Load base"),
        ({"intermediate_size": 192}, "_features of model.layers.0.mlp."),
    ],
)
def test_another_shape_is_refused(stirred, folder, change, told):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        other = LlamaForCausalLM(LlamaConfig(**stirred.config.to_dict() | {"quantization_config": None} | change))
    other.config._name_or_path = "base"
    assert told in refused(adapters.check, other, folder)


def test_other_modules_are_refused(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=384))
    other.config._name_or_path = "base"
    assert "it has no model.layers.0" in refused(adapters.check, other, folder)


# An adapter with nothing in it.


OTHER = "holds other weights than its adapter_config.json says: "


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda name, t: {name.removeprefix("base_model.model."): t},
            OTHER + "base_model.model.model.layers.0.mlp.down",
        ),
        (lambda name, t: {}, "Every lora_B of adapter is zero or missing: it changes nothing. Save a trained"),
        (lambda name, t: {name: t} if "q_proj" in name else {}, OTHER),
        (lambda name, t: {name: t[:2] if "lora_A" in name else t[:, :2]}, OTHER),
        (lambda name, t: {name: t * float("nan")}, "is not finite. Train again, with a lower"),
        (lambda name, t: {name: t * ("lora_A" in name)}, "Every lora_B of adapter is zero"),
        (None, "adapter_model.safetensors of adapter was not saved whole ("),
    ],
    ids=["other names", "no tensors", "q_proj alone", "another rank", "NaN", "all of B zero", "cut short"],
)
def test_an_adapter_with_nothing_in_it_is_refused(folder, change, told):
    path, changed = folder / "adapter_model.safetensors", {}
    if change:
        for name, tensor in load_file(path).items():
            changed |= {n: t.contiguous() for n, t in change(name, tensor).items()}
        save_file(changed, path)
    else:
        path.write_bytes(path.read_bytes()[:-100])
    assert told in refused(adapters.load, folder)


# No adapter at all.


@pytest.mark.parametrize("name", ["./none", "outputs/adapters/none", "/none", "my adapter"])
def test_an_unknown_folder_is_called_unknown(name):
    assert refused(adapters.find, name).startswith(f"There is no folder {name}. Give the folder of an adapter")


def test_from_the_hub_come_safetensors_and_json_alone(saved, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda n, **a: asked.update(a, name=n) or str(saved))
    assert adapters.find("owner/adapter") == saved
    assert asked == {"name": "owner/adapter", "allow_patterns": ["*.json", "*.safetensors"]}


def test_a_pickle_is_not_loaded(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "a .bin may hold code" in refused(adapters.find, folder)


@pytest.mark.parametrize("name", ["run.json", "adapter_config.json"])
def test_a_broken_file_is_called_broken(folder, name):
    (folder / name).write_text("{")
    assert refused(adapters.load, folder).startswith(f"{name} in adapter is not JSON")
