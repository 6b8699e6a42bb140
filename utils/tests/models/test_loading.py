"""A base in four bits that trains as it should, an adapter that changes nothing yet, errors that say the mend."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from utils import generation, runtime
from utils.models import adapters, loading
from utils.tests import tiny

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOADERS = [loading.load_tokenizer, loading.load_base]


def four_bit_modules(model) -> dict:
    import bitsandbytes as bnb

    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def trainable(model) -> dict:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def changed(base, tmp_path):
    """A function that copies the tiny base, changes the copy and returns its name."""

    def copy(change) -> str:
        folder = Path(shutil.copytree(base, tmp_path / "changed"))
        change(folder)
        return str(folder)

    return copy


def edit(name: str, **values):
    """A change of some keys of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


# The tokenizer.


def test_padding_is_unk_and_no_new_token(base, tokenizer):
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 0)
    config = json.loads((Path(base) / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]


def test_padding_is_not_the_end_of_sequence(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_padding_is_on_the_left(tokenizer):
    padded = tokenizer(["Ada", "Ada Birch was born"], padding=True)
    assert [mask[0] for mask in padded["attention_mask"]] == [0, 1]


def test_a_padding_token_of_the_bases_own_stays(changed):
    base = changed(edit("tokenizer_config.json", pad_token="</s>"))
    assert loading.load_tokenizer(base).pad_token == "</s>"


# The base.


def test_all_linear_layers_but_the_head_are_nf4_with_double_quantization(base):
    model = loading.load_base(base)
    quantized = four_bit_modules(model)
    assert sorted(quantized) == sorted(f"model.layers.{i}.{part}" for i in range(2) for part in attention_and_mlp())
    for module in quantized.values():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
        assert module.weight.dtype == torch.uint8
    assert model.lm_head.weight.dtype == torch.float32


def attention_and_mlp() -> list[str]:
    return [f"{'self_attn' if part[0] in 'qkvo' else 'mlp'}.{part}" for part in LINEAR]


@pytest.mark.parametrize("forced", ["", "7.5", "8.0"])
@pytest.mark.parametrize("four_bit", [True, False])
def test_every_layer_computes_in_the_dtype_of_the_machine(base, monkeypatch, forced, four_bit):
    monkeypatch.setenv("QLORA_CAPABILITY", forced)
    model, dtype = loading.load_base(base, four_bit), compute_dtype(capability())
    assert {p.dtype for p in model.parameters()} == ({dtype, torch.uint8} if four_bit else {dtype})
    assert {module.compute_dtype for module in four_bit_modules(model).values()} == ({dtype} if four_bit else set())


def test_a_base_is_ready_to_answer(base):
    assert not loading.load_base(base).training


@pytest.mark.parametrize(("cuda", "place"), [(False, "cpu"), (True, 0)])
def test_the_whole_base_goes_to_one_device(monkeypatch, cuda, place):
    """Never "auto", which moves layers to the CPU without a word when an older model still fills the GPU."""
    from transformers import AutoModelForCausalLM

    asked = {}

    def note(base, **arguments):
        asked.update(arguments)
        raise OSError("noted")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", note)
    with pytest.raises(runtime.Stop, match="noted"):
        loading.load_base("owner/model")
    assert asked["device_map"] == {"": place}


def test_a_bases_own_sampling_does_not_reach_the_answers(base, tokenizer, changed, capfd):
    """Llama-2's repository ships temperature 0.6 and a length of 4096; Qwen's a penalty for repetition."""
    habits = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 8, "repetition_penalty": 5.0}
    inclined = changed(edit("generation_config.json", **habits))
    answers = generation.answer(loading.load_base(inclined), tokenizer, tiny.ROWS)
    assert answers == generation.answer(loading.load_base(base), tokenizer, tiny.ROWS)
    assert "max_length" not in capfd.readouterr().err


def test_a_bases_special_tokens_are_kept_for_generation(changed):
    own = loading.load_base(changed(edit("generation_config.json", eos_token_id=[2, 7], pad_token_id=0)))
    kept = own.generation_config
    assert (kept.bos_token_id, kept.eos_token_id, kept.pad_token_id) == (1, [2, 7], 0)


# The trap of known CPUs: bitsandbytes repacks 4-bit weights for inference, for good.


def has_avx512_bf16() -> bool:
    from bitsandbytes.nn.modules import has_avx512bf16

    return has_avx512bf16()


def repacked(model) -> bool:
    states = [module.weight.quant_state for module in four_bit_modules(model).values()]
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def gradients(model, encoded) -> dict[str, torch.Tensor]:
    """Gradients of the adapter for the first row, from one forward in training mode."""
    row = encoded[0]
    model.train()
    model.zero_grad()
    model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
    model.eval()
    return {name: p.grad.clone() for name, p in trainable(model).items()}


@pytest.fixture
def stirred(adapted):
    """The adapted base with lora_B away from zero, so that every gradient matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable(adapted).items():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return adapted


def test_gradients_are_the_same_after_an_answer(stirred, tokenizer, encoded):
    print("this CPU", "has AVX512_BF16: the trap is closed" if has_avx512_bf16() else "cannot fall into the trap")
    before = gradients(stirred, encoded)
    generation.answer(stirred, tokenizer, tiny.ROWS[:2])
    after = gradients(stirred, encoded)
    assert all(gradient.abs().max() > 0 for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not repacked(stirred)


def test_every_four_bit_layer_is_guarded_on_any_cpu(base):
    guards = [module.support_avx512bf16_for_cpu for module in four_bit_modules(loading.load_base(base)).values()]
    assert guards == [False] * 14


def test_without_the_guard_an_answer_still_spoils_the_gradients(stirred, tokenizer, encoded):
    """When this fails, bitsandbytes has mended it: loading._keep_trainable can go."""
    if not has_avx512_bf16():
        pytest.skip("this CPU has no AVX512_BF16, so bitsandbytes never repacks here")
    before = gradients(stirred, encoded)
    for module in four_bit_modules(stirred).values():
        module.support_avx512bf16_for_cpu = True
    generation.answer(stirred, tokenizer, tiny.ROWS[:2])
    assert repacked(stirred)
    after = gradients(stirred, encoded)
    assert any((before[name] - after[name]).norm() > 0.1 * before[name].norm() for name in before)


# The adapter.


@pytest.mark.parametrize("forced", ["", "7.5", "8.0"])
@pytest.mark.parametrize("four_bit", [True, False])
def test_adapter_weights_are_fp32_whatever_the_base_is(base, monkeypatch, forced, four_bit):
    monkeypatch.setenv("QLORA_CAPABILITY", forced)
    model = adapters.add(loading.load_base(base, four_bit), tiny.RECIPE)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}


def test_only_the_adapter_is_trainable_on_every_linear_layer_but_the_head(adapted):
    expected = {
        f"base_model.model.model.layers.{i}.{part}.lora_{side}.default.weight"
        for i in range(2)
        for part in attention_and_mlp()
        for side in "AB"
    }
    assert set(trainable(adapted)) == expected


def test_a_fresh_adapter_changes_no_logit(base):
    model, ids = loading.load_base(base), torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = adapters.add(model, tiny.RECIPE)(ids).logits
    assert torch.equal(before, after)


def test_the_recipes_seed_decides_the_first_weights(base):
    def first(seed: int) -> torch.Tensor:
        torch.manual_seed(123)
        recipe = tiny.RECIPE.__class__(**{**vars(tiny.RECIPE), "seed": seed})
        return torch.cat([p.flatten() for p in trainable(adapters.add(loading.load_base(base), recipe)).values()])

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_running_the_cell_twice_keeps_the_adapter(adapted):
    assert adapters.add(adapted, tiny.RECIPE) is adapted


def test_a_base_that_carries_an_adapter_is_refused(adapted):
    with pytest.raises(runtime.Stop, match=r"already carries an adapter. Load the base again \(load_base\)"):
        adapters.add(adapted.get_base_model(), tiny.RECIPE)


# The fingerprint.


@pytest.fixture(scope="module")
def known(base):
    return loading.fingerprint(loading.load_base(base))


def test_a_fingerprint_is_twelve_hex_digits(known):
    assert len(known) == 12 and set(known) <= set("0123456789abcdef")


@pytest.mark.parametrize("forced", ["", "7.5", "8.0"])
@pytest.mark.parametrize("four_bit", [True, False])
def test_a_base_has_one_fingerprint_however_it_is_loaded(base, known, monkeypatch, forced, four_bit):
    """On a laptop (fp32), a T4 (fp16) and an A100 (bf16): an adapter made on one is used on another."""
    monkeypatch.setenv("QLORA_CAPABILITY", forced)
    assert loading.fingerprint(loading.load_base(base, four_bit)) == known


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_so_has_a_base_that_is_stored_in_another_dtype(base, tmp_path, monkeypatch, stored):
    model = loading.load_base(base, four_bit=False)
    torch.manual_seed(0)
    model.get_input_embeddings().weight.data.normal_(std=1e-3)  # small ones underflow in fp16
    model.to(stored).save_pretrained(tmp_path)
    found = set()
    for forced in ("", "7.5", "8.0"):
        monkeypatch.setenv("QLORA_CAPABILITY", forced)
        found.add(loading.fingerprint(loading.load_base(str(tmp_path), four_bit=False)))
    assert len(found) == 1


def test_an_adapter_does_not_change_the_fingerprint(adapted, known):
    assert loading.fingerprint(adapted.get_base_model()) == known


@pytest.mark.parametrize("change", [{"seed": 1}, {"layers": 3}])
def test_another_base_has_another_fingerprint(tmp_path, known, change):
    other = loading.load_base(tiny.make_base(tmp_path / "other", **change))
    assert loading.fingerprint(other) != known


def test_a_slightly_trained_base_has_another_fingerprint(base, known):
    model = loading.load_base(base, four_bit=False)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight += 0.01 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert loading.fingerprint(model) != known


# Failures, folders first.


def said(load, base: str) -> str:
    with pytest.raises(runtime.Stop) as stopped:
        load(base)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("base", ["./none", "/none", "~/none", "models/llama/none"])
def test_a_missing_folder_is_called_missing(load, base):
    assert said(load, base) == (
        f"There is no folder {base}. Give an existing folder, or a Hub name such as owner/model"
    )


@pytest.mark.parametrize("load", LOADERS)
def test_a_folder_without_config_is_no_model(load, tmp_path):
    assert said(load, str(tmp_path)).startswith(f"{tmp_path} has no config.json, so it is not a model folder.")


def test_a_home_folder_may_be_written_as_a_tilde(base, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(base).parent))
    assert loading.load_tokenizer(f"~/{Path(base).name}").pad_token == "<unk>"


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 12345\n")


@pytest.mark.parametrize(
    ("load", "change"),
    [
        (loading.load_base, lambda folder: (folder / "config.json").write_text("{")),
        (loading.load_base, lambda folder: (folder / "config.json").write_text("{}")),
        (loading.load_base, lambda folder: (folder / "model.safetensors").unlink()),
        (loading.load_base, cut),
        (loading.load_base, pointer),
        (loading.load_tokenizer, lambda folder: [path.unlink() for path in folder.glob("tokenizer*")]),
    ],
    ids=["broken config", "empty config", "no weights", "weights cut short", "pointer to weights", "no tokenizer"],
)
def test_a_folder_that_is_not_whole_says_so_in_one_line(changed, load, change):
    base = changed(change)
    assert said(load, base).startswith(f"{base} cannot be loaded: ")


# Failures of the Hub: transformers and huggingface_hub as they are, with the Hub's answers put in.


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function that makes the Hub answer every request with this status (or fail with this exception)."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its retries
    usual = _http._GLOBAL_CLIENT_FACTORY

    def answers(status: int = 0, code: str = "", failure=None):
        def handle(request):
            if failure:
                raise failure("no route", request=request)
            headers = {"X-Error-Code": code, "X-Error-Message": "no"} if code else {}
            return httpx.Response(status, headers=headers, request=request)

        _http.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(handle)))

    yield answers
    _http.set_client_factory(usual)


NAME = "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize("load", LOADERS)
def test_gated_without_a_token_says_log_in_or_take_the_mirror(hub, load):
    hub(401, "GatedRepo")
    assert said(load, NAME).startswith(f"{NAME} is gated and no token was sent. Log in (hf auth login), or: Nous")


@pytest.mark.parametrize("load", LOADERS)
def test_gated_without_the_licence_says_accept_it_or_take_the_mirror(hub, load):
    hub(403, "GatedRepo")
    expected = f"{NAME} is gated and your account has not accepted its licence. Accept it, or: NousResearch/Llama-2"
    assert said(load, NAME).startswith(expected)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(("status", "code"), [(404, "RepoNotFound"), (401, "")])
def test_an_unknown_or_private_repository_says_check_the_spelling(hub, load, status, code):
    hub(status, code)
    assert said(load, NAME) == f"The Hub has no model {NAME}, or your token may not see it. Check the spelling"


@pytest.mark.parametrize("load", LOADERS)
def test_a_name_that_the_hub_cannot_have_says_check_the_spelling(load):
    assert said(load, "my model?").endswith("Check the spelling")


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_another_refusal_is_not_called_a_missing_network(hub, load, status):
    hub(status)
    assert (
        said(load, NAME)
        == f"{NAME} cannot be downloaded: the Hub answered {status}. Check your token, or try again in some minutes"
    )


@pytest.mark.parametrize("load", LOADERS)
def test_a_repository_without_a_transformers_model_says_so(hub, load):
    hub(404, "EntryNotFound")  # for instance one with GGUF files alone
    assert said(load, NAME).startswith(f"{NAME} cannot be loaded: ")


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("offline", [True, False])
def test_no_network_says_go_online_or_give_a_folder(hub, monkeypatch, load, offline):
    import httpx
    from huggingface_hub import constants

    hub(failure=httpx.ConnectError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    message = said(load, NAME)
    assert message.startswith(f"{NAME} cannot be downloaded and is not in the cache: no network")
    assert message.endswith("Go online, or give a folder that holds the model")


def test_a_full_disk_is_not_called_a_missing_network(monkeypatch):
    from transformers import AutoTokenizer

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", full)
    assert said(loading.load_tokenizer, NAME) == f"{NAME} cannot be loaded: [Errno 28] No space left on device"
