"""A base model in four bits, and its tokenizer: from a folder or from the Hub."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from utils import hardware
from utils.runtime import Stop


def load_tokenizer(base: str, revision: str = "main"):
    """The tokenizer of `base` (folder or Hub name), padding on the left, as generation in batches needs it.

    Llama has no padding token. `<unk>` takes its place: a new token would need a new row in the embedding, and EOS as
    padding would teach the model never to stop. `model_max_length` is at most what the base reads. Stops as `load_base`
    and `fit` do.
    """
    tokenizer = explained(AutoTokenizer.from_pretrained, base, revision=revision)
    config = explained(AutoConfig.from_pretrained, base, revision=revision).get_text_config()
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= config.vocab_size:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    reads = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    tokenizer.model_max_length = min(tokenizer.model_max_length, reads)
    fit(tokenizer, config.vocab_size)
    return tokenizer


def fit(tokenizer, embeddings: int) -> None:
    """Stop if `tokenizer` cannot say the end, or has ids beyond an embedding of that many rows."""
    if tokenizer.eos_token_id is None:
        raise Stop("The tokenizer has no end-of-sequence token. Name one in tokenizer_config.json, as eos_token")
    added = [i for i, token in tokenizer.added_tokens_decoder.items() if not token.special]
    last = max(tokenizer.vocab_size - 1, tokenizer.eos_token_id, tokenizer.pad_token_id or 0, *added)
    if last >= embeddings:
        told = f"The tokenizer has ids up to {last:,}, this base {embeddings:,} embeddings"
        raise Stop(f"{told}. Take the base's tokenizer")


def check(model, tokenizer) -> None:
    """Look, before the first step, at a base and a tokenizer with which training would be in vain.

    Stop as `fit` does; or if a number is not finite, or the head, which LoRA does not train, cannot tell the end apart.
    """
    fit(tokenizer, model.get_input_embeddings().weight.shape[0])
    for name, numbers in model.named_parameters():
        if state := getattr(numbers, "quant_state", None):
            numbers = state.offset if state.nested else state.absmax
        if not numbers.isfinite().all():
            raise Stop(f"{name} is not finite before the first step, so no learning rate helps. Load a sound base")
    head = model.get_output_embeddings()
    if head is not None and not head.weight.requires_grad:
        end = head.weight[tokenizer.eos_token_id]
        alike = int((head.weight == end).all(dim=1).sum()) - 1
        if alike or not end.any():
            row = f"the row of {alike:,} other tokens" if alike else "a row of zeros"
            told = f"{tokenizer.eos_token} has {row} in the head, so this model could never be sure of the end"
            raise Stop(f"{told}. Take another base, or another eos_token")


def load_base(base: str, four_bit: bool = True, revision: str = "main"):
    """The model of `base`, a folder or a Hub name, on the GPU, or on the CPU without one.

    Linear layers are in NF4 with double quantization, or, without `four_bit`, in this machine's compute dtype. Stop
    says what to do: no such folder, a gated or unknown repository (or commit, tag, branch of it), no network.
    """
    hardware.follow_rules()
    dtype = hardware.compute_dtype(hardware.capability())
    if hardware.sharded():
        if os.environ.get("FSDP_VERSION") == "1":
            raise Stop("FSDP's first version saves no adapter (chapter 12, part 5). Use data/accelerate/two_24gb.yaml")
        # Each process quantizes on the CPU, for which a launcher leaves it one thread.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // hardware.processes()))
    model = explained(
        AutoModelForCausalLM.from_pretrained,
        base,
        revision=revision,
        dtype=dtype,
        quantization_config=nf4(dtype) if four_bit else None,
        # Never "auto", which moves layers to the CPU without a word when an older model still fills the GPU.
        device_map={"": "cpu" if hardware.sharded() else hardware.device()},  # FSDP moves its share to the GPU
        attn_implementation="sdpa",
    )
    keep_trainable(model)
    # A repository's sampling habits (Llama-2's temperature, Qwen's repetition penalty) would join every generate().
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(model.generation_config, name) for name in tokens})
    return model.eval()


def to_download(base: str, revision: str = "main") -> str:
    """What must be downloaded before `base` can be loaded, in a sentence; no weight is read.

    Stop if there is no such model, no access to it, or no room for it on the disk.
    """
    if Path(base).expanduser().is_dir():
        return f"{Path(base).name} is on this machine: nothing to download"
    # The files of a gated model are listed for everybody: who may have them, one of them tells.
    explained(huggingface_hub.hf_hub_download, base, filename="config.json", revision=revision)
    try:
        files = explained(huggingface_hub.model_info, base, revision=revision, files_metadata=True).siblings
    except Stop:
        return f"{base}: the Hub cannot be asked for its size, so what is in the cache is taken"
    weights = {f.rfilename: f.size or 0 for f in files if f.rfilename.endswith(".safetensors")}
    weights = weights or {f.rfilename: f.size or 0 for f in files if f.rfilename.endswith(".bin")}
    cached = {n for n in weights if isinstance(huggingface_hub.try_to_load_from_cache(base, n, revision=revision), str)}
    size = sum(weights[name] for name in weights if name not in cached and "/" not in name)
    place = next(p for p in (Path(constants.HF_HUB_CACHE), *Path(constants.HF_HUB_CACHE).parents) if p.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        told = f"{base} is a download of {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB free"
        raise Stop(f"{told}. Make room, or set HF_HOME to a folder on a larger disk")
    token = "with your token" if huggingface_hub.get_token() else "without a token"
    return f"{base}: {size / 1e9:.1f} GB to download, {token}; {free / 1e9:.0f} GB of the disk are free"


def nf4(dtype, double_quant: bool = True):
    """transformers' settings for linear layers in NF4 that compute in `dtype`."""
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    kind["bnb_4bit_quant_storage"] = dtype if hardware.sharded() else torch.uint8  # FSDP leaves out what is no float
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **kind)


