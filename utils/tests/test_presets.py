"""Which world, which base, which data, which dtype: decided by names and numbers alone."""

import pytest
import torch

from utils import hardware, presets, runtime


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("QLORA_PROFILE", "QLORA_BASE", "QLORA_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        (None, torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),  # a T4, which says that it supports bf16
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_dtype_follows_the_capability(capability, dtype):
    assert hardware.compute_dtype(capability) is dtype


def test_bf16_is_not_asked_of_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    assert hardware.compute_dtype((7, 5)) is torch.float16


@pytest.mark.parametrize(("forced", "capability"), [("7.5", (7, 5)), ("8.0", (8, 0)), ("12.0", (12, 0))])
def test_a_capability_can_be_forced(monkeypatch, forced, capability):
    monkeypatch.setenv("QLORA_CAPABILITY", forced)
    assert hardware.capability() == capability


@pytest.mark.parametrize("forced", ["7", "7.5.0", "T4", "7,5", "."])
def test_a_malformed_capability_is_refused_with_an_example(monkeypatch, forced):
    monkeypatch.setenv("QLORA_CAPABILITY", forced)
    with pytest.raises(runtime.Stop, match="is no compute capability. Write major.minor, as in 7.5"):
        hardware.capability()


@pytest.mark.parametrize("found", [None, (7, 5), (9, 0)])
def test_capability_is_that_of_the_gpu_in_use(monkeypatch, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found)
    assert hardware.capability() == found


@pytest.mark.parametrize(("cuda", "name"), [(False, "pocket"), (True, "llama-2-7b")])
def test_a_gpu_decides_when_nobody_else_does(monkeypatch, cuda, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert presets.pick() == presets.PROFILES[name]


def test_a_chapters_default_holds_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert presets.pick("pocket").name == "pocket"


def test_the_environment_overrules_a_chapters_default(monkeypatch):
    monkeypatch.setenv("QLORA_PROFILE", "llama-2-7b")
    assert presets.pick("pocket").name == "llama-2-7b"


@pytest.mark.parametrize("by_environment", [True, False])
def test_an_unknown_profile_lists_the_valid_ones(monkeypatch, by_environment):
    if by_environment:
        monkeypatch.setenv("QLORA_PROFILE", "llama")
    with pytest.raises(runtime.Stop, match="no profile 'llama'. Choose one of: pocket, llama-2-7b"):
        presets.pick("pocket" if by_environment else "llama")


def test_the_environments_base_replaces_the_profiles(monkeypatch):
    monkeypatch.setenv("QLORA_BASE", "owner/model")
    assert presets.pick("pocket") == presets.Profile(
        "pocket", "owner/model", presets.PROFILES["pocket"].data, presets.PROFILES["pocket"].recipe
    )


def test_arguments_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("QLORA_BASE", "owner/model")
    picked = presets.pick("pocket", base="mine", data="rows.jsonl")
    assert (picked.base, picked.data) == ("mine", "rows.jsonl")


def test_picking_leaves_the_profiles_as_they_were():
    before = dict(presets.PROFILES)
    presets.pick("pocket", base="mine", data="rows.jsonl")
    assert before == presets.PROFILES


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
