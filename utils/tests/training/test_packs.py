"""Packs and levers, as the default recipe of a GPU has them: right before fast."""

from dataclasses import replace

import pytest
import torch

from utils.models import adapters, loading
from utils.runtime import Stop
from utils.tests import tiny
from utils.training import levers
from utils.training.trainer import build, packed, train

PACKS = replace(tiny.RECIPE, pack_length=128, steps=0, epochs=2)


def learned(base, tokenizer, encoded, recipe, fused=False):
    """Loss of one plain step on all rows, and how far each adapter weight has moved in it, which is its gradient."""
    adapted = adapters.add(loading.load_base(base), recipe)
    if fused:
        assert levers.fuse_adapters(adapted) == 14
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.02)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    plain = {"optimizer": "sgd", "learning_rate": 1.0, "warmup_steps": 0, "max_grad_norm": 1e9, "steps": 1}
    log = train(adapted, tokenizer, encoded, replace(recipe, **plain), live=False)
    return log[0]["loss"], {n: p.detach() - before[n] for n, p in adapted.named_parameters() if p.requires_grad}


def test_a_step_of_packs_learns_what_its_rows_teach_one_at_a_time(base, tokenizer, encoded):
    alone, gradients = learned(base, tokenizer, encoded, replace(tiny.RECIPE, batch_size=1, accumulation=12))
    together, others = learned(base, tokenizer, encoded, replace(PACKS, batch_size=1, accumulation=12), fused=True)
    assert together == pytest.approx(alone, abs=1e-5)
    assert all((others[n] - g).norm() <= 1e-5 * max(g.norm(), 1e-3) for n, g in gradients.items())


def test_no_row_is_lost_or_cut_and_every_one_ends(tokenizer, encoded):
    packs = packed(encoded, PACKS)
    rows, labels = [], 0
    for pack in packs:
        assert sum(pack["seq_lengths"]) == len(pack["input_ids"]) <= 128
        rows += [row.tolist() for row in torch.tensor(pack["input_ids"]).split(pack["seq_lengths"])]
        labels += sum(label != -100 for label in pack["labels"])
    assert sorted(rows) == sorted(encoded["input_ids"])
    assert all(row[-1] == tokenizer.eos_token_id for row in rows)
    assert labels == sum(label != -100 for row in encoded["labels"] for label in row)
    assert packed(packs, PACKS) is packs  # packing is done once


def test_epochs_are_epochs(adapted, tokenizer, encoded):
    """Each row is read `epochs` times, in packs and in batches; `steps` is a limit only where it is set."""
    seen = []
    llama = loading.bare(adapted).model
    llama.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].cpu()), with_kwargs=True)
    for recipe in (PACKS, replace(tiny.RECIPE, steps=0, epochs=2, batch_size=5)):
        seen.clear()
        trainer = build(adapted, tokenizer, encoded, recipe)
        trainer.train()
        starts = sum((ids == tokenizer.bos_token_id).sum().item() for ids in seen)
        assert starts == 2 * len(encoded)
    own = tiny.RECIPE.read_whole(rows=12)
    assert (own.steps, own.epochs) == (0, 2)  # its limit of 6 steps of 4 rows is two passes over 12
    assert tiny.RECIPE.read_whole(10_000).epochs == 1
    assert tiny.RECIPE.read_whole(12, epochs=7).epochs == 7


def test_a_row_longer_than_a_pack_is_not_cut(adapted, tokenizer, encoded):
    with pytest.raises(Stop, match=r"A row has \d+ tokens and a pack 16. Make pack_length at least as large"):
        build(adapted, tokenizer, encoded, replace(PACKS, pack_length=16))


def test_layers_that_share_an_input_share_a_node(adapted, tokenizer):
    """Out of order, twice, or under recomputation, each layer gets what is its own."""
    levers.fuse_adapters(adapted)
    attention = adapted.get_base_model().model.layers[0].self_attn
    x = torch.randn(1, 5, 64, requires_grad=True)
    q, k, v = (getattr(attention, f"{name}_proj") for name in "qkv")
    expected = [type(m).forward(m, x) for m in (q, k, v)]
    for order in ((0, 1, 2), (2, 0, 1), (1, 1, 2)):
        for i in order:
            assert (getattr(attention, f"{'qkv'[i]}_proj")(x) - expected[i]).abs().max() < 1e-5
    assert q(x).grad_fn is not None
    with torch.no_grad():
        assert torch.equal(q(x), expected[0])
