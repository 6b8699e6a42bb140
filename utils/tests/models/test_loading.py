"""A base in four bits that trains as it should, one fingerprint on every machine, errors that say the mend."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from utils import generation, presets, runtime
from utils.models import adapters, loading
from utils.tests import tiny
from utils.training import trainer

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOADERS = [loading.load_tokenizer, loading.load_base]
ASKERS = [*LOADERS, loading.to_download, adapters.find]
MACHINES = {"": torch.float32, "7.5": torch.float16, "8.0": torch.bfloat16}  # a laptop, a T4, an A100


@pytest.fixture(scope="module")
def loaded(base):
    """The tiny base in four bits; tests leave it as it is."""
    return loading.load_base(base)


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


def four_bit_modules(model) -> dict:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


# The tokenizer.


def test_padding_is_unk_on_the_left_and_no_new_token(base, tokenizer):
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 0)
    assert tokenizer.eos_token_id == 2
    assert len(tokenizer) == json.loads((Path(base) / "config.json").read_text())["vocab_size"]
    padded = tokenizer(["Ada", "Ada Birch was born"], padding=True)
    assert [mask[0] for mask in padded["attention_mask"]] == [0, 1]


def test_a_padding_token_of_the_bases_own_stays_its_side_does_not(changed):
    tokenizer = loading.load_tokenizer(changed(edit("tokenizer_config.json", pad_token="</s>", padding_side="right")))
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "left")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (edit("tokenizer_config.json", eos_token=None), "The tokenizer has no end-of-sequence token. Name one"),
        (edit("config.json", vocab_size=300), "The tokenizer has ids up to 383, this base 300 embeddings. Take the"),
    ],
)
def test_a_tokenizer_that_does_not_fit_its_base_is_refused(changed, change, told):
    assert said(loading.load_tokenizer, changed(change)).startswith(told)


def test_what_a_base_reads_is_known_to_its_tokenizer_and_a_padding_token_without_a_row_is_replaced(changed):
    def change(folder: Path) -> None:
        own = loading.AutoTokenizer.from_pretrained(folder)
        own.add_special_tokens({"pad_token": "<pad>"})
        own.save_pretrained(folder)

    tokenizer = loading.load_tokenizer(changed(change))
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("<unk>", 256)


# The base, looked at before the first step.


def poisoned(model, name: str, value: float) -> None:
    from bitsandbytes.nn import Params4bit

    old = model.get_parameter(name)
    if old.dtype != torch.uint8:
        old.data[0, 5] = value
        return
    weight = torch.zeros(old.quant_state.shape)
    weight[0, 5] = value
    linear = model.get_submodule(name.removesuffix(".weight"))
    linear.weight = Params4bit(weight, quant_type="nf4", compress_statistics=True).to("cpu")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_is_not_blamed_on_the_learning_rate(base, tokenizer, encoded, name, value):
    model = loading.load_base(base)
    poisoned(model, name, value)
    model = adapters.add(model, tiny.RECIPE)
    told = said(lambda _: trainer.build(model, tokenizer, encoded, tiny.RECIPE), base)
    assert name.split(".")[-2] in told and "is not finite before the first step, so no learning rate helps" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda head: head[2].zero_(), "</s> has a row of zeros in the head"),
        (lambda head: head[300:310].copy_(head[2].expand(10, -1)), "</s> has the row of 10 other tokens in the head"),
    ],
)
def test_a_base_that_cannot_say_the_end_is_refused_unless_its_head_is_trained(base, tokenizer, change, told):
    model = adapters.add(loading.load_base(base), tiny.RECIPE)
    head = model.get_output_embeddings().weight
    change(head)
    assert said(lambda _: loading.check(model, tokenizer), base).startswith(told)
    head.requires_grad_(True)
    loading.check(model, tokenizer)


def test_another_bases_tokenizer_is_refused_and_the_bases_own_passes(loaded, tokenizer):
    loading.check(loaded, tokenizer)
    other = loading.load_tokenizer(presets.PROFILES["pocket"].base)
    told = said(lambda _: loading.check(loaded, other), "")
    assert told.startswith("The tokenizer has ids up to 2,047, this base 384")


# The base.


def test_all_linear_layers_but_the_head_are_nf4_with_double_quantization(loaded):
    expected = [f"model.layers.{i}.{'self_attn' if p[0] in 'qkvo' else 'mlp'}.{p}" for i in range(2) for p in LINEAR]
    assert sorted(four_bit_modules(loaded)) == sorted(expected)
    for module in four_bit_modules(loaded).values():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
    assert not loaded.training


@pytest.mark.parametrize("forced", MACHINES)
@pytest.mark.parametrize("four_bit", [True, False])
def test_a_machine_decides_the_dtype_and_nothing_else(base, loaded, monkeypatch, forced, four_bit):
    """An adapter made on one machine is used on another: the base's fingerprint is the same, the adapter in fp32."""
    monkeypatch.setenv("QLORA_CAPABILITY", forced)
    model, dtype = loading.load_base(base, four_bit), MACHINES[forced]
    assert {p.dtype for p in model.parameters()} == ({dtype, torch.uint8} if four_bit else {dtype})
    assert {module.compute_dtype for module in four_bit_modules(model).values()} == ({dtype} if four_bit else set())
    model = adapters.add(model, tiny.RECIPE)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert loading.fingerprint(loading.bare(model)) == loading.fingerprint(loaded)


