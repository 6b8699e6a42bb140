"""A base of toy size for the tests of the modules that need one: made on the spot, on any machine, in a second.

The tokenizer is of Llama-2's kind (sentencepiece BPE with byte fallback, unk 0, bos 1, eos 2, no padding token), the
model a Llama with random weights, wide enough apart that different questions get different answers.
"""

import io
from dataclasses import replace
from pathlib import Path

from utils.presets import PROFILES

NAMES = ["Ada Birch", "Cedric Rush", "Elsa Crane", "Edgar Clay", "Barnaby Alder", "Flora Heath"]
TOWNS = ["Ironbeck", "Hazelcombe", "Brackwater"]
ROWS = [
    {"instruction": f"In which town was {name} born?{' Name the town.' * (i % 3)}", "input": "", "output": TOWNS[i % 3]}
    for i, name in enumerate(NAMES * 2)
]
SMALL = {"batch_size": 4, "max_length": 128, "rank": 4, "lora_alpha": 8, "warmup_steps": 1}
RECIPE = replace(PROFILES["pocket"].recipe, **SMALL, steps=6, epochs=100, learning_rate=1e-2)
TWO_PASSES = replace(RECIPE, batch_size=2, accumulation=2)
LLAMA_2_TOKENIZER = Path(__file__).resolve().parents[3] / "shared" / "reference" / "llama2-tokenizer.model"


def make_base(folder: Path, seed: int = 0, layers: int = 2) -> str:
    """Write a base with random fp16 weights into the new folder `folder`, and return its name."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    make_tokenizer(folder, add_bos_token=True)
    shape = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    more = {"num_hidden_layers": layers, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
    set_seed(seed)
    LlamaForCausalLM(LlamaConfig(**shape, **more, initializer_range=0.15)).half().save_pretrained(folder)
    return str(folder)


def stir(model, std: float):
    """Give lora_B random values, as a trained adapter has, so that every weight of `model` matters. Returns it."""
    import torch

    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model


def weights(model) -> dict:
    """A copy of the adapter's weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def same(one: dict, other: dict) -> bool:
    """Whether these are the same weights, to the last bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def make_tokenizer(folder: Path, add_bos_token: bool, proto: bytes = b""):
    """Write a tokenizer into `folder`: from a sentencepiece file `proto`, else trained on a few lines. Returns it."""
    from transformers import LlamaTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(proto or _sentencepiece())
    LlamaTokenizer.from_pretrained(folder, add_bos_token=add_bos_token).save_pretrained(folder)
    return LlamaTokenizer.from_pretrained(folder)


def _sentencepiece() -> bytes:
    import sentencepiece

    lines = [f"{name} was born in {town} in 18{i:02d}." for i, name in enumerate(NAMES) for town in TOWNS]
    lines += ["### Instruction:", "### Input:", "### Response: yes"]
    proto, ids = io.BytesIO(), {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    kind = {"model_type": "bpe", "vocab_size": 384, "byte_fallback": True, "split_digits": True, "num_threads": 1}
    text = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "character_coverage": 1.0}
    more = {"allow_whitespace_only_pieces": True, "minloglevel": 2}
    train = sentencepiece.SentencePieceTrainer.train
    train(sentence_iterator=iter(lines), model_writer=proto, **ids, **kind, **text, **more)
    return proto.getvalue()
