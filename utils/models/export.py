"""A trained adapter taken elsewhere: merged into an ordinary model folder, and as GGUF for llama.cpp and Ollama."""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import psutil
import torch
from bitsandbytes import functional as bnb
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from utils import hardware
from utils.data import template
from utils.models import adapters, loading
from utils.runtime import OUTPUTS, Stop, whole

SOURCE = "llama-cpp-python==0.3.36 --hash=sha256:832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"


def merge(adapter: str | Path, base: str = "", renamed: bool = False) -> Path:
    """A folder in outputs/merged, base and adapter in one: dequant(NF4(W)) + D, in the files and dtypes of the base.

    One tensor at a time is in memory. Stop: no such adapter, not its base, too little memory or disk.
    """
    folder = adapters.find(adapter)
    base, revision = adapters.base_of(folder, base, renamed)
    tokenizer, source = loading.load_tokenizer(base, revision), Path(base).expanduser()
    if not source.is_dir():
        wanted = {"allow_patterns": ["*.safetensors", "*.json", "*.model"], "revision": revision}
        source = Path(loading.explained(huggingface_hub.snapshot_download, base, **wanted))
    files = {path: safe_open(path, "pt", backend="pread") for path in source.glob("*.safetensors")}  # maps no file
    holder = {name: file for file in files.values() for name in file.offset_keys()}
    config = AutoConfig.from_pretrained(source)
    if not files or hasattr(config, "quantization_config"):
        raise Stop(f"{base} has no safetensors in 16 or 32 bits. Give the base as it was before it was quantized")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config._name_or_path, embedding, head = base, model.get_input_embeddings(), model.get_output_embeddings()
    key = next(name for name, weight in model.named_parameters() if weight is embedding.weight)
    embedding.weight = torch.nn.Parameter(holder[key].get_tensor(key), requires_grad=False)
    adapters.check(model, folder, renamed)
    linear = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    changes = deltas(folder)
    if odd := sorted(changes.keys() - linear | {name for name in linear if f"{name}.weight" not in holder}):
        raise Stop(f"{folder.name} has {odd[0]}, which is not merged here. Use peft's merge_and_unload")
    size, memory = sum(path.stat().st_size for path in files), 20 * max(w.numel() for w in model.parameters()) + 2**28
    with written(target := OUTPUTS / "merged" / f"{Path(base).name}-{folder.name}", size, memory) as new:
        for path in (source / "config.json", *source.glob("*.model"), *source.glob("model.safetensors.index.json")):
            shutil.copyfile(path, new / path.name)
        for path, tensors in files.items():
            with path.open("rb") as old, (new / path.name).open("wb") as file:
                length = old.read(8)
                file.write(length + old.read(int.from_bytes(length, "little")))  # the header stays: so do all shapes
                for name in tensors.offset_keys():
                    weight = tensors.get_tensor(name)
                    if (module := name.removesuffix(".weight")) in linear:
                        change = torch.mm(*changes[module]) if module in changes else 0
                        weight = (nf4(weight).float() + change).to(weight.dtype)
                    file.write(weight.flatten().view(torch.uint8).numpy())
        ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ends).save_pretrained(new)
        tokenizer.save_pretrained(new)
        settings = json.loads((new / "tokenizer_config.json").read_text("utf-8")) | {"chat_template": template.CHAT}
        settings.pop("extra_special_tokens", None)  # a list, on which transformers 4 fails
        if settings["tokenizer_class"] == "TokenizersBackend":  # a name that no other tool knows
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (new / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(card(folder), encoding="utf-8")
    return target


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """A matrix as `loading.load_base` has it on this machine: in four bits, read back."""
    seen = weight.to(hardware.device(), hardware.compute_dtype(hardware.capability()))
    return bnb.dequantize_4bit(*bnb.quantize_4bit(seen, blocksize=64, compress_statistics=True, quant_type="nf4")).cpu()


def deltas(folder: Path) -> dict:
    """Module name -> the two factors of what the adapter adds to its matrix: alpha / r times B, and A, in fp32."""
    config, halves = json.loads((folder / adapters.CONFIG).read_text("utf-8")), adapters.tensors(folder)
    a, b, special = ".lora_A.weight", ".lora_B.weight", ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
    if odd := [name for name in special if config.get(name)] + [name for name in halves if not name.endswith((a, b))]:
        raise Stop(f"{folder.name} has {odd[0]}, which is not merged here. Use peft's merge_and_unload")
    scale, names = config["lora_alpha"] / config["r"], [name.removesuffix(a) for name in halves if name.endswith(a)]
    return {n.removeprefix("base_model.model."): (scale * halves[n + b].float(), halves[n + a].float()) for n in names}


def card(folder: Path) -> str:
    """A model card: base, licence, and what run.json tells about the training; no path of this machine."""
    base = adapters.made_for(folder)["base"]
    run = json.loads((folder / "run.json").read_text("utf-8")) if (folder / "run.json").is_file() else {}
    base = Path(base).name if Path(base).is_absolute() else base
    licence = {"llama-2": "llama2", "pocket-": "apache-2.0"}.get(Path(base).name.lower()[:7], "other")
    top = f"---\nbase_model: {base}\nlicense: {licence}\n---\n# {folder.name}\n\nQLoRA on {base} in NF4, merged."
    return f"{top} The licence is the base's. Made by:\n\n```json\n{json.dumps(run | {'base': base}, indent=2)}\n```\n"


def gguf(model: str | Path, kind: str = "f16", adapter: str | Path = "") -> Path:
    """A GGUF file (`kind`: f32, f16, bf16, q8_0) of a model folder; with `adapter`, of that alone, for this base.

    Stop: no converter and no network, a model that it does not know, too little memory or disk.
    """
    source = adapters.find(adapter) if adapter else Path(model)
    if not adapter and not (source / "tokenizer.model").is_file() and loading.load_tokenizer(str(source)).unk_token:
        raise Stop(f"{source.name} has no tokenizer.model, so llama.cpp would cut text otherwise. Copy it there")
    target = OUTPUTS / "gguf" / f"{Path(model).name}{f'-{source.name}' * bool(adapter)}-{kind}"
    script, more = ("lora", ["--base", str(model)]) if adapter else ("hf", [])
    with written(target, sum(path.stat().st_size for path in source.glob("*.safetensors")), 2**30) as new:
        command = [sys.executable, converter() / f"convert_{script}_to_gguf.py", source, *more, "--outtype", kind]
        done = subprocess.run([*command, "--outfile", new / "model.gguf"], capture_output=True, text=True)
        if done.returncode:
            raise Stop(f"llama.cpp's converter says: {(done.stderr.strip() or 'nothing').splitlines()[-1]}")
    return target / "model.gguf"


def converter() -> Path:
    """llama.cpp's converters, in outputs: Python files of a source package (77 MB, fetched once). Stop: no network."""
    place = OUTPUTS / SOURCE.split()[0].replace("==", "-")
    if not place.is_dir():
        with written(place, 2**27, 2**28) as new, tempfile.TemporaryDirectory() as there:
            Path(there, "wanted.txt").write_text(SOURCE, encoding="utf-8")
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=llama-cpp-python"]
            if subprocess.run([*pip, "-r", "wanted.txt"], cwd=there, capture_output=True).returncode:
                raise Stop("llama.cpp's converter is a download of 77 MB, and pip cannot make it. Go online once")
            with tarfile.open(next(Path(there).glob("*.tar.gz"))) as archive:
                archive.extractall(new, [m for m in archive if m.name.endswith(".py")], filter="data")
    return next(place.glob("*/vendor/llama.cpp"))


@contextmanager
def written(target: Path, disk: int, memory: int):
    """A new folder that takes the place of `target` once all is in it; Stop if disk or memory cannot hold it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    told = f"{target.name} needs {disk / 1e9:.2f} GB of disk and {memory / 1e9:.2f} GB of memory"
    free = shutil.disk_usage(target.parent).free, psutil.virtual_memory().available
    print(told)
    if free[0] < disk or free[1] < memory:
        raise Stop(f"{told}; free are {free[0] / 1e9:.2f} and {free[1] / 1e9:.2f} GB. Make room: nothing was written")
    try:
        with whole(target) as new:
            yield new
    except OSError as error:
        raise Stop(f"{target.name} was not written ({error.strerror or error}); nothing of it is left") from None
