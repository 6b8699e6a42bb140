"""One run: fp32 adapters, the loss of trl, stops that say why, the same run twice, and adapters saved whole."""

import errno
import gc
import signal
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import isfinite

import pytest
import torch
from transformers import TrainerCallback

from utils import runtime
from utils.models import adapters, loading
from utils.training import checkpoints, guards, progress
from utils.training.trainer import arguments, train
from utils.tests import tiny


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of what is trainable."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def stir(model) -> None:
    """Give lora_B values, as a trained adapter has, that bf16 cannot hold."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)


@pytest.fixture
def built(tokenizer, encoded, monkeypatch):
    """A function: the trainer as `train` builds it, and the adapter's weights at the moment when it would start."""
    from trl import SFTTrainer

    def build(model, recipe=tiny.RECIPE):
        found = []
        monkeypatch.setattr(SFTTrainer, "train", lambda self, **_: found.extend([self, weights(self.model)]))
        train(model, tokenizer, encoded, recipe)
        monkeypatch.undo()
        return found

    return build


# Arguments.


def arguments(recipe=tiny.RECIPE, rows: int = 1000, folder: str = "unused"):
    return arguments(recipe, rows, folder)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_no_argument_is_deprecated(tmp_path, checkpointing):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        for message, category in runtime.QUIET_WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        arguments(replace(tiny.RECIPE, gradient_checkpointing=checkpointing), folder=str(tmp_path))


@pytest.mark.parametrize(
    ("forced", "fp16", "bf16"), [("", False, False), ("7.5", True, False), ("8.0", False, True), ("9.0", False, True)]
)
def test_mixed_precision_follows_the_capability_and_not_torch(monkeypatch, tmp_path, forced, fp16, bf16):
    monkeypatch.setenv("QLORA_CAPABILITY", forced)
    made = arguments(folder=str(tmp_path))
    assert (made.fp16, made.bf16) == (fp16, bf16)


@pytest.mark.parametrize(
    ("rows", "accumulation", "epochs", "steps"),
    [
        (1000, 1, 100, 6),  # many rows: the recipe's steps
        (5, 1, 2, 4),  # two batches an epoch
        (4, 1, 2, 2),
        (1, 1, 3, 3),
        (9, 2, 1, 2),  # eight rows a step
    ],
)
def test_few_rows_are_not_read_more_often_than_epochs(tmp_path, rows, accumulation, epochs, steps):
    made = arguments(replace(tiny.RECIPE, accumulation=accumulation, epochs=epochs), rows, str(tmp_path))
    assert made.max_steps == steps


def test_a_short_run_spends_at_most_a_fifth_on_warming_up(tmp_path):
    recipe = replace(tiny.RECIPE, warmup_steps=10)
    assert arguments(recipe, folder=str(tmp_path)).warmup_steps == 1
    assert arguments(replace(recipe, steps=200), folder=str(tmp_path)).warmup_steps == 10


def test_the_recipe_arrives_in_the_arguments(tmp_path):
    recipe = replace(tiny.RECIPE, seed=7, max_grad_norm=0.3, accumulation=2, optimizer="paged_adamw_8bit")
    made = arguments(recipe, folder=str(tmp_path))
    assert (made.seed, made.max_grad_norm, made.learning_rate, made.max_length) == (7, 0.3, 1e-2, 128)
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (4, 2)
    assert made.optim == "paged_adamw_8bit"
    assert made.gradient_checkpointing is False  # trl's default is True


# What the trainer does to the adapter, and what is undone.


def test_trl_alone_still_rounds_the_adapter_to_bf16(adapted, tokenizer, encoded, tmp_path):
    """When this fails, trl has mended it: `train` need not put the values back."""
    from trl import SFTTrainer

    SFTTrainer(adapted, arguments(folder=str(tmp_path)), train_dataset=encoded, processing_class=tokenizer)
    assert {values.dtype for values in weights(adapted).values()} == {torch.bfloat16}


@pytest.mark.parametrize("forced", ["", "7.5", "8.0"])
def test_the_adapter_is_trained_in_fp32(base, built, monkeypatch, forced):
    monkeypatch.setenv("QLORA_CAPABILITY", forced)
    model = adapters.add(loading.load_base(base), tiny.RECIPE)
    monkeypatch.delenv("QLORA_CAPABILITY")  # the run itself is the CPU's
    assert {values.dtype for values in built(model)[1].values()} == {torch.float32}