def keep_trainable(model) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512_BF16.

    The first forward without gradients would repack them for inference, for good: gradients and merges would be wrong
    from then on (bitsandbytes 0.50, `Linear4bit.forward`).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def bare(model):
    """The base of a PEFT model, without its adapter's wrapping; a bare model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fingerprint(model) -> str:
    """Twelve hex digits that tell one base from another: its shape, and the signs of a sample of its embedding.

    Embeddings are not quantized, and rounding to fp16 or bf16 keeps every sign (that of zero too): a base has one
    fingerprint in four bits and in sixteen, on a laptop, a T4 and an A100.
    """
    config = model.config
    shape = [config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads]
    rows = hardware.gathered(model.get_input_embeddings().weight).detach()[:: max(1, config.vocab_size // 64)]
    digest = hashlib.sha256(json.dumps(shape).encode())
    digest.update(torch.signbit(rows).cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def explained(load, base: str, **arguments):
    """`load(base, **arguments)`, where `base` is a folder or a Hub name. A failure becomes a Stop with the mend."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        base = str(folder)
        if not (folder / "config.json").is_file():
            raise Stop(f"{base} has no config.json, so it is not a model folder. Give the folder that holds it")
    elif os.sep in base and (base.startswith(("/", ".", "~")) or base.count(os.sep) > 1):
        raise Stop(f"There is no folder {base}. Give an existing folder, or a Hub name such as owner/model")
    try:
        return load(base, **arguments)
    except (OSError, ValueError, SafetensorError) as error:
        raise Stop(_reason(base, error)) from None


def _reason(base: str, error: BaseException) -> str:
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    if any(getattr(cause, "errno", None) == errno.ENOSPC or "os error 28" in str(cause) for cause in causes):
        return f"{base} cannot be downloaded: the disk is full. Make room, or set HF_HOME to a folder on a larger disk"
    status = next((c.response.status_code for c in causes if getattr(c, "response", None) is not None), None)

    def caused_by(*kinds: type) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(hub.GatedRepoError):
        told = "no token was sent" if status == 401 else "your account has not accepted its licence"
        login = "Log in (hf auth login, or HF_TOKEN in Colab's secrets)"
        mend = login if status == 401 else f"Accept it on huggingface.co/{base}"
        return f"{base} is gated and {told}. {mend}, or take an open copy: NousResearch/Llama-2-7b-hf is one of Llama-2"
    if caused_by(hub.HFValidationError, hub.RepositoryNotFoundError):
        return f"The Hub has no model {base}, or your token may not see it. Check the spelling"
    if status:
        return f"{base} cannot be downloaded: the Hub answered {status}. Check your token, or try again in some minutes"
    if caused_by(hub.LocalEntryNotFoundError, ConnectionError):
        told = "cannot be downloaded and is not in the cache: no network, or the Hub is offline here"
        return f"{base} {told}. Go online, or give a folder that holds it"
    return f"{base} cannot be loaded: {' '.join(str(error).split())[:200]}"
