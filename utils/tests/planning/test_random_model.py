"""A random model must be, byte for byte in size and type, what loading the real one gives."""

from dataclasses import replace

import pytest
import torch

from utils.data import dataset
from utils.models import adapters, loading
from utils.planning import random_model
from utils.training.levers import attend_by_row, fuse_adapters

POCKET = PROFILES["pocket"]


@pytest.fixture(scope="module")
def config():
    return random_model.config(POCKET.base)


def described(model):
    return {
        name: (type(t).__name__, t.dtype, tuple(t.shape), t.requires_grad)
        for name, t in model.state_dict(keep_vars=True).items()
        if "bitsandbytes__" not in name  # a little JSON text, as long as its numbers are
    }


def test_it_has_the_tensors_of_a_loaded_model(config):
    assert described(random_model.build(config)) == described(loading.load_base(POCKET.base))
    plain = random_model.build(config, four_bit=False)
    assert described(plain) == described(loading.load_base(POCKET.base, four_bit=False))
    assert not any(t.is_meta for t in [*plain.parameters(), *plain.buffers()])


def test_it_computes_with_the_real_angles(config):
    loaded, random = loading.load_base(POCKET.base), random_model.build(config)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, random.model.rotary_emb.inv_freq)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.isfinite(random(ids).logits).all()


def test_single_quantization_keeps_absmax_in_fp32(config):
    layer = random_model.build(config, double_quant=False).model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.absmax.dtype == torch.float32 and not layer.weight.quant_state.nested


@pytest.mark.parametrize("name", random_model.SHAPES)
def test_published_shapes(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(random_model.config(name))
    published = {"llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192}
    assert sum(p.numel() for p in model.parameters()) == published[name]  # the Hub's count of safetensors' parameters


def with_gradients(model, ids):
    return with_gradients_of(model, {"input_ids": ids, "labels": ids})


def with_gradients_of(model, batch):
    model.train().zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("alpha", [16, 32], ids=["scaling 1", "scaling 2"])
def test_fused_adapters_compute_the_same(config, alpha):
    model = adapters.add(random_model.build(config), replace(POCKET.recipe, lora_alpha=alpha))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(3, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    loss, gradients = with_gradients(model, ids)
    assert fuse_adapters(model) == 7 * config.num_hidden_layers
    fused_loss, fused = with_gradients(model, ids)
    assert abs(fused_loss - loss) < 1e-5
    assert all((fused[n] - g).norm() < 1e-4 * g.norm() for n, g in gradients.items())
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=ids)  # falls back to peft's own forward


def test_adapters_with_dropout_are_left_alone(config):
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert fuse_adapters(get_peft_model(random_model.build(config), adapter)) == 0


def test_rows_of_a_pack_attend_by_themselves(config):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = adapters.add(random_model.build(config), POCKET.recipe)
    rows = [torch.randint(3, config.vocab_size, (n,)).tolist() for n in (5, 30, 1, 12)]
    pack = {"input_ids": [token for row in rows for token in row], "seq_lengths": [len(row) for row in rows]}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([pack])
    batch["use_cache"] = False  # as the trainer does; with a cache transformers takes the pack for one row
    padded = DataCollatorForLanguageModeling(pad_token_id=0)([{"input_ids": row} for row in rows])
    loss, gradients = with_gradients_of(model, batch)
    apart = model(**padded).logits
    attend_by_row(model)
    squares = []
    model.get_base_model().model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: squares.append(kwargs["row_lengths"]), with_kwargs=True
    )
    found_loss, found = with_gradients_of(model, batch)
    assert squares == [[5, 30, 1, 12]] and abs(found_loss - loss) < 1e-5
    assert all((found[n] - g).norm() < 1e-4 * g.norm() for n, g in gradients.items() if g.norm() > 0)
    logits = model(**batch).logits[0].split(pack["seq_lengths"])
    assert all((a[: len(b)] - b).abs().max() < 1e-4 for a, b in zip(apart, logits, strict=True))


def test_batches_without_rows_attend_as_before(config):
    model = adapters.add(random_model.build(config), POCKET.recipe)
    ids = torch.randint(3, config.vocab_size, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        attend_by_row(model)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert model.generate(input_ids=ids, attention_mask=mask, **settings).shape == (2, 25)


def test_a_folder_that_loads_like_a_real_one(tmp_path):
    from utils import dataset
    from utils.benchmark import workloads

    stand_in.write(PROFILES["pocket"].base, tmp_path, dtype=torch.float32)
    model, tokenizer = loading.load_base(str(tmp_path)), loading.load_tokenizer(str(tmp_path))
    encoded, too_long = dataset.encode(tokenizer, dataset.read(tmp_path / "rows.jsonl"), 1024)
    assert model.config.hidden_size == random_model.config(PROFILES["pocket"].base).hidden_size and not too_long
    middle = sorted(len(row["input_ids"]) for row in encoded)[len(encoded) // 2]
    assert abs(middle - sorted(ALPACA)[len(ALPACA) // 2]) < 10
