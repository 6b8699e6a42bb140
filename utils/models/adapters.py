"""LoRA adapters: put on a base, saved with what made them, and loaded onto the base that they were made for.

outputs/adapters/<what made it>/    adapter_model.safetensors, adapter_config.json, the tokenizer, run.json, log.csv
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import pandas
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import set_seed

from utils import hardware
from utils.data import template
from utils.models import loading
from utils.presets import Recipe
from utils.runtime import OUTPUTS, ROOT, Stop, is_hub_name, versions, whole

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def add(model, recipe: Recipe):
    """`model` with one LoRA adapter on all linear layers but the output head; adapter weights are fp32.

    Running the cell twice is safe: a model that has its adapter already is given back as it is. Stop if a bare base
    carries adapter layers, left by an adapter made from it before.
    """
    if isinstance(model, PeftModel):
        return model
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise Stop("This base already carries an adapter. Load the base again (load_base), then add the adapter")
    set_seed(recipe.seed)  # lora_A starts from random numbers
    shape = {"r": recipe.rank, "lora_alpha": recipe.lora_alpha, "lora_dropout": 0.0}
    return get_peft_model(model, LoraConfig(**shape, target_modules="all-linear", task_type="CAUSAL_LM"))


def save(model, tokenizer, recipe: Recipe, rows: list[dict], report: dict, log: Sequence[dict] = ()) -> Path:
    """Save the adapter of `model`: safetensors and its config, the tokenizer, run.json, and the log as log.csv.

    run.json holds the base, its revision and its fingerprint, a hash of the training rows, the recipe, the steps
    trained, the versions, and `report`. The folder is named by a hash of what made the adapter, so that equal runs
    share one folder, and a run that was interrupted or continued has another. The weights come first, and whatever
    fails behind them does not take them back: a line says what it was. Of several processes all must call it; the main
    one writes.
    """
    run = made_by(model, recipe, rows, getattr(model, "trained_steps", 0))
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad} if hardware.sharded() else {}
    weights = {name: hardware.gathered(tensor).cpu() for name, tensor in trained.items()}
    folder, base = folder_of(run), loading.bare(model).config
    run |= {"base": base._name_or_path, "base_revision": getattr(base, "_commit_hash", None)}
    model.peft_config["default"].revision = run["base_revision"]
    if not hardware.is_main():
        return folder
    with whole(folder) as new:
        model.save_pretrained(new, state_dict=weights or None)
        (new / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        try:
            tokenizer.save_pretrained(new)
            told = json.dumps(run | report, indent=2, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
            (new / "run.json").write_text(told + "\n", encoding="utf-8")
            if log:
                pandas.DataFrame(log).set_index("step").to_csv(new / "log.csv")
        except Exception as error:  # of any kind: it may not cost the training
            print(f"note: the adapter is saved, but not all that belongs beside it ({type(error).__name__}: {error})")
    return folder


def made_by(model, recipe: Recipe, rows: list[dict], steps: int) -> dict:
    """What decides the weights of an adapter: base, rows, recipe, steps trained, versions."""
    return {
        "base_fingerprint": loading.fingerprint(loading.bare(model)),
        "rows": hashlib.sha256(json.dumps([template.exchanges(row) for row in rows]).encode()).hexdigest()[:12],
        "recipe": asdict(recipe) | ({"processes": n} if (n := hardware.processes()) > 1 else {}),
        "steps": steps,
        "versions": versions(),
    }


def folder_of(made_by: dict, kind: str = "adapters") -> Path:
    """Where the adapter (or the "checkpoints") of a run belong."""
    return OUTPUTS / kind / hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]


def load(adapter: str | Path, base: str = "", four_bit: bool = True, renamed: bool = False):
    """Base with adapter, for use and not for training, and the tokenizer.

    `adapter` is a folder that `save` or peft wrote, or a Hub name; `base` says where the base is, if not where the
    adapter says; `renamed` says that it is the right one under another name. Stop if there is no such adapter, none
    that is whole, no such base, or one that the adapter was not made for.
    """
    folder = find(adapter)
    base, revision = base_of(folder, base, renamed)
    saved = tensors(folder).keys()
    model = loading.load_base(base, four_bit, revision)
    check(model, folder, renamed)
    try:
        model = PeftModel.from_pretrained(model, folder).eval()
        loaded = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
        odd = sorted((loaded - saved) | (saved - loaded - dict(model.named_parameters()).keys()))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        odd = [" ".join(str(error).split())[:200]]
    if odd:
        raise Stop(f"{folder.name} holds other weights than its {CONFIG} says: {odd[0]}. Save the adapter again")
    return model, loading.load_tokenizer(base, revision)


def find(adapter: str | Path) -> Path:
    """The folder of an adapter: one that is here, or a copy of the Hub's (safetensors and JSON, never a pickle).

    Stop if it is neither here nor there, or no adapter.
    """
    name, folder = str(adapter), Path(adapter).expanduser()
    if not folder.is_dir() and (ROOT / folder).is_dir():  # typed from the course's folder, read in notebooks/
        folder = ROOT / folder
    if not folder.is_dir():
        if not ("/" in name and is_hub_name(name)):
            raise Stop(f"There is no folder {name}. Give the folder of an adapter, or a Hub name such as owner/adapter")
        wanted = ["*.json", "*.safetensors"]
        folder = Path(loading.explained(huggingface_hub.snapshot_download, name, allow_patterns=wanted))
    if not (folder / CONFIG).is_file():
        is_model = (folder / "config.json").is_file()
        mend = "It is a whole model: loading.load_base reads it" if is_model else "Give the folder that holds it"
        raise Stop(f"{name} has no {CONFIG}, so it is no adapter. {mend}")
    if not (folder / WEIGHTS).is_file():
        raise Stop(f"{name} has no {WEIGHTS}. Save the adapter again with save_pretrained (a .bin may hold code)")
    return folder


def made_for(folder: Path) -> dict[str, str]:
    """What an adapter says about its base: base, revision, fingerprint; "" for what it does not say."""
    config = _json(folder / CONFIG)
    run = _json(folder / "run.json") if (folder / "run.json").is_file() else {}
    return {
        "base": run.get("base") or config.get("base_model_name_or_path") or "",
        "revision": run.get("base_revision") or config.get("revision") or "",
        "fingerprint": run.get("base_fingerprint") or "",
    }


def base_of(folder: Path, base: str = "", renamed: bool = False) -> tuple[str, str]:
    """Where the base of an adapter is, and at which revision. Stop if nobody says, or if `base` is another by name."""
    made = made_for(folder)
    base = base or here(made["base"])
    if not base:
        raise Stop(f"{folder.name} does not say which base it was made for. Give base=")
    _check_name(base, made, renamed)
    return base, (made["revision"] if base == made["base"] else "") or "main"


def check(model, folder: Path, renamed: bool = False) -> None:
    """Refuse a base (bare, or with its adapter already) that the adapter in `folder` was not made for.

    peft looks at none of this but the sizes of matrices. The last part of a base's name must agree (so a mirror or a
    moved folder passes), its layers, its revision where both are known, and its fingerprint. A fingerprint sees the
    embedding alone: a base into which something was merged has the same, and only its name can tell. Stop says the
    difference and the mend.
    """
    base, made = loading.bare(model), made_for(folder)
    name = base.config._name_or_path
    _check_name(name, made, renamed)
    if difference := _shape_difference(base, folder):
        raise Stop(f"This base has another shape than the adapter's: {difference}. {_load(made)}")
    ours, theirs = getattr(base.config, "_commit_hash", None), made["revision"]
    if made["base"] == name and re.fullmatch("[0-9a-f]{40}", theirs) and ours not in (None, theirs):
        told = f"The adapter was made for revision {theirs[:8]} of {Path(name).name}; this is {ours[:8]}"
        raise Stop(f"{told}. {_load(made)}")
    found = loading.fingerprint(base)
    if made["fingerprint"] not in ("", found):
        told = f"The adapter was made for a base with fingerprint {made['fingerprint']}; this one has {found}"
        raise Stop(f"{told}: same name, other weights. {_load(made)}")


def _check_name(name: str, made: dict[str, str], renamed: bool) -> None:
    ours, theirs = Path(name).name, Path(made["base"]).name
    if theirs and ours != theirs and not renamed:
        mend = "If this is the same model under another name, say renamed=True"
        raise Stop(f"The adapter was made for {theirs}; this base is {ours}. {_load(made)}. {mend}")


def _load(made: dict[str, str]) -> str:
    at = f" at revision {made['revision'][:8]}" if made["revision"] else ""
    return f"Load {Path(made['base']).name or 'its base'}{at}, or train an adapter for this base"


def _shape_difference(base, folder: Path) -> str:
    """Where adapter and base do not fit, or ""."""
    shapes = {name: tensor.shape for name, tensor in tensors(folder).items()}
    layers = {int(n) for name in shapes for n in re.findall(r"\.layers\.(\d+)\.", name)}
    depth = getattr(base.config, "num_hidden_layers", 0)
    if layers and max(layers) + 1 != depth and not _json(folder / CONFIG).get("layers_to_transform"):
        return f"{depth} layers, the adapter has {max(layers) + 1}"
    modules = dict(base.named_modules())
    for name, shape in shapes.items():
        if not (found := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)):
            continue
        module, side = modules.get(found[1]), "in_features" if found[2] == "A" else "out_features"
        if module is None:
            return f"it has no {found[1]}"
        here, there = getattr(module, side, None), shape[1 if found[2] == "A" else 0]
        if here not in (None, there):
            return f"{side} of {found[1]} is {here}, the adapter's {there}"
    return ""


def tensors(folder: Path) -> dict:
    """Name -> tensor of an adapter; Stop if its file is broken, or nothing in it could change a base."""
    try:
        found = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise Stop(f"{WEIGHTS} of {folder.name} was not saved whole ({error}). Copy the adapter again") from None
    if bad := next((name for name, tensor in found.items() if not tensor.isfinite().all()), ""):
        raise Stop(f"{bad} of {folder.name} is not finite. Train again, with a lower learning_rate")
    if not any(tensor.any() for name, tensor in found.items() if "lora_A" not in name):
        raise Stop(f"Every lora_B of {folder.name} is zero or missing: it changes nothing. Save a trained adapter")
    return found


def here(base: str) -> str:
    """A base's recorded name; for a folder of another machine, the one of that name that ships with the course."""
    ships = ROOT / "data" / Path(base).name
    return str(ships) if base.startswith("/") and not Path(base).is_dir() and ships.is_dir() else base


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Stop(f"{path.name} in {path.parent.name} is not JSON ({error}). Copy the adapter again") from None
    return found if isinstance(found, dict) else {}


def to_send(folder: Path) -> Path:
    """A copy of an adapter's folder for other people, in outputs/to_send: weights, JSON and tokenizer, no log, no card.

    A base that is a folder here is called by its last name. Stop: a token or a path of this machine is left in a file.
    """
    base = made_for(folder)["base"]
    name = Path(base).name if Path(base).is_absolute() else base
    with whole(target := OUTPUTS / "to_send" / folder.name) as new:
        shutil.copytree(folder, new, ignore=shutil.ignore_patterns("*.csv", "*.md"), dirs_exist_ok=True)
        for path in new.glob("*.json"):
            text = path.read_text("utf-8").replace(json.dumps(base), json.dumps(name))
            if re.search(r"hf_[A-Za-z0-9]{20,}", text) or str(ROOT) in text or f"{Path.home()}/" in text:
                raise Stop(f"{path.name} holds a token or a path of this machine. Take it out, then send it")
            path.write_text(text, encoding="utf-8")
    return target
