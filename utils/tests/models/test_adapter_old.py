"""Adapters on disk: saved whole, named by what made them, and trained once for all who ask."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from utils import generation, runtime
from utils.data import template
from utils.models import adapters, loading
from utils.training import guards
from utils.training.cache import trained_adapter
from utils.training.trainer import train
from utils.tests import tiny


@pytest.fixture(scope="module")
def trained(base, tokenizer, encoded):
    """A model after one run, and its log."""
    model = adapters.add(loading.load_base(base), tiny.RECIPE)
    return model, train(model, tokenizer, encoded, tiny.RECIPE, live=False)


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(adapter, "OUTPUTS", tmp_path)
    return tmp_path


def save(trained, tokenizer, recipe=tiny.RECIPE, rows=tiny.ROWS, **report) -> Path:
    return adapters.save(trained[0], tokenizer, recipe, rows, report)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_holds_all_that_is_needed_and_no_pickle(trained, tokenizer, outputs):
    folder = save(trained, tokenizer)
    names = set(content(folder))
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "run.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert folder.parent == outputs / "adapters"


def test_run_json_says_what_made_the_adapter(base, trained, tokenizer, outputs):
    run = json.loads((save(trained, tokenizer, exact=0.5) / "run.json").read_text())
    assert run["base"] == base
    assert run["base_fingerprint"] == loading.fingerprint(loading.load_base(base))
    assert run["recipe"]["learning_rate"] == 1e-2
    assert run["versions"] == runtime.versions()
    assert run["exact"] == 0.5


def test_equal_runs_share_one_folder_and_the_later_one_stays(trained, tokenizer, outputs):
    first = save(trained, tokenizer, exact=0.1)
    second = save(trained, tokenizer, exact=0.2)
    assert first == second
    assert json.loads((first / "run.json").read_text())["exact"] == 0.2
    assert list((outputs / "adapters").iterdir()) == [first]


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": replace(tiny.RECIPE, seed=1)},
        {"recipe": replace(tiny.RECIPE, learning_rate=2e-2)},
        {"rows": tiny.ROWS[1:]},
        {"rows": tiny.ROWS[::-1]},
    ],
)
def test_another_recipe_or_other_data_get_another_folder(trained, tokenizer, outputs, other):
    assert save(trained, tokenizer) != save(trained, tokenizer, **other)


def test_other_versions_get_another_folder(trained, tokenizer, outputs, monkeypatch):
    first = save(trained, tokenizer)
    monkeypatch.setattr(adapter, "versions", lambda: {**runtime.versions(), "torch": "0"})
    assert save(trained, tokenizer) != first


def test_another_base_gets_another_folder(trained, tokenizer, encoded, outputs, tmp_path):
    deeper = tiny.make_base(tmp_path / "deeper", layers=3)
    other = adapters.add(loading.load_base(deeper), tiny.RECIPE)
    assert save((other, []), tokenizer) != save(trained, tokenizer)


def test_the_name_does_not_depend_on_where_the_base_lies(base, trained, tokenizer, outputs, tmp_path):
    first = save(trained, tokenizer)
    moved = adapters.add(loading.load_base(tiny.make_base(tmp_path / "moved")), tiny.RECIPE)
    moved.trained_steps = trained[0].trained_steps
    assert save((moved, []), tokenizer) == first


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_fails_while_renaming_leaves_the_old_folder_whole(
    trained, tokenizer, outputs, monkeypatch, call, failure
):
    folder = save(trained, tokenizer, exact=0.1)
    before, replace_, calls = content(folder), os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == call:
            raise failure
        replace_(source, target)

    monkeypatch.setattr(adapter.os, "replace", failing)
    with pytest.raises(type(failure)):
        save(trained, tokenizer, exact=0.2)
    assert content(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_report_that_cannot_be_written_leaves_the_old_folder_whole(trained, tokenizer, outputs):
    folder = save(trained, tokenizer, exact=0.1)
    before = content(folder)
    with pytest.raises(TypeError):
        save(trained, tokenizer, exact=torch.tensor(0.2))
    assert content(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_first_save_that_fails_leaves_nothing(trained, tokenizer, outputs):
    with pytest.raises(TypeError):
        save(trained, tokenizer, exact=torch.tensor(0.2))
    assert list((outputs / "adapters").iterdir()) == []


def test_a_saved_adapter_on_a_fresh_base_gives_the_same_logits(base, trained, tokenizer, outputs):
    from peft import PeftModel

    folder, ids = save(trained, tokenizer), torch.arange(3, 60)[None]
    again = PeftModel.from_pretrained(loading.load_base(base), folder)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trained[0](ids).logits)
        assert not torch.equal(again(ids).logits, loading.load_base(base)(ids).logits)


def test_the_saved_tokenizer_is_the_one_that_was_used(trained, tokenizer, outputs):
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(save(trained, tokenizer))
    assert (again.pad_token, again.padding_side) == ("<unk>", "left")
    assert [template.encode(again, row) for row in tiny.ROWS] == [template.encode(tokenizer, row) for row in tiny.ROWS]


def test_a_learners_run_prints_nothing_on_stderr(base, tmp_path):
    """Load, add, train, answer, save, reload, by the recipes of both profiles; the base has sampling habits."""
    inclined = Path(shutil.copytree(base, tmp_path / "base"))
    habits = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": 0.6, "max_length": 200}
    (inclined / "generation_config.json").write_text(json.dumps(habits))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("healthy_run.py")), str(inclined)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(runtime.ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "healthy"
    assert len(list((tmp_path / "adapters").iterdir())) == 2


def test_a_run_that_went_on_has_another_folder(base, tokenizer, encoded, outputs):
    model = adapters.add(loading.load_base(base), tiny.RECIPE)
    train(model, tokenizer, encoded, tiny.RECIPE, live=False)
    once = save((model, []), tokenizer)
    train(model, tokenizer, encoded, tiny.RECIPE, live=False)
    assert save((model, []), tokenizer) != once


def test_an_adapter_is_trained_once_for_all_who_ask(base, tokenizer, outputs, monkeypatch):
    first = generation.answer(trained_adapter(base, tokenizer, tiny.ROWS, tiny.RECIPE), tokenizer, tiny.ROWS)
    monkeypatch.setattr(training, "train", lambda *given, **named: pytest.fail("trained again"))
    second = generation.answer(trained_adapter(base, tokenizer, tiny.ROWS, tiny.RECIPE), tokenizer, tiny.ROWS)
    assert first == second
    assert first != generation.answer(loading.load_base(base), tokenizer, tiny.ROWS)


def test_the_notebook_and_those_who_ask_later_share_one_adapter(base, trained, tokenizer, outputs, monkeypatch):
    save(trained, tokenizer)
    monkeypatch.setattr(training, "train", lambda *given, **named: pytest.fail("trained again"))
    trained_adapter(base, tokenizer, tiny.ROWS, tiny.RECIPE)


def test_an_adapter_that_was_cut_off_goes_on_where_it_was(base, tokenizer, outputs, monkeypatch):
    """The same call again is all that it takes, and checkpoints are gone once the adapter is saved."""
    recipe, begun = replace(tiny.RECIPE, steps=60), []

    class Killed(BaseException):
        pass

    def spy(self, args, state, control, **kwargs):
        begun.append(state.global_step)
        if state.global_step == 55:
            raise Killed

    monkeypatch.setattr(guards.Guard, "on_step_begin", spy)
    with pytest.raises(Killed):
        trained_adapter(base, tokenizer, tiny.ROWS, recipe)
    assert list(outputs.glob("checkpoints/*/checkpoint-50"))
    begun.clear()
    monkeypatch.setattr(
        guards.Guard, "on_step_begin", lambda _, args, state, *more, **named: begun.append(state.global_step)
    )
    trained_adapter(base, tokenizer, tiny.ROWS, recipe)
    assert begun == list(range(50, 60))
    assert not list(outputs.glob("checkpoints/*"))


def test_an_adapter_is_fetched_from_the_mirror(base, tokenizer, outputs, tmp_path, monkeypatch):
    first = trained_adapter(base, tokenizer, tiny.ROWS, tiny.RECIPE, mirror=tmp_path / "drive")
    shutil.rmtree(outputs / "adapters")  # a new machine
    monkeypatch.setattr(training, "train", None)  # must not be asked again
    again = trained_adapter(base, tokenizer, tiny.ROWS, tiny.RECIPE, mirror=tmp_path / "drive")
    kept = {name: p for name, p in first.named_parameters() if "lora_" in name}
    assert kept and all(torch.equal(p, kept[name]) for name, p in again.named_parameters() if "lora_" in name)


def test_a_mirror_that_is_full_at_the_end_is_told_and_the_adapter_stays(base, tokenizer, outputs, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "copy", full)
    trained_adapter(base, tokenizer, tiny.ROWS, tiny.RECIPE, mirror=outputs / "drive")
    assert "the adapter could not be copied to" in capsys.readouterr().out
    assert list(outputs.glob("adapters/*/adapter_model.safetensors"))


def test_the_log_is_a_csv_file(base, tokenizer, outputs):
    trained_adapter(base, tokenizer, tiny.ROWS, tiny.RECIPE)
    log = next(outputs.glob("adapters/*/log.csv")).read_text().splitlines()
    assert log[0].startswith("step,loss,grad_norm,learning_rate")
    assert [line.split(",")[0] for line in log[1:]] == ["1", "2", "3", "4", "5", "6"]