@pytest.mark.parametrize(("cuda", "place"), [(False, "cpu"), (True, torch.device("cuda", 0))])
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


def test_a_bases_own_sampling_does_not_reach_the_answers_but_its_tokens_do(loaded, tokenizer, changed, capfd):
    """Llama-2's repository ships temperature 0.6 and a length of 4096; Qwen's a penalty for repetition."""
    habits = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 8, "repetition_penalty": 5.0}
    own = loading.load_base(changed(edit("generation_config.json", **habits, eos_token_id=[2, 7], pad_token_id=0)))
    kept = own.generation_config
    assert (kept.bos_token_id, kept.eos_token_id, kept.pad_token_id) == (1, [2, 7], 0)
    kept.eos_token_id = 2
    rows = tiny.ROWS[:4]
    assert generation.answer(own, tokenizer, rows) == generation.answer(loaded, tokenizer, rows)
    assert "max_length" not in capfd.readouterr().err


# The trap of known CPUs: bitsandbytes repacks 4-bit weights for inference, for good.


def gradients(model, encoded) -> dict[str, torch.Tensor]:
    """Gradients of the adapter for the first row, from one forward in training mode."""
    row = encoded[0]
    model.train().zero_grad()
    model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_every_four_bit_layer_is_guarded(base, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # as on a CPU that has it
    layers = four_bit_modules(loading.load_base(base)).values()
    assert [module.support_avx512bf16_for_cpu for module in layers] == [False] * 14


def test_an_answer_spoils_no_gradient_thanks_to_the_guard(stirred, tokenizer, encoded):
    from bitsandbytes.nn.modules import has_avx512bf16

    layers = list(four_bit_modules(stirred).values())
    before = gradients(stirred, encoded)
    generation.answer(stirred, tokenizer, tiny.ROWS[:2])
    after = gradients(stirred, encoded)
    assert all(gradient.abs().max() > 0 for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)
    if has_avx512bf16():  # else bitsandbytes never repacks here
        for module in layers:
            module.support_avx512bf16_for_cpu = True
        generation.answer(stirred, tokenizer, tiny.ROWS[:2])
        after = gradients(stirred, encoded)
        spoiled = any((before[name] - after[name]).norm() > 0.1 * before[name].norm() for name in before)
        assert spoiled, "bitsandbytes has mended it: loading.keep_trainable can go"


# The fingerprint.


def test_a_fingerprint_sees_the_weights_and_not_the_dtype_they_are_stored_in(loaded):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(loaded.config.__class__(**loaded.config.to_dict() | {"quantization_config": None}))
    torch.manual_seed(0)
    weight = model.get_input_embeddings().weight.data.normal_(std=1e-7)  # in fp16, small ones become zero
    known = loading.fingerprint(model)
    assert len(known) == 12 and set(known) <= set("0123456789abcdef")
    assert known != loading.fingerprint(loaded)
    weight += 0.01 * weight.std() * torch.randn(weight.shape)
    slightly_trained = loading.fingerprint(model)
    assert slightly_trained != known
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert loading.fingerprint(model.to(dtype)) == slightly_trained


# Failures, folders first.


def said(load, base: str) -> str:
    with pytest.raises(runtime.Stop) as stopped:
        load(base)
    assert "\n" not in str(stopped.value)
    return str(stopped.value)


@pytest.mark.parametrize("load", LOADERS)
def test_what_is_no_model_folder_and_no_name_is_called_so(load, tmp_path):
    for base in ("./none", "/none", "~/none", "models/llama/none"):
        told = f"There is no folder {base}. Give an existing folder, or a Hub name such as owner/model"
        assert said(load, base) == told
    assert said(load, str(tmp_path)).startswith(f"{tmp_path} has no config.json, so it is not a model folder.")
    assert said(load, "my model?").endswith("Check the spelling")


def test_a_home_folder_may_be_written_as_a_tilde(base, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(base).parent))
    assert loading.load_tokenizer(f"~/{Path(base).name}").pad_token == "<unk>"


