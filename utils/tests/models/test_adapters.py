"""Base and adapter, put together in a process that knows neither; and every wrong base refused, with the mend."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import generation, runtime
from utils.models import adapters, loading
from utils.training.trainer import train
from utils.tests import tiny
from utils.tests import tiny; "


@pytest.fixture(scope="module")
def model(base, tokenizer, encoded):
    """The tiny base with a trained adapter."""
    model = adapters.add(loading.load_base(base), tiny.RECIPE)
    train(model, tokenizer, encoded, tiny.RECIPE, live=False)
    return model


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "OUTPUTS", tmp_path_factory.mktemp("outputs"))
        return adapters.save(model, tokenizer, tiny.RECIPE, tiny.ROWS, {})


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the saved adapter that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(call, *arguments, **named) -> str:
    with pytest.raises(runtime.Stop) as stopped:
        call(*arguments, **named)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


def other_base(path: Path, **change) -> str:
    return tiny.make_base(path / "base", **change)  # the same last name


def test_the_loaded_model_answers_as_the_one_that_was_saved(model, tokenizer, saved):
    loaded, its_tokenizer = adapters.load(saved)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    expected = generation.answer(model, tokenizer, tiny.ROWS)
    assert generation.answer(loaded, its_tokenizer, tiny.ROWS) == expected
    with loaded.disable_adapter():
        assert generation.answer(loaded, its_tokenizer, tiny.ROWS) != expected


def test_a_process_that_knows_nothing_answers_the_same(model, tokenizer, saved):
    script = (
        "import sys; from utils import exam, inference; from utils.tests import tiny; "
        "print(generation.answer(*adapters.load(sys.argv[1]), tiny.ROWS))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(saved)]
    done = subprocess.run(command, cwd=runtime.ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().splitlines()[-1] == str(generation.answer(model, tokenizer, tiny.ROWS)), done.stderr


def test_a_base_without_four_bits_takes_the_adapter_too(saved):
    loaded, _ = adapters.load(saved, four_bit=False)
    assert torch.uint8 not in {p.dtype for p in loaded.parameters()}


# Which base: the adapter's papers, and where that base is now.


def test_a_mirror_and_a_moved_folder_have_the_same_last_name(base, folder, tmp_path):
    moved = shutil.copytree(base, tmp_path / "elsewhere" / Path(base).name)
    adapters.load(folder, base=str(moved))


def test_a_base_under_another_name_is_refused_unless_you_say_so(base, folder, tmp_path):
    renamed = str(shutil.copytree(base, tmp_path / "my-llama"))
    said = refused(adapters.load, folder, base=renamed)
    assert said.startswith("The adapter was made for base; this base is my-llama. Load base, or train")
    assert said.endswith("say renamed=True")
    adapters.load(folder, base=renamed, renamed=True)


def test_the_name_is_refused_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(loading, "load_base", lambda *a: pytest.fail("loaded"))
    refused(adapters.load, folder, base="owner/another-model")


def test_a_folder_of_another_machine_is_found_among_the_courses_data(folder, monkeypatch):
    edit(folder / "run.json", base="/content/course/data/pocket-llama")
    asked = []
    monkeypatch.setattr(loading, "load_base", lambda *a: asked.append(a[0]) or pytest.skip.Exception)
    with pytest.raises(AttributeError):
        adapters.load(folder)
    assert asked == [str(runtime.ROOT / "data" / "pocket-llama")]


def test_an_adapter_without_papers_names_its_base_in_pefts_config(base, folder):
    (folder / "run.json").unlink()
    assert adapters.made_for(folder) == {"base": base, "revision": "", "fingerprint": ""}
    adapters.load(folder)


def test_an_adapter_that_names_no_base_needs_one(base, folder):
    (folder / "run.json").unlink()
    edit(folder / "adapter_config.json", base_model_name_or_path=None)
    assert refused(adapters.load, folder).endswith("Give base=")
    adapters.load(folder, base=base)


# Wrong in shape, weights, revision.


@pytest.mark.parametrize("layers", [1, 3])
def test_another_depth_is_refused(folder, tmp_path, layers):
    said = refused(adapters.load, folder, base=other_base(tmp_path, layers=layers))
    assert f"another shape than the adapter's: {layers} layers, the adapter has 2. Load base" in said


def test_another_width_is_refused(folder, tmp_path, model):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = model.config.to_dict() | {"intermediate_size": 192, "quantization_config": None}
    narrow = LlamaForCausalLM(LlamaConfig(**shape))
    narrow.config._name_or_path = "base"
    said = refused(adapters.check, narrow, folder)
    assert "features of model.layers.0.mlp" in said and "is 192, the adapter's 128" in said


def test_other_modules_are_refused(folder, model):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=384))
    other.config._name_or_path = "base"
    assert "it has no model.layers.0" in refused(adapters.check, other, folder)


def test_the_same_shape_with_other_weights_is_refused(folder, tmp_path):
    said = refused(adapters.load, folder, base=other_base(tmp_path, seed=1))
    assert "fingerprint" in said and "same name, other weights. Load base" in said


def test_another_revision_is_refused_where_both_are_known(base, folder):
    plain = loading.load_base(base)
    edit(folder / "run.json", base_revision="a" * 40)
    adapters.check(plain, folder)  # a folder has no revision
    plain.config._commit_hash = "b" * 40
    said = refused(adapters.check, plain, folder)
    assert said.startswith(f"The adapter was made for revision {'a' * 8} of base; this is {'b' * 8}. Load base at")
    plain.config._commit_hash = "a" * 40
    adapters.check(plain, folder)


def test_the_recorded_revision_is_the_one_that_is_loaded(folder, monkeypatch):
    edit(folder / "run.json", base="owner/model", base_revision="a" * 40)
    asked = []
    monkeypatch.setattr(loading, "load_base", lambda *a: asked.append(a))
    with pytest.raises(AttributeError):
        adapters.load(folder)
    with pytest.raises(AttributeError):
        adapters.load(folder, base="mirror/model")  # whose commits are others
    assert asked == [("owner/model", True, "a" * 40), ("mirror/model", True, "main")]


def test_a_model_that_has_its_adapter_already_can_be_checked(model, folder):
    adapters.check(model, folder)


# No adapter at all.


@pytest.mark.parametrize("name", ["./none", "outputs/adapters/none", "/none", "my adapter"])
def test_an_unknown_folder_is_called_unknown(name):
    assert refused(adapters.find, name).startswith(f"There is no folder {name}. Give the folder of an adapter")


def test_an_unknown_hub_name_says_what_was_tried():
    said = refused(adapters.find, "owner/adapter")  # tests are offline
    assert said.startswith("owner/adapter is no folder here, and cannot be had from the Hub (")
    assert said.endswith("Check the spelling, log in (hf auth login), or go online")


def test_from_the_hub_come_safetensors_and_json_alone(saved, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **a: asked.update(a, name=name) or str(saved)
    )
    assert adapters.find("owner/adapter") == saved
    assert asked == {"name": "owner/adapter", "allow_patterns": ["*.json", "*.safetensors"]}


def test_a_whole_model_is_no_adapter(base):
    assert refused(adapters.find, base).endswith("It is a whole model: loading.load_base reads it")


def test_an_empty_folder_is_no_adapter(tmp_path):
    assert refused(adapters.find, tmp_path).endswith("so it is no adapter. Give the folder that holds it")


def test_a_pickle_is_not_loaded(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "a .bin may hold code" in refused(adapters.find, folder)


@pytest.mark.parametrize("name", ["run.json", "adapter_config.json"])
def test_broken_papers_are_called_broken(folder, name):
    (folder / name).write_text("{")
    assert refused(adapters.load, folder).startswith(f"{name} in adapter is not JSON")