def test_a_trained_adapter_goes_on_from_its_exact_values(adapted, built):
    stir(adapted)
    before = weights(adapted)
    assert not all(torch.equal(v, v.bfloat16().float()) for v in before.values())
    assert same(built(adapted)[1], before)


# The loss on a CPU.


def batch(tokenizer, encoded):
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)([encoded[i] for i in range(4)])


def loss_and_gradients(compute_loss, trainer, inputs, items):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = compute_loss(trainer, trainer.model, dict(inputs), num_items_in_batch=items)
    loss.backward()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("items", [None, torch.tensor(7), torch.tensor(1000)])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_our_loss_is_trls(adapted, tokenizer, encoded, built, items, checkpointing):
    from trl import SFTTrainer

    stir(adapted)
    trainer, _ = built(adapted, replace(tiny.RECIPE, gradient_checkpointing=checkpointing))
    inputs = batch(tokenizer, encoded)
    ours, our_gradients = loss_and_gradients(type(trainer).compute_loss, trainer, inputs, items)
    theirs, their_gradients = loss_and_gradients(SFTTrainer.compute_loss, trainer, inputs, items)
    assert type(trainer).compute_loss is not SFTTrainer.compute_loss
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert (our_gradients - their_gradients).norm() <= 1e-6 * their_gradients.norm()


