"""Which world, which base, which data: decided by names alone."""

from dataclasses import replace

import pytest
import torch

from utils import presets, runtime


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("QLORA_PROFILE", "QLORA_BASE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("cuda", "name"), [(False, "pocket"), (True, "llama-2-7b")])
def test_a_gpu_decides_when_nobody_else_does(monkeypatch, cuda, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert presets.pick() == presets.PROFILES[name]


def test_a_chapters_default_holds_on_a_gpu_too_and_the_environment_overrules_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert presets.pick("pocket").name == "pocket"
    monkeypatch.setenv("QLORA_PROFILE", "llama-2-7b")
    assert presets.pick("pocket").name == "llama-2-7b"


def test_a_recipe_is_changed_by_its_own_names_alone():
    recipe = presets.PROFILES["llama-2-7b"].recipe
    assert recipe.changed("") == recipe
    changed = replace(recipe, learning_rate=7e-5, rank=8, optimizer="adamw_torch", pack_length=0)
    assert recipe.changed(" learning_rate=7e-5,rank = 8, optimizer=adamw_torch, pack_length=0") == changed
    for wrong in ("learning_rat=1", "rank", "rank=many", "rank=0", "steps=-1", "learning_rate=nan"):
        with pytest.raises(runtime.Stop, match=f"CHANGE: '{wrong}' .* epochs=3, .*rank=16"):
            recipe.changed(f"epochs=2, {wrong}")


@pytest.mark.parametrize("by_environment", [True, False])
def test_an_unknown_profile_lists_the_valid_ones(monkeypatch, by_environment):
    if by_environment:
        monkeypatch.setenv("QLORA_PROFILE", "llama")
    with pytest.raises(runtime.Stop, match="no profile 'llama'. Choose one of: pocket, llama-2-7b"):
        presets.pick("pocket" if by_environment else "llama")


def test_the_environments_base_replaces_the_profiles_and_arguments_win_over_it(monkeypatch):
    monkeypatch.setenv("QLORA_BASE", "owner/model")
    assert presets.pick("pocket") == replace(presets.PROFILES["pocket"], base="owner/model")
    assert presets.pick("pocket", "mine", "rows") == replace(presets.PROFILES["pocket"], base="mine", data="rows")


def test_pockets_files_do_not_depend_on_where_python_was_started(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pocket = presets.pick("pocket")
    assert pocket.base == str(runtime.ROOT / "data" / "pocket-llama")
    assert pocket.data == str(runtime.ROOT / "data" / "almanac" / "train.jsonl")


def test_a_relative_base_may_be_typed_from_the_courses_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_BASE", "data/pocket-llama")
    monkeypatch.chdir(tmp_path)
    assert presets.pick("pocket").base == str(runtime.ROOT / "data" / "pocket-llama")
    (tmp_path / "data" / "pocket-llama").mkdir(parents=True)
    assert presets.pick("pocket").base == "data/pocket-llama"  # where the kernel runs comes first