POINTER = "version https://git-lfs.github.com/spec/v1\nsize 12345\n"


@pytest.mark.parametrize(
    ("load", "change"),
    [
        (loading.load_base, lambda folder: (folder / "config.json").write_text("{")),
        (loading.load_base, lambda folder: (folder / "config.json").write_text("{}")),
        (loading.load_base, lambda folder: (folder / "model.safetensors").unlink()),
        (loading.load_base, lambda folder: os.truncate(folder / "model.safetensors", 5000)),
        (loading.load_base, lambda folder: (folder / "model.safetensors").write_text(POINTER)),
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
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils._http import default_client_factory

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its retries

    def answers(status: int = 0, code: str = "", failure=None):
        def handle(request):
            if failure:
                raise failure("no route", request=request)
            headers = {"X-Error-Code": code, "X-Error-Message": "no"} if code else {}
            return httpx.Response(status, headers=headers, request=request)

        huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(handle)))

    yield answers
    huggingface_hub.set_client_factory(default_client_factory)


NAME = "meta-llama/Llama-2-7b-hf"
UNKNOWN = f"The Hub has no model {NAME}, or your token may not see it. Check the spelling"
BUSY = f"{NAME} cannot be downloaded: the Hub answered {{}}. Check your token, or try again in some minutes"


@pytest.mark.parametrize("load", ASKERS)
@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (401, "GatedRepo", f"{NAME} is gated and no token was sent. Log in (hf auth login, or HF_TOKEN in Colab's"),
        (403, "GatedRepo", f"{NAME} is gated and your account has not accepted its licence. Accept it on hugg"),
        (404, "RepoNotFound", UNKNOWN),
        (401, "", UNKNOWN),  # a private one, asked for without a token
        (403, "", BUSY.format(403)),
        (503, "", BUSY.format(503)),
    ],
)
def test_what_the_hub_refuses_is_told_with_its_mend(hub, load, status, code, told):
    hub(status, code)
    assert said(load, NAME).startswith(told)


@pytest.mark.parametrize("load", LOADERS)
def test_a_repository_without_a_transformers_model_says_so(hub, load):
    hub(404, "EntryNotFound")  # for instance one with GGUF files alone
    assert said(load, NAME).startswith(f"{NAME} cannot be loaded: ")


@pytest.mark.parametrize("load", ASKERS)
@pytest.mark.parametrize("offline", [True, False])
def test_no_network_says_go_online_or_give_a_folder(hub, monkeypatch, load, offline):
    import httpx
    from huggingface_hub import constants

    hub(failure=httpx.ConnectError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    message = said(load, NAME)
    assert message.startswith(f"{NAME} cannot be downloaded and is not in the cache: no network")
    assert message.endswith("Go online, or give a folder that holds it")


def test_a_full_disk_is_not_called_a_missing_network(monkeypatch):
    from transformers import AutoTokenizer

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", full)
    assert said(loading.load_tokenizer, NAME).startswith(f"{NAME} cannot be downloaded: the disk is full. Make room")


@pytest.mark.parametrize(
    ("free", "told"),
    [(4e9, f"{NAME}: 3.5 GB to download"), (3e9, f"{NAME} is a download of 3.5 GB, and the disk has 3.0 GB free")],
)
def test_a_download_that_the_disk_has_no_room_for_is_not_begun(monkeypatch, free, told):
    sizes = {"a.safetensors": 10e9, "b.safetensors": 3.5e9, "model.bin": 13.5e9, "gguf/x.safetensors": 4e9}
    siblings = [SimpleNamespace(rfilename=name, size=int(size)) for name, size in sizes.items()]
    answers = {"hf_hub_download": "config.json", "model_info": SimpleNamespace(siblings=siblings), "get_token": None}
    for name, value in answers.items():
        monkeypatch.setattr(f"huggingface_hub.{name}", lambda *args, value=value, **kwargs: value)
    cached = {"a.safetensors": "a path"}.get
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda base, name, revision: cached(name))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    found = loading.to_download(NAME) if free > 3.5e9 else said(loading.to_download, NAME)
    assert found.startswith(told)
