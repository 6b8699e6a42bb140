"""What is planned of sizes, against real tensors. Notebook 09 does the same in 32 bits, and for peaks on a GPU."""

from dataclasses import replace

import pytest
import torch

from utils.models import adapters
from utils.planning import memory, random_model
from utils.planning.memory import Levers
from utils.presets import PROFILES
from utils.training.levers import fuse_adapters

POCKET = PROFILES["pocket"]


@pytest.fixture(scope="module")
def config():
    return random_model.config(POCKET.base)


def storages(tensors):
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())


def upcast(model):
    """What peft's prepare_model_for_kbit_training does to all that is frozen and not in four bits."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


@pytest.mark.parametrize("double_quant", [True, False])
def test_bytes_of_the_base(config, double_quant):
    model = random_model.build(config, double_quant=double_quant, dtype=torch.float16)
    quantized = [p for p in model.parameters() if hasattr(p, "quant_state")]
    constants = []
    for state in (p.quant_state for p in quantized):
        constants += [state.absmax, state.code]
        if double_quant:
            constants += [state.state2.absmax, state.state2.code, state.offset]
    expected = memory.weights(config, Levers(double_quant=double_quant))
    assert expected["4-bit weights"] == storages(quantized)
    assert expected["block constants"] == sum(t.nbytes for t in constants)
    rest = [p for p in model.parameters() if not hasattr(p, "quant_state")]
    assert expected["embeddings, head, norms"] == storages(rest)
    upcast(model.requires_grad_(False))
    assert memory.weights(config, Levers(upcast=True))["embeddings, head, norms"] == storages(rest)


def test_parameters_of_the_published_shapes():
    base = {"llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192}  # on the Hub
    adapter = {"llama-2-7b": 39_976_960, "llama-2-13b": 62_586_880}  # rank 16, as peft counts
    for name, published in base.items():
        sizes = memory.weights(random_model.config(name))
        assert 2 * sizes["4-bit weights"] + sizes["embeddings, head, norms"] // 2 == published
    for name, published in adapter.items():
        assert sum(memory.adapter(random_model.config(name), 16)) == published


def test_only_large_tensors_lie_in_pages():
    sizes = [4095, 65_536, 100_000]
    found = memory.optimizer(sizes, "paged_adamw_8bit")
    assert found == {"optimizer": 8 * 4095 + 2 * 65_536 + 8 * (256 + 391), "optimizer, paged": 200_000}
    assert memory.optimizer(sizes, "adamw_torch") == {"optimizer": 8 * sum(sizes), "optimizer, paged": 0}


def kept_by_layer(model, ids):
    """Bytes of the tensors that each decoder layer saves for its backward pass; a shared one counts where it is new."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    layers, seen, now = model.get_base_model().model.layers, {}, [-1]

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen.setdefault(storage.data_ptr(), (now[0], storage.nbytes(), tensor))  # kept, so no address comes twice
        return tensor

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, i=i: now.__setitem__(0, i))
    layers[-1].register_forward_hook(lambda *_: now.__setitem__(0, len(layers)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    return [sum(size for at, size, _ in seen.values() if at == i) for i in range(len(layers))]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("element", "wide"), [(4, False), (2, False), (2, True)], ids=["fp32", "bf16", "upcast"])
def test_activations_of_every_layer(config, monkeypatch, element, wide, dropout):
    monkeypatch.setenv("QLORA_CAPABILITY", "8.0" if element == 2 else "")
    model = adapters.add(random_model.build(config), POCKET.recipe).train()
    for module in model.modules():
        if dropout and hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)
    if wide:
        upcast(model)
    fuse_adapters(model)  # peft's own forward asks CUDA whether there is autocast, and on a CPU casts once more
    model.enable_input_require_grads()
    ids = torch.randint(3, config.vocab_size, (2, 40))
    with torch.autocast("cpu", torch.bfloat16, enabled=element == 2):
        found = kept_by_layer(model, ids)
    levers = Levers(liger=False, upcast=wide, element=element, dropout=bool(dropout))
    expected = memory.saved(config, 16, ids.numel(), levers)
    if dropout:  # the holes: a byte a number on a GPU, a number in fp32 on a CPU
        expected += 3 * ids.numel() * sum(inputs for _, inputs in memory.shapes(config).values())
    # The first layer meets the angles of the rotary embedding, which all layers share: 64 for each of 40 positions.
    assert found[0] - found[1] == 2 * 40 * 64 * (4 if wide else element)
    assert found[1] == expected


@pytest.mark.parametrize("kind", [0, 2, 1, "offload"])
def test_recomputing_keeps_layers_inputs_alone(kind):
    """The peak's activations, for a shape so long that the turning point is where it lies."""
    config, recipe = random_model.config("llama-2-7b"), replace(POCKET.recipe, batch_size=1, max_length=4096)
    whole, entrance = memory.saved(config, recipe.rank, 4096), 4096 * 4096 * 2
    kept = {0: 32 * whole, 2: 16 * (whole + entrance), 1: 32 * entrance, "offload": 0}
    offload = kind == "offload"
    recipe = replace(recipe, gradient_checkpointing=1 if offload else kind)
    assert memory.at_peak(config, recipe, offload=offload)["kept activations"] == kept[kind]
