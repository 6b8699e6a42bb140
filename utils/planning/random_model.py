"""A model of a target's exact shape with random weights: nothing is downloaded."""

import copy

import bitsandbytes as bnb
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.quantizers import AutoHfQuantizer

from utils import hardware
from utils.models import loading

# (hidden size, intermediate size, layers, heads, key-value heads) of the config.json of meta-llama/Llama-2-*-hf.
SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32, 32),
    "llama-2-13b": (5120, 13824, 40, 40, 40),
    "llama-2-70b": (8192, 28672, 80, 64, 8),
}
STD = 0.02  # Llama's initializer_range


def config(target: str):
    """The configuration of a target: a name of SHAPES, or a folder or Hub name (a kilobyte is read, no weights)."""
    if target in SHAPES:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        shape = dict(zip(names, SHAPES[target], strict=True))
        return LlamaConfig(**shape, vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5)
    return AutoConfig.from_pretrained(target)


def build(config, four_bit: bool = True, double_quant: bool = True, device=None, dtype=None):
    """A random model as `loading.load_base` would give it: same modules, dtypes and bytes, other numbers.

    `config` is Llama's or one like it (linear layers, norms, embeddings); device and dtype are by default this
    machine's. One layer at a time is drawn and quantized, so the peak is the 4-bit model and one matrix in 16 bits.
    """
    hardware.follow_rules()
    device = torch.device(device or hardware.device())
    dtype = dtype or hardware.compute_dtype(hardware.capability())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")
    if four_bit:
        quantizer = AutoHfQuantizer.from_config(loading.nf4(dtype, double_quant), pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map={"": device})
        model.hf_quantizer = quantizer
    draw = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, device=device, dtype=dtype)
            if parameter.dim() == 1:
                value.fill_(1.0)  # a norm
            else:
                value.normal_(0, STD, generator=draw)
            if isinstance(module, bnb.nn.Linear4bit):
                value = bnb.nn.Params4bit(value, **{**parameter.__dict__, "module": module}).to(device)
                module.weight = value
                module.quant_state = value.quant_state
            else:
                setattr(module, name, torch.nn.Parameter(value))
    with torch.device(device):  # its angles are computed, not drawn
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    if four_bit:
        quantizer.postprocess_model(model)
        loading.keep_trainable(model)
    model.tie_weights()
    return model.eval()
