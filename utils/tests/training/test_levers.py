"""The levers compute what is computed without them, and recompute only what they should."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from utils.models import adapters, loading
from utils.runtime import Stop
from utils.tests import tiny
from utils.training import levers
from utils.training.trainer import build, train

LENGTHS = [5, 30, 1, 12]


@pytest.fixture
def rows():
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 384, (length,), generator=draw).tolist() for length in LENGTHS]


@pytest.fixture
def pack(rows):
    """One batch of one pack, as trl's trainer makes it."""
    packed = {"input_ids": [token for row in rows for token in row], "seq_lengths": LENGTHS}
    # With a cache transformers would take the pack for one row; the trainer switches it off, too.
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([packed]) | {"use_cache": False}


def learned(base: str, alpha: int = 8):
    """A model whose adapter is not zero."""
    return tiny.stir(adapters.add(loading.load_base(base), replace(tiny.RECIPE, lora_alpha=alpha)), std=0.02)


def results(model, batch):
    model.train().zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output.loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def check(found, expected) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert all((found[1][n] - g).norm() <= 1e-4 * g.norm() for n, g in expected[1].items())


@pytest.mark.parametrize("alpha", [4, 8], ids=["scaling 1", "scaling 2"])
def test_fused_adapters_compute_the_same(base, rows, alpha):
    model, ids = learned(base, alpha), torch.tensor([rows[1], rows[1][::-1]])
    expected = results(model, {"input_ids": ids, "labels": ids})
    assert levers.fuse_adapters(model) == 14
    check(results(model, {"input_ids": ids, "labels": ids}), expected)
    with torch.no_grad(), model.disable_adapter():
        bare = model(input_ids=ids).logits  # by peft's own forward
    assert torch.equal(bare, loading.load_base(base)(input_ids=ids).logits)
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert levers.fuse_adapters(get_peft_model(loading.load_base(base), config)) == 0  # with dropout: left alone


def test_rows_of_a_pack_attend_by_themselves(base, rows, pack):
    model, seen = learned(base), []
    expected = results(model, pack)
    alone = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    levers.attend_by_row(model)
    attention = model.get_base_model().model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["row_lengths"]), with_kwargs=True)
    check(results(model, pack), expected)
    assert seen == [LENGTHS]
    logits = model(**pack).logits[0].split(LENGTHS)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(alone, logits, strict=True))


def test_batches_without_rows_attend_as_before(base, rows):
    model, ids = learned(base), torch.tensor([rows[1], rows[1][::-1]])
    batch = {"input_ids": ids, "attention_mask": (torch.arange(30) >= torch.tensor([[0], [7]])).long()}
    with torch.no_grad():
        before = model(**batch).logits
        levers.attend_by_row(model)
        assert torch.equal(model(**batch).logits, before)
        assert model.generate(**batch, max_new_tokens=5, min_new_tokens=5, pad_token_id=0).shape == (2, 35)


def test_a_pack_without_its_rows_ends_stops(adapted, tokenizer, pack, encoded, monkeypatch):
    """trl 1.15 gives the positions alone: each row would compute with all the others, and nobody would be told."""
    levers.attend_by_row(adapted)
    positions = {name: pack[name] for name in ("input_ids", "position_ids")}
    for mask in (None, torch.ones_like(pack["input_ids"])):
        with pytest.raises(Stop, match="does not say where its rows end"):
            adapted(**positions, attention_mask=mask)
    with pytest.raises(Stop, match="does not say where its rows end"):  # rows that pack_dataset did not make
        build(adapted, tokenizer, encoded, tiny.RECIPE, packing=True)
    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", lambda *_: positions)
    with pytest.raises(Stop, match="does not say where its rows end"):
        build(adapted, tokenizer, encoded, tiny.RECIPE, padding_free=True, max_length=None)


def test_every_nth_layer_is_recomputed(adapted, tokenizer, encoded):
    calls = [0, 0]
    for i, layer in enumerate(adapted.get_base_model().model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    train(adapted, tokenizer, encoded, replace(tiny.RECIPE, steps=1, gradient_checkpointing=2), live=False)
    assert calls == [2, 1]