def test_our_loss_is_trls_for_a_base_with_a_head_of_its_own_kind(tokenizer, encoded, built):
    """Gemma 2 squeezes its logits behind the head: what is right for Llama would be silently wrong."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, set_seed
    from trl import SFTTrainer

    set_seed(0)
    config = Gemma2Config(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.5,
        final_logit_softcapping=5.0,
        attn_implementation="eager",
    )
    model = adapters.add(Gemma2ForCausalLM(config), tiny.RECIPE)
    trainer, _ = built(model)
    inputs = batch(tokenizer, encoded)
    ours, _ = loss_and_gradients(type(trainer).compute_loss, trainer, inputs, None)
    theirs, _ = loss_and_gradients(SFTTrainer.compute_loss, trainer, inputs, None)
    assert ours == pytest.approx(theirs, rel=1e-6)


# A run.


def run(base: str, tokenizer, encoded, recipe=tiny.RECIPE):
    """A fresh adapter, trained: (model, log)."""
    model = adapters.add(loading.load_base(base), recipe)
    return model, train(model, tokenizer, encoded, recipe)


@pytest.fixture(scope="module")
def trained(base, tokenizer, encoded):
    """One run for all tests that only look at it."""
    return run(base, tokenizer, encoded)


def test_every_lora_b_has_left_zero(trained):
    learned = {name: values for name, values in weights(trained[0]).items() if "lora_B" in name}
    assert len(learned) == 14
    assert all(values.abs().max() > 0 for values in learned.values())


def test_the_loss_falls(trained):
    assert trained[1][-1]["loss"] < 0.8 * trained[1][0]["loss"]


def test_the_log_has_an_entry_a_step_with_what_chapters_plot(trained):
    assert [entry["step"] for entry in trained[1]] == [1, 2, 3, 4, 5, 6]
    assert all(isfinite(entry[key]) for entry in trained[1] for key in ("loss", "grad_norm", "learning_rate"))


def test_a_trained_model_is_ready_to_answer(trained):
    assert not any(module.training for module in trained[0].modules())


def test_nothing_but_the_progress_is_printed(base, tokenizer, encoded, capsys, monkeypatch):
    monkeypatch.setenv("QLORA_PROGRESS_LINES", "1")
    run(base, tokenizer, encoded)
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"step {step} of 6" for step in range(1, 7)
    ]


def test_the_same_seed_gives_the_same_adapter_to_the_bit(base, tokenizer, encoded, trained):
    torch.manual_seed(99)  # what was drawn before must not matter
    assert same(weights(run(base, tokenizer, encoded)[0]), weights(trained[0]))


def test_another_seed_gives_another_adapter(base, tokenizer, encoded, trained):
    other, _ = run(base, tokenizer, encoded, replace(tiny.RECIPE, seed=1))
    assert not same(weights(other), weights(trained[0]))


def test_a_run_writes_nothing_beside_what_is_saved(base, tokenizer, encoded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(base, tokenizer, encoded)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_keeps_what_was_learned_and_the_log(adapted, tokenizer, encoded, monkeypatch, capsys):
    kept = {}

    class Impatient(progress.LiveLoss):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                kept.update(weights(model))
                raise KeyboardInterrupt

    monkeypatch.setattr(progress, "LiveLoss", Impatient)
    log = train(adapted, tokenizer, encoded, tiny.RECIPE)
    assert [entry["step"] for entry in log] == [1, 2]
    assert same(weights(adapted), kept)
    assert any(values.abs().max() > 0 for name, values in kept.items() if "lora_B" in name)
    assert "Stopped by you after 3 steps. The adapter keeps what it has learned." in capsys.readouterr().out
    assert not adapted.training


# Runs that cannot learn.


def test_a_model_without_adapter_is_refused(base, tokenizer, encoded):
    model = loading.load_base(base)
    model.requires_grad_(False)
    with pytest.raises(runtime.Stop, match="add an adapter"):
        train(model, tokenizer, encoded, tiny.RECIPE)


def test_a_frozen_adapter_is_refused(base, trained, tokenizer, encoded, tmp_path):
    from peft import PeftModel

    trained[0].save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(loading.load_base(base), tmp_path)
    with pytest.raises(runtime.Stop, match="No parameter of this model can be trained: .*is_trainable=True"):
        train(frozen, tokenizer, encoded, tiny.RECIPE)


def test_rows_without_a_label_stop_the_run_and_say_so(adapted, tokenizer, encoded):
    masked = encoded.map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(runtime.Stop, match="gradient is exactly zero at step 1: .*every label is masked"):
        train(adapted, tokenizer, masked, tiny.RECIPE)


def test_an_adapter_that_gets_no_gradient_stops_the_run(adapted, tokenizer, encoded):
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.zero_()  # A and B zero: neither can ever leave it
    with pytest.raises(runtime.Stop, match="gradient is exactly zero at step 1"):
        train(adapted, tokenizer, encoded, tiny.RECIPE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_at_once(adapted, tokenizer, encoded, bad):
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name).fill_(bad)
    with pytest.raises(runtime.Stop, match="The loss is nan at step 1. Lower learning_rate"):
        train(adapted, tokenizer, encoded, tiny.RECIPE)


@pytest.mark.parametrize("log", [None, {}, {"loss": 0.0, "grad_norm": 1e-9}, {"loss": 3.0, "grad_norm": float("inf")}])
def test_the_guard_lets_healthy_logs_pass(log):
    """A gradient that is not finite is healthy in fp16: the scaler skips the step and goes on."""
    state = type("State", (), {"global_step": 1})
    guards.Guard().on_log(None, state, None, logs=log)


def test_no_rows_stop_the_run(adapted, tokenizer, encoded):
    with pytest.raises(runtime.Stop, match="There are no rows to train on"):
        train(adapted, tokenizer, encoded.select([]), tiny.RECIPE)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_full_memory_names_what_to_lower_in_order(adapted, tokenizer, encoded, monkeypatch, error):
    def forward(*_, **__):
        raise error

    monkeypatch.setattr(adapted.get_base_model().model, "forward", forward)
    with pytest.raises(runtime.Stop) as stop:
        train(adapted, tokenizer, encoded, tiny.RECIPE)
    told = str(stop.value)
    order = ["batch_size 4 to 2 and accumulation 1 to 2", "gradient_checkpointing to True", "adamw_torch to paged"]
    positions = [told.index(text) for text in [*order, "max_length 128 to 64"]]
    assert positions == sorted(positions)
    assert "rank" not in told  # four is little already


def test_full_memory_is_given_back_though_the_error_is_kept(adapted, tokenizer, encoded, monkeypatch):
    found = []

    def forward(*_, **__):
        activations = torch.zeros(1000)
        found.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(adapted.get_base_model().model, "forward", forward)
    with pytest.raises(runtime.Stop) as kept:
        train(adapted, tokenizer, encoded, tiny.RECIPE)
    assert kept.value and found[0]() is None


def test_other_errors_pass_as_they_are(adapted, tokenizer, encoded, monkeypatch):
    def forward(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(adapted.get_base_model().model, "forward", forward)
    with pytest.raises(RuntimeError, match="a bug"):
        train(adapted, tokenizer, encoded, tiny.RECIPE)


def test_data_that_vanish_while_they_are_read_are_named(adapted, tokenizer, encoded):
    def vanished(rows):
        raise FileNotFoundError(2, "No such file or directory", "drive/rows.arrow")

    with pytest.raises(runtime.Stop, match="drive/rows.arrow has vanished while training read it"):
        train(adapted, tokenizer, encoded.with_transform(vanished), tiny.RECIPE)


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stays(adapted, tokenizer, encoded, tmp_path, monkeypatch):
    saved, writes, write = checkpoints.Checkpoints(tmp_path / "run", every=2), [], torch.save

    def full(*arguments, **named):
        writes.append(1)
        if len(writes) > 4:  # three files a checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **named)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(runtime.Stop, match="The disk is full: checkpoint 4 was not saved"):
        train(adapted, tokenizer, encoded, tiny.RECIPE, checkpoints=saved)
    assert saved.latest().name == "checkpoint-2"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 1e-3}, "recipe.learning_rate was 0.01, is 0.001"),
        ({"seed": 1}, "recipe.seed was 0, is 1"),
    ],
)
def test_checkpoints_of_another_recipe_are_refused(base, tokenizer, encoded, tmp_path, change, named):
    saved = checkpoints.Checkpoints(tmp_path / "run", every=3)
    model = adapters.add(loading.load_base(base), tiny.RECIPE)
    train(model, tokenizer, encoded, tiny.RECIPE, checkpoints=saved)
    with pytest.raises(runtime.Stop, match=named):
        train(model, tokenizer, encoded, replace(tiny.RECIPE, **change), checkpoints=saved)
    with pytest.raises(runtime.Stop, match="data.rows was 12, is 11; data.tokens was"):
        train(model, tokenizer, encoded.select(range(11)), tiny.RECIPE, checkpoints=saved)
    other = adapters.add(loading.load_base(tiny.make_base(tmp_path / "other", seed=1)), tiny.RECIPE)
    with pytest.raises(runtime.Stop, match="base.name was .*; base.fingerprint was"):
        train(other, tokenizer, encoded, tiny.RECIPE, checkpoints=saved)


def test_what_a_checkpoint_pickles_is_read_weights_only(adapted, tokenizer, encoded, tmp_path):
    saved = checkpoints.Checkpoints(tmp_path / "run", every=3)
    train(adapted, tokenizer, encoded, tiny.RECIPE, checkpoints=saved)
    found = {path.name for path in saved.latest().iterdir()}
    assert {name for name in found if name.endswith((".pt", ".pth", ".bin"))} == {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    }
    assert "adapter_model.safetensors" in found
    torch.load(saved.latest() / "optimizer.pt", weights_only=True)


def test_held_out_rows_are_evaluated_on_the_way(adapted, tokenizer, encoded):
    log = train(adapted, tokenizer, encoded, tiny.RECIPE, held_out=encoded)
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [4, 6]
    assert log[-1]["eval_loss"] < log[3]["eval_loss"]


def test_evaluation_on_the_way_changes_nothing(base, tokenizer, encoded, trained):
    model = adapters.add(loading.load_base(base), tiny.RECIPE)
    train(model, tokenizer, encoded, tiny.RECIPE, held_out=encoded)
    assert same(weights(model), weights(trained[0]))


def test_the_trainer_counts_the_tokens(trained, encoded):
    tokens = sum(len(row["input_ids"]) for row in encoded)
    assert trained[1][-1]["num_input_tokens_seen"] == 2 * tokens  # two passes


def test_a_second_interrupt_ends_at_once(adapted, tokenizer, encoded, capsys):
    class Impatient(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    train(adapted, tokenizer, encoded, tiny.RECIPE, callbacks=[Impatient()])
    assert "Stopped by you after 2 steps" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_training_in_a_thread_works_without_signals(adapted, tokenizer, encoded):
    with ThreadPoolExecutor(1) as pool:
        log = pool.submit(train, adapted, tokenizer, encoded, tiny.RECIPE, False).result()
    assert len(log) == 6


def test_a_second_run_on_the_same_model_is_prepared_again(adapted, tokenizer, encoded):
    """accelerate marks a model and would not prepare it again: in 16 bits the second run would miss autocast."""
    marks = []

    class Spy(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            marks.append("_is_accelerate_prepared" in adapted.__dict__)

    train(adapted, tokenizer, encoded, replace(tiny.RECIPE, steps=1), live=False, callbacks=[Spy()])
    assert marks == [True]
    assert not {"_is_accelerate_prepared", "forward", "_original_forward"} & adapted.__dict__.keys()


def test_a_model_that_was_trained_can_be_freed(base, tokenizer, encoded):
    model = adapters.add(loading.load_base(base), tiny.RECIPE)
    train(model, tokenizer, encoded, replace(tiny.RECIPE, steps=1, optimizer="paged_adamw_8bit"), live=False)
    embedding = weakref.ref(model.get_input_embeddings())
    del model
    gc.collect()
    assert embedding() is None
