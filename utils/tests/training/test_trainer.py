"""One run: fp32 adapters, the loss of trl, stops that say why, the same run twice, and nothing left behind."""

import errno
import gc
import signal
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, redirect_stdout
from dataclasses import replace
from io import StringIO
from math import isfinite
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Gemma2Config, Gemma2ForCausalLM, TrainerCallback
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from utils import hardware, runtime
from utils.models import adapters, loading
from utils.tests import tiny
from utils.tests.tiny import same, stir, weights
from utils.training import checkpoints, guards
from utils.training.trainer import arguments, build, train


def test_no_argument_is_deprecated(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        for message, category in runtime.QUIET_WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        for checkpointing in (True, False):
            arguments(replace(tiny.RECIPE, gradient_checkpointing=checkpointing), 1000, str(tmp_path))


@pytest.mark.parametrize(("forced", "mixed"), [("", (False, False)), ("7.5", (True, False)), ("8.0", (False, True))])
def test_mixed_precision_follows_the_capability_and_not_torch(monkeypatch, tmp_path, forced, mixed):
    monkeypatch.setenv("QLORA_CAPABILITY", forced)
    made = arguments(tiny.RECIPE, 1000, str(tmp_path))
    assert (made.fp16, made.bf16) == mixed


@pytest.mark.parametrize(
    ("rows", "accumulation", "epochs", "processes", "steps", "warmup"),
    [
        (1000, 1, 100, 1, 60, 10),  # many rows: the recipe's steps and warm-up
        (5, 1, 2, 1, 4, 0),  # two batches an epoch; at most a fifth for the warm-up
        (9, 2, 1, 1, 2, 0),  # eight rows a step
        (9, 2, 3, 2, 3, 0),  # sixteen
    ],
)
def test_steps(tmp_path, monkeypatch, rows, accumulation, epochs, processes, steps, warmup):
    monkeypatch.setattr(hardware, "processes", lambda: processes)
    recipe = replace(tiny.RECIPE, steps=60, warmup_steps=10, accumulation=accumulation, epochs=epochs)
    made = arguments(recipe, rows, str(tmp_path))
    assert (made.max_steps, made.warmup_steps) == (steps, warmup)


@pytest.mark.parametrize("forced", ["", "7.5"])
def test_a_trained_adapter_goes_on_from_its_exact_values_in_fp32(base, tokenizer, encoded, monkeypatch, forced):
    monkeypatch.setenv("QLORA_CAPABILITY", forced)
    model = stir(adapters.add(loading.load_base(base), tiny.RECIPE), 0.02)
    before = weights(model)
    assert not all(torch.equal(v, v.bfloat16().float()) for v in before.values())
    build(model, tokenizer, encoded, tiny.RECIPE)
    assert same(weights(model), before) and {v.dtype for v in before.values()} == {torch.float32}


def check_loss(trainer, inputs, items=None) -> None:
    """Ours and trl's: the same loss and, for what is trained, the same gradients."""
    found = []
    for compute in (type(trainer).compute_loss, SFTTrainer.compute_loss):
        trainer.model.train().zero_grad()
        loss = compute(trainer, trainer.model, dict(inputs), num_items_in_batch=items)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
        found.append((loss.item(), gradient))
    (ours, our_gradient), (theirs, their_gradient) = found
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert (our_gradient - their_gradient).norm() <= 1e-6 * their_gradient.norm()


@pytest.fixture
def batch(tokenizer, encoded):
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)([encoded[i] for i in range(4)])


def test_our_loss_is_trls(adapted, tokenizer, encoded, batch):
    trainer = build(stir(adapted, 0.02), tokenizer, encoded, tiny.RECIPE)
    for items in (None, torch.tensor(7)):
        check_loss(trainer, batch, items)
    check_loss(trainer, DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([*encoded][:3]))


