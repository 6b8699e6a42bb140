"""An adapter is trained once for all who ask, goes on where it was cut off, and outlives its machine in a mirror."""

import shutil
from dataclasses import replace

import pytest

from utils.models import adapters, loading
from utils.tests import tiny
from utils.tests.tiny import same, weights
from utils.training import checkpoints, guards, trainer
from utils.training.cache import trained_adapter


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "OUTPUTS", tmp_path)
    return tmp_path


@pytest.fixture
def never_trains(monkeypatch):
    """A function: from here on, a training is a failure."""
    return lambda: monkeypatch.setattr(trainer, "train", lambda *given, **named: pytest.fail("trained again"))


def test_an_adapter_is_trained_once_and_fetched_from_the_mirror(base, tokenizer, outputs, never_trains):
    def ask():
        return trained_adapter(base, tokenizer, tiny.ROWS, tiny.RECIPE, mirror=outputs / "drive")

    first = ask()
    assert any(tensor.any() for name, tensor in weights(first).items() if "lora_B" in name)
    assert not list(outputs.glob("checkpoints/*")) and not list(outputs.glob("drive/checkpoints/*"))
    log = next(outputs.glob("adapters/*/log.csv")).read_text().splitlines()
    assert log[0].startswith("step,loss,grad_norm,learning_rate")
    assert [line.split(",")[0] for line in log[1:]] == ["1", "2", "3", "4", "5", "6"]
    never_trains()
    assert same(weights(ask()), weights(first))
    shutil.rmtree(outputs / "adapters")  # a new machine
    assert same(weights(ask()), weights(first))


def test_a_notebook_that_trains_and_one_that_asks_share_it(base, tokenizer, encoded, outputs, never_trains):
    model = adapters.add(loading.load_base(base), tiny.RECIPE)
    trainer.train(model, tokenizer, encoded, tiny.RECIPE, live=False)
    adapters.save(model, tokenizer, tiny.RECIPE, tiny.ROWS, {})
    never_trains()
    assert same(weights(trained_adapter(base, tokenizer, tiny.ROWS, tiny.RECIPE)), weights(model))


def test_a_run_that_was_cut_off_goes_on_and_survives_a_full_mirror(base, tokenizer, outputs, monkeypatch, capsys):
    recipe, begun = replace(tiny.RECIPE, steps=52), []

    class Killed(BaseException):
        pass

    def full(*_):
        raise OSError(28, "No space left on device")

    def killed_at(last: int):
        def on_step_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)
            if state.global_step == last:
                raise Killed

        return on_step_begin

    monkeypatch.setattr(guards.Guard, "on_step_begin", killed_at(51))
    with pytest.raises(Killed):
        trained_adapter(base, tokenizer, tiny.ROWS, recipe)
    assert list(outputs.glob("checkpoints/*/checkpoint-50"))
    begun.clear()
    monkeypatch.setattr(guards.Guard, "on_step_begin", killed_at(-1))
    monkeypatch.setattr(checkpoints, "copy", full)
    trained_adapter(base, tokenizer, tiny.ROWS, recipe, mirror=outputs / "drive")
    assert begun == [50, 51]
    assert "the adapter could not be copied to" in capsys.readouterr().out
    assert list(outputs.glob("adapters/*/adapter_model.safetensors")) and not list(outputs.glob("checkpoints/*"))