def test_our_loss_is_trls_for_a_base_with_a_head_of_its_own_kind(tokenizer, encoded, batch):
    """Gemma 2 squeezes its logits behind the head: what is right for Llama would be silently wrong."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "attn_implementation": "eager"}
    shape = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = Gemma2Config(**shape, **heads, initializer_range=0.5, final_logit_softcapping=5.0)
    model = adapters.add(Gemma2ForCausalLM(config), tiny.RECIPE)
    check_loss(build(model, tokenizer, encoded, tiny.RECIPE), batch)


@pytest.mark.parametrize("recipe", [tiny.RECIPE, tiny.TWO_PASSES])
def test_a_penalty_counts_once_a_step_and_not_on_held_out_rows(base, tokenizer, encoded, recipe):
    logs = []
    for penalty in (None, lambda weights: 3.0 + 0 * sum(w.sum() for w in weights if w.requires_grad)):
        model = adapters.add(loading.load_base(base), recipe)
        settings = {"held_out": encoded, "logging_steps": 1, "eval_steps": 1, "penalty": penalty}
        logs.append(train(model, tokenizer, encoded, replace(recipe, steps=1), live=False, **settings)[0])
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"] + 3, abs=1e-4)
    assert logs[1]["eval_loss"] == pytest.approx(logs[0]["eval_loss"], abs=1e-4)


def test_a_run_does_not_go_on_with_another_penalty(base, tokenizer, encoded, tmp_path):
    def started(strength):
        model = adapters.add(loading.load_base(base), tiny.RECIPE)
        saving = {"checkpoints": checkpoints.Checkpoints(tmp_path, every=1), "live": False}
        penalty = lambda ws: strength * sum((w**2).sum() for w in ws)  # noqa: E731
        return train(model, tokenizer, encoded, replace(tiny.RECIPE, steps=1), **saving, penalty=penalty)

    assert started(0.1) and started(0.1)
    with pytest.raises(runtime.Stop, match="recipe.penalty"):
        started(0.2)


@pytest.fixture(scope="module")
def trained(base, tokenizer, encoded, tmp_path_factory):
    """One run for all tests that only look at it: the model, the log, what was printed, and the folder it ran in."""
    model, folder = adapters.add(loading.load_base(base), tiny.RECIPE), tmp_path_factory.mktemp("here")
    with chdir(folder), redirect_stdout(StringIO()) as printed:
        log = train(model, tokenizer, encoded, tiny.RECIPE)
    return model, log, printed.getvalue(), folder


def test_a_run_learns_prints_its_progress_alone_and_is_ready_to_answer(trained, encoded):
    model, log, printed, folder = trained
    learned = {name: values for name, values in weights(model).items() if "lora_B" in name}
    assert len(learned) == 14 and all(values.abs().max() > 0 for values in learned.values())
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert all(isfinite(entry[key]) for entry in log for key in ("loss", "grad_norm", "learning_rate"))
    assert log[-1]["num_input_tokens_seen"] == 2 * sum(len(row["input_ids"]) for row in encoded)  # two passes
    assert not any(module.training for module in model.modules())
    assert [line.split(",")[0] for line in printed.splitlines()] == [f"step {step} of 6" for step in range(1, 7)]
    assert not list(folder.iterdir())  # nothing is written beside what is saved


def test_the_same_seed_gives_the_same_bits_and_held_out_rows_change_nothing(adapted, tokenizer, encoded, trained):
    torch.manual_seed(99)  # what was drawn before must not matter
    log = train(adapted, tokenizer, encoded, tiny.RECIPE, live=False, held_out=encoded)
    assert same(weights(adapted), weights(trained[0]))
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [4, 6]
    assert log[-1]["eval_loss"] < log[3]["eval_loss"]


def test_a_second_interrupt_ends_at_once_and_keeps_what_was_learned(adapted, tokenizer, encoded, capsys):
    kept = {}

    class Impatient(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                kept.update(weights(model))
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    log = train(adapted, tokenizer, encoded, tiny.RECIPE, callbacks=[Impatient()])
    assert "Stopped by you after 2 steps. The adapter keeps what it has learned." in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    assert [entry["step"] for entry in log] == [1, 2] and adapted.trained_steps == 2 and not adapted.training
    assert same(weights(adapted), kept) and any(v.any() for name, v in kept.items() if "lora_B" in name)


def test_a_run_in_a_thread_leaves_nothing_on_the_model(base, tokenizer, encoded):
    """accelerate marks a model and would not prepare it again: in 16 bits the second run would miss autocast."""
    model, marks = adapters.add(loading.load_base(base), tiny.RECIPE), []
    recipe = replace(tiny.RECIPE, steps=1, optimizer="paged_adamw_8bit")

    class Spy(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            marks.append("_is_accelerate_prepared" in model.__dict__)

    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:  # where there are no signals
            pool.submit(train, model, tokenizer, encoded, recipe, live=False, callbacks=[Spy()]).result()
        assert not {"_is_accelerate_prepared", "forward", "_original_forward"} & model.__dict__.keys()
    assert marks == [True, True] and model.trained_steps == 2
    embedding = weakref.ref(model.get_input_embeddings())
    del model
    gc.collect()
    assert embedding() is None


# Runs that cannot go on. (Chapter 04 shows the frozen adapter, the masked rows, the loss that is no number, and what to
# lower when the memory is full.)


@pytest.mark.parametrize("log", [None, {}, {"loss": 0.0, "grad_norm": 1e-9}, {"loss": 3.0, "grad_norm": float("inf")}])
def test_the_guard_lets_healthy_logs_pass(log):
    """A gradient that is not finite is healthy in fp16: the scaler skips the step and goes on."""
    guards.Guard().on_log(None, None, None, logs=log)


def test_a_gradient_of_zero_is_laid_to_the_rate_once_the_rate_has_acted():
    """A rate far too high leaves no slope; at step 1 it has changed nothing yet."""
    args = SimpleNamespace(learning_rate=2e4)
    for step, cause in {1: "the adapter is frozen or every", 4: "the rate of 20000 is far too high .*CHANGE"}.items():
        with pytest.raises(runtime.Stop, match=f"zero at step {step}: {cause}"):
            guards.Guard().on_log(args, SimpleNamespace(global_step=step), None, logs={"grad_norm": 0.0})


def test_no_rows_and_unknown_settings_are_refused(adapted, tokenizer, encoded):
    with pytest.raises(runtime.Stop, match="There are no rows to train on"):
        build(adapted, tokenizer, encoded.select([]), tiny.RECIPE)
    with pytest.raises(TypeError, match="SFTConfig has no pakcing"):
        build(adapted, tokenizer, encoded, tiny.RECIPE, pakcing=True)


def test_full_memory_is_given_back_though_the_error_is_kept(adapted, tokenizer, encoded, monkeypatch):
    errors = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("a bug"),
    ]
    found = []

    def forward(*_, **__):
        activations = torch.zeros(1000)
        found.append(weakref.ref(activations))
        raise errors.pop(0)

    monkeypatch.setattr(adapted.get_base_model().model, "forward", forward)
    for _ in range(2):
        with pytest.raises(runtime.Stop, match="memory is full.*CHANGE.* first: batch_size=2, acc") as kept:
            train(adapted, tokenizer, encoded, tiny.RECIPE, live=False)
        assert kept.value and found[-1]() is None
    with pytest.raises(RuntimeError, match="a bug"):
        train(adapted, tokenizer, encoded, tiny.RECIPE, live=False)


def test_data_that_vanish_while_they_are_read_are_named(adapted, tokenizer, encoded):
    def vanished(rows):
        raise FileNotFoundError(2, "No such file or directory", "drive/rows.arrow")

    with pytest.raises(runtime.Stop, match="drive/rows.arrow has vanished while training read it"):
        train(adapted, tokenizer, encoded.with_transform(vanished), tiny.RECIPE)


@pytest.fixture(scope="module")
def begun(base, tokenizer, encoded, tmp_path_factory):
    """The model and the checkpoints of a run that ended when the disk was full."""
    saved = checkpoints.Checkpoints(tmp_path_factory.mktemp("begun") / "run", every=2)
    model, writes, write = adapters.add(loading.load_base(base), tiny.RECIPE), iter(range(9)), torch.save

    def full(*given):
        if next(writes) > 3:  # three files a checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*given)

    told = "The disk is full: checkpoint 4 was not saved"
    with patch.object(torch, "save", full), pytest.raises(runtime.Stop, match=told):
        train(model, tokenizer, encoded, tiny.RECIPE, live=False, checkpoints=saved)
    return model, saved


def test_what_a_checkpoint_pickles_is_read_weights_only(begun):
    latest = begun[1].latest()
    assert latest.name == "checkpoint-2" and (latest / "adapter_model.safetensors").is_file()
    pickles = {path.name: torch.load(path, weights_only=True) for path in latest.iterdir() if path.suffix == ".pt"}
    assert pickles.keys() == {"optimizer.pt", "scheduler.pt"} and not list(latest.glob("*.bin"))


def test_a_finished_run_does_nothing_more(base, tokenizer, encoded, tmp_path):
    for session in (2, 0):  # in the middle of a pass over the rows, where transformers would take one more step
        model, saved = adapters.add(loading.load_base(base), tiny.RECIPE), checkpoints.Checkpoints(tmp_path, every=1)
        train(model, tokenizer, encoded, replace(tiny.RECIPE, steps=2), live=False, checkpoints=saved)
        assert (model.trained_steps, model.session[0]) == (2, session)


def test_checkpoints_of_another_run_are_refused(begun, base, tokenizer, encoded, tmp_path, monkeypatch):
    model, saved = begun

    def refused(told: str, model=model, rows=encoded, recipe=tiny.RECIPE, **settings) -> None:
        with pytest.raises(runtime.Stop, match=told):
            train(model, tokenizer, rows, recipe, checkpoints=saved, **settings)

    refused("recipe.learning_rate was 0.01, is 0.001", recipe=replace(tiny.RECIPE, learning_rate=1e-3))
    refused("recipe.weight_decay was None, is 0.1", weight_decay=0.1)
    refused("data.rows was 12, is 11; data.tokens was", rows=encoded.select(range(11)))
    other = adapters.add(loading.load_base(tiny.make_base(tmp_path / "other", seed=1)), tiny.RECIPE)
    refused("base.name was .*; base.fingerprint was", model=other)
    monkeypatch.setattr(hardware, "processes", lambda: 2)
    refused("recipe.a_step was 4, is 8")
